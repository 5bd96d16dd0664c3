"""Networks that take an image pair to a displacement, behind one registry.

A network is a module whose ``forward(moving, fixed)`` takes two (N, 1, n, n, n) images in [0, 1]
to a (N, 3, n, n, n) displacement on the fixed grid, in unit coordinates. `NETWORKS` maps the name
on a weights card to the `NetworkFamily` that builds the network from the card's ``config``; it
holds the ``FAMILY`` of every module of this package, so that a new network is one new file.
"""

import pkgutil
from importlib import import_module

from m2m_bids.registration.networks.family import NetworkFamily


def collect_families() -> dict[str, NetworkFamily]:
    """
    Import the modules of this package and gather their families.

    Returns
    -------
    dict
        Families by name, in the order of the modules' names.

    Raises
    ------
    RuntimeError
        If two modules give the same name.
    """
    families: dict[str, NetworkFamily] = {}
    for found in pkgutil.iter_modules(__path__):
        family = getattr(import_module(f"{__name__}.{found.name}"), "FAMILY", None)
        if family is None:
            continue
        if family.name in families:
            raise RuntimeError(f"two modules define the network {family.name!r}")
        families[family.name] = family
    return families


NETWORKS: dict[str, NetworkFamily] = collect_families()
