"""
FireANTs by mutual information or by local normalised cross-correlation.

Jena et al., "FireANTs: Adaptive Riemannian optimization for multi-scale diffeomorphic matching",
arXiv:2404.01249.
"""

from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal, NamedTuple

import nibabel as nb
import numpy as np

from m2m_bids.api import Modality, resolve_device
from m2m_bids.baselines.base import (
    Images,
    Options,
    Outcome,
    chain_through_template,
    images_in_template,
)
from m2m_bids.preprocessing.ants_bridge import RAS2LPS, read_displacement

if TYPE_CHECKING:
    import torch
    from fireants.io.image import Image

PACKAGES = ("fireants", "SimpleITK")
SCALES = (4, 2, 1)
ITERATIONS = (200, 100, 50)
LNCC_WINDOW_VOXELS = 7


class _Smoothing(NamedTuple):
    """Standard deviations of Gaussians, in voxels of each level, and the step, in voxels."""

    gradient: float
    warp: float
    step: float


# FireANTs' defaults are for images of one modality and 1 mm: smoother gradients brought landmarks
# of simulated pairs closer (PET 5.2 to 3.0 mm, FA 4.9 to 2.0 mm by mutual information). With
# larger steps LNCC leads PET away from the truth.
SMOOTHING = {"mi": _Smoothing(5.0, 1.0, 0.5), "cc": _Smoothing(5.0, 1.0, 0.25)}


def missing_fireants(modality: Modality | None = None) -> str | None:
    """Say which Python package is missing, and how to get it; None if none is."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if not missing:
        return None
    # FireANTs asks for a SimpleITK that is not there for newer versions of Python, without need.
    return (
        f"Python package {' and '.join(missing)} not installed:"
        " `pip install SimpleITK && pip install --no-deps fireants`"
    )


def register_fireants(
    images: Images, options: Options, *, similarity: Literal["mi", "cc"]
) -> Outcome:
    """
    Register by FireANTs' greedy diffeomorphic registration.

    Parameters
    ----------
    images : Images
    options : Options
        Device, threads and the voxel size.
    similarity : {"mi", "cc"}
        Mutual information, or local normalised cross-correlation.

    Returns
    -------
    Outcome

    Raises
    ------
    ImageError
        If the images do not overlap.
    DeviceError
        If the device is not there.
    """
    import torch
    from fireants.io.image import BatchedImages
    from fireants.registration.greedy import GreedyRegistration

    if options.n_threads:
        torch.set_num_threads(options.n_threads)
    device = resolve_device(options.device)
    smoothing = SMOOTHING[similarity]
    pair = images_in_template(images, options.spacing_mm)
    everywhere = nb.Nifti1Image(np.ones(pair.moving.shape, dtype=np.uint8), pair.moving.affine)
    registration = GreedyRegistration(
        scales=list(SCALES),
        iterations=list(ITERATIONS),
        fixed_images=BatchedImages([_masked_image(pair.fixed, pair.region, device)]),
        moving_images=BatchedImages([_masked_image(pair.moving, everywhere, device)]),
        loss_type=f"masked_{similarity}",
        loss_params={},  # the default is one dictionary for all registrations
        cc_kernel_size=LNCC_WINDOW_VOXELS,
        optimizer_lr=smoothing.step,
        smooth_grad_sigma=smoothing.gradient,
        smooth_warp_sigma=smoothing.warp,
        progress_bar=False,
    )
    registration.optimize()
    with TemporaryDirectory(prefix="m2m-fireants-") as folder:
        file = Path(folder) / "warp.nii"
        registration.save_as_ants_transforms(str(file))
        displacement = read_displacement(file)
    return Outcome(chain_through_template(images, displacement, pair.fixed.affine))


def _masked_image(image: nb.Nifti1Image, mask: nb.Nifti1Image, device: "torch.device") -> "Image":
    """Image of FireANTs with a mask as its second channel, which is where it looks for one."""
    import SimpleITK as sitk
    from fireants.io.image import Image

    vox2lps = RAS2LPS @ image.affine
    spacing = np.linalg.norm(vox2lps[:3, :3], axis=0)
    channels = []
    for volume in (image, mask):
        # SimpleITK's arrays have the first axis of the image last.
        data = np.ascontiguousarray(np.asarray(volume.dataobj, dtype=np.float32).T)
        converted = sitk.GetImageFromArray(data)
        converted.SetSpacing(spacing.tolist())
        converted.SetOrigin(vox2lps[:3, 3].tolist())
        converted.SetDirection((vox2lps[:3, :3] / spacing).ravel().tolist())
        channels.append(Image(converted, device=device))
    return channels[0].concatenate(channels[1])
