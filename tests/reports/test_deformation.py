"""The bent grid and the cycle error, on maps that are known."""

import re

import nibabel as nb
import numpy as np
import pytest

from m2m_bids.reports import mosaic
from m2m_bids.reports.deformation import cycle_figure, grid_figure


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(mosaic, "TILE_WIDTH_PX", 60)


def starts(file):
    """Where lines of the grid begin, by the way in which they follow each other."""
    paths = re.findall(r'd="([^"]*)" fill="none" stroke="#ffd23c"', file.read_text())
    return [set(re.findall(r"M(\d+ \d+)", path)) for path in paths]


@pytest.fixture
def draw(brain, image_of, tmp_path):
    def run(function):
        displacement = image_of(function, brain)
        return starts(grid_figure(displacement, brain, tmp_path / "grid.svg", background=brain))

    return run


def test_a_grid_moved_by_its_spacing_looks_the_same(draw, brain):
    """Moved by half of it to the right, the lines that follow each other there do not."""
    direction = nb.as_closest_canonical(brain).affine[:3, 0]
    direction = direction / np.linalg.norm(direction)
    still, spaced, between = (
        draw(lambda points, mm=mm: np.zeros_like(points) + mm * direction) for mm in (0, 10, 5)
    )
    # A line's end may be rounded otherwise, or lie beyond the field of view of the displacement.
    assert len(still[0] & spaced[0]) > 0.7 * len(still[0])
    assert len(still[0] & between[0]) < 0.4 * len(still[0])
    assert len(still[1] & between[1]) > 0.7 * len(still[1])


def test_a_compressed_scan_has_narrow_lines(draw):
    """Points of the T1w go twice as far in the scan: its lines lie half as far apart."""
    still, narrow = draw(np.zeros_like), draw(lambda points: points - (0, -10, 5))
    for before, after in zip(still, narrow, strict=True):
        assert 1.5 < len(after) / len(before) < 2.5


def test_cycle_error_has_its_numbers(brain, image_of, tmp_path):
    error = image_of(lambda points: 0.02 * np.abs(points[..., 1] + 10), brain)
    text = cycle_figure(error, brain, tmp_path / "cycle.svg", label="<PET>").read_text()
    values = error.get_fdata()[np.asarray(brain.dataobj) > 0]
    assert f">{values.mean():.2f}<" in text
    assert f">{values.max():.2f}<" in text
    assert f"mean (mm) {values.mean():.2f}" in text  # in the words for those who do not see
    assert "&lt;PET&gt;" in text
    assert "<PET>" not in text
    with pytest.raises(ValueError, match="no finite value"):
        cycle_figure(error, nb.Nifti1Image(np.zeros(brain.shape), brain.affine), tmp_path / "a")
