"""Write the page of a cohort: distributions, sortable table, ratings; one file, no network."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nb
import numpy as np

from m2m_bids.reports.fragments import about_html, summary_html
from m2m_bids.reports.mosaic import make_mosaic
from m2m_bids.reports.page import write_page
from m2m_bids.reports.svg import data_uri

TITLE = "Cohort"
N_SLICES = 5
COLOR_MAPS = {"pet": "inferno", "fa": "gray"}


class AveragePicture(NamedTuple):
    """
    Mean and standard deviation of a kind of scans, to be shown.

    Parameters
    ----------
    title : str
        Kind and space.
    modality : str
        "pet" or "fa".
    mean, sd : Nifti1Image or None
        On one grid; None of fewer than two images.
    note : str
        Number of images, how they were scaled.
    left_out : sequence of str
        Images that are not in it, and why.
    """

    title: str
    modality: str
    mean: nb.Nifti1Image | None
    sd: nb.Nifti1Image | None
    note: str
    left_out: Sequence[str] = ()


def write_group_report(
    out_file: Path,
    scans: Sequence[Mapping[str, Any]],
    columns: Sequence[Mapping[str, Any]],
    *,
    averages: Sequence[AveragePicture] = (),
    averages_note: str = "",
    facts: Mapping[str, object] | None = None,
    software: Mapping[str, object] | None = None,
    command: str = "",
) -> Path:
    """
    Write the page of a cohort.

    The page is one file and loads nothing. Scans are drawn by the script in it, from the data in
    it, as text: nothing in a name or reason is read as HTML.

    Parameters
    ----------
    out_file : Path
        HTML file to write.
    scans : sequence of mapping
        For each scan ``participant_id``, ``session_id``, ``scan``, ``kind`` (modality and tracer),
        ``status``, ``reason``, ``decision``, ``report`` (relative link, or None), ``flags`` (list
        of str) and ``numbers`` (by column).
    columns : sequence of mapping
        For each number ``name``, ``title``, ``unit``, ``meaning``, ``good``, ``worry``,
        ``flagged`` (which values are) and ``limits`` (to be drawn).
    averages : sequence of AveragePicture
    averages_note : str
        Said where there are none.
    facts, software : mapping, optional
        What was collected, and versions.
    command : str

    Returns
    -------
    Path
        `out_file`.
    """
    sections = {
        "In short": summary_html(facts or {}) + _noscript(),
        "Scans to look at": '<div id="flagged"></div>',
        "Distributions": '<p class="elem-caption">Thick lines are medians, dashed ones limits;'
        " each point is a scan and leads to its report. By the keyboard: Tab to a distribution,"
        " left and right to the next scan, up and down to another kind, Enter for the"
        ' report.</p><div id="panels" class="m2m-panels"></div>',
        "All scans": _table_frame(),
        "Cohort images": _averages_html(averages, averages_note),
        "What the numbers mean": _definitions(columns),
        "Software": about_html(software or {}, command=command),
    }
    data = _embedded({"scans": list(scans), "columns": list(columns)})
    return write_page(
        out_file, TITLE, sections, styles=("group.css",), script="group.js", data=data
    )


def _embedded(data: Mapping[str, Any]) -> str:
    """Write JSON that cannot end the element it is in."""
    return json.dumps(data, allow_nan=False).replace("<", "\\u003c")


def _noscript() -> str:
    return (
        '<noscript><p class="alert alert-warning">Plots and tables need JavaScript; the same'
        " numbers are in the tables beside this page.</p></noscript>"
    )


def _table_frame() -> str:
    return (
        '<form class="m2m-controls" id="controls" aria-label="Which scans">'
        '<label>Find <input type="search" id="find" autocomplete="off"></label>'
        '<label>Status <select id="status"><option value="">all</option></select></label>'
        '<label>Kind <select id="kind"><option value="">all</option></select></label>'
        '<label>Rated <select id="rated"><option value="">all</option></select></label>'
        '<label><input type="checkbox" id="only-flagged"> only those to look at</label>'
        '<button type="button" class="btn btn-primary btn-sm" id="export">Save ratings (TSV)'
        "</button>"
        '<label class="btn btn-outline-secondary btn-sm m2m-file">Load ratings (TSV)'
        '<input type="file" id="import" class="visually-hidden"'
        ' accept=".tsv,text/tab-separated-values"></label></form>'
        '<p id="count" role="status" aria-live="polite"></p><p id="loaded" role="status"></p>'
        '<a class="visually-hidden-focusable" href="#rows">To the first rating</a>'
        '<div class="m2m-wide m2m-frame" tabindex="0" role="region"'
        ' aria-label="Table of all scans">'
        '<table class="table table-sm m2m-evaluation m2m-scans" id="scans"></table></div>'
        '<div class="m2m-pages"><button type="button" class="btn btn-outline-secondary btn-sm"'
        ' id="previous">Previous</button> <span id="page"></span> <button type="button"'
        ' class="btn btn-outline-secondary btn-sm" id="next">Next</button></div>'
        '<p class="elem-caption">Ratings and notes stay in this browser until they are saved;'
        " a saved table can be loaded here or by somebody else.</p>"
    )


def _definitions(columns: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for column in columns:
        unit = f" ({escape(column['unit'])})" if column["unit"] else ""
        parts.append(
            f"<dt>{escape(column['title'])}{unit} <code>{escape(column['name'])}</code></dt>"
            f"<dd>{escape(column['meaning'])} <em>Good:</em> {escape(column['good'])}"
            f" <em>Worry:</em> {escape(column['worry'])}"
            f" <em>Flagged:</em> {escape(column['flagged'])}.</dd>"
        )
    return f"<dl>{''.join(parts)}</dl>"


def _averages_html(averages: Sequence[AveragePicture], note: str) -> str:
    if not averages:
        return f"<p>{escape(note)}</p>"
    return "".join(
        f'<h3>{escape(average.title)}</h3><p class="elem-caption">{escape(average.note)}</p>'
        f'{_left_out_html(average.left_out)}<div class="m2m-panels">{_pictures(average)}</div>'
        for average in averages
    )


def _left_out_html(reasons: Sequence[str]) -> str:
    if not reasons:
        return ""
    items = "".join(f"<li>{escape(reason)}</li>" for reason in reasons)
    return f"<details><summary>{len(reasons)} left out</summary><ul>{items}</ul></details>"


def _pictures(average: AveragePicture) -> str:
    return "".join(
        f"<figure>{_picture(image, average, what)}<figcaption>{what}</figcaption></figure>"
        for what, image in (("Mean", average.mean), ("Standard deviation", average.sd))
        if image is not None
    )


def _picture(image: nb.Nifti1Image, average: AveragePicture, what: str) -> str:
    """Draw slices of an image, from zero to its 99.5th percentile in the head."""
    from matplotlib import colormaps

    mean = np.asarray(average.mean.dataobj)
    head = (mean > 0.1 * np.percentile(mean, 99)).astype(np.uint8)
    if not head.any():
        return "<p>Nothing is above zero.</p>"
    mosaic = make_mosaic(nb.Nifti1Image(head, average.mean.affine), n_slices=N_SLICES)
    top = np.percentile(np.asarray(image.dataobj)[head > 0], 99.5) or 1.0
    colors = colormaps[COLOR_MAPS[average.modality]]
    tiles = [
        (255 * colors(np.clip(tile / top, 0, 1))[..., :3]).astype(np.uint8)
        for tile in mosaic.sample(image)
    ]
    alt = escape(f"{what} of {average.title}: axial, coronal and sagittal slices, 0 to {top:.3g}")
    return f'<img alt="{alt}" src="{data_uri(mosaic.canvas(tiles))}">'
