"""Put sections into a page of one file, which loads nothing."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from m2m_bids.whole_files import replacing

COMMON_STYLES = ("bootstrap.min.css", "report.css", "evaluation.css")
# The browser itself then keeps the page from loading or running anything.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write_page(
    out_file: Path,
    title: str,
    sections: Mapping[str, str],
    *,
    styles: Sequence[str] = (),
    script: str = "",
    data: str = "",
) -> Path:
    """
    Write a page, beside its name and then renamed.

    Parameters
    ----------
    out_file : Path
        HTML file to write; its folder is made.
    title : str
        Heading.
    sections : mapping of str to str
        HTML by heading.
    styles : sequence of str
        Style sheets of ``data/report`` beside the common ones.
    script : str
        Script of ``data/report``, the only one that the browser will run.
    data : str
        JSON for the script, in an element with the identifier ``data``.

    Returns
    -------
    Path
        `out_file`.
    """
    style = "\n".join(_asset(name) for name in (*COMMON_STYLES, *styles))
    policy, scripts = POLICY, ""
    if script:
        code = _asset(script)
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        policy = f"{policy}; script-src 'sha256-{digest}'"
        scripts = f'\n<script type="application/json" id="data">{data}</script>\n'
        scripts += f"<script>{code}</script>"
    anchors = {name: name.lower().replace(" ", "-") for name in sections}
    links = "".join(f'<a href="#{anchor}">{name}</a>' for name, anchor in anchors.items())
    body = "\n".join(
        f'<section aria-labelledby="{anchors[name]}"><h2 id="{anchors[name]}">{name}</h2>\n'
        f"{content}</section>"
        for name, content in sections.items()
    )
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title><style>{style}</style></head>\n"
        f'<body class="m2m-page"><header><h1>{title}</h1></header>\n'
        f'<nav aria-label="Sections">{links}</nav>\n<main>{body}</main>{scripts}</body></html>\n'
    )
    out_file = Path(out_file)
    with replacing(out_file, is_alone=True) as beside:
        beside.write_text(page, "UTF-8", errors="replace")
    return out_file


def _asset(name: str) -> str:
    return files("m2m_bids.data").joinpath("report", name).read_text("UTF-8")
