"""Compare registrations on simulated pairs of different subjects, never trained on.

    python tests/benchmarks/simulated_pairs.py RESULTS.jsonl [--pairs 20] [--spacing 2]

Each pair's numbers are a line of the file, so that a stopped run continues; the table is printed
at the end. Methods: the headers as they are, the app's rigid alignment, ANTs SyN(MI) (affine and
deformable, default iterations) from that, and M2M-Reg as the app runs it, with its check.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import ants
import numpy as np
import pandas as pd

from m2m_bids.api import DeformableOptions, estimate_deformation
from m2m_bids.evaluation.landmarks import landmark_errors
from m2m_bids.evaluation.overlap import dice_per_label
from m2m_bids.preprocessing.anatomical import extract_brain, segment_tissues
from m2m_bids.preprocessing.ants_bridge import to_ants
from m2m_bids.preprocessing.coregistration import register_rigid
from m2m_bids.simulation.pairs import SimulatedPair, simulate_pair
from m2m_bids.simulation.truth import LABELS
from m2m_bids.spatial.itk import write_affine
from m2m_bids.spatial.resampling import resample

LPS = np.array([-1.0, -1.0, 1.0])


def overlap(pair: SimulatedPair, moved: np.ndarray) -> dict[str, float]:
    """Dice of each class between the fixed labels and the moved ones."""
    fixed = np.asarray(pair.fixed_labels.dataobj)
    dice = dice_per_label(fixed, moved.astype(fixed.dtype))
    return {f"dsc_{name}": dice[number] for name, number in LABELS.items() if number in dice}


def measure(pair: SimulatedPair, chain) -> dict[str, float]:
    """Landmark error and overlap of a chain of this project's transforms."""
    errors = landmark_errors(chain, pair.landmarks.fixed, pair.landmarks.moving)
    moved = resample(pair.moving_labels, chain, pair.fixed_labels, order=0)
    return {"error_mm": float(errors.mean()), **overlap(pair, np.asarray(moved.dataobj))}


def measure_syn(pair: SimulatedPair, rigid: np.ndarray) -> dict[str, float]:
    """Run ANTs SyN with mutual information from the rigid alignment; measure it by ANTs itself."""
    start = time.monotonic()
    fixed, moving = to_ants(pair.fixed_image), to_ants(pair.moving_image)
    with tempfile.TemporaryDirectory() as folder:
        initial = write_affine(rigid, Path(folder) / "rigid.txt")
        result = ants.registration(
            fixed,
            moving,
            type_of_transform="SyN",
            initial_transform=str(initial),
            random_seed=1,
            outprefix=f"{folder}/syn_",
        )
        seconds = time.monotonic() - start
        files = result["fwdtransforms"]
        points = pd.DataFrame(pair.landmarks.fixed * LPS, columns=["x", "y", "z"])
        mapped = ants.apply_transforms_to_points(3, points, files).to_numpy() * LPS
        labels = ants.apply_transforms(
            fixed, to_ants(pair.moving_labels), files, interpolator="nearestNeighbor"
        )
        warp = ants.image_read(files[0])
        determinants = ants.create_jacobian_determinant_image(fixed, warp).numpy()
    inside = np.asarray(pair.fixed_image.dataobj) > 0
    errors = np.linalg.norm(mapped - pair.landmarks.moving, axis=1)
    return {
        "error_mm": float(errors.mean()),
        **overlap(pair, labels.numpy()),
        "folding_percent": 100 * float(np.mean(determinants[inside] <= 0)),
        "seconds": seconds,
    }


def run_pair(seed: int, modality: str, args: argparse.Namespace) -> list[dict]:
    """Register one pair by every method."""
    pair = simulate_pair(seed, modality, spacing_mm=args.spacing, kind=args.kind)
    brain = extract_brain(pair.fixed_image)
    start = time.monotonic()
    rigid = register_rigid(pair.moving_image, pair.fixed_image, brain.mask).fixed2moving
    rigid_s = time.monotonic() - start
    start = time.monotonic()
    options = {"weights": args.weights} if args.weights else {}
    deformation = estimate_deformation(
        pair.moving_image,
        pair.fixed_image,
        brain.mask,
        fixed2moving=rigid,
        template2fixed=brain.template2anat,
        options=DeformableOptions(modality, n_refine=args.refine, device="auto", **options),
        fixed_dseg=segment_tissues(pair.fixed_image, brain.mask, brain.template2anat).labels,
    )
    m2m_s = time.monotonic() - start
    objections = deformation.quality.objections()
    chain = (rigid,) if objections else (rigid, deformation.field)
    numbers = {
        "initial": measure(pair, ()),
        "rigid": {**measure(pair, (rigid,)), "seconds": rigid_s},
        "SyN(MI)": measure_syn(pair, rigid),
        "M2M-Reg": {
            **measure(pair, chain),
            "seconds": m2m_s,
            "objections": objections,
            **asdict(deformation.quality),
        },
    }
    key = {"seed": seed, "modality": modality, "kind": args.kind}
    return [{**key, "method": method, **values} for method, values in numbers.items()]


def table(rows: list[dict]) -> str:
    """Average over pairs; Markdown."""
    frame = pd.DataFrame(rows)
    classes = [column for column in frame if column.startswith("dsc_")]
    frame["dsc"] = frame[classes].mean(axis=1)
    lines = [
        "| | method | landmark error (mm) | mean DSC | "
        + " | ".join(name.removeprefix("dsc_") for name in classes)
        + " | folds (%) | seconds |",
        "|---" * (6 + len(classes)) + "|",
    ]
    for (modality, method), group in frame.groupby(["modality", "method"], sort=False):
        means = group.mean(numeric_only=True)
        folds, seconds = means.get("folding_percent", np.nan), means["seconds"]
        lines.append(
            f"| {modality.upper()} | {method}"
            f" | {means['error_mm']:.2f} ± {group['error_mm'].std():.2f}"
            f" | {means['dsc']:.3f} | "
            + " | ".join(f"{means[name]:.3f}" for name in classes)
            + f" | {'-' if np.isnan(folds) else f'{folds:.4f}'}"
            f" | {'-' if np.isnan(seconds) else f'{seconds:.0f}'} |"
        )
    counts = frame.groupby("modality")["seed"].nunique().to_dict()
    return "\n".join([*lines, f"\nPairs: {counts}"])


def main() -> int:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--spacing", type=float, default=2.0, help="voxel size, mm")
    parser.add_argument("--kind", choices=("between", "within"), default="between")
    parser.add_argument("--refine", type=int, default=60)
    parser.add_argument("--weights", type=Path)
    args = parser.parse_args()
    done = args.results.read_text().splitlines() if args.results.exists() else []
    rows = [json.loads(line) for line in done]
    finished = {(row["seed"], row["modality"]) for row in rows}
    for seed in range(args.pairs):
        for modality in ("pet", "fa"):
            if (seed, modality) in finished:
                continue
            new = run_pair(seed, modality, args)
            with args.results.open("a") as stream:
                stream.writelines(json.dumps(row) + "\n" for row in new)
            rows += new
    sys.stdout.write(table(rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
