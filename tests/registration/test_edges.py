"""Calls of a network for several edges at the same time, against one after the other."""

import copy

import pytest
import torch

from m2m_bids.registration.edges import InPrecision, _OrderedSums, predict_edges
from m2m_bids.registration.grids import identity_map
from m2m_bids.registration.maps import map_from_displacement
from m2m_bids.registration.networks.corrmlp import CorrMLP, CorrMLPConfig
from m2m_bids.registration.networks.gradicon import GradICON, GradICONConfig
from m2m_bids.registration.networks.transmorph import TransMorph, TransMorphConfig


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


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_gradients_are_added_in_the_order_of_edges_whenever_they_come(order):
    grads = torch.randn(4, 2, 500, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(sum(grads), sum(grads.flip(0)))
    sums = _OrderedSums([torch.float32] * 3)
    for edge in order:
        for parameter in range(2):
            if (edge, parameter) != (1, 1):  # one edge has no gradient of one parameter
                leaf = torch.zeros(500)
                leaf.grad = grads[edge, parameter].clone()
                sums.add(parameter, edge, leaf)
                assert leaf.grad is None
    first, second, none = sums.take()
    assert torch.equal(first, grads[0, 0] + grads[1, 0] + grads[2, 0] + grads[3, 0])
    assert torch.equal(second, grads[0, 1] + grads[2, 1] + grads[3, 1])
    assert none is None


def test_gradients_of_another_type_are_added_in_that_of_the_parameter():
    grads = torch.randn(3, 500, generator=torch.Generator().manual_seed(0)).bfloat16()
    sums = _OrderedSums([torch.float32])
    for edge, grad in enumerate(grads):
        leaf = torch.zeros(500, dtype=torch.bfloat16)
        leaf.grad = grad
        sums.add(0, edge, leaf)
    first, second, third = grads.float()
    assert torch.equal(sums.take()[0], first + second + third)


WITHOUT_BATCH_STATISTICS = {
    "corrmlp": lambda: CorrMLP(CorrMLPConfig(2, 4, n_levels=2, windows=(2, 3))),
    "gradicon": lambda: GradICON(
        GradICONConfig(down_widths=(8, 16), up_widths=(8, 16), normalization="group")
    ),
    "transmorph": lambda: TransMorph(
        TransMorphConfig(8, (1, 1), (2, 2), (2, 2, 2), head_width=4, drop_path=0)
    ),
}


@pytest.mark.parametrize("name", ["gradicon, batch", *WITHOUT_BATCH_STATISTICS])
def test_edges_in_bfloat16_give_what_single_calls_give(n_threads, name):
    with torch.random.fork_rng():
        torch.manual_seed(2)
        make = WITHOUT_BATCH_STATISTICS.get(name, lambda: make_network().float())
        network = InPrecision(make().train(), use_bfloat16=True)
        for parameter in network.parameters():
            parameter.data.add_(0.05 * torch.randn(parameter.shape))
    edges = [(moving.float(), fixed.float()) for moving, fixed in make_edges(3)]
    results = []
    for threads in (1, 2):  # one after the other, and at the same time
        n_threads(threads)
        network.zero_grad()
        maps = predict_edges(network, edges)
        sum((i + 1) * phi.square().sum() for i, phi in enumerate(maps)).backward()
        disps = torch.cat(maps).detach() - identity_map(18)
        results.append((disps, [p.grad for p in network.parameters()]))
    (alone, alone_grads), (together, together_grads) = results
    # bfloat16 keeps eight bits; batch normalisation leaves the biases before it without gradient.
    assert (together - alone).norm() < 0.01 * alone.norm()
    least = 1e-3 * max(grad.norm() for grad in alone_grads)
    for ours, theirs in zip(together_grads, alone_grads, strict=True):
        assert ours.dtype == theirs.dtype == torch.float32
        assert (ours - theirs).norm() <= 0.2 * theirs.norm() + least


def test_weights_in_bfloat16_are_made_once_for_all_edges(n_threads):
    class Recording(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = torch.nn.Conv3d(2, 3, 3, padding=1)
            self.norm = torch.nn.GroupNorm(1, 3)

        def forward(self, moving, fixed):
            weight = self.convolution.weight
            seen.append((weight.dtype, weight.data_ptr(), self.norm.weight.dtype))
            return self.norm(self.convolution(torch.cat((moving, fixed), 1)).float())

    n_threads(2)
    seen = []
    network = InPrecision(Recording(), use_bfloat16=True)
    edges = [(moving.float(), fixed.float()) for moving, fixed in make_edges(3)]
    sum(phi.sum() for phi in predict_edges(network, edges)).backward()
    assert len(seen) == 3
    assert len(set(seen)) == 1
    assert seen[0][0] == torch.bfloat16
    assert seen[0][2] == torch.float32
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in network.parameters())


def test_an_error_in_one_call_is_raised(n_threads):
    n_threads(2)
    small = torch.rand(1, 1, 4, 4, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="images must be larger"):
        predict_edges(make_network(), [*make_edges(2), (small, small)])
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("name", list(WITHOUT_BATCH_STATISTICS))
def test_concurrent_calls_give_what_one_batch_gives(n_threads, name):
    with torch.random.fork_rng():
        torch.manual_seed(2)
        network = WITHOUT_BATCH_STATISTICS[name]().double().train()
        for parameter in network.parameters():
            parameter.data.add_(0.05 * torch.randn(parameter.shape))
    results = []
    for threads in (1, 2):
        n_threads(threads)
        network.zero_grad()
        maps = predict_edges(network, make_edges(3))
        sum((i + 1) * phi.square().sum() for i, phi in enumerate(maps)).backward()
        results.append([phi.detach() for phi in maps] + [p.grad for p in network.parameters()])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


def test_what_concurrent_calls_draw_depends_on_the_seed_alone(n_threads):
    n_threads(2)
    config = TransMorphConfig(8, (2, 2), (2, 2), (2, 2, 2), head_width=4, drop_path=0.5)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = TransMorph(config).train()
    edges = [(moving.float(), fixed.float()) for moving, fixed in make_edges(5)]
    results = []
    for seed in (0, 0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            results.append(torch.cat(predict_edges(network, edges)))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert all(block.generator is None for stage in network.encoder.stages for block in stage)
