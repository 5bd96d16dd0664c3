import numpy as np
import pytest
import torch
from nibabel.affines import apply_affine

from m2m_bids.registration.grids import identity_map
from m2m_bids.registration.maps import jacobian_determinant
from m2m_bids.simulation.anatomy import (
    TEMPLATE_CHANNELS,
    Template,
    deformed_subject,
    gradient,
    random_coordinates,
    random_field,
    random_subject,
    subject_from_coordinates,
    template_from_nilearn,
    uniform,
)


@pytest.fixture(scope="module")
def template():
    return template_from_nilearn(size=32, spacing_mm=6.0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def channel(template, name):
    return template.data[0, TEMPLATE_CHANNELS.index(name)].numpy()


def test_template_tissues_fill_the_brain_and_nothing_else(template):
    assert template.data.min() >= 0
    assert template.data.max() <= 1
    tissues = sum(channel(template, name) for name in ("csf", "gm", "wm"))
    mask = channel(template, "mask")
    assert np.abs(tissues - mask)[mask > 0.99].mean() < 0.02
    assert tissues[mask == 0].max() < 0.02
    # The MNI152 brain has about 1.9 litres within its mask.
    assert 1.7e6 < mask.sum() * template.spacing_mm**3 < 2.1e6


def test_ventricles_are_two_bodies_of_fluid_at_their_place(template):
    ventricles = channel(template, "ventricles")
    ijk = np.argwhere(ventricles > 0.2)
    x, y, z = apply_affine(template.affine, ijk).T
    for side in (-1, 1):
        assert 5 < side * np.median(x[side * x > 0]) < 30
    assert -40 < y.mean() < 20
    assert 0 < z.mean() < 30
    assert channel(template, "csf")[ventricles > 0.5].mean() > 0.5


def test_pooling_keeps_the_brain_at_its_place_in_the_world(template):
    pooled = template.pooled()
    assert pooled.spacing_mm == pytest.approx(12)
    assert pooled.size == 16

    def center(volume):
        mask = channel(volume, "mask")
        ijk = np.indices(mask.shape).reshape(3, -1) @ mask.ravel() / mask.sum()
        return volume.affine[:3, :3] @ ijk + volume.affine[:3, 3]

    # Averages over blocks keep a centre of mass exactly, up to the sums' rounding in float32.
    np.testing.assert_allclose(center(pooled), center(template), atol=0.01)


def test_saved_template_comes_back_to_a_byte(template, tmp_path):
    template.save(tmp_path / "template.npz")
    loaded = Template.load(tmp_path / "template.npz")
    np.testing.assert_array_equal(loaded.affine, template.affine)
    assert (loaded.data - template.data).abs().max() <= 0.5 / 255 + 1e-6


def test_random_field_has_unit_variance_and_its_scale():
    fine, coarse = (random_field(40, scale, generator(), n_channels=2) for scale in (4, 16))
    assert fine.shape == (1, 2, 40, 40, 40)
    for field in (fine, coarse):
        assert field.std().item() == pytest.approx(1, abs=1e-3)
    steps = [gradient(field[:, :1]).norm(dim=1).mean() for field in (fine, coarse)]
    # Noise of four times the scale changes about a quarter as much per voxel.
    assert 2.5 < steps[0] / steps[1] < 6


def test_gradient_of_a_ramp():
    ramp = 3 * torch.arange(8.0)[None, None, :, None, None].expand(1, 1, 8, 8, 8)
    slope = gradient(ramp)
    assert slope.shape == (1, 3, 8, 8, 8)
    assert (slope[:, 0] == 3).all()
    assert (slope[:, 1:] == 0).all()


@pytest.mark.parametrize("strength", [1.0, 1.5])
def test_random_coordinates_have_no_folds_and_depend_on_the_seed(template, strength):
    phi = random_coordinates(template, generator(1), strength=strength)
    assert jacobian_determinant(phi).min() > 0
    torch.testing.assert_close(
        phi, random_coordinates(template, generator(1), strength=strength), rtol=0, atol=0
    )
    other = random_coordinates(template, generator(2), strength=strength)
    assert (phi - other).abs().max() * template.extent_mm > 3


def test_without_strength_and_affine_only_a_shift_remains(template):
    phi = random_coordinates(template, generator(), strength=0.0, affine_sd=0.0)
    shift = (phi - identity_map(template.size)) * template.extent_mm
    spread = shift.amax((2, 3, 4)) - shift.amin((2, 3, 4))
    assert spread.max() < 1e-3
    assert 0.1 < shift.abs().max() < 10


def test_subject_has_fractions_that_sum_to_at_most_one(template):
    subject = random_subject(template, generator(3))
    total = subject.tissues.sum(1)
    assert subject.tissues.min() >= 0
    assert total.max() <= 1 + 1e-5
    assert total[subject.template[:, TEMPLATE_CHANNELS.index("mask")] <= 0.02].max() == 0
    # Sharper than the template: most voxels of the brain are of one tissue.
    assert (subject.tissues.amax(1)[total > 0.5] > 0.8).float().mean() > 0.6


def test_subject_at_the_identity_resembles_the_template(template):
    subject = subject_from_coordinates(template, identity_map(32), generator(4))
    names = ("csf", "gm", "wm")
    volumes = [*subject.tissues[0].numpy(), *(channel(template, name) for name in names)]
    correlation = np.corrcoef([volume.ravel() for volume in volumes])[:3, 3:]
    assert correlation.argmax(axis=1).tolist() == [0, 1, 2]
    # Sulci are thinner than these voxels and vary most; a random pairing would be near zero.
    assert (correlation.diagonal() > (0.5, 0.7, 0.7)).all()


def test_deformed_subject_shows_the_anatomy_at_x_plus_displacement(template):
    subject = random_subject(template, generator(5))
    displacement = torch.zeros(1, 3, 32, 32, 32)
    displacement[:, 1] = 2 / 31
    moved = deformed_subject(subject, displacement)
    # Voxel j of the moved subject shows voxel j + 2; interpolation at voxels costs rounding only.
    torch.testing.assert_close(
        moved.tissues[..., :, :30, :], subject.tissues[..., :, 2:, :], rtol=0, atol=1e-4
    )
    torch.testing.assert_close(
        moved.coordinates[..., :, :30, :], subject.coordinates[..., :, 2:, :], rtol=0, atol=1e-4
    )


def test_uniform_stays_between_its_bounds():
    numbers = [uniform(generator(seed), -2, 3) for seed in range(100)]
    assert -2 <= min(numbers) < -1
    assert 2 < max(numbers) <= 3
