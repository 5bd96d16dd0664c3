"""Say in words what an evaluation found, what its numbers mean and what limits them."""

from collections.abc import Mapping, Sequence
from html import escape

from m2m_bids.reports.evaluation_rows import (
    Row,
    baseline_of,
    best_own,
    group_rows,
    group_title,
    least_p_value,
    mean_dsc,
    method_titles,
    n_lost,
    n_pairs,
    statistic,
    subjects,
)
from m2m_bids.reports.evaluation_tables import NUMBERS, SIGNIFICANCE, p_text

TABLE_NOTE = (
    "Mean ± standard deviation over pairs; in brackets the 95 % confidence interval of "
    "the mean, by bootstrap of participants. ↑ higher is better, ↓ lower is better. "
    "<strong>Bold</strong>: best of its column, among methods that did all pairs; "
    "for folds, time and memory, among methods that deform. "
    "p: paired Wilcoxon signed-rank test of the DSC against the best baseline, which is the "
    "method of highest mean DSC that is no network of m2m-bids, with Holm's correction; below "
    f"{SIGNIFICANCE}, ▲ marks a mean above that baseline's and ▼ one below. †: some pairs failed, "
    "so the means are over other pairs than those of the neighbours. Shaded: networks of m2m-bids."
)
DEFINITIONS = {
    "Pair": "A moving scan (PET or FA) and a fixed T1w. Between subjects, they are of two "
    "participants, and the moving labels are those of the moving participant's own T1w, carried "
    "over by the rigid alignment of the scan with that T1w. Within a subject, they are of one "
    "participant, and the truth is a reference transform or landmarks.",
    "Initial, rigid": "Positions as in the headers, and after the rigid alignment from which all "
    "other methods start.",
    "Networks of m2m-bids": "Weights trained with M2M-Reg, or, where their name says so, with a "
    "conventional objective, a similarity of both modalities, to compare with.",
    **{number.label: number.definition for number in NUMBERS},
    "95 % CI": "Bootstrap interval of the mean. Where pairs share participants, these are drawn; "
    "none for fewer than three. Otherwise pairs are, bias-corrected and accelerated; none for "
    "fewer than five.",
    "p": "Two-sided paired Wilcoxon signed-rank test over the pairs that both methods have, "
    "corrected after Holm for the number of methods of one kind of pair and modality.",
    "n/a, –": "Not known, or not measured.",  # noqa: RUF001
}
GENERAL_CAVEATS = (
    (
        "Overlap of labels says where structures lie, not whether the deformation inside and "
        "between them is right. Read the DSC together with folds and pictures."
    ),
    (
        "Between subjects, moving labels come through the rigid alignment of the scan with its "
        "own T1w, and labels are themselves estimated: a perfect registration need not have a "
        "DSC of 1."
    ),
    (
        "The best baseline and, where several are listed, the best network are chosen by the "
        "mean DSC of these same pairs, so both means are slightly too good. Holm's correction "
        "allows for the number of methods."
    ),
    (
        "Other methods were run with fixed settings and were not tuned to these data; better "
        "settings may exist."
    ),
    (
        "Time and memory hold for this machine and its load, and for the device that each method "
        "used."
    ),
)


def verdicts(summaries: Sequence[Row]) -> str:
    """
    Compare the best network with the best baseline, in a sentence for each kind and modality.

    Parameters
    ----------
    summaries : sequence of mapping

    Returns
    -------
    str
        HTML list.
    """
    titles = method_titles(summaries)
    items = "".join(
        f"<li><strong>{escape(group_title(*group))}:</strong> {_verdict(rows, titles)}</li>"
        for group, rows in group_rows(summaries).items()
    )
    return f"<ul>{items}</ul>"


def _verdict(summaries: Sequence[Row], titles: Mapping[str, str]) -> str:
    own, baseline = best_own(summaries), baseline_of(summaries)
    if own is None or baseline is None:
        only = own or baseline
        if only is None:
            return "no overlap could be measured."
        missing = "network of m2m-bids" if own is None else "other method"
        return f"{_score(only, titles)}; no {missing} to compare with."
    difference = (mean_dsc(own) or 0.0) - (mean_dsc(baseline) or 0.0)
    order = "above" if difference > 0 else "below" if difference < 0 else "equal to"
    sentence = (
        f"{_score(own, titles)} is {order} the best baseline, {_score(baseline, titles)}: "
        f"{difference:+.3f}, {_test(own, summaries)}."
    )
    if n_pairs(own, "dsc_n") != n_pairs(baseline, "dsc_n"):
        sentence += " The two means are over different pairs."
    folds = statistic(own, "folding_percent", "mean")
    return sentence + ("" if folds is None else f" Folds: {folds:.3f} %.")


def _test(own: Row, summaries: Sequence[Row]) -> str:
    """Say what the test of a network against the best baseline found, escaped."""
    p_value = statistic(own, "dsc", "p")
    if p_value is None:
        return "not tested"
    if least_p_value(summaries) >= SIGNIFICANCE:
        return "of too few pairs for a test"
    return p_text(p_value) + (", so this may be chance" if p_value >= SIGNIFICANCE else "")


def _score(summary: Row, titles: Mapping[str, str]) -> str:
    title = escape(titles[str(summary["method"])])
    return f"{title} (mean DSC {mean_dsc(summary):.3f}, n = {n_pairs(summary, 'dsc_n')})"


def counts(records: Sequence[Row]) -> dict[str, str]:
    """Count pairs, participants and methods of each kind and modality, as plain text."""
    return {
        group_title(*group): ", ".join(
            (
                plural(len({row["pair"] for row in rows}), "pair"),
                plural(len(subjects(rows)), "participant"),
                plural(len({row["method"] for row in rows}), "method"),
            )
        )
        for group, rows in group_rows(records).items()
    }


def plural(number: int, name: str) -> str:
    """
    Write a number and what it counts.

    >>> plural(1, "pair"), plural(2, "pair")
    ('1 pair', '2 pairs')
    """
    return f"{number} {name}{'' if number == 1 else 's'}"


def definitions() -> str:
    """List what each number means, HTML."""
    items = (f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in DEFINITIONS.items())
    return f"<dl>{''.join(items)}</dl>"


def caveats(
    records: Sequence[Row], summaries: Sequence[Row], of_this_run: Sequence[str] = ()
) -> str:
    """
    List what limits the conclusions: in this run, by the number of pairs, and in general.

    Parameters
    ----------
    records, summaries : sequence of mapping
    of_this_run : sequence of str
        Said first, plain text.

    Returns
    -------
    str
        HTML.
    """
    items = [*of_this_run]
    summarized = group_rows(summaries)
    for group, rows in group_rows(records).items():
        items += _caveats_of_size(group_title(*group), rows, summarized.get(group, []))
    if any(n_pairs(row) and n_lost(row) for row in summaries):
        items.append(
            "Methods that failed for some pairs (†) are averaged over the rest. If those are the "
            "easy ones, their means are too good."
        )
    items += GENERAL_CAVEATS
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"


def _caveats_of_size(name: str, records: Sequence[Row], summaries: Sequence[Row]) -> list[str]:
    """Caveats of one kind and modality."""
    number, n_subjects = len({row["pair"] for row in records}), len(subjects(records))
    smallest_p = least_p_value(summaries)
    items = []
    if number == 1:
        items.append(
            f"{name}: one pair only, so there is no spread or interval, and a test says nothing."
        )
    elif smallest_p >= SIGNIFICANCE:
        items.append(
            f"{name}: with {number} pairs and so many methods, no p can be below "
            f"{smallest_p:.2g}, whatever the difference. None is shown."
        )
    if records[0]["kind"] == "between" and 0 < n_subjects < 2 * number:
        items.append(
            f"{name}: {number} pairs are made of {n_subjects} participants. Tests take pairs as "
            "independent: where pairs share a participant, p is too small. Intervals allow for it."
        )
    return items
