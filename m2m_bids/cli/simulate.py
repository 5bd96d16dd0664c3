"""Write a simulated cohort, and compare a run's results with the truth."""

import argparse
import logging
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm.contrib.logging import logging_redirect_tqdm

from m2m_bids.bids.naming import expected_outputs
from m2m_bids.bids.query import QueryError, Scan, query
from m2m_bids.bids.status import read_status
from m2m_bids.evaluation.landmarks import landmark_errors
from m2m_bids.spatial.itk import read_affine, read_composite

_HEADER = ("scan", "before", "rigid", "M2M-Reg", "status")


@dataclass(frozen=True)
class TableRow:
    """
    How well one scan was registered.

    Attributes
    ----------
    scan : str
        Name of the scan.
    before_mm, rigid_mm, m2m_mm : float or None
        Mean landmark error by the headers alone, after the rigid step and after M2M-Reg; None
        where there is no such transform.
    status : str
        Of ``logs/status.tsv``; "not run" for a scan that is not there.
    """

    scan: str
    before_mm: float
    rigid_mm: float | None
    m2m_mm: float | None
    status: str


def landmark_table(
    bids_dir: Path, output_dir: Path, derivatives: dict[str, Path] | None = None
) -> list[TableRow]:
    """
    Measure landmark errors of every scan of a simulated cohort.

    Parameters
    ----------
    bids_dir : Path
        Cohort of ``m2m-bids-simulate cohort``.
    output_dir : Path
        Output of ``m2m-bids`` for it.
    derivatives : dict of str to Path, optional
        Derivatives datasets; by default all under ``derivatives/`` of the cohort.

    Returns
    -------
    list of TableRow
        One for each scan, in the order of the query.

    Raises
    ------
    ValueError
        If a folder is missing, or the cohort has no truth.
    """
    from m2m_bids.simulation.cohort import TRUTH_FOLDER

    for folder in (bids_dir / TRUTH_FOLDER, output_dir):
        if not folder.is_dir():
            raise ValueError(
                f"{folder}: no such folder. Give a cohort of `m2m-bids-simulate cohort` and the "
                "output folder of m2m-bids for it."
            )
    if derivatives is None:
        described = sorted(bids_dir.glob("derivatives/*/dataset_description.json"))
        derivatives = {file.parent.name: file.parent for file in described}
    status = {row.scan: row.status for row in read_status(output_dir)}
    scans = [
        scan
        for scan in query(bids_dir, derivatives=derivatives)
        if not scan.reason and (bids_dir / TRUTH_FOLDER / _stem(scan)).is_dir()
    ]
    return [
        _row(scan, bids_dir / TRUTH_FOLDER, output_dir, status.get(scan.name, "not run"))
        for scan in scans
    ]


def format_table(rows: list[TableRow]) -> str:
    """
    Format rows as text, errors in mm, with a last row of means.

    Parameters
    ----------
    rows : list of TableRow

    Returns
    -------
    str
        Lines without a final line break.
    """
    cells = [
        (row.scan, *(_number(x) for x in (row.before_mm, row.rigid_mm, row.m2m_mm)), row.status)
        for row in rows
    ]
    columns = (
        [getattr(row, name) for row in rows] for name in ("before_mm", "rigid_mm", "m2m_mm")
    )
    known = ([value for value in column if value is not None] for column in columns)
    means = (float(np.mean(values)) if values else None for values in known)
    cells.append(("mean", *(_number(mean) for mean in means), ""))
    widths = [max(len(row[i]) for row in (_HEADER, *cells)) for i in range(len(_HEADER))]
    lines = []
    for row in (_HEADER, *cells):
        numbers = "  ".join(row[i].rjust(widths[i]) for i in (1, 2, 3))
        lines.append(f"{row[0].ljust(widths[0])}  {numbers}  {row[4]}".rstrip())
    title = "Mean landmark error in mm: by the headers (before), after rigid, after M2M-Reg"
    return "\n".join([title, "", *lines])


def main(argv: list[str] | None = None) -> int:
    """
    Run ``m2m-bids-simulate``.

    Parameters
    ----------
    argv : list of str, optional
        Arguments; those of the process by default.

    Returns
    -------
    int
        Exit code: 0, or 1 after a message on standard error.
    """
    args = _build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        if args.command == "table":
            derivatives = {path.name: path for path in args.derivatives} or None
            print(format_table(landmark_table(args.bids_dir, args.output_dir, derivatives)))
        else:
            _write(args)
    except (ValueError, OSError, QueryError) as error:
        print(f"m2m-bids-simulate: {error}", file=sys.stderr)
        return 1
    return 0


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="m2m-bids-simulate", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    cohort = commands.add_parser("cohort", help="write a simulated ADNI-like BIDS dataset")
    cohort.add_argument("bids_dir", type=Path, help="new folder of the dataset")
    cohort.add_argument("--subjects", type=int, default=3, metavar="N", help="default: 3")
    cohort.add_argument("--seed", type=int, default=0, help="of the random numbers; default: 0")
    cohort.add_argument(
        "--warp",
        type=float,
        default=None,
        metavar="MM",
        help="mean length of each scan's nonlinear displacement; default: 3, 0 for none",
    )
    table = commands.add_parser("table", help="print the landmark errors of a run on a cohort")
    table.add_argument("bids_dir", type=Path, help="dataset of the command cohort")
    table.add_argument("output_dir", type=Path, help="output folder of m2m-bids for it")
    table.add_argument(
        "-d",
        "--derivatives",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH",
        help="derivatives datasets; by default all under derivatives/ of the dataset",
    )
    return parser


def _write(args: argparse.Namespace) -> None:
    from m2m_bids.simulation.cohort import CohortOptions, write_cohort

    options = CohortOptions()
    if args.warp is not None:
        options = replace(options, warp_mm=args.warp)
    # Lines of the log go above the progress bar.
    with logging_redirect_tqdm():
        write_cohort(args.bids_dir, n_subjects=args.subjects, seed=args.seed, options=options)
    print(f"{args.bids_dir}: {args.subjects} simulated subjects; truth in sourcedata/truth/")


def _row(scan: Scan, truth_dir: Path, output_dir: Path, status: str) -> TableRow:
    """Read a scan's landmarks and the transforms written for it."""
    from m2m_bids.spatial.landmarks import read_landmarks

    landmarks = read_landmarks(truth_dir / _stem(scan) / "landmarks.tsv")
    outputs = expected_outputs(scan, output_dir, "m2m")
    rigid_mm = m2m_mm = None
    if outputs["rigid_xfm"].is_file():
        rigid = read_affine(outputs["rigid_xfm"])
        rigid_mm = float(landmark_errors(rigid, *landmarks).mean())
    if outputs["m2m_xfm"].is_file():
        m2m = read_composite(outputs["m2m_xfm"])
        m2m_mm = float(landmark_errors(m2m, *landmarks).mean())
    before_mm = float(landmark_errors((), *landmarks).mean())
    return TableRow(scan.name, before_mm, rigid_mm, m2m_mm, status)


def _stem(scan: Scan) -> str:
    return scan.file.name.partition(".")[0]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    sys.exit(main())
