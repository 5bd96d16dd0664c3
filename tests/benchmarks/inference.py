"""Time the full-size GradICON on one pair, and ANTs SyN(MI) on the same pair.

    python tests/benchmarks/inference.py [--size 128] [--repeats 3]

The pair is simulated; the network has the paper's size and random weights, which do not change its
time. SyN is ANTs' `SyN` (affine and deformable, Mattes mutual information) at its default
iterations. Both use all cores, in turn.
"""

import os

# As `m2m_bids.cli.environment` sets it for the processes that compute; before PyTorch is imported.
os.environ["THP_MEM_ALLOC_ENABLE"] = "1"

import argparse
import resource
import sys
import time

import ants
import numpy as np
import torch
from scipy import ndimage

from m2m_bids.registration.networks.gradicon import GradICON
from m2m_bids.simulation.pairs import simulate_pair


def cube(image, size: int) -> np.ndarray:
    """Scale a simulated image to the network's grid and range."""
    data = np.asarray(image.get_fdata(), np.float32)
    data = ndimage.zoom(data, size / np.array(data.shape), order=1)
    return np.clip(data / np.percentile(data, 99.9), 0, 1)


def main() -> int:
    """Print seconds and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pair = simulate_pair(0, "pet", spacing_mm=2.0, kind="between")
    moving, fixed = (cube(image, args.size) for image in (pair.moving_image, pair.fixed_image))
    network = GradICON().eval()
    for unet in network.unets:
        torch.nn.init.normal_(unet.last_conv.weight, std=0.01)
    tensors = [torch.from_numpy(data)[None, None] for data in (moving, fixed)]
    images = [ants.from_numpy(data) for data in (fixed, moving)]
    times: dict[str, list[float]] = {"network": [], "syn": []}
    for _ in range(args.repeats):
        start = time.perf_counter()
        with torch.inference_mode():
            network(*tensors)
        times["network"].append(time.perf_counter() - start)
        if not times["syn"]:
            peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        start = time.perf_counter()
        ants.registration(*images, type_of_transform="SyN", random_seed=1)
        times["syn"].append(time.perf_counter() - start)
    network_s, syn_s = (min(seconds) for seconds in times.values())
    sys.stdout.write(
        "| size | GradICON (s) | SyN(MI) (s) | times faster | peak memory before SyN (GB) |\n"
        "|---|---|---|---|---|\n"
        f"| {args.size}^3 | {network_s:.2f} | {syn_s:.1f} | {syn_s / network_s:.1f}"
        f" | {peak_gb:.2f} |\n\n"
        f"{args.threads} threads, load {os.getloadavg()[0]:.1f}; PyTorch {torch.__version__},"
        f" antspyx {ants.__version__}.\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
