"""The level ``evaluate``: register pairs of a cohort by several methods, and compare them."""

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m2m_bids import __version__
from m2m_bids.cli.environment import configure_nipype, prepare_environment
from m2m_bids.cli.evaluation_plan import (
    Labels,
    PlannedMethod,
    choose_labels,
    choose_methods,
    choose_pairs,
)
from m2m_bids.cli.plugins import count_run_gpus
from m2m_bids.cli.prepare import empty_work_folder, prepare_images, usable_scans
from m2m_bids.settings import Settings

if TYPE_CHECKING:
    from m2m_bids.bids.labels import LabelFile
    from m2m_bids.bids.query import Scan
    from m2m_bids.evaluation.pairs import CohortScan, Pair
    from m2m_bids.evaluation.scan_files import ScanFiles
    from m2m_bids.workflows.cohort import EvaluationImages
    from m2m_bids.workflows.evaluation import MovingLabels, PairInputs, Task

LOGGER = logging.getLogger("m2m_bids")
_COLUMNS = (
    *("scan", "subjects", "method"),
    *("pairs", "DSC", "folds (%)", "landmarks (mm)", "seconds"),
)


def run_evaluation(settings: Settings) -> int:
    """
    Run the level ``evaluate``.

    Parameters
    ----------
    settings : Settings

    Returns
    -------
    int
        0 if each method that is there registered each pair; 1 if some failed.

    Raises
    ------
    ValueError
        If the cohort or the options do not allow it.
    """
    n_gpus = count_run_gpus(settings)
    scans = usable_scans(settings)
    if settings.dry_run:
        sys.stdout.write(_dry_run_text(_plan(settings, scans)) + "\n")
        return 0

    from m2m_bids.bids.locks import hold_level, remove_all_unfinished

    with hold_level("evaluate", [settings.work_dir]):
        empty_work_folder(settings, scans, "evaluate")
        plan = _plan(settings, scans)
        with hold_level("evaluate", [settings.evaluation_dir]):
            remove_all_unfinished(settings.evaluation_dir)
            return _evaluate(plan, use_gpu=n_gpus > 0)


def _plan(settings: Settings, scans: "list[Scan]") -> "Plan":
    """Choose what is evaluated, before anything is computed."""
    # Before Nipype and matplotlib are imported: both write to the home directory on import.
    prepare_environment(settings)

    from m2m_bids.workflows.cohort import EvaluationImages

    methods = choose_methods(settings)
    labels = choose_labels(settings, scans)
    pairs = choose_pairs(settings, scans, labels)
    images = EvaluationImages(settings.evaluation_dir / "scans")
    return Plan(settings, pairs, methods, labels, images)


def _evaluate(plan: "Plan", *, use_gpu: bool) -> int:
    """Do what is not done yet, gather all and report it; return the exit code."""
    from m2m_bids.cli.evaluation_report import write_report
    from m2m_bids.evaluation.records import write_records

    settings = plan.settings
    failures = _prepare(plan)
    _register(plan, failures, use_gpu=use_gpu)
    records = _gather(plan, failures)
    summaries = write_records(records, settings.evaluation_dir, seed=settings.random_seed)
    report = write_report(plan, records, summaries)
    sys.stdout.write(_closing_text(records, summaries, settings.evaluation_dir, report) + "\n")
    return 1 if any(record["status"] == "failed" for record in records) else 0


@dataclass(frozen=True)
class Plan:
    """
    What is evaluated.

    Parameters
    ----------
    settings : Settings
    pairs : sequence of Pair
    methods : sequence of PlannedMethod
    labels : Labels
    images : EvaluationImages
        Where the prepared scans are.
    """

    settings: Settings
    pairs: "Sequence[Pair]"
    methods: Sequence[PlannedMethod]
    labels: Labels
    images: "EvaluationImages"

    def files(self, scan: "CohortScan") -> "ScanFiles":
        """Name the prepared files of a scan."""
        from m2m_bids.evaluation.scan_files import ScanFiles

        return ScanFiles.below(self.images.folder / scan.name)

    def fixed_labels(self, scan: "CohortScan") -> "LabelFile":
        """Name the labels of a scan's T1w."""
        from m2m_bids.bids.labels import LabelFile

        if self.labels.of_t1w is None:
            return LabelFile(self.files(scan).dseg_file, "tissues")
        return self.labels.of_t1w[scan.t1w]

    def moving_labels(self, pair: "Pair") -> "MovingLabels | None":
        """Name the labels of a pair's moving scan; None where a registration would give them."""
        from m2m_bids.workflows.evaluation import MovingLabels

        if own := self.labels.of_scan.get(pair.moving.name):
            return MovingLabels(own)
        if pair.kind == "within":
            return None
        files = self.files(pair.moving)
        return MovingLabels(
            self.fixed_labels(pair.moving), files.t1w_file, files.mask_file, files.rigid_xfm
        )

    def is_shown(self, pair: "Pair") -> bool:
        """Tell whether a pair is shown: the first of its modality, between participants if any."""
        same = [other for other in self.pairs if other.moving.modality == pair.moving.modality]
        return pair == min(same, key=lambda other: other.kind == "within")

    def record_dir(self, pair: "Pair", method: PlannedMethod) -> Path:
        """Name the folder of a record."""
        folder = self.settings.evaluation_dir / "pairs" / pair.name
        return folder / method.key.replace(":", "_")


def _prepare(plan: Plan) -> dict[str, str]:
    """Prepare the scans of the pairs; say why a scan failed, by its name."""
    scans = {scan.name: scan for pair in plan.pairs for scan in (pair.moving, pair.fixed)}
    due = [scan for scan in scans.values() if not plan.images.has(scan)]
    return prepare_images(plan.settings, due, plan.images) if due else {}


def _register(plan: Plan, failures: Mapping[str, str], *, use_gpu: bool) -> None:
    """Run the workflow of the registrations that are due."""
    from m2m_bids.cli.run import execute
    from m2m_bids.workflows.evaluation import RunOptions, init_evaluation_wf

    settings = plan.settings
    due = []
    for pair in plan.pairs:
        is_prepared = not {pair.moving.name, pair.fixed.name} & set(failures)
        if is_prepared and (tasks := _tasks(plan, pair)):
            due.append((_pair_inputs(plan, pair), tasks))
    n_due = sum(len(tasks) for _, tasks in due)
    LOGGER.info(
        "%d pairs, %d methods: %d registrations to do",
        *(len(plan.pairs), len(plan.methods), n_due),
    )
    if not due:
        return
    configure_nipype(settings)
    options = RunOptions(
        device=settings.device,
        use_gpu=use_gpu,
        random_seed=settings.random_seed,
        omp_nthreads=settings.omp_nthreads,
        spacing_mm=settings.baseline_spacing_mm,
    )
    workflow = init_evaluation_wf(
        pairs=due, options=options, base_dir=settings.work_dir, crash_dir=_crash_dir(settings)
    )
    execute(workflow, settings, use_gpu=use_gpu, ends_early=True)


def _tasks(plan: Plan, pair: "Pair") -> "list[Task]":
    """List the registrations of a pair that are not done, of methods that are there."""
    from m2m_bids.workflows.evaluation import MethodOptions, Task

    return [
        Task(
            MethodOptions(
                method.key,
                weights=method.weights,
                weights_sha256=method.weights_sha256,
                n_refine=method.n_refine,
                can_use_gpu=method.method.uses_gpu,
            ),
            record=_known(pair, method),
            made_with=_made_with(plan, pair, method),
            out_dir=plan.record_dir(pair, method),
            is_shown=plan.is_shown(pair),
        )
        for method in plan.methods
        if not method.missing[pair.moving.modality] and not _is_done(plan, pair, method)
    ]


def _pair_inputs(plan: Plan, pair: "Pair") -> "PairInputs":
    from m2m_bids.workflows.evaluation import PairInputs

    moving, fixed = plan.files(pair.moving), plan.files(pair.fixed)
    is_own = pair.moving.t1w == pair.fixed.t1w
    return PairInputs(
        name=pair.name,
        modality=pair.moving.modality,
        moving_file=moving.moving_file,
        fixed_file=fixed.t1w_file,
        mask_file=fixed.mask_file,
        dseg_file=fixed.dseg_file,
        template2anat=fixed.template2anat,
        rigid_xfm=moving.rigid_xfm if is_own else None,
        fixed_labels=plan.fixed_labels(pair.fixed),
        moving_labels=plan.moving_labels(pair),
        landmarks=pair.reference.landmarks,
        reference_xfm=pair.reference.reference_xfm,
    )


def _known(pair: "Pair", method: PlannedMethod) -> dict[str, Any]:
    """Fields of a record that are known before."""
    return {
        "pair": pair.name,
        "moving": pair.moving.name,
        "fixed": pair.fixed_name,
        "moving_subject": pair.moving.subject,
        "fixed_subject": pair.fixed.subject,
        "modality": pair.moving.modality,
        "kind": pair.kind,
        "method": method.key,
        "title": method.title,
    }


def _made_with(plan: Plan, pair: "Pair", method: PlannedMethod) -> dict[str, Any]:
    """Say what a record depends on: the registration is done again when that changes."""
    from m2m_bids.workflows.cohort import stamp

    settings = plan.settings
    moving_labels = plan.moving_labels(pair)
    labels = [plan.fixed_labels(pair.fixed), moving_labels and moving_labels.label]
    # The app's own tissues are made with the scans.
    kept = [label for label in labels if label and plan.labels.of_t1w is not None]
    made_with = {
        "version": __version__,
        "moving": plan.images.description(pair.moving),
        "fixed": plan.images.description(pair.fixed),
        "labels": [[label.scheme, *stamp(label.file)] for label in kept],
        "reference": [stamp(file) for file in pair.reference if file],
        "random_seed": settings.random_seed,
        "is_shown": plan.is_shown(pair),
    }
    if method.weights is None:
        return {**made_with, "spacing_mm": settings.baseline_spacing_mm}
    return {**made_with, "weights": method.weights_sha256, "n_refine": method.n_refine}


def _read_record(plan: Plan, pair: "Pair", method: PlannedMethod) -> dict[str, Any] | None:
    """Read the record of a registration; None if there is none, or it is of other inputs."""
    from m2m_bids.evaluation.record_files import read_record

    record = read_record(plan.record_dir(pair, method), _made_with(plan, pair, method))
    return None if record is None else {**record, **_known(pair, method)}


def _is_done(plan: Plan, pair: "Pair", method: PlannedMethod) -> bool:
    record = _read_record(plan, pair, method)
    return record is not None and record["status"] == "done"


def _gather(plan: Plan, failures: Mapping[str, str]) -> list[dict[str, Any]]:
    """Collect the records of all pairs and methods, those that are missing or failed too."""
    from m2m_bids.cli.progress import crash_reasons

    crashes = crash_reasons(_crash_dir(plan.settings))
    records = []
    for pair in plan.pairs:
        unprepared = [
            f"{scan.name}: {failures[scan.name]}"
            for scan in (pair.moving, pair.fixed)
            if scan.name in failures
        ]
        for method in plan.methods:
            problem: dict[str, Any] = {}
            if reason := method.missing[pair.moving.modality]:
                problem = {"status": "missing", "reason": reason}
            elif unprepared:
                problem = {"status": "failed", "reason": unprepared[0]}
            elif record := _read_record(plan, pair, method):
                records.append(record)
                continue
            else:
                problem = {"status": "failed", "reason": _why_failed(crashes, pair, method)}
            records.append({**_known(pair, method), **problem})
    return records


def _why_failed(crashes: Mapping[str, str], pair: "Pair", method: PlannedMethod) -> str:
    from m2m_bids.workflows.evaluation import node_names, pair_wf_name

    for name in node_names(method.key):
        for node, reason in crashes.items():
            if node.split(".")[1:] == [pair_wf_name(pair.name), name]:
                return reason
    return "its record was not written"


def _crash_dir(settings: Settings) -> Path:
    return settings.evaluation_dir / "log" / settings.run_uuid


def _dry_run_text(plan: Plan) -> str:
    lines = [
        f"m2m-bids would evaluate {len(plan.methods)} methods on {len(plan.pairs)} pairs.",
        "",
        f"Labels: {plan.labels.description}",
        "",
        "Methods",
    ]
    for method in plan.methods:
        missing = dict.fromkeys(reason for reason in method.missing.values() if reason)
        shown = f"missing: {'; '.join(missing)}" if missing else str(method.weights or "")
        lines.append(f"  {method.key:16s}{method.title:22s}{shown}".rstrip())
    lines += ["", "Pairs"]
    for pair in plan.pairs:
        truth = [name for name, file in pair.reference._asdict().items() if file]
        known = f" ({' and '.join(truth)} known)" if truth else ""
        lines.append(f"  {pair.kind:8s}{pair.moving.name} to {pair.fixed_name}{known}")
    return "\n".join(lines)


def _closing_text(
    records: Sequence[Mapping[str, Any]],
    summaries: Sequence[Mapping[str, Any]],
    folder: Path,
    report: Path,
) -> str:
    """Say how the methods did, what is missing or failed, and where everything is."""
    lines = [_summary_table(summaries), ""]
    problems: dict[tuple[str, str, str], int] = {}
    for record in records:
        if record["status"] != "done":
            key = (record["status"], record["title"], record["reason"])
            problems[key] = problems.get(key, 0) + 1
    lines += [
        f"  {status}: {title}{f' ({count} pairs)' if count > 1 else ''}: {reason}"
        for (status, title, reason), count in problems.items()
    ]
    lines += [f"Report:  {report}", f"Records: {folder / 'evaluation.tsv'}"]
    return "\n".join(lines)


def _summary_table(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Lay out the means of each modality, kind and method as text."""
    rows = [_COLUMNS]
    for row in summaries:
        numbers = ("dsc", "folding_percent", "landmark_error_mm", "seconds")
        digits = (3, 3, 2, 0)
        rows.append(
            (
                str(row["modality"]),
                str(row["kind"]),
                str(row["title"]),
                str(row["n"]),
                *(
                    _number(row.get(f"{number}_mean"), places)
                    for number, places in zip(numbers, digits, strict=True)
                ),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _number(value: Any, places: int) -> str:
    from m2m_bids.evaluation.records import known_number

    number = known_number(value)
    return "-" if number is None else f"{number:.{places}f}"
