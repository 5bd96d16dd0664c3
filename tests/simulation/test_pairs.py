import numpy as np
import pytest

from m2m_bids.evaluation.landmarks import landmark_errors
from m2m_bids.evaluation.overlap import dice_per_label
from m2m_bids.simulation.pairs import simulate_pair
from m2m_bids.simulation.truth import LABELS
from m2m_bids.spatial.fields import jacobian_determinant
from m2m_bids.spatial.resampling import resample

SPACING_MM = 4.5


@pytest.fixture(scope="module", params=[("within", "pet"), ("within", "fa"), ("between", "fa")])
def pair(request):
    kind, modality = request.param
    return kind, simulate_pair(0, modality, spacing_mm=SPACING_MM, kind=kind)


def dice(pair, transforms):
    labels = resample(pair.moving_labels, transforms, pair.fixed_image, order=0)
    maps = (np.asarray(image.dataobj) for image in (labels, pair.fixed_labels))
    return np.mean(list(dice_per_label(*maps, LABELS.values()).values()))


def test_truth_maps_fixed_landmarks_to_moving_landmarks(pair):
    kind, pair = pair
    errors = [
        landmark_errors(transforms, *pair.landmarks).mean()
        for transforms in ((), pair.rigid_fixed2moving, pair.fixed2moving)
    ]
    assert len(pair.landmarks.fixed) > 150
    # Headers are off by 5 to 10 mm and 5 to 10 degrees, the anatomy by more between subjects.
    assert errors[0] > 5
    assert 2 < errors[1] < (5 if kind == "within" else 25)
    # What linear interpolation over 4.5 mm leaves of bends of some 20 mm.
    assert errors[2] < 0.25
    assert landmark_errors(pair.fixed2moving, *pair.landmarks[::-1]).mean() > 5


def test_truth_brings_labels_together(pair):
    kind, pair = pair
    header, rigid, truth = (
        dice(pair, transforms) for transforms in ((), pair.rigid_fixed2moving, pair.fixed2moving)
    )
    assert header < rigid < truth
    # Nearest-neighbour labels at this voxel size; each subject has folds of its own.
    assert truth > (0.7 if kind == "within" else 0.55)
    assert truth > rigid + 0.1


def test_images_show_what_the_labels_say(pair):
    _, pair = pair
    moving, fixed = (np.asarray(image.dataobj) for image in (pair.moving_image, pair.fixed_image))
    moving_labels, fixed_labels = (
        np.asarray(image.dataobj) for image in (pair.moving_labels, pair.fixed_labels)
    )
    gm, wm, csf = (LABELS[name] for name in ("GM", "WM", "CSF"))
    assert fixed[fixed_labels == wm].mean() > fixed[fixed_labels == gm].mean()
    assert fixed[fixed_labels == gm].mean() > fixed[fixed_labels == csf].mean()
    bright, dark = (gm, wm) if pair.modality == "pet" else (wm, gm)
    assert moving[moving_labels == bright].mean() > 1.3 * moving[moving_labels == dark].mean()
    for data in (moving, fixed):
        assert data.min() >= 0
        assert data.max() <= 1


def test_truth_has_no_folds(pair):
    assert (jacobian_determinant(pair[1].fixed2moving[1]) > 0).all()


def test_pairs_depend_on_their_number_alone():
    first, same, other = (
        simulate_pair(seed, "pet", spacing_mm=SPACING_MM, kind="between") for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first.moving_image.dataobj, same.moving_image.dataobj)
    np.testing.assert_array_equal(first.moving_image.affine, same.moving_image.affine)
    assert np.abs(first.fixed_image.get_fdata() - other.fixed_image.get_fdata()).max() > 0.2


def test_pair_without_warp_is_rigid():
    pair = simulate_pair(0, "pet", spacing_mm=SPACING_MM, kind="within", warp_mm=0.0)
    assert np.abs(pair.fixed2moving[1].data).max() == 0
    # Landmarks are exact to rounding of float32 positions.
    assert landmark_errors(pair.rigid_fixed2moving, *pair.landmarks).max() < 0.02


@pytest.mark.parametrize(
    ("seed", "modality", "kind", "message"),
    [
        (0, "ct", "within", "modality must be"),
        (0, "pet", "same", "kind must be"),
        (-1, "pet", "within", "seed must not be negative, got -1"),
    ],
)
def test_what_cannot_be_simulated_is_an_error(seed, modality, kind, message):
    with pytest.raises(ValueError, match=message):
        simulate_pair(seed, modality, kind=kind)
