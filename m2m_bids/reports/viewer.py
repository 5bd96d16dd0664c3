"""
Write a page that scrolls through a T1w and an image over it, whole in one file.

Its script is our own: NiiVue's alone has 2.9 MB (0.69) and needs WebGL 2, which remote desktops
often lack; nilearn's viewer shows one image over another, but neither switches between several nor
can it be used with the keyboard.
"""

import json
from base64 import b64encode
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from string import Template
from typing import Literal

import nibabel as nb
import numpy as np

from m2m_bids.reports.figures import STATE_TITLES, color_table, intensity_window, levels
from m2m_bids.reports.mosaic import mask_bounds, obliquity_deg
from m2m_bids.reports.svg import BRAIN_COLOR, LINE_COLORS

MARGIN_MM = 12.0
SPACING_MM = 1.5
MAX_VOXELS = 2_200_000  # of each image
# The first with which the images of a page take no more; most need 2 MB with the first.
JPEG_QUALITIES = (88, 70, 50, 30)
MAX_BYTES = 4_800_000
# Grey matter, white matter and fluid are 1, 2 and 3; this is brain that is none of them.
OTHER_BRAIN = 4
OUTLINES = (
    {"name": "brain", "color": BRAIN_COLOR, "members": [1, 2, 3, OTHER_BRAIN], "is_shown": False},
    {"name": "white matter", "color": LINE_COLORS[0], "members": [2], "is_shown": True},
    {"name": "cortex", "color": LINE_COLORS[1], "members": [1, 2], "is_shown": False},
)


def write_viewer(
    background: nb.Nifti1Image,
    mask: nb.Nifti1Image,
    dseg: nb.Nifti1Image,
    states: Mapping[str, nb.Nifti1Image],
    out_file: Path,
    *,
    label: str = "PET",
    target: str = "T1w",
    color_map: str = "inferno",
) -> Path:
    """
    Write a page with three orthogonal slices, opacity and a switch between states.

    The page needs neither a network nor WebGL, and its size does not depend on that of the images:
    they are sampled linearly on one grid around the brain, along the T1w's own axes, with voxels
    of 1.5 mm, or larger for a large head, and stored with 8 bit as JPEG.

    Parameters
    ----------
    background : Nifti1Image
        T1w, 3-D.
    mask, dseg : Nifti1Image
        Brain mask, and tissue classes (1 grey matter, 2 white matter, 3 CSF), in its world.
    states : mapping of str to Nifti1Image
        Moving image at each stage, 3-D, in the T1w's world, as `figures.flicker` takes them. They
        share one window.
    out_file : Path
        HTML file to write.
    label : str
        What the moving image is, as shown: PET, FA.
    target : str
        What it is registered to, as shown: T1w, or template.
    color_map : str
        Matplotlib colour map of the moving image.

    Returns
    -------
    Path
        `out_file`.

    Raises
    ------
    ValueError
        If there is no state, or the mask is empty.
    """
    if not states:
        raise ValueError("states is empty: expected the moving image at one stage at least")
    shape, affine = viewer_grid(mask)
    inside = _sample(mask, shape, affine, order=0) > 0
    labels = np.where(inside, _sample(dseg, shape, affine, order=0), 0)
    labels = np.where(inside & (labels == 0), OTHER_BRAIN, labels).astype(np.uint8)
    t1w = _sample(background, shape, affine)
    moving = {name: _sample(image, shape, affine) for name, image in states.items()}
    window = intensity_window([values[inside] for values in moving.values()])
    columns = int(np.ceil(np.sqrt(shape[2])))
    brightness = {"t1w": levels(t1w, intensity_window([t1w[inside]]))}
    brightness |= {name: levels(values, window) for name, values in moving.items()}
    images = _encode_all([_atlas(volume, columns) for volume in brightness.values()])
    data = {
        "label": label,
        "target": target,
        "shape": shape,
        "affine": affine.tolist(),
        "columns": columns,
        "window": window,
        "colors": color_table(color_map).ravel().tolist(),
        "outlines": OUTLINES,
        "labels": _encode(_atlas(labels, columns), "PNG"),
        "t1w": images[0],
        "states": [
            {"title": STATE_TITLES.get(name, name), "image": image}
            for name, image in zip(moving, images[1:], strict=True)
        ],
    }
    return _write_page(data, Path(out_file), obliquity_deg(affine))


def viewer_grid(mask: nb.Nifti1Image) -> tuple[tuple[int, int, int], np.ndarray]:
    """
    Lay an isotropic grid around a brain, along the axes of its image.

    Parameters
    ----------
    mask : Nifti1Image
        Brain mask, 3-D, positive inside.

    Returns
    -------
    shape : tuple of int
        Voxels to the right, to the front and upwards.
    affine : ndarray, shape (4, 4)
        Voxel to RAS+ mm.

    Raises
    ------
    ValueError
        If the mask is empty or not 3-D.
    """
    bounds, vox2ras = mask_bounds(mask)
    zooms_mm = np.linalg.norm(vox2ras[:3, :3], axis=0)
    lower_mm = (bounds[:, 0] - 0.5) * zooms_mm - MARGIN_MM
    size_mm = (bounds[:, 1] + 0.5) * zooms_mm + MARGIN_MM - lower_mm
    spacing_mm = max(SPACING_MM, float(np.cbrt(np.prod(size_mm) / MAX_VOXELS)))
    shape = tuple(int(n) for n in np.ceil(size_mm / spacing_mm))
    affine = np.eye(4)
    affine[:3, :3] = vox2ras[:3, :3] / zooms_mm * spacing_mm
    first = (lower_mm + spacing_mm / 2) / zooms_mm
    affine[:3, 3] = vox2ras[:3, :3] @ first + vox2ras[:3, 3]
    return shape, affine


def _sample(
    image: nb.Nifti1Image, shape: tuple[int, int, int], affine: np.ndarray, *, order: int = 1
) -> np.ndarray:
    """Interpolate an image on a grid, zero outside; not finite values count as zero."""
    from scipy.ndimage import affine_transform

    data = np.asanyarray(image.dataobj).astype(np.float32)
    data[~np.isfinite(data)] = 0
    to_voxels = np.linalg.inv(image.affine) @ affine
    return affine_transform(data, to_voxels, output_shape=shape, order=order)


def _atlas(volume: np.ndarray, columns: int) -> np.ndarray:
    """Lay axial slices out in rows, from the lowest."""
    n_i, n_j, n_k = volume.shape
    page = np.zeros((int(np.ceil(n_k / columns)) * n_j, columns * n_i), np.uint8)
    for k in range(n_k):
        top, left = k // columns * n_j, k % columns * n_i
        page[top : top + n_j, left : left + n_i] = volume[..., k].T
    return page


def _encode_all(pages: list[np.ndarray]) -> list[str]:
    """Encode grey levels as JPEG, of a quality by which they are not too large together."""
    for quality in JPEG_QUALITIES:
        images = [_encode(page, "JPEG", quality=quality) for page in pages]
        if sum(map(len, images)) <= MAX_BYTES:
            break
    return images


def _encode(page: np.ndarray, kind: Literal["JPEG", "PNG"], **options: int) -> str:
    """Encode grey levels as a data URI."""
    from PIL import Image

    buffer = BytesIO()
    Image.fromarray(page).save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{b64encode(buffer.getvalue()).decode()}"


def _write_page(data: dict, out_file: Path, tilt_deg: float) -> Path:
    """Fill the template in; what is in `data` cannot end its script element."""
    folder = files("m2m_bids.data") / "report"
    spacing_mm = np.linalg.norm(np.array(data["affine"])[:3, 0])
    page = Template((folder / "viewer.html").read_text("UTF-8")).substitute(
        label=escape(data["label"]),
        target=escape(data["target"]),
        spacing=f"{spacing_mm:.2g}",
        tilt=f", which are tilted by {tilt_deg:.0f}°" if tilt_deg > 1 else "",
        style=(folder / "viewer.css").read_text("UTF-8"),
        script=(folder / "viewer.js").read_text("UTF-8"),
        data=json.dumps(data).replace("<", "\\u003c"),
    )
    out_file.parent.mkdir(parents=True, exist_ok=True)
    out_file.write_text(page, "UTF-8")
    return out_file
