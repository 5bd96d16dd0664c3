"""Images of FireANTs lie where they are."""

import nibabel as nb
import numpy as np
import pytest
import torch
from nibabel.affines import apply_affine, from_matvec

pytest.importorskip("fireants")
pytest.importorskip("SimpleITK")

from m2m_bids.baselines.fireants import _masked_image


def test_image_keeps_its_place_and_gets_its_mask(rng):
    shape = (8, 10, 12)
    affine = from_matvec(np.diag([2.0, 3.0, 4.0]), [-20, 5, 7])
    data = rng.random(shape).astype(np.float32)
    mask = (rng.random(shape) > 0.5).astype(np.uint8)
    image = _masked_image(
        nb.Nifti1Image(data, affine), nb.Nifti1Image(mask, affine), torch.device("cpu")
    )
    # Batch and channels first, then the axes from last to first.
    assert image.array.shape == (1, 2, 12, 10, 8)
    np.testing.assert_array_equal(image.array[0, 0].numpy().T, data)
    np.testing.assert_array_equal(image.array[0, 1].numpy().T, mask)
    # [-1, 1] from the first voxel's centre to the last one's, to LPS mm.
    corners = np.array([[-1.0, -1, -1], [1, 1, 1], [-1, 1, -1]])
    voxels = (corners + 1) / 2 * (np.array(shape) - 1)
    expected = apply_affine(affine, voxels) * [-1, -1, 1]
    found = apply_affine(image.torch2phy[0].numpy(), corners)
    np.testing.assert_allclose(found, expected, atol=1e-4)
