"""
Brain mask by SynthStrip [Hoopes et al., NeuroImage 2022], with weights that the user has.

The network is that of the package nipreps-synthstrip, its steps are those of FreeSurfer's
``mri_synthstrip``. Weights are read from a file; nothing is downloaded.
"""

import hashlib
import pickle
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel as nb
import numpy as np
from scipy import ndimage

from m2m_bids.preprocessing.ants_bridge import finite_data, name_of
from m2m_bids.spatial.images import ImageError
from m2m_bids.spatial.resampling import resample

if TYPE_CHECKING:
    import torch

# The network halves an image six times, and was trained on grids of 1 mm of these sizes.
SIZE_STEP, MIN_SIZE, MAX_SIZE = 64, 192, 320
# It gives the distance to the surface of the brain, negative inside.
BORDER_MM = 1.0
FAR_MM = 100.0


class SynthStripError(ValueError):
    """SynthStrip cannot be used; the message says what is missing and what to do."""


def load_synthstrip(file: Path | str) -> "torch.nn.Module":
    """
    Build the network with weights from a file.

    Parameters
    ----------
    file : Path or str
        Checkpoint of FreeSurfer, such as ``synthstrip.1.pt``: weights are under
        ``model_state_dict``. Only tensors and plain values are read from it, no code.

    Returns
    -------
    torch.nn.Module
        Maps an image, (1, 1, I, J, K), to distances in mm, of the same shape.

    Raises
    ------
    SynthStripError
        If the package is not installed, or the file is missing or holds other weights.
    """
    import torch

    try:
        from nipreps.synthstrip.model import StripModel
    except ImportError as error:
        raise SynthStripError(
            "SynthStrip's network is not installed: pip install nipreps-synthstrip (or "
            "'m2m-bids[synthstrip]'), or leave out --synthstrip-model."
        ) from error
    expected = (
        "expected SynthStrip's weights (synthstrip.1.pt of FreeSurfer, in its models/ folder or "
        "from https://surfer.nmr.mgh.harvard.edu/docs/synthstrip/)"
    )
    model = StripModel()
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        model.load_state_dict(content["model_state_dict"])
    except FileNotFoundError as error:
        raise SynthStripError(f"{file}: no such file, {expected}.") from error
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise SynthStripError(f"{file}: cannot be read ({_first(error)}), {expected}.") from error
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise SynthStripError(f"{file}: other content ({_first(error)}), {expected}.") from error
    return model.eval()


def sha256_of(file: Path | str) -> str:
    """Return the SHA-256 of a file."""
    with Path(file).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def synthstrip_mask(
    image: nb.Nifti1Image, model_file: Path | str, *, n_threads: int = 0
) -> nb.Nifti1Image:
    """
    Find the brain in an image, of any contrast, on the CPU.

    Parameters
    ----------
    image : Nifti1Image, shape (I, J, K)
        Image of a head, with any voxels and orientation.
    model_file : Path or str
        As of `load_synthstrip`.
    n_threads : int
        Threads of PyTorch, for the whole process; 0 leaves them as they are.

    Returns
    -------
    Nifti1Image, uint8
        1 in the brain with its ventricles and sulci, on the grid of ``image``: the largest part
        within 1 mm of the brain, its holes filled.

    Raises
    ------
    SynthStripError
        If the network or its weights are missing.
    ImageError
        If the image is not 3-D or has no signal, or no brain is found in it.
    """
    import torch

    if n_threads:
        torch.set_num_threads(n_threads)
    model = load_synthstrip(model_file)
    grid = _conformed_grid(image)
    clean = nb.Nifti1Image(finite_data(image), image.affine)
    data = np.asarray(resample(clean, (), grid, order=1).dataobj)
    data = data - data.min()
    # Of a head in a very large field of view, more than 99 % may be dark.
    data = np.clip(data / (np.percentile(data, 99) or data.max() or 1), 0, 1)
    with torch.inference_mode():
        distance_mm = model(torch.from_numpy(data.astype(np.float32))[None, None])[0, 0].numpy()
    found = nb.Nifti1Image(distance_mm, grid.affine)
    near = np.asarray(resample(found, (), image, order=1, cval=FAR_MM).dataobj) < BORDER_MM
    parts, n_parts = ndimage.label(near)
    if not n_parts:
        raise ImageError(
            f"{name_of(image)}: SynthStrip finds no brain in it. Look at the image, or use "
            "--brain-extraction template."
        )
    largest = parts == np.argmax(np.bincount(parts.ravel())[1:]) + 1
    mask = ndimage.binary_fill_holes(largest)
    return nb.Nifti1Image(mask.astype(np.uint8), image.affine)


def network_shape(image: nb.Nifti1Image) -> np.ndarray:
    """
    Tell the size of the grid that the network works on.

    Parameters
    ----------
    image : Nifti1Image, shape (I, J, K)

    Returns
    -------
    ndarray of int, shape (3,)
        Voxels of 1 mm to the left, inferior, anterior.
    """
    corners = np.array([*np.ndindex(2, 2, 2)]) * np.array(image.shape[:3]) - 0.5
    extent_mm = np.ptp(nb.affines.apply_affine(image.affine, corners), axis=0)
    sizes = np.clip(np.ceil(extent_mm / SIZE_STEP).astype(int) * SIZE_STEP, MIN_SIZE, MAX_SIZE)
    return sizes[[0, 2, 1]]


def _conformed_grid(image: nb.Nifti1Image) -> nb.Nifti1Image:
    """Lay a grid of 1 mm with axes to the left, inferior, anterior about the same centre."""
    shape = network_shape(image)
    axes = np.array([[-1.0, 0, 0], [0, 0, 1.0], [0, -1.0, 0]])
    centre = nb.affines.apply_affine(image.affine, (np.array(image.shape) - 1) / 2)
    affine = nb.affines.from_matvec(axes, centre - axes @ ((shape - 1) / 2))
    return nb.Nifti1Image(np.zeros(shape, np.uint8), affine)


def _first(error: BaseException) -> str:
    """Shorten an error to its type and first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
