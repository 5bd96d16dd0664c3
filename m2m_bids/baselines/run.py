"""
Run a method in a process of its own, which measures its time and memory.

The memory is the largest of the resident sets, at their peaks, of that process and of the programs
that it starts: what the system keeps for each, so that no sampling can miss it. Libraries count,
as they do for a user. A method that crashes does not take the caller with it; a caller that is
killed takes the method and its programs with it. Their temporary files go to the folder that gets
the result.
"""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from m2m_bids.api import Modality
from m2m_bids.baselines.base import Images, Options
from m2m_bids.baselines.methods import find_method
from m2m_bids.processes import end_group, end_with_parent
from m2m_bids.spatial.images import load_image
from m2m_bids.spatial.itk import read_affine, write_affine, write_composite
from m2m_bids.spatial.transforms import Chain

JOB_NAME, REPORT_NAME, LOG_NAME = "job.json", "report.json", "log.txt"
_MAX_REASON = 500


@dataclass(frozen=True)
class PairFiles:
    """
    Files of a pair to register.

    Parameters
    ----------
    moving_file : str
        Static PET or FA image.
    fixed_file, mask_file : str
        T1w image, and its brain mask on the same grid.
    rigid_xfm : str
        ITK affine: fixed points to moving points.
    template2anat : str
        ITK affine: MNI points to fixed points.
    modality : {"pet", "fa"}
        Kind of the moving image.
    dseg_file : str, optional
        Tissues of the T1w: 1 GM, 2 WM, 3 CSF.
    """

    moving_file: str
    fixed_file: str
    mask_file: str
    rigid_xfm: str
    template2anat: str
    modality: Modality
    dseg_file: str | None = None

    def load(self) -> Images:
        """Read the files; raise ImageError or ValueError, naming one that cannot be read."""
        return Images(
            moving=load_image(self.moving_file),
            fixed=load_image(self.fixed_file),
            fixed_mask=load_image(self.mask_file),
            fixed2moving=read_affine(self.rigid_xfm),
            template2fixed=read_affine(self.template2anat),
            modality=self.modality,
            fixed_dseg=load_image(self.dseg_file) if self.dseg_file else None,
        )


@dataclass(frozen=True)
class Report:
    """
    What became of a registration.

    Parameters
    ----------
    status : {"done", "missing", "failed"}
        "missing" where a program or weights are missing.
    reason : str or None
        Why it is missing or failed, or why a part of it was not applied; one line.
    seconds : float or None
        Time of the registration, images in memory; None where nothing was computed.
    peak_memory_gb : float or None
        Largest memory held, GB of 10^9 bytes; None where nothing was computed.
    """

    status: Literal["done", "missing", "failed"]
    reason: str | None = None
    seconds: float | None = None
    peak_memory_gb: float | None = None


def run_method(
    key: str, files: PairFiles, options: Options, folder: Path, *, weights: Path | None = None
) -> tuple[Report, Path | None]:
    """
    Register a pair by a method; whatever happens to it, it is reported.

    Parameters
    ----------
    key : str
        As `m2m_bids.baselines.methods.find_method` takes it.
    files : PairFiles
    options : Options
    folder : Path
        Gets the transform, ``report.json``, and ``log.txt`` with what the method printed.
    weights : Path, optional
        Weights folder of M2M-Reg.

    Returns
    -------
    report : Report
    xfm_file : Path or None
        ITK transform (``.txt`` if it is affine, else ``.h5``) from fixed points to moving points;
        None unless the status is "done".

    Raises
    ------
    ValueError
        If there is no such method.
    """
    method = find_method(key, weights)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (REPORT_NAME, "xfm.txt", "xfm.h5"):
        (folder / name).unlink(missing_ok=True)
    if reason := method.missing(files.modality):
        report = Report("missing", reason)
        _write_json(asdict(report), folder / REPORT_NAME)
    else:
        report = _run_in_process(key, files, options, folder, weights)
    xfm_files = [folder / name for name in ("xfm.txt", "xfm.h5") if (folder / name).is_file()]
    return report, xfm_files[0] if xfm_files and report.status == "done" else None


def write_chain(chain: Chain, folder: Path) -> Path:
    """
    Write a chain as one ITK transform.

    Parameters
    ----------
    chain : tuple of Transform
        Map of RAS+ mm points, outermost first; the identity if it is empty.
    folder : Path
        Destination.

    Returns
    -------
    Path
        ``xfm.txt`` where it is one affine, else ``xfm.h5``.
    """
    if not chain:
        chain = (np.eye(4),)
    if len(chain) == 1 and isinstance(chain[0], np.ndarray):
        return write_affine(chain[0], folder / "xfm.txt")
    return write_composite(chain, folder / "xfm.h5")


def peak_memory_gb() -> float:
    """
    Return the largest memory that this process, or a program that it waited for, has held so far.

    Returns
    -------
    float
        Resident set, GB of 10^9 bytes.
    """
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    own, programs = (resource.getrusage(kind).ru_maxrss for kind in kinds)
    in_bytes = 1 if sys.platform == "darwin" else 1024
    own, programs = own * in_bytes, programs * in_bytes
    status = Path("/proc/self/status")
    if status.is_file():
        # The other number also has what the process that started this one held by then.
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        own = int(fields["VmHWM"].split()[0]) * 1024
    return max(own, programs) / 1e9


def _run_in_process(
    key: str, files: PairFiles, options: Options, folder: Path, weights: Path | None
) -> Report:
    """Start a Python that runs `main`, and make a report of its end if it makes none itself."""
    job = {
        "key": key,
        "weights": str(weights) if weights else None,
        "files": asdict(files),
        "options": asdict(options),
    }
    _write_json(job, folder / JOB_NAME)
    # -P: modules are never taken from the folder where this runs.
    command = [sys.executable, "-P", "-m", "m2m_bids.baselines.run", str(folder)]
    with (
        (folder / LOG_NAME).open("wb") as log,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # nothing is written to it: see `end_with_parent`
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(options, folder),
            process_group=0,
        ) as process,
    ):
        try:
            code = process.wait()
        finally:
            end_group(process.pid)
    if code == 0:
        return Report(**json.loads((folder / REPORT_NAME).read_text()))
    report = Report("failed", _why_ended(code, folder / LOG_NAME))
    _write_json(asdict(report), folder / REPORT_NAME)
    return report


def _environment(options: Options, folder: Path) -> dict[str, str]:
    environment = {**os.environ, "TMPDIR": str(folder.absolute())}
    if options.n_threads:
        for name in ("OMP_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"):
            environment[name] = str(options.n_threads)
    return environment


def _why_ended(code: int, log: Path) -> str:
    """Say in a line why a process did not end well."""
    if code == -signal.SIGKILL:
        return "the system ended it (SIGKILL), as it does when memory runs out"
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    last = next((line for line in reversed(lines) if line), "nothing was printed")
    # The last line of a traceback: an error's name without its module is enough.
    last = re.sub(r"^(?:\w+\.)+(?=\w+: )", "", last)
    how = f"ended by signal {-code}: " if code < 0 else ""
    return f"{how}{last}"[:_MAX_REASON]


def _write_json(content: Mapping[str, Any], file: Path) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")


def main(folder: Path) -> None:
    """Run the job of a folder in this process."""
    job = json.loads((folder / JOB_NAME).read_text())
    method = find_method(job["key"], Path(job["weights"]) if job["weights"] else None)
    images, options = PairFiles(**job["files"]).load(), Options(**job["options"])
    start = time.monotonic()
    outcome = method.register(images, options)
    seconds = time.monotonic() - start
    write_chain(outcome.chain, folder)
    cost = (None, None) if method.is_given else (seconds, peak_memory_gb())
    report = Report("done", outcome.reason or None, *cost)
    _write_json(asdict(report), folder / REPORT_NAME)


if __name__ == "__main__":
    end_with_parent(sys.stdin.fileno(), with_group=True)
    main(Path(sys.argv[1]))
