"""Register real scans to real T1w images of other people, and see what lies on their tissues.

    python tests/benchmarks/real_images.py BIDS_DIR RESULTS.jsonl

There is no truth for these pairs. What is measured is whether the scan shows what it should where
the T1w's own tissues are: FA is high in white matter, PET of perfusion or metabolism in grey. That
is the area under the ROC curve (AUC) of the scan's voxels in the brain, and, for FA, the Dice
overlap of FA > 0.25 with white matter. M2M-Reg's refinement looks at these same tissues, and SyN's
mutual information at the contrast that they make: a high number shows that the scan fits the
tissues, not that every point is where it belongs.

A method that finds the right places finds them wherever the scan was before. So each scan is also
registered after a known smooth deformation of up to 29 mm, from the same rigid alignment, and
compared with what the same method made of the undeformed scan: the mean distance, in the brain,
of the places of the scan that each point of the T1w is given (`strays_mm`). A method that does not
move anything strays by as much as the deformation. A stopped run goes on.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nb
import numpy as np
import pandas as pd
from nibabel.affines import apply_affine
from scipy.ndimage import gaussian_filter

from m2m_bids.api import DEFAULT_WEIGHTS
from m2m_bids.baselines.base import Images, Options
from m2m_bids.baselines.methods import find_method
from m2m_bids.preprocessing.anatomical import (
    correct_bias_field,
    extract_brain,
    load_t1w,
    segment_tissues,
)
from m2m_bids.preprocessing.coregistration import register_rigid
from m2m_bids.preprocessing.diffusion import clean_fa
from m2m_bids.preprocessing.pet import static_reference
from m2m_bids.quality.measures import probability_above
from m2m_bids.spatial.fields import DisplacementField, jacobian_determinant
from m2m_bids.spatial.images import load_image, require_3d
from m2m_bids.spatial.resampling import resample
from m2m_bids.spatial.transforms import Chain, map_points

METHODS = ("initial", "rigid", "syn-mi", "m2m:default")
BRIGHT = {"fa": 2, "pet": 1}
WHITE_FA = 0.25
WARP_MM = 29.0


def load_scan(file: Path, modality: str) -> nb.Nifti1Image:
    """Load a PET or FA scan as the app does."""
    image = load_image(file)
    image.set_filename(str(file))
    return (
        clean_fa(require_3d(image, file))
        if modality == "fa"
        else static_reference(image).registered
    )


def smooth_warp(image: nb.Nifti1Image, seed: int) -> DisplacementField:
    """Draw a deformation of up to `WARP_MM` that does not fold, in an image's field of view."""
    spacing_mm, smoothness_mm = 6.0, 40.0
    sizes_mm = np.array(image.shape) * image.header.get_zooms()
    shape = np.ceil(sizes_mm / spacing_mm).astype(int) + 1
    affine = image.affine.copy()
    affine[:3, :3] *= spacing_mm / np.asarray(image.header.get_zooms())
    noise = np.random.default_rng(seed).standard_normal((*shape, 3))
    # Periodic, so that it is as strong in the middle as at the rim.
    data = gaussian_filter(noise, smoothness_mm / spacing_mm, axes=(0, 1, 2), mode="wrap")
    warp = DisplacementField(data * WARP_MM / np.linalg.norm(data, axis=-1).max(), affine)
    assert jacobian_determinant(warp).min() > 0
    return warp


def measure(images: Images, chain: Chain) -> dict[str, float]:
    """Compare a moved scan with the tissues of the T1w."""
    moved = np.asarray(resample(images.moving, chain, images.fixed, order=1).dataobj)
    tissues = np.asarray(images.fixed_dseg.dataobj)
    inside = tissues > 0
    values, is_bright = moved[inside], tissues[inside] == BRIGHT[images.modality]
    numbers = {"auc": probability_above(values[is_bright], values[~is_bright])}
    if images.modality == "fa":
        is_white = values > WHITE_FA
        both = is_white & is_bright
        numbers["dsc"] = float(2 * both.sum() / (is_white.sum() + is_bright.sum()))
    return numbers


def compare(images: Images, warp: DisplacementField) -> list[dict]:
    """Run the methods on a scan as it is and on the deformed one."""
    warped = replace(images, moving=resample(images.moving, warp, images.moving))
    voxels = np.argwhere(np.asarray(images.fixed_mask.dataobj) > 0)[::101]
    points = apply_affine(images.fixed.affine, voxels)
    rows = []
    for key in METHODS:
        method = find_method(key, DEFAULT_WEIGHTS)
        outcome, again = (
            method.register(some, Options(device="cpu", n_threads=1)) for some in (images, warped)
        )
        places = map_points((warp, *again.chain), points)
        offsets = places - map_points(outcome.chain, points)
        numbers = measure(images, outcome.chain)
        numbers |= {f"{name}_warped": x for name, x in measure(warped, again.chain).items()}
        numbers["strays_mm"] = float(np.linalg.norm(offsets, axis=-1).mean())
        reasons = {"reason": outcome.reason, "reason_warped": again.reason}
        rows.append({"method": key} | reasons | numbers)
    return rows


def prepare(t1w_file: Path) -> dict:
    """Prepare a T1w image as the app does."""
    t1w = load_t1w(t1w_file)
    brain = extract_brain(t1w)
    t1w = correct_bias_field(t1w, brain.mask)
    return {
        "fixed": t1w,
        "fixed_mask": brain.mask,
        "template2fixed": brain.template2anat,
        "fixed_dseg": segment_tissues(t1w, brain.mask, brain.template2anat).labels,
    }


def main() -> int:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bids_dir", type=Path)
    parser.add_argument("results", type=Path)
    args = parser.parse_args()
    done = args.results.read_text().splitlines() if args.results.exists() else []
    rows = [json.loads(line) for line in done]
    finished = {(row["fixed"], row["moving"]) for row in rows}
    scans = {
        "fa": sorted(args.bids_dir.rglob("*_param-FA_dwimap.nii.gz")),
        "pet": sorted(args.bids_dir.rglob("*_pet.nii.gz")),
    }
    pairs = [(modality, file) for modality, files in scans.items() for file in files]
    for t1w_file in sorted(args.bids_dir.rglob("*_T1w.nii.gz")):
        due = [pair for pair in pairs if (t1w_file.name, pair[1].name) not in finished]
        anatomy = prepare(t1w_file) if due else {}
        for modality, file in due:
            moving = load_scan(file, modality)
            rigid = register_rigid(moving, anatomy["fixed"], anatomy["fixed_mask"]).fixed2moving
            images = Images(moving=moving, fixed2moving=rigid, modality=modality, **anatomy)
            names = {"fixed": t1w_file.name, "moving": file.name, "modality": modality}
            warp = smooth_warp(moving, seed=len(rows))
            rows.extend(names | row for row in compare(images, warp))
            with args.results.open("a") as stream:
                stream.writelines(json.dumps(row) + "\n" for row in rows[-len(METHODS) :])
    means = pd.DataFrame(rows).groupby(["modality", "method"], sort=False).mean(numeric_only=True)
    sys.stdout.write(means.round(3).to_string() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
