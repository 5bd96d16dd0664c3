"""Curves of a training."""

from pathlib import Path

from m2m_bids.whole_files import replacing

DSC_COLOR, LNCC_COLOR = "#1b6ca8", "#c8553d"


def draw_training(rows: list[dict[str, float]], file: Path) -> Path:
    """
    Draw similarity against overlap over a training, as Fig. 1 of the M2M-Reg paper does.

    Where the similarity of both modalities (LNCC) rises while the overlap of labels (DSC) falls,
    the similarity misleads.

    Parameters
    ----------
    rows : list of dict of str to float
        ``iteration``, ``lncc`` and, where labels are known, ``dsc`` and ``dsc_before``.
    file : Path
        SVG file to write.

    Returns
    -------
    Path
        The file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    iterations = [row["iteration"] for row in rows]
    axes.plot(iterations, [row["lncc"] for row in rows], color=LNCC_COLOR, marker=".")
    axes.set_xlabel("iteration")
    axes.set_ylabel("similarity of both modalities (LNCC)", color=LNCC_COLOR)
    if any("dsc" in row for row in rows):
        overlap = axes.twinx()
        known = [row for row in rows if "dsc" in row]
        overlap.plot(
            [row["iteration"] for row in known],
            [row["dsc"] for row in known],
            color=DSC_COLOR,
            marker="o",
            markersize=3,
        )
        overlap.axhline(known[0]["dsc_before"], color=DSC_COLOR, linestyle="--", linewidth=1)
        overlap.set_ylabel("overlap of labels (DSC; dashed: before)", color=DSC_COLOR)
    with replacing(file, is_alone=True) as beside:
        figure.savefig(beside, format="svg")
    return file
