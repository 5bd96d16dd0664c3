"""Time training steps on a GPU against the paper's equations computed plainly, and the floor.

    python tests/benchmarks/training_step_gpu.py [--networks gradicon] [--batches 1 2]

The reference is that of `training_step.py`. Steps of all kinds are timed in turn in one process,
with their first calls left out; the numbers are medians. Rows of a Markdown table are printed as
they come.
"""

import argparse
import contextlib
import importlib.util
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from m2m_bids.registration.edges import InPrecision
from m2m_bids.registration.m2m import CyclePairs, objective_losses
from m2m_bids.registration.networks import NETWORKS
from m2m_bids.registration.presets import preset

REFERENCE = Path(__file__).parents[1] / "registration" / "reference.py"
HEADER = (
    "| network | size | batch | dtype | reference (ms) | m2m-bids (ms) | times faster"
    " | compiled (ms) | peak memory (GB) | floor (ms) |\n" + "|---" * 10 + "|\n"
)


def load_reference():
    """Load the plain reference of the tests."""
    spec = importlib.util.spec_from_file_location("reference", REFERENCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_network(name: str) -> torch.nn.Module:
    """Make a network of the paper's size that deforms."""
    torch.manual_seed(0)
    family = NETWORKS[name]
    network = family.network(family.paper()).cuda().train()
    if name == "gradicon":
        for unet in network.unets:
            torch.nn.init.normal_(unet.last_conv.weight, std=0.01)
    return network


def plain_predictor(reference, name: str, network: torch.nn.Module, size: int):
    """Give the reference's network and the module that holds its parameters."""
    if name == "gradicon":
        predict, module, _ = reference.icon_gradicon(network, size)
        return predict, module
    return reference.plain_network(network), network


def timed(step, module: torch.nn.Module, repeats: int) -> tuple[float, float]:
    """Return a step's median of milliseconds and its peak of GB; not a number without memory."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    milliseconds = []
    try:
        for number in range(repeats + 2):
            module.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            start = time.perf_counter()
            torch.stack(list(step().values())).sum().backward()
            torch.cuda.synchronize()
            if number >= 2:
                milliseconds.append(1e3 * (time.perf_counter() - start))
    except torch.cuda.OutOfMemoryError:
        return float("nan"), float("nan")
    finally:
        module.zero_grad(set_to_none=True)
    return statistics.median(milliseconds), torch.cuda.max_memory_allocated() / 2**30


def busiest_kernels(step, n_rows: int) -> str:
    """Tabulate the kernels of a step by the time that the GPU is busy with them."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        torch.stack(list(step().values())).sum().backward()
        torch.cuda.synchronize()
    averages = profiler.key_averages()
    busy_ms = sum(event.self_device_time_total for event in averages) / 1e3
    table = averages.table("self_cuda_time_total", n_rows, max_name_column_width=100)
    return f"{table}\nbusy: {busy_ms:.1f} ms"


def matmul_tflops(dtype: torch.dtype) -> float:
    """Measure the rate of a matrix product."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        torch.cuda.synchronize()
        start = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * 8192**3 / min(seconds) / 1e12


def measure(reference, name: str, size: int, batch: int, args: argparse.Namespace) -> str:
    """Compare the steps of one size; a row of the table."""
    config = preset(name, "m2m+gcc").objective
    network = make_network(name)
    predict, module = plain_predictor(reference, name, network, size)
    pairs = CyclePairs(*torch.rand(4, batch, 1, *[size] * 3, device="cuda"), is_aligned=False)
    options = {
        field: getattr(config, field)
        for field in ("regularizer", "regularity_weight", "gradcycon_weight")
    }

    def in_precision(moving, fixed):
        with torch.autocast("cuda", torch.bfloat16, enabled=args.bfloat16):
            return predict(moving, fixed).float()

    fast = InPrecision(network, use_bfloat16=args.bfloat16)
    slow = timed(
        lambda: reference.m2m_losses(in_precision, pairs, **options), module, args.repeats
    )

    def step():
        return objective_losses(fast, pairs, config)[0]

    own = timed(step, network, args.repeats)
    if args.profile:
        sys.stderr.write(f"{name} {size}^3 x {batch}\n{busiest_kernels(step, args.profile)}\n")
    compiled = (float("nan"),)
    if args.compile:
        network.compile()
        compiled = timed(step, network, args.repeats)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        predict(pairs.s[:1], pairs.t[:1])
    has_inverse = config.regularizer == "gradicon" and config.regularity_weight > 0
    tflop = 3 * counter.get_total_flops() * (4 + has_inverse) * batch / 1e12
    floor_ms = 1e3 * tflop / args.tflops
    dtype = "bfloat16" if args.bfloat16 else "float32"
    return (
        f"| {name} | {size}^3 | {batch} | {dtype} | {slow[0]:.0f} | {own[0]:.0f}"
        f" | {slow[0] / own[0]:.2f} | {compiled[0]:.0f} | {slow[1]:.1f} / {own[1]:.1f}"
        f" | {floor_ms:.0f} |\n"
    )


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=["gradicon", "transmorph", "corrmlp"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[128])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--float32", dest="bfloat16", action="store_false")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network too")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="name N kernels")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no row after")
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    torch.backends.cudnn.benchmark = True
    reference = load_reference()
    args.tflops = matmul_tflops(torch.bfloat16 if args.bfloat16 else torch.float32)
    sys.stdout.write(
        f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}; floor: operations of the"
        f" convolutions and products at {args.tflops:.0f} TFLOP/s\n\n{HEADER}"
    )
    for name in args.networks:
        for size in args.sizes:
            for batch in args.batches:
                if time.monotonic() > end:
                    return 0
                with contextlib.suppress(torch.cuda.OutOfMemoryError):
                    sys.stdout.write(measure(reference, name, size, batch, args))
                    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
