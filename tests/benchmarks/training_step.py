"""Time a training step against the paper's equations computed plainly, and against its floor.

    python tests/benchmarks/training_step.py [--network gradicon] [--size 96] [--compact]

The reference (`tests/registration/reference.py`) calls the network once per edge, LNCC with
depthwise convolutions and the regularisers with four compositions; for GradICON the network is the
ICON project's module with the same weights (this package's own for the compact size, which it
cannot build), for the others it is written plainly too. Both run in processes of their own, one
step of each in turn, the reference in PyTorch's default environment and the other in that of
`m2m-bids`. The table is Markdown.
"""

import argparse
import importlib.util
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

REFERENCE = Path(__file__).parents[1] / "registration" / "reference.py"
# What `m2m_bids.cli.environment` sets for the processes that compute.
ENVIRONMENT = {"THP_MEM_ALLOC_ENABLE": "1", "OMP_WAIT_POLICY": "PASSIVE"}


class Worker:
    """A process that computes one kind of step when asked."""

    def __init__(self, kind: str, arguments: list[str]):
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", kind, *arguments],
            env=os.environ | (ENVIRONMENT if kind == "fast" else {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.info = self._read()

    def ask(self, what: str) -> dict:
        """Send a request, wait for its numbers."""
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """Let the process end."""
        self.process.stdin.close()
        self.process.wait()

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the worker stopped, see its message above")
        return json.loads(line)


def work(args: argparse.Namespace) -> None:
    """Answer requests: ``step``, ``parts`` and ``floor``."""
    import torch

    from m2m_bids.cli.environment import use_one_heap
    from m2m_bids.registration.edges import InPrecision, predict_edges
    from m2m_bids.registration.grids import identity_map
    from m2m_bids.registration.m2m import CyclePairs, objective_losses
    from m2m_bids.registration.networks import NETWORKS
    from m2m_bids.registration.presets import preset

    spec = importlib.util.spec_from_file_location("reference", REFERENCE)
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    if args.worker == "fast":
        use_one_heap()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    family = NETWORKS[args.network]
    network = family.network(family.compact if args.compact else family.paper())
    config = preset(args.network, "m2m+gcc").objective
    if args.network == "gradicon":
        for unet in network.unets:
            torch.nn.init.normal_(unet.last_conv.weight, std=0.01)
    network.train()
    images = torch.rand(4, 1, 1, *[args.size] * 3)
    pairs = CyclePairs(*images, is_aligned=args.aligned)
    predict = module = network
    if args.worker == "reference" and args.network != "gradicon":
        predict = reference.plain_network(network)
    elif args.worker == "reference" and not args.compact:
        predict, module, _ = reference.icon_gradicon(network, args.size)

    def predict_in_precision(moving, fixed):
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bfloat16):
            return predict(moving, fixed).float()

    # A module is known to the package, which decides how it is called.
    fast_network = InPrecision(network, use_bfloat16=args.bfloat16)
    used_network = fast_network if args.worker == "fast" else predict_in_precision

    def losses_of(predict, config):
        if args.worker == "fast":
            return objective_losses(predict, pairs, config)[0]
        return reference.m2m_losses(
            predict,
            pairs,
            regularizer=config.regularizer,
            regularity_weight=config.regularity_weight,
            gradcycon_weight=config.gradcycon_weight,
        )

    def step():
        start = time.perf_counter(), time.process_time()
        module.zero_grad(set_to_none=True)
        losses = losses_of(used_network, config)
        torch.stack(list(losses.values())).sum().backward()
        return {
            "seconds": time.perf_counter() - start[0],
            "cpu_seconds": time.process_time() - start[1],
            "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }

    def parts():
        """Split a step of the package at the displacements."""
        from dataclasses import replace

        module.zero_grad(set_to_none=True)
        spent = {}
        clock = Clock(spent)
        edge = images[0], images[1]
        maps = predict_edges(fast_network, [edge] * n_edges(config, args.aligned))
        clock("network forward")
        predicted = [phi - identity_map(args.size) for phi in maps]
        leaves = [disp.detach().requires_grad_() for disp in predicted]

        def backward(some):
            known = iter(leaves)
            losses = losses_of(lambda *_: next(known), some)
            torch.stack(list(losses.values())).sum().backward()

        zero = replace(config, gradcycon_weight=0.0, regularity_weight=0.0)
        clock.skip()
        backward(zero)
        clock("similarity")
        for leaf in leaves:
            leaf.grad = None
        backward(config)
        clock("regularity")
        spent["regularity"] -= spent["similarity"]
        clock.skip()
        torch.autograd.backward(predicted, [leaf.grad for leaf in leaves])
        clock("network backward")
        return spent

    def floor():
        from torch.utils.flop_counter import FlopCounterMode

        # Of the reference: the counter does not know all that the package calls.
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            predict(images[0], images[1])
        operations = 3 * counter.get_total_flops() * n_edges(config, args.aligned)
        matrix = torch.randn(1536, 1536)
        seconds = []
        for _ in range(12):
            start = time.perf_counter()
            matrix @ matrix
            seconds.append(time.perf_counter() - start)
        rate = 2 * 1536**3 / min(seconds)
        return {"gflop": operations / 1e9, "gflop_per_s": rate / 1e9}

    requests = {"step": step, "parts": parts, "floor": floor}
    answer({"torch": torch.__version__, "threads": torch.get_num_threads()})
    for line in sys.stdin:
        answer(requests[line.strip()]())


class Clock:
    """Seconds since the last reading, by name."""

    def __init__(self, spent: dict[str, float]):
        self.spent = spent
        self.skip()

    def __call__(self, name: str) -> None:
        """Book the time since the last reading."""
        self.spent[name] = time.perf_counter() - self.last
        self.skip()

    def skip(self) -> None:
        """Start anew."""
        self.last = time.perf_counter()


def n_edges(config, is_aligned: bool) -> int:
    """Count calls of the network in a step."""
    has_inverse = config.regularizer == "gradicon" and config.regularity_weight > 0
    return (3 if is_aligned else 4) + has_inverse


def answer(numbers: dict) -> None:
    """Send numbers to the asking process."""
    sys.stdout.write(json.dumps(numbers) + "\n")
    sys.stdout.flush()


def measure(args: argparse.Namespace, arguments: list[str]) -> str:
    """Compare steps in turn; a Markdown table."""
    workers = {kind: Worker(kind, arguments) for kind in ("reference", "fast")}
    steps: dict[str, list[dict]] = {kind: [] for kind in workers}
    for _ in range(args.repeats):
        for kind, worker in workers.items():
            numbers = worker.ask("step")
            sys.stderr.write(f"{kind} {numbers}\n")
            steps[kind].append(numbers)
    parts = workers["fast"].ask("parts")
    floor = workers["reference"].ask("floor")
    best = {
        kind: {name: min(row[name] for row in rows) for name in rows[0]}
        for kind, rows in steps.items()
    }
    peaks = {kind: max(row["peak_gb"] for row in rows) for kind, rows in steps.items()}
    slow, fast = best["reference"], best["fast"]
    floor_seconds = floor["gflop"] / floor["gflop_per_s"]
    size = f"{args.size}^3" + (", compact" if args.compact else "")
    total = sum(parts.values())
    shares = ", ".join(f"{name} {100 * value / total:.0f} %" for name, value in parts.items())
    dtype = "bfloat16" if args.bfloat16 else "float32"
    for worker in workers.values():
        worker.close()
    header = (
        "| network | size | dtype | reference (s) | m2m-bids (s) | times faster | CPU time (s)"
        " | peak memory (GB) | floor (s) |"
    )
    row = (
        f"| {args.network} | {size} | {dtype} | {slow['seconds']:.1f} | {fast['seconds']:.1f}"
        f" | {slow['seconds'] / fast['seconds']:.2f}"
        f" | {slow['cpu_seconds']:.1f} / {fast['cpu_seconds']:.1f}"
        f" = {slow['cpu_seconds'] / fast['cpu_seconds']:.2f}"
        f" | {peaks['reference']:.2f} / {peaks['fast']:.2f}"
        f" = {100 * peaks['fast'] / peaks['reference']:.0f} % | {floor_seconds:.1f} |"
    )
    notes = (
        f"Shares of the step: {shares}. Floor: {floor['gflop']:.0f} GFLOP of convolutions and"
        f" products, forward and backward, at {floor['gflop_per_s']:.0f} GFLOP/s (product of"
        f" 1536 x 1536). {platform.machine()}, {args.threads} threads, load"
        f" {os.getloadavg()[0]:.1f}; PyTorch {workers['fast'].info['torch']}."
    )
    return "\n".join([header, "|---" * 9 + "|", row, "", notes])


def main() -> int:
    """Print the table of one network."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="gradicon")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--compact", action="store_true", help="the size that trains on a CPU")
    parser.add_argument("--aligned", action="store_true", help="three edges")
    parser.add_argument("--bfloat16", action="store_true", help="autocast, in both")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--worker", choices=("reference", "fast"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
    else:
        sys.stdout.write(measure(args, sys.argv[1:]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
