"""Records of an evaluation, one for each pair and method: their fields, summary and tables."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from m2m_bids.evaluation.hausdorff import hd95_per_label
from m2m_bids.evaluation.labels import NAMES, labels_in_common
from m2m_bids.evaluation.overlap import dice_per_label
from m2m_bids.evaluation.statistics import holm, paired_p_value, shared_bootstrap_interval
from m2m_bids.whole_files import replacing

Value = str | int | float | None
Record = Mapping[str, Value]

NOT_KNOWN = "n/a"
OWN_PREFIX = "m2m:"
"""Methods whose keys begin so are M2M-Reg; the others are its baselines."""

_ORDER = ("pet", "fa", "between", "within")
_KEYS: dict[str, dict] = {
    "pair": {"Description": "Name of the pair of images."},
    "moving": {"Description": "Name of the PET or FA scan that is moved."},
    "fixed": {"Description": "Name of the T1w image that it is registered to."},
    "moving_subject": {"Description": "Participant of the moving scan."},
    "fixed_subject": {"Description": "Participant of the fixed image."},
    "modality": {
        "Description": "Kind of the moving scan.",
        "Levels": {"pet": "PET", "fa": "fractional anisotropy of a diffusion scan"},
    },
    "kind": {
        "Description": "Whose images are registered.",
        "Levels": {"between": "those of two participants", "within": "those of one participant"},
    },
    "method": {"Description": "Key of the method; m2m:NAME is M2M-Reg with the weights NAME."},
    "title": {"Description": "Name of the method as shown."},
    "status": {
        "Description": "What became of the registration.",
        "Levels": {
            "done": "registered",
            "missing": "not run: the program, the weights or an input is missing",
            "failed": "ended with an error",
        },
    },
    "reason": {
        "Description": "Why the registration is missing or failed, or why the deformable step of "
        "M2M-Reg was not applied."
    },
}
_NUMBERS: dict[str, dict] = {
    "dsc": {
        "LongName": "Dice similarity coefficient",
        "Description": "2 |A and B| / (|A| + |B|) of the moved and the fixed labels, from 0, "
        "apart, to 1, equal: mean over the classes that are in either map. A class that is in one "
        "map only has 0.",
    },
    "hd95_mm": {
        "LongName": "95 % Hausdorff distance",
        "Description": "95th percentile of the distances from each surface of a class to the "
        "other, the larger of both directions: mean over the classes that are in both maps.",
        "Units": "mm",
    },
    "folding_percent": {
        "LongName": "Folds",
        "Description": "Voxels of the fixed brain at which the Jacobian determinant of the map in "
        "the world, by central differences, is not positive.",
        "Units": "%",
    },
    "folding_percent_paper": {
        "LongName": "Folds as the M2M-Reg paper counts them",
        "Description": "Cells of the whole grid, background too, at which the Jacobian "
        "determinant of differences from voxel to voxel is negative.",
        "Units": "%",
    },
    "landmark_error_mm": {
        "Description": "Mean distance from where the map takes landmarks to where the known or "
        "reference transform takes them.",
        "Units": "mm",
    },
    "seconds": {"Description": "Wall-clock time of the registration of the pair.", "Units": "s"},
    "peak_memory_gb": {
        "Description": "Largest memory held during the registration of the pair.",
        "Units": "GB",
    },
}
_OF_CLASSES = ("dsc", "hd95_mm")
_STATISTICS = {
    "n": "Pairs that have the number",
    "mean": "Mean over the pairs",
    "sd": "Standard deviation over the pairs (n - 1)",
    "ci_low": "Lower end of the 95 % confidence interval of the mean (bootstrap of participants)",
    "ci_high": "Upper end of the 95 % confidence interval of the mean (bootstrap of participants)",
}
_COUNTS: dict[str, dict] = {
    "n": {"Description": "Pairs that were registered."},
    "n_failed": {"Description": "Pairs of which the registration ended with an error."},
    "n_missing": {"Description": "Pairs that were not registered since something is missing."},
}
_TEST: dict[str, dict] = {
    "dsc_baseline": {
        "Description": "Method of highest mean DSC among those that are not M2M-Reg, for this "
        "modality and kind; the others are tested against it."
    },
    "dsc_p": {
        "Description": "Two-sided p value of Wilcoxon's signed-rank test of the DSC against "
        "dsc_baseline, over the pairs that both have, adjusted by Holm's method for the number of "
        "methods tested in this modality and kind. Pairs are taken as independent: where they "
        "share participants, rather see whether the intervals overlap."
    },
}


def label_measures(
    moved_labels: np.ndarray, fixed_labels: np.ndarray, affine: np.ndarray
) -> dict[str, Value]:
    """
    Measure how well moved labels agree with those of the fixed image, as fields of a record.

    Parameters
    ----------
    moved_labels, fixed_labels : ndarray of integers, shape (I, J, K)
        Label maps as from `m2m_bids.evaluation.labels.evaluation_labels`, on the fixed grid.
    affine : ndarray, shape (4, 4)
        Voxel to world of the grid, mm.

    Returns
    -------
    dict of str to float or str
        ``dsc`` and ``hd95_mm``, means over the classes, and ``dsc_CLASS`` and ``hd95_mm_CLASS`` of
        every class of the labels' scheme. "n/a" for what cannot be known: the overlap of a class
        that is in neither map, and the distance of one that is absent from either.

    Raises
    ------
    ValueError
        If the maps are of different schemes, or as `hd95_per_label` says.
    """
    labels = labels_in_common(moved_labels, fixed_labels)
    scores = {
        "dsc": dice_per_label(moved_labels, fixed_labels, labels),
        "hd95_mm": hd95_per_label(moved_labels, fixed_labels, affine, labels),
    }
    measures: dict[str, Value] = {}
    for number, of_label in scores.items():
        measures[number] = float(np.mean(list(of_label.values()))) if of_label else NOT_KNOWN
        for label in labels:
            measures[f"{number}_{NAMES[label]}"] = of_label.get(label, NOT_KNOWN)
    return measures


def summarize(records: Sequence[Record], *, seed: int = 0) -> list[dict[str, Value]]:
    """
    Summarise the records of each modality, kind of pair and method.

    Parameters
    ----------
    records : sequence of mapping
        Fields as `write_records` describes them. What is absent, None, NaN or "n/a" is not known.
    seed : int
        Of the bootstrap.

    Returns
    -------
    list of dict
        A row for each ``modality``, ``kind`` and ``method``, methods in the order of the records:
        ``title``; ``n``, ``n_failed`` and ``n_missing`` pairs; for each number of the records
        ``_n``, ``_mean``, ``_sd``, ``_ci_low`` and ``_ci_high`` over the pairs that were
        registered and have it; ``dsc_baseline``, the method of highest mean DSC that is not
        M2M-Reg, and ``dsc_p``, Wilcoxon's test against it, adjusted by Holm's method within a
        modality and kind. "n/a" for what is not known.

    Raises
    ------
    ValueError
        If a record lacks a key, has an unknown field or text for a number, or a pair has two
        records of a method.
    """
    _check(records)
    numbers = [name for name in _fields(records) if name not in _KEYS]
    rows: list[dict[str, Value]] = []
    for modality, kind in _groups(records):
        group = [row for row in records if (row["modality"], row["kind"]) == (modality, kind)]
        methods: dict[str, list[Record]] = {}
        for record in group:
            methods.setdefault(str(record["method"]), []).append(record)
        summaries = [_summary(of_method, numbers, seed) for of_method in methods.values()]
        _add_test(summaries, methods)
        rows += summaries
    return rows


def write_records(
    records: Sequence[Record], folder: Path, *, seed: int = 0
) -> list[dict[str, Value]]:
    """
    Write ``evaluation.tsv`` and ``summary.tsv``, each with a data dictionary (``.json``).

    Parameters
    ----------
    records : sequence of mapping
        One for each pair and method: ``pair``, ``method``, ``modality``, ``kind`` and ``status``,
        and as far as known ``moving``, ``fixed``, ``moving_subject``, ``fixed_subject``,
        ``title``, ``reason``, the fields of `label_measures`, ``folding_percent``,
        ``folding_percent_paper``, ``landmark_error_mm``, ``seconds`` and ``peak_memory_gb``.
    folder : Path
        Made if necessary; each file is replaced at once.
    seed : int
        Of the bootstrap.

    Returns
    -------
    list of dict
        The rows of ``summary.tsv``, see `summarize`.

    Raises
    ------
    ValueError
        As `summarize` says; nothing is written then.
    """
    summaries = summarize(records, seed=seed)
    columns = _fields(records)
    numbers = [name for name in columns if name not in _KEYS]
    _write_table(records, {name: _description(name) for name in columns}, folder / "evaluation")
    _write_table(summaries, _summary_columns(numbers), folder / "summary")
    return summaries


def known_number(value: Value) -> float | None:
    """
    Return a number of a record, None if it is not known.

    >>> known_number(0.5), known_number("0.5"), known_number("n/a"), known_number(None)
    (0.5, 0.5, None, None)
    """
    number = math.nan if value in (None, "", NOT_KNOWN) else float(value)  # type: ignore[arg-type]
    return number if math.isfinite(number) else None


def _fields(records: Iterable[Record]) -> list[str]:
    """All fields of records in their standard order, those of classes by the classes' order."""
    present = {name for record in records for name in record}
    order = list(_KEYS)
    for number in _NUMBERS:
        order.append(number)
        if number in _OF_CLASSES:
            order += [f"{number}_{name}" for name in NAMES.values()]
    if unknown := present - set(order):
        raise ValueError(f"records: unknown fields {', '.join(sorted(unknown))}")
    return [name for name in order if name in present or name in _KEYS or name in _NUMBERS]


def _check(records: Iterable[Record]) -> None:
    seen = set()
    for record in records:
        for key in ("pair", "method", "modality", "kind", "status"):
            if record.get(key) in (None, "", NOT_KNOWN):
                raise ValueError(f"records: {key} is missing in {dict(record)}")
        if record["status"] not in _KEYS["status"]["Levels"]:
            raise ValueError(
                f"records: status {record['status']!r} of {record['method']}; expected one of "
                f"{', '.join(_KEYS['status']['Levels'])}"
            )
        pair, method = record["pair"], record["method"]
        key = (record["modality"], record["kind"], pair, method)
        if key in seen:
            raise ValueError(f"records: the pair {pair} has two records of {method}")
        seen.add(key)
        for name in set(record) - set(_KEYS):
            try:
                known_number(record[name])
            except ValueError:
                raise ValueError(
                    f"records: {name} of the pair {pair} by {method} is {record[name]!r}; "
                    f"expected a number or {NOT_KNOWN}"
                ) from None


def _groups(records: Iterable[Record]) -> list[tuple[Value, Value]]:
    """Modalities and kinds: PET before FA, between before within participants."""
    groups = dict.fromkeys((record["modality"], record["kind"]) for record in records)
    known = {name: place for place, name in enumerate(_ORDER)}
    return sorted(groups, key=lambda group: [known.get(name, len(known)) for name in group])


def _summary(records: Sequence[Record], numbers: Sequence[str], seed: int) -> dict[str, Value]:
    """Summarise one method, its test left open."""
    first, statuses = records[0], [record["status"] for record in records]
    row: dict[str, Value] = {
        "modality": first["modality"],
        "kind": first["kind"],
        "method": first["method"],
        "title": first.get("title") or first["method"],
        "n": statuses.count("done"),
        "n_failed": statuses.count("failed"),
        "n_missing": statuses.count("missing"),
        **dict.fromkeys(_TEST, NOT_KNOWN),
    }
    people = {str(record["pair"]): _participants(record) for record in records}
    for number in numbers:
        by_pair = _values(records, number)
        values = list(by_pair.values())
        interval = shared_bootstrap_interval(values, [people[p] for p in by_pair], seed=seed)
        row |= {
            f"{number}_n": len(values),
            f"{number}_mean": float(np.mean(values)) if values else NOT_KNOWN,
            f"{number}_sd": float(np.std(values, ddof=1)) if len(values) > 1 else NOT_KNOWN,
            f"{number}_ci_low": interval.low if interval else NOT_KNOWN,
            f"{number}_ci_high": interval.high if interval else NOT_KNOWN,
        }
    return row


def _participants(record: Record) -> tuple[str, str]:
    """Return the participants of a pair; one of its own for an unknown one."""
    moving, fixed = (
        str(record.get(key) or record["pair"]) for key in ("moving_subject", "fixed_subject")
    )
    return moving, fixed


def _values(records: Iterable[Record], number: str) -> dict[str, float]:
    """Return what is known of a number, by pair."""
    values = {
        str(record["pair"]): known_number(record.get(number))
        for record in records
        if record["status"] == "done"
    }
    return {pair: value for pair, value in values.items() if value is not None}


def _add_test(
    summaries: Sequence[dict[str, Value]], methods: Mapping[str, Sequence[Record]]
) -> None:
    """Test all methods of a modality and kind against the best baseline."""
    means = {str(row["method"]): known_number(row["dsc_mean"]) for row in summaries}
    baselines = {
        method: mean
        for method, mean in means.items()
        if mean is not None and not method.startswith(OWN_PREFIX)
    }
    if not baselines:
        return
    best = max(baselines, key=baselines.__getitem__)
    reference = _values(methods[best], "dsc")
    tested, p_values = [], []
    for row in summaries:
        row["dsc_baseline"] = best
        values = _values(methods[str(row["method"])], "dsc")
        pairs = [pair for pair in values if pair in reference]
        p_value = paired_p_value([values[p] for p in pairs], [reference[p] for p in pairs])
        if row["method"] != best and p_value is not None:
            tested.append(row)
            p_values.append(p_value)
    for row, p_value in zip(tested, holm(p_values), strict=True):
        row["dsc_p"] = p_value


def _description(name: str) -> dict:
    """Describe a field of records."""
    if name in _KEYS or name in _NUMBERS:
        return {**_KEYS, **_NUMBERS}[name]
    number = next(number for number in _OF_CLASSES if name.startswith(f"{number}_"))
    class_name = name.removeprefix(f"{number}_").replace("_", " ")
    whole = _NUMBERS[number]
    text = whole["Description"].partition(": mean over the classes")[0]
    return {**whole, "Description": f"{text}: {class_name}."}


def _summary_columns(numbers: Sequence[str]) -> dict[str, dict]:
    """Describe the columns of a summary."""
    columns = {name: _KEYS[name] for name in ("modality", "kind", "method", "title")} | _COUNTS
    for number in numbers:
        of_number = _description(number)
        units = {"Units": of_number["Units"]} if "Units" in of_number else {}
        for statistic, text in _STATISTICS.items():
            columns[f"{number}_{statistic}"] = {
                "Description": f"{text}: {number} of evaluation.tsv.",
                **({} if statistic == "n" else units),
            }
        if number == "dsc":
            columns |= _TEST
    return columns


def _write_table(rows: Sequence[Record], columns: Mapping[str, dict], stem: Path) -> None:
    """Write a table and its data dictionary."""
    lines = ["\t".join(columns)]
    lines += ["\t".join(_text(row.get(name)) for name in columns) for row in rows]
    with replacing(stem.with_suffix(".tsv")) as file:
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with replacing(stem.with_suffix(".json")) as file:
        file.write_text(json.dumps(columns, indent=2) + "\n", encoding="utf-8")


def _text(value: Value) -> str:
    """Write a value on one line; numbers to six digits."""
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else NOT_KNOWN
    return NOT_KNOWN if value is None else " ".join(str(value).split()) or NOT_KNOWN
