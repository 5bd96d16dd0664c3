"""The page of an evaluation: what was run, with which caveats, and the pictures."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from m2m_bids.evaluation.label_images import read_labels
from m2m_bids.evaluation.labels import NAMES
from m2m_bids.reports.evaluation import EvaluationRun, write_evaluation_report
from m2m_bids.reports.pictures import ExamplePair, MovedImage
from m2m_bids.settings import DEFAULT_BASELINE_SPACING_MM
from m2m_bids.spatial.images import load_image
from m2m_bids.spatial.labels import labels_on_t1w

if TYPE_CHECKING:
    from m2m_bids.cli.evaluate import Plan
    from m2m_bids.cli.evaluation_plan import PlannedMethod
    from m2m_bids.evaluation.pairs import Pair

# What is outlined in the pictures, of whichever labels there are.
STRUCTURES = ("cerebral_white_matter", "ventricles", "white_matter", "lateral_ventricles")


def write_report(
    plan: "Plan", records: Sequence[Mapping[str, Any]], summaries: Sequence[Mapping[str, Any]]
) -> Path:
    """
    Write ``evaluation.html``.

    Parameters
    ----------
    plan : Plan
        What was evaluated.
    records, summaries : sequence of mapping
        Rows of ``evaluation.tsv`` and ``summary.tsv``.

    Returns
    -------
    Path
        The page.
    """
    from m2m_bids.bids.derivatives import software_versions

    run = EvaluationRun(
        facts=_facts(plan),
        caveats=_caveats(plan),
        command=shlex.join(["m2m-bids", *sys.argv[1:]]),
        software=software_versions(),
    )
    return write_evaluation_report(
        plan.settings.evaluation_dir / "evaluation.html",
        records,
        summaries,
        run=run,
        trainings=_trainings(plan.methods),
        shares=_shares(plan.methods, summaries),
        examples=[
            example
            for pair in plan.pairs
            if plan.is_shown(pair) and (example := _example(plan, pair)) is not None
        ],
    )


def _facts(plan: "Plan") -> dict[str, object]:
    """Say what was evaluated, and how."""
    settings = plan.settings
    facts: dict[str, object] = {
        "Data": str(settings.bids_dir),
        "Labels": plan.labels.description,
        "Pairs": str(settings.pairs) if settings.pairs else f"drawn, seed {settings.random_seed}",
    }
    if weighted := [method for method in plan.methods if method.weights]:
        facts["Weights"] = [
            f"{method.title}: {method.weights} (SHA-256 {method.weights_sha256[:12]}…),"
            f" {method.n_refine} steps of refinement"
            for method in weighted
        ]
    facts["Voxels of other methods"] = f"{settings.baseline_spacing_mm:g} mm"
    facts["Device"] = settings.device
    facts["Threads"] = f"{settings.omp_nthreads} of each registration, {settings.nprocs} in all"
    return facts


def _caveats(plan: "Plan") -> list[str]:
    """Say what a reader must know of this evaluation."""
    settings = plan.settings
    caveats = []
    if plan.labels.of_t1w is None:
        caveats.append(
            "The labels are tissues found by m2m-bids itself, which M2M-Reg also uses: their"
            " overlap favours it. For a fair comparison, give FreeSurfer's (--fs-subjects-dir)."
        )
    if plan.labels.of_scan:
        caveats.append(
            "The cohort is simulated by the software under test, which trained its default weights"
            " on simulated people too, of other seeds. Real images are harder."
        )
    if settings.baseline_spacing_mm > DEFAULT_BASELINE_SPACING_MM:
        caveats.append(
            f"Reduced: other methods saw voxels of {settings.baseline_spacing_mm:g} mm, where the"
            f" paper has {DEFAULT_BASELINE_SPACING_MM:g} mm."
        )
    if settings.nprocs > settings.omp_nthreads:
        caveats.append(
            "Several registrations ran at the same time, so that each may have taken longer than"
            " alone."
        )
    subjects = {scan.subject for pair in plan.pairs for scan in (pair.moving, pair.fixed)}
    for method in plan.methods:
        if seen := subjects & _trained_on(method):
            caveats.append(
                f"{method.title} was trained on {len(seen)} of the {len(subjects)} participants:"
                " what it shows here is not what it does on others."
            )
    return caveats


def _trained_on(method: "PlannedMethod") -> set[str]:
    """Participants that weights were trained on, as far as their training's folder tells."""
    from m2m_bids.cohort import SPLITS_NAME, read_splits

    file = (method.weights or Path()).parent / SPLITS_NAME
    if method.weights is None or not file.is_file():
        return set()
    return {subject for subject, split in read_splits(file).items() if split == "train"}


def _trainings(methods: Sequence["PlannedMethod"]) -> dict[str, list[dict[str, float]]]:
    """Read the validation logs beside weights."""
    from m2m_bids.registration.training import VALIDATION_LOG, read_log

    logs = {
        method.title: read_log(method.weights.parent / VALIDATION_LOG)
        for method in methods
        if method.weights
    }
    return {title: rows for title, rows in logs.items() if rows}


def _shares(
    methods: Sequence["PlannedMethod"], summaries: Sequence[Mapping[str, Any]]
) -> list[tuple[float, Mapping[str, Any]]]:
    """
    Find weights that were trained alike but for the share of pre-aligned pairs.

    Of several such groups, that with the most shares is taken; one share makes no curve.
    """
    from m2m_bids.registration.weights import read_card

    groups: dict[str, dict[str, float]] = {}
    for method in methods:
        if method.weights is None:
            continue
        card = read_card(method.weights)
        names = ("pre_aligned_subjects", "training_subjects")
        n_aligned, n_subjects = (card.details.get(name) for name in names)
        if n_subjects:
            like = f"{card.network} {card.config} {card.grid_size} {card.details['objective']}"
            groups.setdefault(like, {})[method.key] = 100 * n_aligned / n_subjects
    shares = max(groups.values(), key=lambda group: len(set(group.values())), default={})
    if len(set(shares.values())) < 2:
        return []
    return [
        (shares[row["method"]], row)
        for row in summaries
        if row["method"] in shares and row["kind"] == "between"
    ]


def _example(plan: "Plan", pair: "Pair") -> ExamplePair | None:
    """Read the images of a pair that is shown; None where no method moved any."""
    moved = {}
    for method in plan.methods:
        folder = plan.record_dir(pair, method)
        image, labels = folder / "moved.nii.gz", folder / "moved_labels.nii.gz"
        if image.is_file():
            moved[method.key] = MovedImage(
                load_image(image), load_image(labels) if labels.is_file() else None
            )
    if not moved:
        return None
    files, label = plan.files(pair.fixed), plan.fixed_labels(pair.fixed)
    t1w, mask = load_image(files.t1w_file), load_image(files.mask_file)
    labels = labels_on_t1w(read_labels(label.file, label.scheme), t1w, mask, label.file)
    present = set(np.unique(labels.dataobj))
    numbers = {name: number for number, name in NAMES.items() if number in present}
    return ExamplePair(
        pair=pair.name,
        modality=pair.moving.modality,
        fixed=t1w,
        mask=mask,
        moved=moved,
        labels=labels,
        structures={
            name.replace("_", " "): [numbers[name]] for name in STRUCTURES if name in numbers
        },
    )
