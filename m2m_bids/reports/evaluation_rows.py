"""Read the rows of an evaluation: records of pairs, summaries of methods."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

Row = Mapping[str, object]

KINDS = {"between": "between subjects", "within": "within a subject"}
MODALITIES = {"pet": "PET → T1w", "fa": "FA → T1w"}
STARTS = ("initial", "rigid")  # they deform nothing
OWN_PREFIX = "m2m:"


def as_number(value: object) -> float | None:
    """
    Read a number of a row.

    Parameters
    ----------
    value : object
        Number, or text as it stands in a table.

    Returns
    -------
    float or None
        ``None`` for ``n/a``, NaN, infinities and anything that is not a number.

    Examples
    --------
    >>> as_number("0.5"), as_number("n/a"), as_number(float("nan"))
    (0.5, None, None)
    """
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def statistic(summary: Row, number: str, name: str) -> float | None:
    """Return a statistic of a number: ``n``, ``mean``, ``sd``, ``ci_low``, ``ci_high``, ``p``."""
    return as_number(summary.get(f"{number}_{name}"))


def mean_dsc(summary: Row) -> float | None:
    """Return the mean DSC of a summary."""
    return statistic(summary, "dsc", "mean")


def n_pairs(summary: Row, count: str = "n") -> int:
    """Return how many pairs were registered (``n``), or have a number (``dsc_n``)."""
    return int(as_number(summary.get(count)) or 0)


def n_lost(summary: Row) -> int:
    """Return how many pairs were not registered, for want of a program or since it failed."""
    return n_pairs(summary, "n_failed") + n_pairs(summary, "n_missing")


def is_own(method: object) -> bool:
    """Whether a method is a network of m2m-bids."""
    return str(method).startswith(OWN_PREFIX)


def least_p_value(summaries: Sequence[Row]) -> float:
    """
    Return the least p value that so few pairs allow, whatever the difference.

    Parameters
    ----------
    summaries : sequence of mapping
        Of all methods of one kind and modality.

    Returns
    -------
    float
        All differences of one sign are 2 of 2**n assignments of signs; times Holm's factor.
    """
    n_tests = sum(statistic(row, "dsc", "p") is not None for row in summaries)
    n_differences = max((n_pairs(row, "dsc_n") for row in summaries), default=0)
    return min(1.0, n_tests * 2 / 2**n_differences)


def best_own(summaries: Iterable[Row]) -> Row | None:
    """Return the summary of the network of highest mean DSC, if any has one."""
    known = [(mean_dsc(row), row) for row in summaries if is_own(row["method"])]
    scored = [(mean, row) for mean, row in known if mean is not None]
    return max(scored, key=lambda item: item[0])[1] if scored else None


def baseline_of(summaries: Sequence[Row]) -> Row | None:
    """Return the summary, of one kind and modality, that the others were tested against."""
    return next((row for row in summaries if row["method"] == row.get("dsc_baseline")), None)


def group_rows(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Group rows by kind and modality, in the order of the page."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((str(row["kind"]), str(row["modality"])), []).append(row)
    order = [*KINDS, *MODALITIES]
    return dict(
        sorted(
            groups.items(),
            key=lambda item: [order.index(k) if k in order else len(order) for k in item[0]],
        )
    )


def modality_title(modality: object) -> str:
    """Say what is registered to what, as plain text."""
    return MODALITIES.get(str(modality), f"{modality} → T1w")


def group_title(kind: str, modality: str) -> str:
    """Name a kind of pair and its modality, as plain text."""
    return f"{modality_title(modality)}, {KINDS.get(kind, kind)}"


def class_title(name: str) -> str:
    """
    Name a class of labels, as plain text.

    >>> class_title("csf_outside_lateral_ventricles")
    'CSF outside lateral ventricles'
    """
    return " ".join("CSF" if word == "csf" else word for word in name.split("_"))


def method_titles(rows: Iterable[Row]) -> dict[str, str]:
    """
    Return the title of each method, in order of appearance, as plain text.

    Parameters
    ----------
    rows : iterable of mapping
        Records or summaries.

    Returns
    -------
    dict of str to str
        Titles that several methods share are told apart by the methods' keys.

    Examples
    --------
    >>> method_titles([{"method": "a", "title": "SyN"}, {"method": "b", "title": "SyN"}])
    {'a': 'SyN (a)', 'b': 'SyN (b)'}
    """
    titles = {str(row["method"]): str(row.get("title") or row["method"]) for row in rows}
    counts = Counter(titles.values())
    return {m: title if counts[title] == 1 else f"{title} ({m})" for m, title in titles.items()}


def subjects(records: Sequence[Row]) -> set[str]:
    """Return the participants of records, moving or fixed."""
    names = ("moving_subject", "fixed_subject")
    return {str(row[name]) for row in records for name in names if row.get(name)}
