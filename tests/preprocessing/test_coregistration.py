import nibabel as nb
import numpy as np
import pytest

from m2m_bids.preprocessing.anatomical import extract_brain
from m2m_bids.preprocessing.coregistration import register_affine, register_rigid
from m2m_bids.preprocessing.diffusion import clean_fa
from m2m_bids.spatial.images import ImageError


def moved(image, matrix, zoom=(1, 1, 1)):
    """Give an image another header and coarser, anisotropic voxels."""
    data = np.asarray(image.dataobj)[tuple(slice(None, None, step) for step in zoom)]
    return nb.Nifti1Image(data, matrix @ image.affine @ np.diag([*map(float, zoom), 1.0]))


def test_pet_with_a_header_off_by_60_mm_and_20_degrees(head, tools):
    true = tools["rigid_matrix"]((35, -35, 34), (14, -9, 11))
    found = register_rigid(moved(head.pet, true, (1, 1, 2)), head.t1w, head.brain)
    assert tools["mean_distance_mm"](found.fixed2moving, true, head.brain) < 1.5
    rotation = found.fixed2moving[:3, :3]
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(3), atol=1e-10)
    np.testing.assert_allclose(np.linalg.det(rotation), 1)
    scores = [start.score for start in found.starts]
    assert scores == sorted(scores, reverse=True)
    assert {"header", "centres of mass"} <= {start.name for start in found.starts}
    assert len(found.starts) == 14


@pytest.mark.slow
def test_fa_onto_an_oblique_t1w(head, tools):
    turn = tools["rigid_matrix"]((3, 8, -6), (-12, 15, 8))
    true = tools["rigid_matrix"]((-30, 20, 45), (-6, 12, 9)) @ np.linalg.inv(turn)
    moving = moved(head.fa, true @ turn)
    found = register_rigid(moving, moved(head.t1w, turn), moved(head.brain, turn))
    assert tools["mean_distance_mm"](found.fixed2moving, true, moved(head.brain, turn)) < 1.5


@pytest.mark.slow
def test_a_head_of_another_size(head, tools):
    """Scale and shear come on top of a pose that no header tells."""
    shape = nb.affines.from_matvec([[0.9, 0.04, 0], [0, 1.06, -0.03], [0.02, 0, 0.92]])
    true = tools["rigid_matrix"]((15, -25, 20), (8, -6, 9)) @ shape
    moving = moved(head.pet, true)
    rigid, affine = (f(moving, head.t1w, head.brain) for f in (register_rigid, register_affine))
    apart = [tools["mean_distance_mm"](found.fixed2moving, true, head.brain)
             for found in (rigid, affine)]  # fmt: skip
    assert apart[0] > 3
    assert apart[1] < 1.5
    assert affine.score > rigid.score


@pytest.mark.slow
def test_slab_without_cerebellum(head, tools):
    true = tools["rigid_matrix"]((10, -15, 25), (5, 8, -6))
    data = head.fa.get_fdata().astype(np.float32)[:, :, 34:]
    above = nb.affines.from_matvec(np.eye(3), [0, 0, 34])
    slab = nb.Nifti1Image(data, true @ head.fa.affine @ above)
    found = register_rigid(slab, head.t1w, head.brain)
    assert tools["mean_distance_mm"](found.fixed2moving, true, head.brain) < 2.5


@pytest.mark.slow
def test_repeats_with_the_same_seed(head, tools):
    """ANTs sums in the order in which its threads end: equal to a twentieth of a voxel."""
    first, second = [register_rigid(head.pet, head.t1w, head.brain) for _ in range(2)]
    distance = tools["mean_distance_mm"](first.fixed2moving, second.fixed2moving, head.brain)
    assert distance < 0.15
    assert first.starts == second.starts


def test_bad_images_are_named(head):
    empty = nb.Nifti1Image(np.zeros((8, 8, 8), dtype=np.float32), np.eye(4))
    with pytest.raises(ImageError, match="every voxel is zero"):
        register_rigid(empty, head.t1w, head.brain)
    with pytest.raises(ImageError, match="grid"):
        register_rigid(head.pet, head.t1w, empty)


@pytest.mark.slow
def test_real_images_with_disturbed_headers(shared_data, tools):
    """Real FA and SPECT go to the same place from their own and from a disturbed header."""
    folder = shared_data / "real-bids"
    t1w = nb.load(folder / "sub-01/ses-M000/anat/sub-01_ses-M000_T1w.nii.gz")
    brain = extract_brain(t1w).mask
    pet = nb.load(next(folder.glob("sub-01/ses-M000/pet/*_pet.nii.gz")))
    fa = nb.load(next(folder.glob("derivatives/dti/sub-01/**/*_dwimap.nii.gz")))
    disturbance = tools["rigid_matrix"]((-35, 34, -35), (12, 12, -11))
    for image in (pet, clean_fa(fa)):
        straight = register_rigid(image, t1w, brain).fixed2moving
        disturbed = register_rigid(moved(image, disturbance), t1w, brain).fixed2moving
        distance = tools["mean_distance_mm"](
            np.linalg.inv(disturbance) @ disturbed, straight, brain
        )
        assert distance < 2
