"""Read NIfTI images with every check that later steps rely on, and write them atomically."""

import gzip
import logging
import math
import os
import zlib
from functools import cache
from pathlib import Path
from typing import cast

import nibabel as nb
import numpy as np
from nibabel.affines import apply_affine
from nibabel.arrayproxy import ArrayProxy
from nibabel.filebasedimages import ImageFileError
from nibabel.openers import ImageOpener
from nibabel.spatialimages import HeaderDataError

from m2m_bids.whole_files import replacing

logger = logging.getLogger(__name__)

NIFTI_SUFFIXES = (".nii.gz", ".nii")
# More than the largest headers of DICOM files, which some converters keep in NIfTI's.
_MAX_HEADER_BYTES = 2**26
_MAX_TRAILING_BYTES = 2**22
READ_ERRORS = (
    *(OSError, EOFError, zlib.error, ValueError, MemoryError, OverflowError),
    *(KeyError, ImageFileError, HeaderDataError),  # KeyError: a type that does not exist
)
"""What nibabel raises for files that are damaged or no images."""


class ImageError(ValueError):
    """An image cannot be used; the message names the file, what was found and what to do."""


def load_image(file: Path | str) -> nb.Nifti1Image:
    """
    Read a NIfTI image wholly into memory and check that it can be used.

    Integer images without a scale keep their type, scaled images become float32. The data are in
    the byte order of the machine. Voxels that are not finite are allowed. A header that leaves the
    orientation open, or states two different ones, is reported as a warning.

    Parameters
    ----------
    file : Path or str
        NIfTI-1 or NIfTI-2 file (``.nii``, ``.nii.gz``).

    Returns
    -------
    Nifti1Image
        Image with its data in memory; its affine maps voxels to RAS+ millimetres.

    Raises
    ------
    ImageError
        If the file is missing, truncated, corrupt or not NIfTI, has an empty axis, has voxels that
        are not real numbers (RGB, complex), has voxel sizes or an affine that are zero, negative,
        not finite or not invertible, or if its data would not fit into the memory of the machine,
        of which none is taken then.
    """
    file = Path(file)
    if not file.is_file():
        hint = "a link to a file that is not there; get its content" if file.is_symlink() else ""
        raise ImageError(f"{file}: {hint or 'no such file'}.")
    try:
        _check_size(file)
        image = nb.load(file, mmap=False)
    except ImageError:
        raise
    except READ_ERRORS as error:
        raise ImageError(
            f"{file}: not a readable image ({_reason(error)}): expected NIfTI (.nii or .nii.gz). "
            "Convert or copy the file again."
        ) from error
    if not isinstance(image, nb.nifti1.Nifti1Pair):
        raise ImageError(
            f"{file}: format {type(image).__name__}: expected NIfTI (.nii or .nii.gz). Convert it."
        )
    _check_header(image, file)
    data = _read_data(image, file)
    header = image.header.copy()
    header.set_data_dtype(data.dtype)
    image_class = nb.Nifti2Image if isinstance(image, nb.Nifti2Pair) else nb.Nifti1Image
    return image_class(data, image.affine, header)


def data_bytes(file: Path | str) -> int:
    """
    Tell how much memory the voxels of a NIfTI image take, as float32 or their larger own type.

    Returns
    -------
    int
        By the header alone; 0 where that cannot be read.
    """
    try:
        header = stored_header(Path(file))
        if header is None:
            return 0
        n_voxels = math.prod(max(0, int(size)) for size in header.get_data_shape())
        return n_voxels * max(4, header.get_data_dtype().itemsize)
    except READ_ERRORS:
        return 0


def require_3d(image: nb.Nifti1Image, file: Path | str) -> nb.Nifti1Image:
    """
    Return an image without trailing axes of length one, or fail if it is not 3-D then.

    Parameters
    ----------
    image : Nifti1Image
        Image of any number of axes.
    file : Path or str
        Name of the image in messages.

    Returns
    -------
    Nifti1Image, 3-D

    Raises
    ------
    ImageError
        If the image has fewer than three axes, or a fourth or later axis longer than one.
    """
    if len(image.shape) == 3:
        return image
    shape = " x ".join(str(size) for size in image.shape)
    if len(image.shape) < 3 or any(size != 1 for size in image.shape[3:]):
        raise ImageError(
            f"{file}: {len(image.shape)}-D image ({shape}): expected 3-D, one volume. "
            "Extract or average the volume that is meant."
        )
    data = np.asanyarray(image.dataobj).reshape(image.shape[:3])
    return type(image)(data, image.affine, image.header)


def save_image(image: nb.Nifti1Image, file: Path | str) -> Path:
    """
    Write an image so that the file is either whole or absent.

    Parameters
    ----------
    image : Nifti1Image
        Image to write.
    file : Path or str
        Destination, ``.nii`` or ``.nii.gz``; its folder is made if necessary.

    Returns
    -------
    Path
        The destination.

    Raises
    ------
    ValueError
        If the suffix is another.
    """
    file = Path(file)
    if not file.name.endswith(NIFTI_SUFFIXES):
        raise ValueError(f"{file}: expected a file name that ends in .nii or .nii.gz")
    with replacing(file) as temporary:
        image.to_filename(temporary)
    return file


def stored_header(file: Path) -> nb.Nifti1Header | None:
    """Read the header as it is stored, without extensions; None where it is not NIfTI's."""
    with ImageOpener(str(file), "rb") as stream:
        block = stream.read(nb.Nifti2Header.template_dtype.itemsize)
    for header_class in (nb.Nifti2Header, nb.Nifti1Header):
        if header_class.may_contain_header(block):
            return header_class(block[: header_class.template_dtype.itemsize], check=False)
    return None


def _check_size(file: Path) -> None:
    """Raise ImageError if header or data of an image would take more memory than there is."""
    header = stored_header(file)
    if header is None:
        return
    offset = float(header["vox_offset"])
    if offset > _MAX_HEADER_BYTES:
        raise ImageError(
            f"{file}: header that says to be {offset:.0f} bytes long: expected at most "
            f"{_MAX_HEADER_BYTES}. Convert or copy the file again."
        )
    require_memory(data_bytes(file), file)


def require_memory(n_bytes: int, file: Path) -> None:
    """Raise ImageError if the voxels of an image would take more memory than there is."""
    limit = _memory_bytes()
    if n_bytes > limit:
        raise ImageError(
            f"{file}: {n_bytes / 1e9:.1f} GB of voxels by its header, more than the "
            f"{limit / 1e9:.1f} GB of this machine's memory. Convert or copy the file again, or "
            "use a larger machine."
        )


@cache
def _memory_bytes() -> int:
    """Memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _check_header(image: nb.nifti1.Nifti1Pair, file: Path) -> None:
    """Raise ImageError unless axes, voxel type, voxel sizes and affine can be used."""
    shape = " x ".join(str(size) for size in image.shape)
    if not image.shape or min(image.shape) < 1:
        raise ImageError(f"{file}: empty image ({shape} voxels): expected at least one voxel.")
    dtype = image.get_data_dtype()
    if dtype.fields is not None or dtype.kind not in "iufb":
        kind = "RGB" if dtype.fields is not None else str(dtype)
        raise ImageError(
            f"{file}: {kind} voxels: expected one real number per voxel. "
            "Convert to a scalar image."
        )
    zooms = _stored_zooms(image, file)
    if not (np.isfinite(zooms).all() and (zooms > 0).all()):
        raise ImageError(
            f"{file}: voxel size {_listed(zooms)} mm: expected three positive numbers. "
            "Correct pixdim in the header, or convert the image again."
        )
    affine = image.affine
    if not np.isfinite(affine).all():
        raise ImageError(
            f"{file}: affine with values that are not finite. "
            "Correct sform and qform in the header."
        )
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    if sizes.min() <= 0 or abs(np.linalg.det(affine[:3, :3] / sizes)) < 1e-3:
        raise ImageError(
            f"{file}: affine that cannot be inverted (voxel edges {_listed(sizes)} mm). "
            "Correct sform and qform in the header."
        )
    _warn_of_orientation(image, file)


def _stored_zooms(image: nb.nifti1.Nifti1Pair, file: Path) -> np.ndarray:
    """Voxel sizes as stored: nibabel reads zero as one and drops the sign."""
    header_file = image.file_map["header" if "header" in image.file_map else "image"].filename
    with ImageOpener(str(header_file or file), "rb") as stream:
        stored = type(image.header).from_fileobj(stream, check=False)
    return np.asarray(stored["pixdim"][1 : 1 + min(3, len(image.shape))], dtype=float)


def _warn_of_orientation(image: nb.nifti1.Nifti1Pair, file: Path) -> None:
    """Log that software may place an image differently; nibabel prefers the sform, ITK may not."""
    try:
        qform, qform_code = image.header.get_qform(coded=True)
    except (ValueError, HeaderDataError) as error:
        logger.warning("%s: the qform cannot be read (%s); sform used", file, _reason(error))
        return
    sform, sform_code = image.header.get_sform(coded=True)
    if not qform_code and not sform_code:
        logger.warning("%s: no orientation in the header; taken as LAS, centred", file)
    if qform is None or sform is None or len(image.shape) < 3:
        return
    corners = np.stack(np.meshgrid(*((0, n - 1) for n in image.shape[:3])), axis=-1)
    shift = apply_affine(qform, corners) - apply_affine(sform, corners)
    distance_mm = np.linalg.norm(shift, axis=-1).max()
    if distance_mm > 1:
        logger.warning("%s: sform and qform differ by %.1f mm; sform used", file, distance_mm)


def _read_data(image: nb.nifti1.Nifti1Pair, file: Path) -> np.ndarray:
    """Voxels in native byte order; float32 if the header scales them."""
    try:
        if file.name.endswith(".gz"):
            _check_gzip(file, image)
        proxy = cast(ArrayProxy, image.dataobj)
        if proxy.slope != 1 or proxy.inter != 0:
            return image.get_fdata(dtype=np.float32, caching="unchanged")
        data = np.asarray(proxy)
    except READ_ERRORS as error:
        dtype = image.get_data_dtype()
        n_bytes = int(np.prod(image.shape, dtype=object)) * dtype.itemsize
        raise ImageError(
            f"{file}: truncated or corrupt ({_reason(error)}): "
            f"expected {n_bytes} bytes of voxel data. Convert or copy the file again."
        ) from error
    if data.dtype.kind == "f" and data.dtype.itemsize > 8:
        return data.astype(np.float64)
    return data.astype(data.dtype.newbyteorder("="), copy=False)


def _check_gzip(file: Path, image: nb.nifti1.Nifti1Pair) -> None:
    """Read to the end, where the checksum is; nibabel stops before it."""
    n_voxels = math.prod(int(size) for size in image.shape)
    n_bytes = image.dataobj.offset + n_voxels * image.get_data_dtype().itemsize
    with gzip.open(file) as stream:
        while stream.read(2**22):
            if stream.tell() > n_bytes + _MAX_TRAILING_BYTES:
                raise ValueError(f"more than {stream.tell()} bytes where {n_bytes} are expected")


def _reason(error: BaseException) -> str:
    """First line of an exception's message, or its name."""
    return next(iter(str(error).strip().splitlines()), "").rstrip(".") or type(error).__name__


def _listed(values: np.ndarray) -> str:
    return " x ".join(f"{value:g}" for value in values)
