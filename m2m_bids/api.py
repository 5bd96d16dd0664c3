"""Register images without Nipype and BIDS: the work that the app's nodes do.

>>> from m2m_bids.api import register_files  # doctest: +SKIP
>>> result = register_files("pet.nii.gz", "T1w.nii.gz", modality="pet")  # doctest: +SKIP
>>> nb.save(result.moved, "pet_in_T1w.nii.gz")  # doctest: +SKIP
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import nibabel as nb
import numpy as np

from m2m_bids.spatial.conform import NetworkGrid, sample_on_grid, template_grid
from m2m_bids.spatial.fields import DisplacementField, invert_displacement, jacobian_determinant
from m2m_bids.spatial.images import ImageError, load_image, require_3d
from m2m_bids.spatial.intensity import normalize
from m2m_bids.spatial.resampling import resample
from m2m_bids.spatial.transforms import Chain, displacement_from_unit

if TYPE_CHECKING:
    import torch

    from m2m_bids.registration.m2m import CyclePairs
    from m2m_bids.registration.refinement import Registration
    from m2m_bids.registration.weights import WeightsCard

Modality = Literal["pet", "fa"]
NEAR_MM = 3.6
"""Scans that need less, on average, are taken for the T1w's own person's (`RefinementConfig`)."""
DEFAULT_WEIGHTS = Path(str(files("m2m_bids.data") / "weights" / "default"))


class DeviceError(RuntimeError):
    """A device that was asked for and is not there."""


@dataclass(frozen=True)
class DeformableOptions:
    """
    How the deformable step is estimated.

    Parameters
    ----------
    modality : {"pet", "fa"}
        Kind of the moving image.
    weights : Path
        Weights folder of the network.
    n_refine : int
        Steps of instance optimisation after the network; 0 for none.
    device : str
        ``"auto"`` (a GPU where there is one), ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
    n_threads : int
        Threads of PyTorch on the CPU, for the whole process; 0 leaves them as they are.
    """

    modality: Modality
    weights: Path = DEFAULT_WEIGHTS
    n_refine: int = 60
    device: str = "auto"
    n_threads: int = 0


@dataclass(frozen=True)
class Quality:
    """
    Numbers by which a deformable step is judged, all inside the brain mask.

    Parameters
    ----------
    folding_percent : float
        Voxels of the written field whose Jacobian determinant is not positive.
    disagreement_mm : float
        Mean distance between a point and where the forward map and then the backward map through
        the bridge bring it.
    similarity_gain : float
        What the deformable map adds, beyond the rigid one, to the two mono-modal similarities
        (LNCC, of at most 1 each) of the cycle that it enters.
    similarity : float
        Mean LNCC, -1 to 1, of the moving image and the bridge's deep inside the brain.
    mean_displacement_mm, max_displacement_mm : float
        Length of the displacement.
    min_jacobian, max_jacobian : float
        Range of the Jacobian determinant.
    likeness, likeness_gain : float, optional
        Mean LNCC in the brain, -1 to 1, of the moved image and what its modality would show of the
        fixed image's tissues, and what the deformable map adds to it; None where the tissues are
        not given.
    """

    folding_percent: float
    disagreement_mm: float
    similarity_gain: float
    similarity: float
    mean_displacement_mm: float
    max_displacement_mm: float
    min_jacobian: float
    max_jacobian: float
    likeness: float | None = None
    likeness_gain: float | None = None

    @property
    def margin(self) -> float:
        """
        Say how far the step is from being decided upon otherwise.

        Returns
        -------
        float
            Of the limits of ``data/quality.json`` the one that is nearest, or passed furthest:
            0 on it, 1 as far inside as a typical good scan is, negative beyond. Minus infinity
            with folds. It is no probability.
        """
        if not self.folding_percent <= quality_limits()["folding_percent"]["limit"]:
            return -np.inf
        values = asdict(self)
        return min(
            (values[name] - entry["limit"]) / (entry["typical"] - entry["limit"])
            for name, entry in quality_limits().items()
            if "typical" in entry and values[name] is not None
        )

    def objections(self) -> list[str]:
        """
        Say why the deformable step should not be used.

        Returns
        -------
        list of str
            One sentence for each limit of ``data/quality.json`` that is passed; empty for a good
            one.
        """
        limits = {name: entry["limit"] for name, entry in quality_limits().items()}
        objections = []
        # Comparisons are negated so that a number that is not one is an objection too.
        if not self.folding_percent <= limits["folding_percent"]:
            objections.append(
                f"the map folds in {self.folding_percent:.3f} % of the brain"
                f" (at most {limits['folding_percent']:g} %)"
            )
        if not self.disagreement_mm <= limits["disagreement_mm"]:
            objections.append(
                f"forward and backward maps disagree by {self.disagreement_mm:.2f} mm"
                f" (at most {limits['disagreement_mm']:g} mm)"
            )
        if not self.similarity_gain >= limits["similarity_gain"]:
            objections.append(
                f"it adds {self.similarity_gain:.3f} to the mono-modal similarity"
                f" (at least {limits['similarity_gain']:g})"
            )
        if not self.similarity >= limits["similarity"]:
            objections.append(
                "inside the brain the image does not look like one of its kind: its similarity to"
                f" the template's is {self.similarity:.2f} (at least {limits['similarity']:g})"
            )
        if self.likeness_gain is not None and not self.likeness_gain >= limits["likeness_gain"]:
            objections.append(
                f"it adds {self.likeness_gain:.3f} to the similarity with what the T1w's tissues"
                f" would show (at least {limits['likeness_gain']:g})"
            )
        if not self.mean_displacement_mm >= limits["mean_displacement_mm"]:
            objections.append(
                f"it moves the brain by {self.mean_displacement_mm:.2f} mm on average, within its"
                f" own error (at least {limits['mean_displacement_mm']:g} mm)"
            )
        return objections


class Deformation(NamedTuple):
    """
    A deformable step, whether or not it should be used.

    Parameters
    ----------
    field, inverse_field : DisplacementField
        In the fixed image's world and covering its field of view: the map from fixed points to
        points of the rigidly aligned moving image, and its inverse.
    jacobian : Nifti1Image
        Jacobian determinant of ``field``, on its grid.
    cycle_error : Nifti1Image
        Distance in mm of each point from where the forward map and then the backward map through
        the bridge bring it, on the network's grid; `Quality.disagreement_mm` is its mean.
    quality : Quality
    device : str
        Device that was used.
    weights_sha256 : str
        Hash of the network's weights.
    """

    field: DisplacementField
    inverse_field: DisplacementField
    jacobian: nb.Nifti1Image
    cycle_error: nb.Nifti1Image
    quality: Quality
    device: str
    weights_sha256: str


@dataclass(frozen=True)
class RegisteredImage:
    """
    A registered image and how it got there.

    Parameters
    ----------
    moved : Nifti1Image
        Moving image on the fixed image's grid, interpolated once.
    transforms : tuple
        Chain from fixed points to moving points, outermost first (`m2m_bids.spatial.transforms`).
    rigid : ndarray, shape (4, 4)
        Rigid map from fixed points to moving points, RAS+ mm.
    deformation : Deformation or None
        None where only a rigid transform was asked for.
    objections : list of str
        Why the deformable step was not used; empty where it was.
    """

    moved: nb.Nifti1Image
    transforms: Chain
    rigid: np.ndarray
    deformation: Deformation | None = None
    objections: list[str] = field(default_factory=list)


@lru_cache(maxsize=1)
def quality_limits() -> dict[str, dict]:
    """Read ``data/quality.json``: the limit of each number, and its reason."""
    return json.loads((files("m2m_bids.data") / "quality.json").read_text())


def missing_gpu_message(device: str, n_gpus: int) -> str:
    """Say that a GPU was named which is not there, and how to get one."""
    return (
        f"--device {device}: PyTorch sees {n_gpus} GPUs here. In a container, start it with"
        " `singularity run --nv` (`docker run --gpus all`); on a cluster, ask for a GPU"
        " (`--gres=gpu:1`); or use --device cpu."
    )


def resolve_device(device: str) -> "torch.device":
    """
    Turn the name of a device into one that works, in the process that will use it.

    Parameters
    ----------
    device : str
        ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.

    Returns
    -------
    torch.device

    Raises
    ------
    DeviceError
        If a GPU is named and there is none, or not so many.
    """
    import torch

    n_gpus = torch.cuda.device_count() if device != "cpu" else 0
    if device == "auto":
        return torch.device("cuda" if n_gpus else "cpu")
    chosen = torch.device(device)
    if chosen.type == "cuda" and (chosen.index or 0) >= n_gpus:
        raise DeviceError(missing_gpu_message(device, n_gpus))
    return chosen


def check_weights(weights: Path, modalities: Iterable[str]) -> str:
    """
    Check that a weights folder can be used, without building its network.

    Parameters
    ----------
    weights : Path
        Weights folder.
    modalities : iterable of str
        Modalities that it is needed for.

    Returns
    -------
    str
        SHA-256 of the weights.

    Raises
    ------
    WeightsError
        If it cannot be used; the message names the file and says what to do.
    """
    from m2m_bids.registration.weights import WeightsError, read_tensors

    _, card = read_tensors(weights)
    if missing := sorted(set(modalities) - set(card.modalities)):
        raise WeightsError(
            f"{weights}: these weights are for {', '.join(card.modalities)}, not for"
            f" {', '.join(missing)}. Name others with --weights, or use --transform rigid."
        )
    return card.sha256


def check_synthstrip(model_file: Path) -> None:
    """
    Check that SynthStrip can be used.

    Parameters
    ----------
    model_file : Path
        File of its weights.

    Raises
    ------
    SynthStripError
        If it cannot; the message says what is missing and what to do.
    """
    from m2m_bids.preprocessing.synthstrip import load_synthstrip

    load_synthstrip(model_file)


@lru_cache(maxsize=1)
def loaded_network(
    weights: Path, sha256: str, device: "torch.device"
) -> "tuple[torch.nn.Module, WeightsCard]":
    """
    Load a network, once in a process for all of its scans.

    Parameters
    ----------
    weights : Path
        Weights folder.
    sha256 : str
        Hash of its weights: others are loaded anew.
    device : torch.device

    Returns
    -------
    network : Module
        On the device, in evaluation mode; not to be changed.
    card : WeightsCard
    """
    from m2m_bids.registration.weights import load_weights

    network, card = load_weights(weights)
    return network.to(device), card


@contextmanager
def explained_out_of_memory(advice: str) -> Iterator[None]:
    """
    Say what to do where the memory of a GPU is not enough, and free what PyTorch keeps of it.

    Parameters
    ----------
    advice : str
        What to do, unless another program has the memory.

    Raises
    ------
    DeviceError
        In place of PyTorch's error.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        shown = "the GPU"
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            shown = f"{torch.cuda.get_device_name()} ({total / 1e9:.1f} GB, {free / 1e9:.1f} free)"
            torch.cuda.empty_cache()
        raise DeviceError(
            f"memory of {shown} ran out: end other programs on it (nvidia-smi lists them), give"
            f" each run a GPU of its own, or {advice}"
        ) from error


def estimate_deformation(
    moving: nb.Nifti1Image,
    fixed: nb.Nifti1Image,
    fixed_mask: nb.Nifti1Image,
    *,
    fixed2moving: np.ndarray,
    template2fixed: np.ndarray,
    options: DeformableOptions,
    fixed_dseg: nb.Nifti1Image | None = None,
) -> Deformation:
    """
    Estimate what a rigid alignment leaves over, by M2M-Reg.

    The pair goes to the network's grid, which lies around the brain in the template's pose. The
    bridge is the template's T1w with its simulated PET or FA; with the tissues of the T1w, so is
    the T1w itself with a PET or FA simulated from them.

    Parameters
    ----------
    moving : Nifti1Image, 3-D
        Static PET or FA image.
    fixed : Nifti1Image, 3-D
        T1w image.
    fixed_mask : Nifti1Image, 3-D
        Brain mask on the grid of ``fixed``.
    fixed2moving : ndarray, shape (4, 4)
        Rigid map from fixed points to moving points, RAS+ mm.
    template2fixed : ndarray, shape (4, 4)
        Affine map from points of MNI space to fixed points, RAS+ mm.
    options : DeformableOptions
    fixed_dseg : Nifti1Image, 3-D, optional
        Labels of tissues, 1 GM, 2 WM and 3 CSF, in the world of ``fixed``.

    Returns
    -------
    Deformation

    Raises
    ------
    WeightsError
        If the weights cannot be used, or are not for this modality.
    DeviceError
        If the device is not there, or its memory is not enough.
    ImageError
        If the rigidly aligned images do not overlap.
    """
    with explained_out_of_memory("use --device cpu, or weights of a coarser grid"):
        return _estimate_deformation(
            *(moving, fixed, fixed_mask),
            fixed2moving=fixed2moving,
            template2fixed=template2fixed,
            options=options,
            fixed_dseg=fixed_dseg,
        )


def _estimate_deformation(
    moving: nb.Nifti1Image,
    fixed: nb.Nifti1Image,
    fixed_mask: nb.Nifti1Image,
    *,
    fixed2moving: np.ndarray,
    template2fixed: np.ndarray,
    options: DeformableOptions,
    fixed_dseg: nb.Nifti1Image | None,
) -> Deformation:
    import torch

    from m2m_bids.registration.m2m import CyclePairs
    from m2m_bids.registration.presets import LNCC_SIGMA_MM
    from m2m_bids.registration.refinement import RefinementConfig, register_pair
    from m2m_bids.simulation.anatomy import load_template
    from m2m_bids.simulation.contrast import FDG_WEIGHTS, expected_contrast, template_bridge

    if options.n_threads:
        torch.set_num_threads(options.n_threads)
    sha256 = check_weights(options.weights, [options.modality])
    device = resolve_device(options.device)
    network, card = loaded_network(options.weights, sha256, device)
    grid = template_grid(template2fixed, size=card.grid_size, spacing_mm=card.spacing_mm)
    images = [
        torch.from_numpy(data)[None, None].to(device)
        for data in images_on_grid(moving, fixed, fixed_mask, fixed2moving=fixed2moving, grid=grid)
    ]
    likeness, pet_weights = None, FDG_WEIGHTS
    if fixed_dseg is not None:
        tissues = _tissues_on_grid(fixed_dseg, grid).to(device)
        if options.modality == "pet":
            pet_weights = _pet_weights(network, *images, tissues, card.spacing_mm)
        likeness = expected_contrast(
            tissues, options.modality, card.spacing_mm, pet_weights=pet_weights
        )
    template = load_template(card.grid_size, card.spacing_mm)
    bridge = template_bridge(template, options.modality, pet_weights=pet_weights)
    pairs = CyclePairs(*images, *(image.to(device) for image in bridge), is_aligned=True)
    config = RefinementConfig(
        n_steps=options.n_refine,
        near_voxels=NEAR_MM / card.spacing_mm,
        lncc_sigma_voxels=LNCC_SIGMA_MM / card.spacing_mm,
    )
    registration = register_pair(network, pairs, config, likeness)
    world_field = displacement_from_unit(
        _displacement(registration.forward), grid, fixed, spacing_mm=card.spacing_mm
    )
    jacobian = nb.Nifti1Image(
        jacobian_determinant(world_field).astype(np.float32), world_field.affine
    )
    cycle_error = _cycle_error(registration, grid)
    return Deformation(
        field=world_field,
        inverse_field=invert_displacement(world_field)[0],
        jacobian=jacobian,
        cycle_error=cycle_error,
        quality=_assess(registration, pairs, cycle_error, world_field, jacobian, fixed_mask),
        device=_device_name(device),
        weights_sha256=card.sha256,
    )


def register_files(
    moving_file: Path | str,
    fixed_file: Path | str,
    *,
    modality: Modality,
    transform: Literal["m2m", "rigid"] = "m2m",
    options: DeformableOptions | None = None,
    synthstrip_model: Path | str | None = None,
    sidecar: Mapping[str, Any] | None = None,
    random_seed: int = 0,
) -> RegisteredImage:
    """
    Register a PET or FA image to a T1w image: the app's whole way, in one call.

    Parameters
    ----------
    moving_file : Path or str
        PET (3-D, or 4-D frames, which are corrected for motion and averaged) or FA map.
    fixed_file : Path or str
        T1w image, with or without skull.
    modality : {"pet", "fa"}
        Kind of the moving image.
    transform : {"m2m", "rigid"}
        Last step.
    options : DeformableOptions, optional
        Of the deformable step; the default ones of the modality.
    synthstrip_model : Path or str, optional
        Weights of SynthStrip, to find the brain by it rather than by the template.
    sidecar : mapping, optional
        BIDS metadata of a PET scan: frames are weighted by ``FrameDuration`` where that is known.
    random_seed : int
        Seed of ANTs.

    Returns
    -------
    RegisteredImage
        Moved rigidly where the deformable step has to be rejected.

    Raises
    ------
    ImageError
        If an image cannot be used; the message names the file.
    """
    from m2m_bids.preprocessing.anatomical import (
        correct_bias_field,
        extract_brain,
        load_t1w,
        segment_tissues,
    )
    from m2m_bids.preprocessing.coregistration import register_rigid
    from m2m_bids.preprocessing.diffusion import clean_fa
    from m2m_bids.preprocessing.pet_motion import corrected_reference

    fixed = load_t1w(fixed_file)
    moving = load_image(moving_file)
    moving.set_filename(str(moving_file))  # messages name it
    if modality == "pet":
        static, moving, _ = corrected_reference(moving, sidecar or {}, random_seed=random_seed)
    else:
        static = moving = clean_fa(require_3d(moving, moving_file))
    brain = extract_brain(fixed, synthstrip_model=synthstrip_model, random_seed=random_seed)
    fixed = correct_bias_field(fixed, brain.mask)
    rigid = register_rigid(moving, fixed, brain.mask, random_seed=random_seed).fixed2moving
    chain: Chain = (rigid,)
    deformation, objections = None, []
    if transform == "m2m":
        deformation = estimate_deformation(
            moving,
            fixed,
            brain.mask,
            fixed2moving=rigid,
            template2fixed=brain.template2anat,
            options=options or DeformableOptions(modality),
            fixed_dseg=segment_tissues(fixed, brain.mask, brain.template2anat).labels,
        )
        objections = deformation.quality.objections()
        if not objections:
            chain = (rigid, deformation.field)
    return RegisteredImage(resample(static, chain, fixed), chain, rigid, deformation, objections)


def images_on_grid(
    moving: nb.Nifti1Image,
    fixed: nb.Nifti1Image,
    fixed_mask: nb.Nifti1Image,
    *,
    fixed2moving: np.ndarray,
    grid: NetworkGrid,
) -> tuple[np.ndarray, np.ndarray]:
    """
    Bring a rigidly aligned pair to a network's grid, as networks are trained and used on it.

    Parameters
    ----------
    moving : Nifti1Image, 3-D
        Static PET or FA image.
    fixed : Nifti1Image, 3-D
        T1w image.
    fixed_mask : Nifti1Image, 3-D
        Brain mask on the grid of ``fixed``.
    fixed2moving : ndarray, shape (4, 4)
        Rigid map from fixed points to moving points, RAS+ mm.
    grid : NetworkGrid
        In the world of the fixed image.

    Returns
    -------
    moving_data, fixed_data : ndarray, float32, shape (n, n, n)
        In [0, 1] by the intensities in the brain; the T1w's is skull-stripped.

    Raises
    ------
    ImageError
        If the images do not overlap.
    """
    inside = np.asarray(fixed_mask.dataobj) > 0
    stripped = nb.Nifti1Image(np.where(inside, np.asarray(fixed.dataobj), 0), fixed.affine)
    fixed_data = sample_on_grid(stripped, grid)
    moving_data = sample_on_grid(moving, grid, point_map=fixed2moving)
    brain = fixed_data > 0
    try:
        return normalize(moving_data, brain), normalize(fixed_data, brain)
    except ValueError as error:
        raise ImageError(
            f"after rigid alignment the moving image and the brain do not overlap ({error})."
            " Look at the rigid result: one of the images may hold no brain, or another one."
        ) from error


def _tissues_on_grid(dseg: nb.Nifti1Image, grid: NetworkGrid) -> "torch.Tensor":
    """Take shares of grey matter, white matter and fluid, (1, 3, n, n, n), from their labels."""
    import torch

    labels = np.asarray(dseg.dataobj)
    shares = [
        sample_on_grid(nb.Nifti1Image((labels == tissue).astype(np.float32), dseg.affine), grid)
        for tissue in (1, 2, 3)
    ]
    return torch.from_numpy(np.stack(shares))[None]


def _pet_weights(
    network: "torch.nn.Module",
    moving: "torch.Tensor",
    fixed: "torch.Tensor",
    tissues: "torch.Tensor",
    spacing_mm: float,
) -> tuple[float, float, float]:
    """Find how bright tissues are in a PET image, where the network brings it."""
    import torch

    from m2m_bids.registration.maps import map_from_displacement, warp
    from m2m_bids.simulation.contrast import fit_pet_weights

    # Where rigid alignment leaves a gyrus on its neighbour, tissues look alike.
    with torch.no_grad():
        phi = map_from_displacement(network(moving, fixed))
    return fit_pet_weights(warp(moving, phi), tissues, spacing_mm)


def _cycle_error(registration: "Registration", grid: NetworkGrid) -> nb.Nifti1Image:
    """Measure how far points come back from themselves, forward and then backward, mm."""
    from m2m_bids.registration.maps import compose

    round_trip = _displacement(compose(registration.backward, registration.forward))
    unit2world = grid.affine[:3, :3] * (grid.size - 1)
    lengths_mm = np.linalg.norm(np.einsum("de,eijk->dijk", unit2world, round_trip), axis=0)
    return nb.Nifti1Image(lengths_mm.astype(np.float32), grid.affine)


def _assess(
    registration: "Registration",
    pairs: "CyclePairs",
    cycle_error: nb.Nifti1Image,
    world_field: DisplacementField,
    jacobian: nb.Nifti1Image,
    fixed_mask: nb.Nifti1Image,
) -> Quality:
    brain = (pairs.t[0, 0] > 0).cpu().numpy()
    on_field = resample(fixed_mask, (), jacobian, order=0)
    inside = np.asarray(on_field.dataobj) > 0
    determinants = np.asarray(jacobian.dataobj)[inside]
    displacements_mm = np.linalg.norm(world_field.data, axis=-1)[inside]
    return Quality(
        folding_percent=100 * float(np.mean(determinants <= 0)),
        disagreement_mm=float(np.asarray(cycle_error.dataobj)[brain].mean()),
        similarity_gain=registration.similarity_gain,
        similarity=registration.similarity,
        mean_displacement_mm=float(displacements_mm.mean()),
        max_displacement_mm=float(displacements_mm.max()),
        min_jacobian=float(determinants.min()),
        max_jacobian=float(determinants.max()),
        likeness=registration.likeness,
        likeness_gain=registration.likeness_gain,
    )


def _displacement(phi: "torch.Tensor") -> np.ndarray:
    """Take a (1, 3, n, n, n) map to the (3, n, n, n) displacement, unit coordinates."""
    from m2m_bids.registration.grids import identity_map

    return (phi - identity_map(phi.shape[-1], like=phi))[0].cpu().numpy()


def _device_name(device: "torch.device") -> str:
    import torch

    if device.type == "cpu":
        return "cpu"
    return f"{device} ({torch.cuda.get_device_name(device)})"
