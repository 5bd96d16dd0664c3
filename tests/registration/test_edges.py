"""Calls of a network for several edges at the same time, against one after the other."""

import copy

import pytest
import torch

from m2m_bids.registration.edges import predict_edges
from m2m_bids.registration.maps import map_from_displacement
from m2m_bids.registration.networks.gradicon import GradICON, GradICONConfig


@pytest.fixture
def n_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def make_network():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = GradICON(GradICONConfig(down_widths=(8, 16), up_widths=(8, 16))).double()
        for unet in network.unets:
            torch.nn.init.normal_(unet.last_conv.weight, std=0.02)
    return network.train()


def make_edges(n):
    images = torch.rand(
        n, 2, 1, 1, 18, 18, 18, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    return [(moving, fixed) for moving, fixed in images]


@pytest.mark.parametrize("n_edges", [2, 3, 5])
@pytest.mark.parametrize("threads", [2, 4])
def test_concurrent_calls_give_maps_gradients_and_statistics_of_single_ones(
    n_threads, threads, n_edges
):
    network, edges = make_network(), make_edges(n_edges)
    other = copy.deepcopy(network)
    n_threads(1)
    expected = [map_from_displacement(other(*edge)) for edge in edges]
    sum((i + 1) * phi.square().sum() for i, phi in enumerate(expected)).backward()
    n_threads(threads)
    maps = predict_edges(network, edges)
    sum((i + 1) * phi.square().sum() for i, phi in enumerate(maps)).backward()
    assert torch.get_num_threads() == threads
    torch.testing.assert_close(maps, expected)
    for ours, theirs in zip(network.parameters(), other.parameters(), strict=True):
        # Displacements are float32, and sums of slabs depend on the number of threads.
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(network.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_an_edge_that_the_loss_leaves_out_has_no_gradient(n_threads):
    network, edges = make_network(), make_edges(3)
    n_threads(2)
    predict_edges(network, edges)[1].sum().backward()
    other = make_network()
    map_from_displacement(other(*edges[1])).sum().backward()
    for ours, theirs in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)


def test_concurrent_calls_repeat_to_the_bit(n_threads):
    n_threads(2)
    results = []
    for _ in range(2):
        network = make_network()
        torch.stack([phi.sum() for phi in predict_edges(network, make_edges(5))]).sum().backward()
        results.append([p.grad for p in network.parameters()] + list(network.buffers()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_an_error_in_one_call_is_raised(n_threads):
    n_threads(2)
    small = torch.rand(1, 1, 4, 4, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="images must be larger"):
        predict_edges(make_network(), [*make_edges(2), (small, small)])
    assert torch.get_num_threads() == 2
