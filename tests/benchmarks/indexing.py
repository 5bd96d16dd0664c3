"""
Measure how long it takes to find the scans of a cohort of ADNI's size.

Makes a tree of empty files named as Clinica names them (a T1w, three PET scans, an FA map and a
DWI in each session) and queries it without a database of its index, while making one, and with it.

    python tests/benchmarks/indexing.py --subjects 1000 --sessions 4
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from m2m_bids.bids.query import query

NAMES = (
    "anat/{}_T1w.nii.gz",
    "pet/{}_trc-18FFDG_rec-coregavg_pet.nii.gz",
    "pet/{}_trc-18FFDG_rec-coregiso_pet.nii.gz",
    "pet/{}_trc-18FAV45_pet.nii.gz",
    "dwi/{}_FA.nii.gz",
    "dwi/{}_dwi.nii.gz",
    "dwi/{}_dwi.bval",
    "dwi/{}_dwi.bvec",
    "dwi/{}_dwi.json",
    "func/{}_task-rest_bold.nii.gz",
    "{}_scans.tsv",
)
SCANS_PER_SESSION = 4


def make_tree(root: Path, n_subjects: int, n_sessions: int) -> int:
    """Make the empty files of a cohort; return their number."""
    n_files = 0
    for number in range(n_subjects):
        subject = f"sub-ADNI{number % 1000:03d}S{number:04d}"
        for visit in range(n_sessions):
            folder = root / subject / f"ses-M{12 * visit:03d}"
            for kind in ("anat", "pet", "dwi", "func"):
                (folder / kind).mkdir(parents=True)
            for name in NAMES:
                (folder / name.format(f"{subject}_{folder.name}")).write_text("image")
        sessions = "".join(f"ses-M{12 * visit:03d}\t{70 + visit}\n" for visit in range(n_sessions))
        table = root / subject / f"{subject}_sessions.tsv"
        table.write_text(f"session_id\tage\n{sessions}", encoding="utf-8")
        n_files += n_sessions * len(NAMES) + 1
    return n_files


def measure(name: str, root: Path, n_expected: int, database_dir: Path | None = None) -> None:
    """Print the wall and processor seconds of one query."""
    wall, processor = time.perf_counter(), time.process_time()
    options = {} if database_dir is None else {"database_dir": database_dir}
    n_scans = len(query(root, **options))
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    if n_scans != n_expected:
        raise SystemExit(f"{name}: found {n_scans} scans, expected {n_expected}")
    sys.stdout.write(f"{name:22s}{wall:8.2f} s, {processor:8.2f} s of processor time\n")
    sys.stdout.flush()


def main() -> None:
    """Make the tree and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--subjects", type=int, default=1000)
    parser.add_argument("--sessions", type=int, default=4)
    options = parser.parse_args()
    n_expected = SCANS_PER_SESSION * options.subjects * options.sessions
    with tempfile.TemporaryDirectory() as folder:
        root, database_dir = Path(folder, "bids"), Path(folder, "database")
        n_files = make_tree(root, options.subjects, options.sessions)
        sys.stdout.write(f"{options.subjects} subjects, {n_files} files\n")
        measure("without database", root, n_expected)
        measure("making the database", root, n_expected, database_dir)
        measure("with the database", root, n_expected, database_dir)


if __name__ == "__main__":
    main()
