"""Networks that take an image pair to a displacement, behind one registry.

A network is a module whose ``forward(moving, fixed)`` takes two (N, 1, n, n, n) images in [0, 1]
to a (N, 3, n, n, n) displacement on the fixed grid, in unit coordinates. `NETWORKS` maps the name
on a weights card to a function that builds the network from the card's ``config``.
"""

from collections.abc import Callable

from torch import nn

from m2m_bids.registration.networks.gradicon import GradICON, GradICONConfig

NETWORKS: dict[str, Callable[[dict], nn.Module]] = {
    "gradicon": lambda config: GradICON(GradICONConfig(**config)),
}
