"""Draw how a transform changes volumes: the logarithm of the Jacobian determinant."""

from pathlib import Path

import nibabel as nb
import numpy as np

from m2m_bids.reports.value_map import SMALLEST, Scale, Words, draw_map, values_in_mask

# Colour limits, log2: never so tight that noise looks like a deformation, never beyond fourfold.
LIMITS_LOG2 = (np.log2(1.25), 2.0)


def jacobian_figure(
    determinant: nb.Nifti1Image,
    mask: nb.Nifti1Image,
    out_file: Path,
    *,
    background: nb.Nifti1Image | None = None,
    label: str = "moving image",
    target: str = "T1w",
) -> Path:
    """
    Draw a map of the Jacobian determinant, on a logarithmic scale, with histogram and numbers.

    Parameters
    ----------
    determinant : Nifti1Image
        Determinant of the map from T1w points to points of the moving image, 3-D, in the T1w's
        world; its grid may be coarser than the mask's.
    mask : Nifti1Image
        Brain mask on the T1w; only values inside are drawn and counted.
    out_file : Path
        SVG file to write.
    background : Nifti1Image, optional
        T1w, drawn dimmed outside the mask.
    label : str
        What the moving image is, as shown: PET, FA.
    target : str
        What it is registered to, as shown: T1w, or template.

    Returns
    -------
    Path
        `out_file`.

    Raises
    ------
    ValueError
        If the mask is empty or lies outside the determinant's grid.
    """
    values = values_in_mask(determinant, mask)
    spread = np.percentile(np.abs(np.log2(np.maximum(values, SMALLEST))), 99.5)
    limit_log2 = float(np.clip(spread, *LIMITS_LOG2))
    words = Words(
        title=f"Local volume change, {label} to {target} (Jacobian determinant, log scale)",
        note=f"Red: the {label} is compressed there to fit the {target}; blue: stretched; "
        "magenta: folded (≤ 0).",
        histogram="Share of brain voxels by determinant",
        numbers=_numbers(values),
    )
    return draw_map(
        determinant,
        mask,
        out_file,
        scale=Scale("RdBu_r", -limit_log2, limit_log2, is_log2=True),
        words=words,
        background=background,
        cval=1.0,
    )


def _numbers(values: np.ndarray) -> tuple[tuple[str, str], ...]:
    """Range, percentiles and folds."""
    low, median, high = np.percentile(values, (1, 50, 99))
    folded = float(np.mean(values <= 0))
    return (
        ("Minimum", f"{values.min():.2f}"),
        ("1st percentile", f"{low:.2f}"),
        ("Median", f"{median:.2f}"),
        ("99th percentile", f"{high:.2f}"),
        ("Maximum", f"{values.max():.2f}"),
        ("Folded (determinant ≤ 0)", f"{100 * folded:.4f} %"),
    )
