"""Plant failures in a simulated cohort, and see which numbers of the group level catch them.

    python tests/benchmarks/planted_failures.py FOLDER

Simulates ten people and plants five failures, each in another person's PET scan and FA map: left
and right swapped, a header 40 mm off, the scans of a person who is not in the cohort, the lower
part of the brain outside the field of view, and noise as strong as the signal. Then it runs the
levels `participant` and `group`, and prints what the group's tables say. A stopped run goes on.
"""

import argparse
import gzip
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nb
import numpy as np
import pandas as pd

from m2m_bids.cli.run import main as m2m_bids
from m2m_bids.simulation.cohort import CohortOptions, write_cohort

N_SUBJECTS = 10
SEED = 21
NUMBERS = (
    "side_gap",
    "header_shift_mm",
    "mean_displacement_mm",
    "fov_cut_percent",
    "noise_percent",
    "brain_dice",
    "nmi",
    "edge_agreement",
    "likeness",
)


def swap_sides(image: nb.Nifti1Image, _: nb.Nifti1Image) -> nb.Nifti1Image:
    """Reverse the voxels along the axis from left to right, and leave the header."""
    axis = int(np.argwhere(nb.io_orientation(image.affine)[:, 0] == 0)[0, 0])
    return like(image, np.flip(np.asarray(image.dataobj), axis))


def shift_header(image: nb.Nifti1Image, _: nb.Nifti1Image) -> nb.Nifti1Image:
    """Move an image by 40 mm."""
    affine = image.affine.copy()
    affine[:3, 3] += [24, -24, 21]
    return nb.Nifti1Image(np.asarray(image.dataobj), affine, image.header)


def exchange(_: nb.Nifti1Image, other: nb.Nifti1Image) -> nb.Nifti1Image:
    """Take the scan of somebody else."""
    return other


def cut_below(image: nb.Nifti1Image, _: nb.Nifti1Image) -> nb.Nifti1Image:
    """Crop the lower third of the part that is not zero."""
    axis = int(np.argwhere(nb.io_orientation(image.affine)[:, 0] == 2)[0, 0])
    data = np.asarray(image.dataobj)
    filled = np.flatnonzero((data > 0.05 * data.max()).any(axis=tuple({0, 1, 2} - {axis})))
    n = len(filled) // 3
    is_flipped = nb.io_orientation(image.affine)[axis, 1] < 0
    kept = slice(0, filled[-1] + 1 - n) if is_flipped else slice(filled[0] + n, None)
    return image.slicer[tuple(kept if a == axis else slice(None) for a in range(3))]


def add_noise(image: nb.Nifti1Image, _: nb.Nifti1Image) -> nb.Nifti1Image:
    """Add noise as strong as the signal."""
    data = np.asarray(image.dataobj, dtype=np.float32)
    noise = np.random.default_rng(0).normal(0, data[data > 0].mean(), data.shape)
    return like(image, np.where(data > 0, np.clip(data + noise, 0, data.max()), 0))


def like(image: nb.Nifti1Image, data: np.ndarray) -> nb.Nifti1Image:
    """Make an image with the header of another."""
    return nb.Nifti1Image(data.astype(image.get_data_dtype()), image.affine, image.header)


FAILURES: dict[str, Callable[[nb.Nifti1Image, nb.Nifti1Image], nb.Nifti1Image]] = {
    "left and right swapped": swap_sides,
    "header 40 mm off": shift_header,
    "another person's scan": exchange,
    "field of view cut": cut_below,
    "noise": add_noise,
}


def scan_files(bids_dir: Path, subject: str) -> list[Path]:
    """List the PET scan and the FA map of a subject."""
    return [
        next(bids_dir.glob(f"sub-{subject}/**/*_pet.nii.gz")),
        next(bids_dir.glob(f"derivatives/**/sub-{subject}_*FA_dwimap.nii.gz")),
    ]


def plant(bids_dir: Path) -> dict[str, str]:
    """Spoil the scans of five people with those of the last one; say what, by subject."""
    subjects = sorted(folder.name[4:] for folder in bids_dir.glob("sub-*"))
    planted = dict(zip(subjects, FAILURES, strict=False))
    is_planted = bids_dir / "sourcedata" / "planted"
    if not is_planted.exists():
        for subject, failure in planted.items():
            pairs = zip(
                scan_files(bids_dir, subject), scan_files(bids_dir, subjects[-1]), strict=True
            )
            for file, other in pairs:
                spoilt = FAILURES[failure](nb.load(file), nb.load(other))
                # Whole in memory, before the file that it may come from is overwritten.
                file.write_bytes(gzip.compress(spoilt.to_bytes()))
        is_planted.touch()
    return planted


def main() -> int:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--transform", choices=("m2m", "rigid"), default="m2m")
    folder, transform = vars(args := parser.parse_args())["folder"], args.transform
    bids_dir, out_dir = folder / "bids", folder / "out"
    if not (bids_dir / "dataset_description.json").is_file():
        write_cohort(bids_dir, n_subjects=N_SUBJECTS, seed=SEED, options=CohortOptions(t1w_mm=1.5))
    planted = plant(bids_dir)
    others = sorted(folder.name[4:] for folder in bids_dir.glob("sub-*"))[:-1]
    common = ["--skip-bids-validation", "-w", str(folder / "work")]
    labels = ["--participant-label", *others]
    # In a space that all share, for the mean images of the cohort.
    spaces = ["--output-spaces", "MNI152NLin2009aSym:res-2"]
    run = [str(bids_dir), str(out_dir), "participant", "--transform", transform]
    m2m_bids([*run, *labels, *spaces, *common])
    m2m_bids([str(bids_dir), str(out_dir), "group"])
    for modality in ("pet", "fa"):
        table = pd.read_csv(out_dir / f"group_{modality}.tsv", sep="\t")
        table["planted"] = table.participant_id.str[4:].map(planted).fillna("nothing")
        shown = ["planted", "status", *(n for n in NUMBERS if n in table), "flags"]
        sys.stdout.write(f"\n{modality}\n{table[shown].round(3).to_string(index=False)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
