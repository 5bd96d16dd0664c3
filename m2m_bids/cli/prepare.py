"""Prepare the images of a cohort: the level ``participant`` as far as the rigid alignment."""

import logging
from typing import TYPE_CHECKING

from m2m_bids.settings import Settings

if TYPE_CHECKING:
    from m2m_bids.bids.query import Scan
    from m2m_bids.workflows.cohort import EvaluationImages, TrainingImages

LOGGER = logging.getLogger("m2m_bids")


def usable_scans(settings: Settings) -> "list[Scan]":
    """
    Find the scans that a cohort level can use; those that are left out are logged.

    Parameters
    ----------
    settings : Settings

    Returns
    -------
    list of Scan
        Each with its T1w.

    Raises
    ------
    ValueError
        If there is none.
    """
    from m2m_bids.cli.run import find_scans

    found = find_scans(settings)
    left_out = [scan for scan in found if scan.reason]
    for scan in left_out:
        LOGGER.info("left out: %s: %s", scan.name, scan.reason)
    if len(left_out) == len(found):
        raise ValueError(
            f"none of the {len(found)} scans can be used; the first is left out because of:"
            f" {left_out[0].reason}"
        )
    return [scan for scan in found if not scan.reason]


def empty_work_folder(settings: Settings, scans: "list[Scan]", level: str = "") -> None:
    """
    Empty the work folder where that is asked for, unless another run works in it.

    Parameters
    ----------
    settings : Settings
    scans : list of Scan
        Of the run: other runs are kept off their participants meanwhile.
    level : str
        Whose lock this process holds in the work folder.
    """
    from m2m_bids.bids import locks

    if not settings.clean_workdir or not settings.work_dir.is_dir():
        return
    participants = {scan.subject for scan in scans}
    own = {f".sub-{label}.lock" for label in participants} | {f".{level}.lock"}
    with locks.hold_participants([settings.work_dir], participants):
        locks.empty_work_folder(settings.work_dir, own)


def prepare_images(
    settings: Settings, scans: "list[Scan]", images: "TrainingImages | EvaluationImages"
) -> dict[str, str]:
    """
    Align scans rigidly with their T1w, and write the images that a cohort level needs.

    Runs that share the output or the work folder take turns for each participant; what another one
    has prepared meanwhile is not prepared again.

    Parameters
    ----------
    settings : Settings
    scans : list of Scan
    images : TrainingImages or EvaluationImages
        Which images, and where they go.

    Returns
    -------
    dict of str to str
        Why a scan failed, by its name; empty if none did.
    """
    from m2m_bids.bids.derivatives import check_maker
    from m2m_bids.bids.locks import hold_participants, remove_unfinished

    check_maker(settings.output_dir)
    participants = {scan.subject for scan in scans}
    with hold_participants((settings.output_dir, settings.work_dir), participants):
        for label in participants:
            remove_unfinished(images.folder, label)
        due = [scan for scan in scans if not images.has(scan)]
        return _prepare(settings, due, images) if due else {}


def _prepare(
    settings: Settings, scans: "list[Scan]", images: "TrainingImages | EvaluationImages"
) -> dict[str, str]:
    from m2m_bids.bids.derivatives import write_dataset_files
    from m2m_bids.cli.run import failure_of, run_workflow
    from m2m_bids.workflows.registration import RegistrationOptions

    write_dataset_files(settings.output_dir, settings.datasets)
    settings.to_toml()
    registration = RegistrationOptions(
        transform="rigid",
        weights=None,
        weights_sha256="",
        n_refine=0,
        device="cpu",
        use_gpu=False,
        random_seed=settings.random_seed,
        omp_nthreads=settings.omp_nthreads,
    )
    LOGGER.info("preparing %d scans", len(scans))
    run_workflow(settings, scans, registration, images)
    return {
        scan.name: failure_of(scan, settings) or "its images were not written"
        for scan in scans
        if not images.has(scan)
    }
