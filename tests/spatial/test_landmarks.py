"""Tables of landmarks: written, read, refused."""

import numpy as np
import pytest

from m2m_bids.spatial.landmarks import Landmarks, read_landmarks, write_landmarks


def test_landmarks_come_back(tmp_path, rng):
    landmarks = Landmarks(*rng.uniform(-50, 50, (2, 7, 3)))
    found = read_landmarks(write_landmarks(landmarks, tmp_path / "landmarks.tsv"))
    assert isinstance(found, Landmarks)
    np.testing.assert_allclose(found, landmarks, atol=5e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x\ty\n1\t2\n", "columns t1w_x, t1w_y, t1w_z, scan_x, scan_y, scan_z"),
        ("t1w_x\tt1w_y\tt1w_z\tscan_x\tscan_y\tscan_z\n", "holds no landmarks"),
        ("t1w_x\tt1w_y\tt1w_z\tscan_x\tscan_y\tscan_z\n1\t2\t3\t4\t5\n", "not a table"),
        ("t1w_x\tt1w_y\tt1w_z\tscan_x\tscan_y\tscan_z\n1\t2\t3\t4\t5\tb\n", "not a table"),
    ],
)
def test_bad_landmarks(tmp_path, text, message):
    file = tmp_path / "points.tsv"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_landmarks(file)
    assert str(file) in str(caught.value)


def test_missing_landmarks(tmp_path):
    with pytest.raises(ValueError, match=r"none\.tsv: not a table"):
        read_landmarks(tmp_path / "none.tsv")
