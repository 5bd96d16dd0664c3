"""
FireANTs by mutual information or by local normalised cross-correlation.

Jena et al., "FireANTs: Adaptive Riemannian optimization for multi-scale diffeomorphic matching",
arXiv:2404.01249.
"""

from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

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


# Standard deviations of Gaussians, in voxels of each level. FireANTs' defaults, 1 and 0.5, are for
# images of one modality: on four simulated pairs, 3 mm, these brought the landmark error by
# mutual information from 5.1 to 2.7 mm.
GRADIENT_SIGMA_VOXELS = 5.0
WARP_SIGMA_VOXELS = 1.0
# Steps in voxels; 0.5 is FireANTs' default. By LNCC it suits FA (1.8 mm, against 2.6 mm with half
# of it) but leads PET back to where it started (9.6 mm, against 4.9 mm).
STEP_VOXELS = {("mi", "pet"): 0.5, ("mi", "fa"): 0.5, ("cc", "pet"): 0.25, ("cc", "fa"): 0.5}


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
        optimizer_lr=STEP_VOXELS[similarity, images.modality],
        smooth_grad_sigma=GRADIENT_SIGMA_VOXELS,
        smooth_warp_sigma=WARP_SIGMA_VOXELS,
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
