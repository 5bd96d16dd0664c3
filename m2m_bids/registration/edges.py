"""The edges of a cycle: calls of one network for several image pairs, at the same time on the CPU.

A network's layers leave threads idle: small ones are not worth sharing, and some of PyTorch's
run on one thread. Whole calls do not.
"""

import copy
import ctypes
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

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

    While a network is trained on the CPU, each edge has a call of its own, and they run at the
    same time, the threads divided among them. Otherwise they are one call; but where the network
    normalises by batch, what it gives for one pair depends on the others of its batch, and each
    edge has a call of its own there too. The result for a number of threads is always the same,
    to the bit.

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
    if isinstance(network, nn.Module) and _can_be_concurrent(edges):
        return list(_ConcurrentCalls.apply(network, edges, *network.parameters()))
    if not isinstance(network, nn.Module) or has_batch_statistics(network):
        return [_predict(network, *edge) for edge in edges]
    moving, fixed = (torch.cat(images) for images in zip(*edges, strict=True))
    return list(_predict(network, moving, fixed).split(len(edges[0][0])))


def _predict(network: Network, moving: Tensor, fixed: Tensor) -> Tensor:
    return map_from_displacement(network(moving, fixed))


def _can_be_concurrent(edges: list[Edge]) -> bool:
    images = [image for edge in edges for image in edge]
    return (
        torch.is_grad_enabled()
        and len(edges) > 1
        and torch.get_num_threads() > 1
        and all(image.device.type == "cpu" and not image.requires_grad for image in images)
    )


class InPrecision(nn.Module):
    """
    A network that computes in bfloat16 or in its own type; either way float32 comes out.

    Parameters
    ----------
    network : Module
        Takes moving and fixed images to displacements.
    use_bfloat16 : bool
    """

    def __init__(self, network: nn.Module, *, use_bfloat16: bool):
        super().__init__()
        self.network = network
        self.use_bfloat16 = use_bfloat16

    def forward(self, moving: Tensor, fixed: Tensor) -> Tensor:
        """Predict displacements, as the network does."""
        with torch.autocast(moving.device.type, torch.bfloat16, enabled=self.use_bfloat16):
            return self.network(moving, fixed).float()

    def numbers(self) -> list[Tensor]:
        """
        Return the numbers of all parameters as the layers take them, without a gradient.

        Returns
        -------
        list of Tensor
            Those of convolutions and products are in bfloat16 where the network computes in it:
            each call would convert and keep them. The others share memory with the parameters.
        """
        in_bfloat16 = set()
        if self.use_bfloat16:
            for module in self.modules():
                if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d, nn.Linear)):
                    in_bfloat16.update(module.parameters(recurse=False))
        return [
            p.detach().bfloat16() if p in in_bfloat16 else p.detach() for p in self.parameters()
        ]


class _ConcurrentCalls(torch.autograd.Function):
    """Maps of edges, by calls of a network in training that run at the same time."""

    @staticmethod
    def forward(ctx, network, edges, *parameters):
        ctx.n_workers = min(len(edges), torch.get_num_threads())
        ctx.sums = _OrderedSums([parameter.dtype for parameter in parameters])
        is_converted = isinstance(network, InPrecision)
        numbers = network.numbers() if is_converted else [p.detach() for p in parameters]
        replicas = [_replicate(network, numbers, ctx.sums, index) for index in range(len(edges))]
        calls = [
            partial(_predict, replica, *edge)
            for replica, edge in zip(replicas, edges, strict=True)
        ]
        ctx.maps = _run(calls, ctx.n_workers)
        _follow(network, replicas)
        return tuple(phi.detach() for phi in ctx.maps)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        calls = [partial(phi.backward, grad) for phi, grad in zip(ctx.maps, grads, strict=True)]
        ctx.maps = None
        first, others = calls[: ctx.n_workers], calls[ctx.n_workers :]
        _run(first, ctx.n_workers)
        if others:
            _return_free_memory()
            _run(others, ctx.n_workers)
        return None, None, *ctx.sums.take()


def _return_free_memory() -> None:
    """
    Return to the system what lies free between arrays.

    By then gradients of weights lie in what the objective and the first edges have freed, and the
    large arrays of the other edges would go beyond it.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim:
            trim(0)


def _replicate(
    network: nn.Module, numbers: list[Tensor], sums: "_OrderedSums", index: int
) -> nn.Module:
    """
    Copy a network around the given numbers, with buffers and random numbers of its own.

    Its parameters' gradients go to the sums as those of the edge with this index.
    """
    memo = {}
    for place, (own, number) in enumerate(zip(network.parameters(), numbers, strict=True)):
        leaf = number.detach().requires_grad_(own.requires_grad)
        if leaf.requires_grad:
            leaf.register_post_accumulate_grad_hook(partial(sums.add, place, index))
        memo[id(own)] = leaf
    replica = copy.deepcopy(network, memo)
    for module in replica.modules():
        if hasattr(module, "generator"):
            # What is drawn at the same time from one generator comes in any order.
            seed = int(torch.randint(2**31, ()))
            module.generator = torch.Generator().manual_seed(seed)
    return replica


class _OrderedSums:
    """
    Gradients of parameters, added up edge after edge in whatever order they come.

    Parameters
    ----------
    dtypes : list of dtype
        Of the sums, one for each parameter.
    """

    def __init__(self, dtypes: list[torch.dtype]):
        self._dtypes = dtypes
        self._totals: list[Tensor | None] = [None] * len(dtypes)
        self._n_added = [0] * len(dtypes)
        self._early: list[dict[int, Tensor]] = [{} for _ in dtypes]
        self._lock = threading.Lock()

    def add(self, parameter: int, edge: int, leaf: Tensor) -> None:
        """Take an edge's gradient from a leaf; it waits for those of the edges before."""
        grad, leaf.grad = leaf.grad, None
        with self._lock:
            early = self._early[parameter]
            early[edge] = grad
            while (next_edge := self._n_added[parameter]) in early:
                self._add_next(parameter, early.pop(next_edge))
                self._n_added[parameter] += 1

    def take(self) -> list[Tensor | None]:
        """Return the sums, with what waits for edges that have no gradient."""
        for parameter, early in enumerate(self._early):
            for edge in sorted(early):
                self._add_next(parameter, early.pop(edge))
        totals, self._totals = self._totals, []
        return totals

    def _add_next(self, parameter: int, grad: Tensor) -> None:
        if self._totals[parameter] is None:
            self._totals[parameter] = grad.to(self._dtypes[parameter])
        else:
            self._totals[parameter] += grad


def _run(calls: list[Callable[[], object]], n_workers: int) -> list:
    """
    Do calls, ``n_workers`` at a time; the last ones, where they are fewer, share the threads.

    Call ``i`` is never done at the same time as call ``i + n_workers``.
    """
    n_threads = torch.get_num_threads()
    n_rest = len(calls) % n_workers
    n_even = len(calls) - n_rest
    try:
        results = _run_evenly(calls[:n_even], n_workers, n_threads)
        return results + _run_evenly(calls[n_even:], n_rest, n_threads) if n_rest else results
    finally:
        # New threads start with the number that was set last.
        torch.set_num_threads(n_threads)


def _run_evenly(calls: list[Callable[[], object]], n_workers: int, n_threads: int) -> list:
    """Do as many calls on each worker, one after the other."""

    def work(worker: int) -> list:
        torch.set_num_threads(n_threads // n_workers)
        return [call() for call in calls[worker::n_workers]]

    with ThreadPoolExecutor(n_workers) as pool:
        by_worker = list(pool.map(work, range(n_workers)))
    return [by_worker[index % n_workers][index // n_workers] for index in range(len(calls))]


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
