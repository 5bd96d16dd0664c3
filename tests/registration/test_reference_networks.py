"""TransMorph and CorrMLP against plain counterparts with the same weights."""

import pytest
import torch

from m2m_bids.registration.networks.corrmlp import CorrMLP, CorrMLPConfig
from m2m_bids.registration.networks.transmorph import TransMorph, TransMorphConfig

NETWORKS = {
    "transmorph": lambda: TransMorph(
        TransMorphConfig(
            embed_width=8,
            depths=(2, 2, 1),
            n_heads=(2, 2, 4),
            window_size=(2, 3, 4),
            head_width=4,
            drop_path=0,
        )
    ),
    "corrmlp": lambda: CorrMLP(
        CorrMLPConfig(encoder_width=2, decoder_width=4, n_levels=3, windows=(2, 3))
    ),
}


def made(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = NETWORKS[name]().double()
        for parameter in network.parameters():  # norms and heads that do nothing hide mistakes
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    return network


@pytest.mark.parametrize("name", list(NETWORKS))
@pytest.mark.parametrize("size", [16, 21])
def test_same_displacements_and_gradients(reference, name, size):
    network = made(name)
    images = torch.rand(
        2, 2, 1, *[size] * 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    results = []
    for predict in (network, reference.plain_network(network)):
        network.zero_grad()
        disp = predict(*images)
        disp.square().sum().backward()
        gradients = {name: p.grad.clone() for name, p in network.named_parameters()}
        results.append((disp.detach(), gradients))
    (disp, gradients), (plain_disp, plain_gradients) = results
    # The network's displacements leave it in float32.
    scale = plain_disp.abs().max()
    torch.testing.assert_close(disp.double() / scale, plain_disp / scale, rtol=1e-4, atol=1e-4)
    for key, gradient in gradients.items():
        torch.testing.assert_close(
            gradient / plain_gradients[key].abs().max().clamp_min(1e-12),
            plain_gradients[key] / plain_gradients[key].abs().max().clamp_min(1e-12),
            rtol=1e-3,
            atol=1e-3,
            msg=lambda text, key=key: f"{key}: {text}",
        )
