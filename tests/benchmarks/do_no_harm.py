"""Count how often the check decides rightly whether to use the deformable step.

    python tests/benchmarks/do_no_harm.py RESULTS.jsonl [--pairs 3] [--junk-pairs 1]

Simulated scans of the T1w's own person, with 0 to 4 mm of true deformation, and of other people:
the right decision is the one with the smaller landmark error. Images that show no brain of their
kind: the right decision is to reject. Each scan's numbers are a line of the file, so that a
stopped run continues, and other limits are tried on what was measured.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path

import nibabel as nb
import numpy as np
import pandas as pd
from scipy import ndimage

from m2m_bids.api import DeformableOptions, Quality, estimate_deformation
from m2m_bids.evaluation.landmarks import landmark_errors
from m2m_bids.preprocessing.anatomical import BrainExtraction, extract_brain, segment_tissues
from m2m_bids.preprocessing.coregistration import register_rigid
from m2m_bids.simulation.pairs import SimulatedPair, simulate_pair

SPACING_MM = 3.0
PEOPLE = {
    "own, no deformation": {"kind": "within", "warp_mm": 0.0},
    "own, 2 mm": {"kind": "within", "warp_mm": 2.0},
    "own, 4 mm": {"kind": "within", "warp_mm": 4.0},
    "another person's": {"kind": "between"},
}


def scrambled(data: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Permute the voxels within the outline."""
    data = data.copy()
    data[data > 0.05] = rng.permutation(data[data > 0.05])
    return data


def blobs(data: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Fill the outline with smooth noise of 9 mm."""
    noise = ndimage.gaussian_filter(rng.normal(size=data.shape), 9 / SPACING_MM)
    return (data > 0.05) * (noise - noise.min()) / np.ptp(noise)


def upside_down(data: np.ndarray, _: np.random.Generator) -> np.ndarray:
    """Turn the brain over, as a wrong affine does."""
    return data[:, ::-1, ::-1]


def noise(data: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Fill the whole field of view with noise."""
    return rng.random(data.shape)


JUNK: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    function.__name__.replace("_", " "): function
    for function in (scrambled, blobs, upside_down, noise)
}


@cache
def brain_of(pair: SimulatedPair) -> BrainExtraction:
    """Extract the brain of a pair once for all its scans."""
    return extract_brain(pair.fixed_image)


def decide(pair: SimulatedPair, moving: nb.Nifti1Image, args: argparse.Namespace) -> dict:
    """Register as the app does; errors are those of the landmarks of the pair."""
    brain = brain_of(pair)
    rigid = register_rigid(moving, pair.fixed_image, brain.mask).fixed2moving
    options = {"weights": args.weights} if args.weights else {}
    deformation = estimate_deformation(
        moving,
        pair.fixed_image,
        brain.mask,
        fixed2moving=rigid,
        template2fixed=brain.template2anat,
        options=DeformableOptions(pair.modality, n_refine=args.refine, **options),
        fixed_dseg=segment_tissues(pair.fixed_image, brain.mask, brain.template2anat).labels,
    )
    points = pair.landmarks.fixed, pair.landmarks.moving
    return {
        "rigid_mm": float(landmark_errors((rigid,), *points).mean()),
        "m2m_mm": float(landmark_errors((rigid, deformation.field), *points).mean()),
        "quality": asdict(deformation.quality),
    }


def cases(seed: int, modality: str, args: argparse.Namespace) -> Iterator[tuple[str, Callable]]:
    """Yield the name of each case, and what measures it."""
    simulate = cache(lambda **kind: simulate_pair(seed, modality, spacing_mm=SPACING_MM, **kind))

    def person(**kind):
        pair = simulate(**kind)
        return decide(pair, pair.moving_image, args)

    def junk(spoil):
        pair = simulate(kind="within", warp_mm=2.0)
        data = spoil(pair.moving_image.get_fdata(), np.random.default_rng(seed))
        return decide(pair, nb.Nifti1Image(data, pair.moving_image.affine), args)

    for name, kind in PEOPLE.items():
        yield name, lambda kind=kind: person(**kind)
    for name, spoil in JUNK.items() if seed < args.junk_pairs else ():
        yield name, lambda spoil=spoil: junk(spoil)


def table(rows: list[dict]) -> str:
    """Count decisions per modality and case; Markdown."""
    lines = [
        "| | scan | used | right | rigid (mm) | M2M-Reg (mm) | output (mm) | similarity | gain |",
        "|---" * 9 + "|",
    ]
    frame = pd.DataFrame([row | row["quality"] for row in rows])
    frame["used"] = [not Quality(**quality).objections() for quality in frame["quality"]]
    for (modality, case), group in frame.groupby(["modality", "case"], sort=False):
        is_junk = case in JUNK
        helps = (group["m2m_mm"] < group["rigid_mm"]) & (not is_junk)
        output = np.where(group["used"], group["m2m_mm"], group["rigid_mm"]).mean()
        ranges = [
            f"{group[name].min():.2f} to {group[name].max():.2f}"
            for name in ("similarity", "similarity_gain")
        ]
        errors = (group["rigid_mm"].mean(), group["m2m_mm"].mean(), output)
        cells = ["-"] * 3 if is_junk else [f"{error:.2f}" for error in errors]
        lines.append(
            f"| {modality.upper()} | {case} | {group['used'].sum()} of {len(group)}"
            f" | {(group['used'] == helps).sum()} | {' | '.join(cells + ranges)} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--junk-pairs", type=int, default=1)
    parser.add_argument("--refine", type=int, default=60)
    parser.add_argument("--weights", type=Path)
    args = parser.parse_args()
    done = args.results.read_text().splitlines() if args.results.exists() else []
    rows = [json.loads(line) for line in done]
    finished = {(row["seed"], row["modality"], row["case"]) for row in rows}
    for seed in range(args.pairs):
        for modality in ("pet", "fa"):
            for case, measure in cases(seed, modality, args):
                if (seed, modality, case) in finished:
                    continue
                rows.append({"seed": seed, "modality": modality, "case": case, **measure()})
                with args.results.open("a") as stream:
                    stream.write(json.dumps(rows[-1]) + "\n")
    sys.stdout.write(table(rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
