"""Run the app: build the workflow, run it, say what became of each scan."""

import errno
import logging
import shutil
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from m2m_bids.cli.dry_run import (
    changed_lines,
    dry_run_table,
    precomputed_lines,
    target_lines,
)
from m2m_bids.cli.environment import (
    available_memory_gb,
    configure_nipype,
    name_a_home,
    prepare_environment,
    termination_interrupts,
)
from m2m_bids.cli.parser import parse_args
from m2m_bids.cli.plugins import choose_plugin, count_run_gpus, start_plugin
from m2m_bids.cli.purge import purge_finished
from m2m_bids.settings import Settings

if TYPE_CHECKING:
    from niworkflows.engine.workflows import LiterateWorkflow

    from m2m_bids.bids.query import Scan
    from m2m_bids.bids.request import Request
    from m2m_bids.cli.progress import Progress
    from m2m_bids.workflows.cohort import EvaluationImages, TrainingImages
    from m2m_bids.workflows.registration import RegistrationOptions

LOGGER = logging.getLogger("m2m_bids")


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name.

    Returns
    -------
    int
        0 if no scan failed, 1 if one did, 2 if nothing could be started, 130 if interrupted, by
        Ctrl-C or SIGTERM.
    """
    name_a_home()
    settings = parse_args(argv)
    level = [logging.WARNING, logging.INFO, logging.DEBUG][min(settings.verbose, 2)]
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    LOGGER.setLevel(min(level, logging.INFO))
    try:
        with termination_interrupts():
            return _run(settings)
    except (ValueError, OSError) as error:
        LOGGER.debug("", exc_info=True)
        return _stop(f"{error}{_advice(error, settings)}")
    except MemoryError:
        LOGGER.debug("", exc_info=True)
        return _stop("there is not enough memory")
    except KeyboardInterrupt:
        again = "with --resume " if settings.analysis_level == "train" else ""
        sys.stderr.write(f"m2m-bids: interrupted; the same command {again}goes on from here\n")
        return 130
    except Exception as error:
        # A mistake of this app: users get its traceback in a file.
        return _stop(f"unexpected {type(error).__name__}: {error}. {_keep_traceback(settings)}")


def _stop(message: str) -> int:
    """Say in one line of printable characters why nothing could be started; return 2."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(message.split()))
    sys.stderr.write(f"m2m-bids: error: {line}\n")
    return 2


def _advice(error: Exception, settings: Settings) -> str:
    """Say what to do about a full disk."""
    if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return ""
    folders = f"{settings.output_dir} or {settings.work_dir}"
    return f": make room in {folders}; the same command goes on from here"


def _keep_traceback(settings: Settings) -> str:
    """Write the traceback of the exception at hand to the logs; say where it is."""
    from m2m_bids.bids.derivatives import write_text

    file = settings.output_dir / "logs" / f"crash-{settings.run_uuid}.txt"
    try:
        write_text(file, traceback.format_exc())
    except OSError:
        return "Run it again with -vv for the details, and report them, please."
    return f"Please report it with {file}."


def _run(settings: Settings) -> int:
    if settings.analysis_level == "group":
        from m2m_bids.cli.group import run_group

        return run_group(settings)
    if settings.synthstrip_model is not None:
        from m2m_bids.api import check_synthstrip

        check_synthstrip(settings.synthstrip_model)
    if settings.analysis_level == "train":
        from m2m_bids.cli.train import run_training

        return run_training(settings)
    if settings.analysis_level == "evaluate":
        from m2m_bids.cli.evaluate import run_evaluation

        return run_evaluation(settings)
    # First, so that a missing GPU is told within seconds.
    n_gpus = count_run_gpus(settings) if settings.transform == "m2m" else 0
    scans = find_scans(settings)
    weights, sha256 = _find_weights(settings)
    _find_templates(settings)
    if settings.dry_run:
        shown = f"{weights} (SHA-256 {sha256[:12]}...)"
        names = dict.fromkeys(settings.modalities, shown)
        sys.stdout.write(dry_run_table(scans, settings, names) + "\n")
        return 0
    from m2m_bids.bids.derivatives import check_maker
    from m2m_bids.bids.locks import empty_work_folder, hold_participants

    check_maker(settings.output_dir)
    participants = {scan.subject for scan in scans if not scan.reason}
    with hold_participants((settings.output_dir, settings.work_dir), participants):
        if settings.clean_workdir and settings.work_dir.is_dir():
            empty_work_folder(settings.work_dir, {f".sub-{label}.lock" for label in participants})
        # Before Nipype and niworkflows are imported: both write to the home directory on import.
        prepare_environment(settings)
        options = _registration_options(settings, weights, sha256, use_gpu=n_gpus > 0)
        return _run_scans(settings, scans, options)


def _run_scans(settings: Settings, scans: "list[Scan]", options: "RegistrationOptions") -> int:
    """Register the scans that are not finished, and report on all."""
    if not settings.skip_bids_validation:
        _validate(settings.bids_dir)

    from m2m_bids.bids.derivatives import missing_outputs, write_dataset_files
    from m2m_bids.workflows.base import scan_request

    wanted = [scan for scan in scans if not scan.reason]
    request_of = {scan.name: scan_request(scan, settings, options) for scan in wanted}
    unfinished = [
        scan
        for scan in wanted
        if not settings.reports_only
        and missing_outputs(scan, settings.output_dir, request_of[scan.name])
    ]
    too_large = _too_large(unfinished, settings.mem_gb or available_memory_gb())
    scans = [replace(scan, reason=too_large.get(scan.name, scan.reason)) for scan in scans]
    due = [scan for scan in unfinished if scan.name not in too_large]
    write_dataset_files(settings.output_dir, settings.datasets)
    for line in _plan_lines(settings, scans, due, request_of):
        LOGGER.info("%s", line)
    progress = None
    if due:
        settings.to_toml()
        progress = run_workflow(settings, due, options)
    elif settings.write_graph:
        LOGGER.warning("no graph was written: there is nothing to run")
    return _report(settings, scans, request_of, progress)


def _plan_lines(
    settings: Settings,
    scans: "list[Scan]",
    due: "list[Scan]",
    request_of: "dict[str, Request]",
) -> list[str]:
    """Say what a run will do."""
    n_left_out = sum(bool(scan.reason) for scan in scans)
    if settings.reports_only:
        return [f"{len(scans)} scans, {n_left_out} left out: only reports are written"]
    n_before = len(scans) - len(due) - n_left_out
    counts = f"{len(due)} to register, {n_before} finished before, {n_left_out} left out"
    return [
        f"{len(scans)} scans: {counts}",
        *changed_lines(due, settings.output_dir, request_of),
        *precomputed_lines(due, settings),
        *target_lines(due, settings),
    ]


def _too_large(scans: "list[Scan]", memory_gb: float) -> dict[str, str]:
    """Say, by names of scans, whose images would not fit into memory by what their headers say."""
    from m2m_bids.spatial.images import data_bytes

    reasons = {}
    for scan in scans:
        for file in filter(None, (scan.file, scan.t1w)):
            if (size_gb := data_bytes(file) / 1e9) > memory_gb:
                reasons[scan.name] = (
                    f"{file}: {size_gb:.1f} GB of voxels by its header, more than the "
                    f"{memory_gb:.1f} GB of --mem. Convert or copy the file again, or give more."
                )
    return reasons


def find_scans(settings: Settings) -> "list[Scan]":
    """Query the dataset for what the settings select."""
    from m2m_bids.bids.query import query, read_bids_filters
    from m2m_bids.spatial.templates import EMBEDDED

    if settings.no_t1w != "skip" and settings.analysis_level != "participant":
        raise ValueError(
            f"--no-t1w {settings.no_t1w}: only for the level participant; the level "
            f"{settings.analysis_level} needs pairs of a scan and a T1w"
        )
    filters = read_bids_filters(settings.bids_filter_file) if settings.bids_filter_file else None
    return query(
        settings.bids_dir,
        participant_labels=settings.participant_label,
        session_labels=settings.session_label,
        tracer_labels=settings.tracer_label,
        reconstruction_labels=settings.rec_label,
        run_labels=settings.run_label,
        subjects_sessions_tsv=settings.subjects_sessions_tsv,
        anatomical_reference=settings.subject_anatomical_reference,
        template=EMBEDDED if settings.no_t1w == "register-to-template" else "",
        modalities=settings.modalities,
        derivatives=settings.derivative_dirs,
        filters=filters,
        database_dir=settings.bids_database_dir,
    )


def _find_weights(settings: Settings) -> tuple[Path | None, str]:
    """Check the weights, before anything is computed; return their folder and hash."""
    if settings.transform == "rigid":
        return None, ""
    from m2m_bids.api import DEFAULT_WEIGHTS, check_weights

    weights = settings.weights or DEFAULT_WEIGHTS
    return weights, check_weights(weights, settings.modalities)


def _find_templates(settings: Settings) -> None:
    """Check that the templates of the output spaces are there, before anything is computed."""
    templates = [space for space in settings.further_spaces if space.is_template]
    if not templates:
        return
    from m2m_bids.spatial.templates import EMBEDDED, find_template

    for space in templates:
        if space.name != EMBEDDED:
            number = int(space.resolution) if space.resolution not in (None, "native") else 1
            find_template(
                space.name, settings.templateflow_home, cohort=space.cohort, resolution=number
            )


def _registration_options(
    settings: Settings, weights: Path | None, sha256: str, *, use_gpu: bool
) -> "RegistrationOptions":
    from m2m_bids.registration.weights import read_card
    from m2m_bids.workflows.registration import RegistrationOptions

    return RegistrationOptions(
        transform=settings.transform,
        weights=weights,
        weights_sha256=sha256,
        n_refine=settings.refine,
        device=settings.device,
        use_gpu=use_gpu,
        random_seed=settings.random_seed,
        omp_nthreads=settings.omp_nthreads,
        network=read_card(weights).network if weights else "",
    )


def _validate(bids_dir: Path) -> None:
    """Run the BIDS validator where it is installed; its findings are advice."""
    program = Path(sys.executable).with_name("bids-validator-deno")
    found = str(program) if program.is_file() else shutil.which("bids-validator-deno")
    if found is None:
        LOGGER.info("bids-validator-deno is not installed: the input was not validated")
        return
    answer = subprocess.run(
        [found, "--ignoreNiftiHeaders", str(bids_dir)], capture_output=True, text=True, check=False
    )
    if answer.returncode:
        LOGGER.warning(
            "the BIDS validator finds errors in %s; m2m-bids goes on with what it can read."
            " See them with: bids-validator-deno %s",
            *(bids_dir, bids_dir),
        )


def run_workflow(
    settings: Settings,
    scans: "list[Scan]",
    options: "RegistrationOptions",
    images: "TrainingImages | EvaluationImages | None" = None,
) -> "Progress":
    """Build the workflow of a run and run it; failures are in its crash files."""
    from m2m_bids.cli.citations import write_level_citation
    from m2m_bids.workflows.base import init_m2m_bids_wf, methods_text

    configure_nipype(settings)
    workflow = init_m2m_bids_wf(settings, scans, options, images=images)
    if images is not None:
        write_level_citation(images.folder.parent, methods_text(workflow))
    if settings.write_graph:
        from m2m_bids.cli.graph import write_graphs

        write_graphs(workflow, settings.output_dir / "logs")
    return execute(workflow, settings, use_gpu=options.use_gpu)


def execute(
    workflow: "LiterateWorkflow",
    settings: Settings,
    *,
    use_gpu: bool,
    ends_early: bool = False,
) -> "Progress":
    """
    Run a workflow; failures are in its crash files.

    Parameters
    ----------
    workflow : LiterateWorkflow
    settings : Settings
    use_gpu : bool
        Whether there are GPUs, each for one node at a time.
    ends_early : bool
        Whether nodes of little memory, such as those that write results, go before the others, so
        that an interrupted run leaves all that it could end; otherwise nodes that are as far from
        the start go together.

    Returns
    -------
    Progress
    """
    from m2m_bids.cli.progress import Progress
    from m2m_bids.cli.steps import node_names

    progress = Progress(node_names(workflow), logs_nodes=settings.verbose > 0)
    plugin = choose_plugin(settings, progress, use_gpu=use_gpu, ends_early=ends_early)
    arguments = start_plugin(**plugin)
    try:
        with progress.watching(sys.stderr):
            workflow.run(**arguments)
    except Exception as error:
        # Nipype raises at the end for the nodes that failed; each has its crash file.
        LOGGER.debug("", exc_info=True)
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = lines[-1] if lines[0].startswith("Traceback") else lines[0]
        LOGGER.warning("some steps failed: %s", reason)
    return progress


def failure_of(scan: "Scan", settings: Settings) -> str:
    """Say why a scan failed in this run; nothing if it did not."""
    from m2m_bids.cli.progress import crash_reasons
    from m2m_bids.workflows.base import anatomical_wf_name, scan_wf_name

    reasons = crash_reasons(settings.output_dir / f"sub-{scan.subject}/log/{settings.run_uuid}")
    parts = {scan_wf_name(scan), anatomical_wf_name(scan)}
    found = [text for node, text in reasons.items() if parts & set(node.split("."))]
    return found[0] if found else ""


def _report(
    settings: Settings,
    scans: "list[Scan]",
    request_of: "dict[str, Request]",
    progress: "Progress | None",
) -> int:
    """Write status and reports, say where they are, and return the exit code."""
    from m2m_bids.bids.status import read_status, update_status
    from m2m_bids.cli.closing import closing_text
    from m2m_bids.cli.outcome import status_of
    from m2m_bids.cli.reporting import rows_without_scans, write_reports
    from m2m_bids.workflows.base import scan_wf_name

    known = {(row.participant_id, row.scan): row for row in read_status(settings.output_dir)}
    rows = []
    for scan in scans:
        failure, seconds = "", None
        if not scan.reason and progress is not None:
            failure = failure_of(scan, settings)
            seconds = progress.elapsed_s(scan_wf_name(scan))
        rows.append(
            status_of(
                *(scan, settings, request_of.get(scan.name)),
                earlier=known.get((f"sub-{scan.subject}", scan.name)),
                failure=failure,
                seconds=seconds,
            )
        )
    is_new = progress is not None or settings.reports_only
    reports = write_reports(settings, scans, rows, is_new=is_new)
    without_scans = rows_without_scans(settings, scans)
    update_status(settings.output_dir, without_scans)
    if settings.purge_workdir_on_success:
        held = {scan.subject for scan in scans if scan.name in request_of}
        purge_finished(settings, scans, rows, held)
    sys.stdout.write(closing_text(settings, [*rows, *without_scans], reports) + "\n")
    return 1 if any(row.status == "failed" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
