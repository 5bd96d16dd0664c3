"""Train the rows of Table 1 on a simulated cohort and print overlap and folds.

    python tests/benchmarks/presets.py FOLDER [--iterations 500] [--modality pet] [--only NAME ...]

A reduction of the paper's training that two cores manage: compact networks, 33 voxels of 5.9 mm,
one cycle an iteration, a learning rate that falls from 1e-3, simulated subjects. A row that is
finished in FOLDER is not trained again, one that was stopped goes on. Subjects that FOLDER has
are not simulated again, so that `--iterations 0` prepares it for a machine without nilearn.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

from m2m_bids.cohort import (
    TrainingOptions,
    find_training_scans,
    train_network,
    write_training_arrays,
)
from m2m_bids.registration.grids import identity_map
from m2m_bids.registration.presets import PRESETS
from m2m_bids.registration.training import Processes, read_log
from m2m_bids.simulation.anatomy import random_subject, template_from_nilearn, uniform
from m2m_bids.simulation.contrast import simulate_fa, simulate_pet, simulate_t1w
from m2m_bids.simulation.truth import label_map

FIELD_MM = 194.7


def write_cohort(
    folder: Path, modality: str, n_subjects: int, grid: tuple[int, float]
) -> list[str]:
    """Simulate subjects on the grid; return the names of their scans."""
    simulate = {"pet": simulate_pet, "fa": simulate_fa}[modality]
    names = [f"sub-{number:03d}_{modality}" for number in range(n_subjects)]
    missing = [pair for pair in enumerate(names) if not (folder / pair[1]).is_dir()]
    template = template_from_nilearn(*grid) if missing else None
    for number, name in missing:
        generator = torch.Generator().manual_seed(number)
        subject = random_subject(template, generator, strength=uniform(generator, 0.5, 1.3))
        arrays = {
            "functional": simulate(subject, grid[1], generator)[0, 0].numpy(),
            "t1w": simulate_t1w(subject, grid[1], generator)[0, 0].numpy(),
        }
        arrays = {key: array.astype(np.float16) for key, array in arrays.items()}
        arrays["labels"] = label_map(subject, identity_map(grid[0])).astype(np.uint8)
        description = {"name": name, "subject": f"{number:03d}", "modality": modality}
        write_training_arrays(folder / name, description, arrays)
    return names


def main() -> int:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--modality", choices=("pet", "fa"), default="pet")
    parser.add_argument("--subjects", type=int, default=40)
    parser.add_argument("--pre-aligned", default="0")
    parser.add_argument("--only", nargs="+", choices=sorted(PRESETS), default=list(PRESETS))
    parser.add_argument("--size", type=int, default=33, help="voxels along an axis")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    grid = (args.size, round(FIELD_MM / args.size, 2))
    images = args.folder / "images"
    names = write_cohort(images, args.modality, args.subjects, grid)
    scans = find_training_scans(images, names)
    if not args.iterations:
        return 0
    sys.stdout.write("| preset | DSC before | DSC | folds (%) | LNCC | s/iteration |\n")
    sys.stdout.write("|---|---|---|---|---|---|\n")
    for name in args.only:
        network, _, objective = name.partition("-")
        options = TrainingOptions(
            network=network,
            objective=objective,
            n_iterations=args.iterations,
            batch_size=1,
            validate_every=max(1, args.iterations // 10),
            pre_aligned=args.pre_aligned,
            grid=grid,
        )
        run_dir = args.folder / "-".join((args.modality, name, args.pre_aligned))
        start = time.monotonic()
        if not (run_dir / "weights").is_dir():
            train_network(scans, options, run_dir, processes=Processes(args.device))
        row = read_log(run_dir / "validation.csv")[-1]
        seconds = (time.monotonic() - start) / args.iterations
        sys.stdout.write(
            f"| {name} | {row['dsc_before']:.3f} | {row['dsc']:.3f}"
            f" | {row['folding_percent']:.3f} | {row['lncc']:.3f} | {seconds:.2f} |\n"
        )
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
