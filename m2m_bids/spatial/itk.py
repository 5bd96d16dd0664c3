"""
Transforms as ITK files: text affines and composite HDF5, as ANTs reads and writes them.

ITK maps points in LPS millimetres; the flips of the first two axes happen only here. A composite
holds the outermost transform first, as a chain does. Where ANTs takes several files (`-t`), to
warp images or points, it takes them the other way round: the first is applied to points first.
"""

from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
from nibabel.affines import from_matvec

from m2m_bids.spatial.fields import DisplacementField, check_affine
from m2m_bids.spatial.transforms import Chain, Transform, as_chain
from m2m_bids.whole_files import replacing

_FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])
_FLIP_VECTORS = np.array([-1, -1, 1], dtype=np.float32)
_BANNER = "#Insight Transform File V1.0"
_LINEAR_TYPES = ("AffineTransform", "MatrixOffsetTransformBase")
_FIELD_TYPE = "DisplacementFieldTransform"


def write_affine(affine: np.ndarray | Sequence[np.ndarray], file: Path | str) -> Path:
    """
    Write an affine as an ITK text file, in double precision.

    Parameters
    ----------
    affine : ndarray, shape (4, 4), or sequence of them
        Map of RAS+ mm points; ANTs takes it in the direction in which points go, fixed to moving
        for images that go from moving to fixed. Of several, as of the frames of a scan, each is a
        transform of its own, numbered from 0.
    file : Path or str
        Destination, ``.txt``.

    Returns
    -------
    Path
        The destination.

    Raises
    ------
    ValueError
        If the affine is not an invertible (4, 4) matrix or the suffix is another.
    """
    file = _with_suffix(file, ".txt")
    lines = [_BANNER]
    for number, matrix in enumerate([affine] if np.ndim(affine) == 2 else affine):
        parameters = " ".join(repr(float(value)) for value in _linear_parameters(matrix))
        lines += [
            f"#Transform {number}",
            "Transform: AffineTransform_double_3_3",
            f"Parameters: {parameters}",
            "FixedParameters: 0 0 0",
        ]
    with replacing(file) as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    return file


def read_affine(file: Path | str) -> np.ndarray:
    """
    Read an affine from an ITK text file.

    Parameters
    ----------
    file : Path or str
        File with one ``AffineTransform`` or ``MatrixOffsetTransformBase``.

    Returns
    -------
    ndarray, shape (4, 4)
        Map of RAS+ mm points.

    Raises
    ------
    ValueError
        If the file cannot be read or holds anything else.
    """
    file = Path(file)
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not a readable ITK text transform ({error}).") from error
    pairs = [line.split(":", maxsplit=1) for line in lines if ":" in line]
    entries = {key.strip(): value.strip() for key, value in pairs}
    if not lines or lines[0].strip() != _BANNER or len(entries) != len(pairs):
        raise ValueError(f"{file}: expected an ITK text file with one transform.")
    try:
        parameters = np.array(entries["Parameters"].split(), dtype=float)
        center = np.array(entries["FixedParameters"].split(), dtype=float)
        return _affine_from(entries["Transform"], parameters, center)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{file}: not an affine ITK transform ({error}).") from error


def write_composite(transforms: Transform | Sequence[Transform], file: Path | str) -> Path:
    """
    Write a chain as an ITK composite transform, the outermost first as in ITK.

    Affines are stored in double precision; fields as float32, compressed. ITK and ANTs read both
    whatever the precision they compute in.

    Parameters
    ----------
    transforms : Transform or sequence of Transform
        Map of RAS+ mm points, outermost first; at least one.
    file : Path or str
        Destination, ``.h5``.

    Returns
    -------
    Path
        The destination.

    Raises
    ------
    ValueError
        If the chain is empty or the suffix is another.
    """
    file = _with_suffix(file, ".h5")
    chain = as_chain(transforms)
    if not chain:
        raise ValueError(f"{file}: expected at least one transform to write")
    with replacing(file) as temporary, h5py.File(temporary, "w") as h5:
        root = h5.create_group("TransformGroup")
        _write_type(root.create_group("0"), "CompositeTransform")
        for index, transform in enumerate(chain, start=1):
            group = root.create_group(str(index))
            if isinstance(transform, DisplacementField):
                _write_field(group, transform)
            else:
                _write_type(group, "AffineTransform")
                group["TransformParameters"] = _linear_parameters(transform)
                group["TransformFixedParameters"] = np.zeros(3)
    return file


def read_composite(file: Path | str) -> Chain:
    """
    Read a chain from an ITK composite transform.

    Parameters
    ----------
    file : Path or str
        HDF5 file as written by `write_composite` or by ITK, of affines and displacement fields.

    Returns
    -------
    tuple of Transform
        Map of RAS+ mm points, outermost first.

    Raises
    ------
    ValueError
        If the file cannot be read or holds transforms of other types.
    """
    file = Path(file)
    try:
        with h5py.File(file, "r") as h5:
            root = h5["TransformGroup"]
            groups = [root[key] for key in sorted(root, key=int)]
            if groups and _read_type(groups[0]).startswith("CompositeTransform_"):
                groups = groups[1:]
            elif len(groups) != 1:
                raise ValueError("several transforms that are not a composite")
            return tuple(_read_transform(group) for group in groups)
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{file}: not a readable ITK composite transform ({error}).") from error


def read_chain(*files: Path | str) -> Chain:
    """
    Read transforms of several files as one chain.

    Parameters
    ----------
    *files : Path or str
        Affines (``.txt``) and composites (``.h5``), outermost first.

    Returns
    -------
    tuple of Transform
        Map of RAS+ mm points, outermost first.

    Raises
    ------
    ValueError
        If a file cannot be read.
    """
    chain: Chain = ()
    for file in map(Path, files):
        chain += read_composite(file) if file.suffix == ".h5" else (read_affine(file),)
    return chain


def _with_suffix(file: Path | str, suffix: str) -> Path:
    file = Path(file)
    if file.suffix != suffix:
        raise ValueError(f"{file}: expected a file name that ends in {suffix}")
    return file


def _linear_parameters(affine: np.ndarray) -> np.ndarray:
    """Twelve ITK parameters of a RAS+ affine: the LPS matrix by rows, then the translation."""
    lps = _FLIP @ check_affine(affine) @ _FLIP
    return np.concatenate([lps[:3, :3].ravel(), lps[:3, 3]])


def _affine_from(kind: str, parameters: np.ndarray, center: np.ndarray) -> np.ndarray:
    """RAS+ affine of ITK parameters; ITK rotates about the center."""
    if kind.split("_")[0] not in _LINEAR_TYPES or parameters.size != 12 or center.size != 3:
        raise ValueError(f"{kind} with {parameters.size} parameters is not supported")
    matrix = parameters[:9].astype(float).reshape(3, 3)
    lps = from_matvec(matrix, parameters[9:] + center - matrix @ center)
    return check_affine(_FLIP @ lps @ _FLIP)


def _write_type(group: h5py.Group, kind: str) -> None:
    # ITK fails to read strings in h5py's default character set, UTF-8.
    ascii_type = h5py.string_dtype("ascii")
    group.create_dataset("TransformType", data=[f"{kind}_double_3_3"], dtype=ascii_type)


def _read_type(group: h5py.Group) -> str:
    return group["TransformType"][0].decode()


def _write_field(group: h5py.Group, field: DisplacementField) -> None:
    """Components vary fastest, then i, j and k; the fixed parameters are the grid."""
    _write_type(group, _FIELD_TYPE)
    lps = (_FLIP @ field.affine)[:3]
    direction = lps[:, :3] / field.spacing_mm
    group["TransformFixedParameters"] = np.concatenate(
        [field.shape, lps[:, 3], field.spacing_mm, direction.ravel()]
    )
    parameters = (field.data * _FLIP_VECTORS).transpose(2, 1, 0, 3).ravel()
    group.create_dataset(
        "TransformParameters",
        data=parameters,
        compression="gzip",
        compression_opts=4,
        shuffle=True,
    )


def _read_transform(group: h5py.Group) -> Transform:
    kind = _read_type(group)
    # ITK before version 5 misspelt the names.
    prefix = "Transform" if "TransformParameters" in group else "Tranform"
    parameters, fixed = group[f"{prefix}Parameters"][...], group[f"{prefix}FixedParameters"][...]
    if kind.split("_")[0] != _FIELD_TYPE:
        return _affine_from(kind, parameters, fixed)
    shape, spacing = fixed[:3].astype(int), fixed[6:9]
    affine = _FLIP @ from_matvec(fixed[9:18].reshape(3, 3) * spacing, fixed[3:6])
    data = parameters.reshape(*shape[::-1], 3).transpose(2, 1, 0, 3)
    return DisplacementField(data * _FLIP_VECTORS, affine)
