"""The edges of a cycle: calls of one network for several image pairs, at the same time on the CPU.

A network's layers leave threads idle: small ones are not worth sharing, and some of PyTorch's
run on one thread. Whole calls do not.
"""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from m2m_bids.registration.maps import map_from_displacement

Network = Callable[[Tensor, Tensor], Tensor]
Edge = tuple[Tensor, Tensor]


def has_batch_statistics(network: nn.Module) -> bool:
    """
    Tell whether a network normalises by batch, as it is now.

    Parameters
    ----------
    network : Module
        In training or in evaluation mode, where batch normalisations use what they have learnt.

    Returns
    -------
    bool
    """
    return any(_is_tracking(module) for module in network.modules())


def _is_tracking(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training


def predict_edges(network: Network, edges: list[Edge]) -> list[Tensor]:
    """
    Predict the maps of several image pairs.

    In one call of the network where that is the same. Where a network normalises by batch, what it
    gives for one pair depends on the others of its batch, and each edge has a call of its own; on
    the CPU these calls run at the same time, the threads divided among them. The result for a
    number of threads is always the same, to the bit.

    Parameters
    ----------
    network : callable
        Takes moving and fixed images to displacements; one that is no module has a call for each
        edge.
    edges : list of tuple of Tensor, shape (N, 1, n, n, n)
        Moving and fixed images.

    Returns
    -------
    list of Tensor, shape (N, 3, n, n, n)
        Maps from each fixed grid to unit coordinates of its moving images.
    """
    if not isinstance(network, nn.Module):
        disps = [network(*edge) for edge in edges]
    elif not has_batch_statistics(network):
        moving, fixed = (torch.cat(images) for images in zip(*edges, strict=True))
        disps = network(moving, fixed).split(len(edges[0][0]))
    elif _can_be_concurrent(edges):
        disps = _ConcurrentCalls.apply(network, edges, *network.parameters())
    else:
        disps = [network(*edge) for edge in edges]
    return [map_from_displacement(disp) for disp in disps]


def _can_be_concurrent(edges: list[Edge]) -> bool:
    images = [image for edge in edges for image in edge]
    return (
        torch.is_grad_enabled()
        and len(edges) > 1
        and torch.get_num_threads() > 1
        and all(image.device.type == "cpu" and not image.requires_grad for image in images)
    )


class _Call(NamedTuple):
    """A call of a network for one edge, with the parameters that collect its gradient."""

    network: nn.Module
    parameters: list[Tensor]
    edge: Edge


class _ConcurrentCalls(torch.autograd.Function):
    """Displacements of edges, by calls of a network in training that run at the same time."""

    @staticmethod
    def forward(ctx, network, edges, *parameters):
        n_workers = min(len(edges), torch.get_num_threads())
        ctx.set_materialize_grads(False)
        ctx.leaves = [
            [own.detach().requires_grad_(own.requires_grad) for own in parameters]
            for _ in range(n_workers)
        ]
        replicas = [
            _replicate(network, ctx.leaves[index % n_workers]) for index in range(len(edges))
        ]
        tasks = [lambda r=r, e=e: r(*e) for r, e in zip(replicas, edges, strict=True)]
        ctx.disps = _run(tasks, n_workers)
        _follow(network, replicas)
        return tuple(disp.detach() for disp in ctx.disps)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        tasks = [
            (lambda d=disp, g=grad: d.backward(g)) if grad is not None else (lambda: None)
            for disp, grad in zip(ctx.disps, grads, strict=True)
        ]
        leaves, ctx.disps = ctx.leaves, None
        _run(tasks, len(leaves))
        return None, None, *(_sum_gradients(some) for some in zip(*leaves, strict=True))


def _replicate(network: nn.Module, leaves: list[Tensor]) -> nn.Module:
    """Copy a network around other parameters, with buffers of its own."""
    memo = {id(own): leaf for own, leaf in zip(network.parameters(), leaves, strict=True)}
    return copy.deepcopy(network, memo)


def _sum_gradients(leaves: tuple[Tensor, ...]) -> Tensor | None:
    """Take the gradients of one parameter from the leaves that collected them."""
    total = None
    for leaf in leaves:
        grad, leaf.grad = leaf.grad, None
        if total is None or grad is None:
            total = grad if total is None else total
        else:
            total += grad
    return total


def _run(tasks: list[Callable[[], object]], n_workers: int) -> list:
    """
    Run tasks in their order, ``n_workers`` at a time; the last ones share the threads.

    Task ``i`` never runs at the same time as task ``i + n_workers``.
    """
    n_threads = torch.get_num_threads()
    n_last = len(tasks) % n_workers
    results: list = [None] * len(tasks)

    def work(worker: int) -> None:
        torch.set_num_threads(n_threads // n_workers)
        for index in range(worker, len(tasks) - n_last, n_workers):
            results[index] = tasks[index]()

    def work_last(worker: int) -> None:
        torch.set_num_threads(n_threads // n_last)
        results[len(tasks) - n_last + worker] = tasks[len(tasks) - n_last + worker]()

    try:
        for some, n_some in ((work, n_workers), (work_last, n_last)):
            if n_some:
                with ThreadPoolExecutor(n_some) as pool:
                    list(pool.map(some, range(n_some)))
    finally:
        # New threads start with the number that was set last.
        torch.set_num_threads(n_threads)
    return results


def _follow(network: nn.Module, replicas: list[nn.Module]) -> None:
    """Let running statistics follow the batches of replicas, one after the other."""
    for name, module in network.named_modules():
        if not _is_tracking(module) or not module.track_running_stats:
            continue
        others = [replica.get_submodule(name) for replica in replicas]
        for statistic in ("running_mean", "running_var"):
            value = getattr(module, statistic)
            start = value.clone()
            for other in others:
                _blend(value, start, getattr(other, statistic), module.momentum)
        module.num_batches_tracked += len(others)


def _blend(value: Tensor, start: Tensor, end: Tensor, momentum: float) -> None:
    """Move a value towards a batch that took another one from ``start`` to ``end``."""
    value.mul_(1 - momentum).add_(end - (1 - momentum) * start)
