import numpy as np
import pytest

from m2m_bids.evaluation.overlap import dice_per_label


def boxes(start, stop, label):
    labels = np.zeros((12, 10, 8), dtype=np.uint8)
    labels[start:stop] = label
    return labels


def test_dice_of_shifted_boxes_is_their_shared_share():
    # Two slabs of six planes that share four: 2 * 4 / (6 + 6).
    assert dice_per_label(boxes(0, 6, 3), boxes(2, 8, 3)) == {3: pytest.approx(8 / 12)}


def test_label_absent_from_both_is_left_out_and_from_one_counts_as_zero():
    a, b = boxes(0, 6, 1), boxes(0, 6, 1)
    b[8:] = 2
    assert dice_per_label(a, b, labels=(1, 2, 5)) == {1: 1.0, 2: 0.0}


def test_background_is_no_label():
    assert dice_per_label(boxes(0, 3, 1), boxes(6, 9, 1)) == {1: 0.0}


def test_no_label_at_all_has_no_score():
    assert dice_per_label(boxes(0, 0, 1), boxes(0, 0, 1)) == {}


def test_other_shapes_and_fractions_are_errors():
    with pytest.raises(ValueError, match=r"\(12, 10, 8\) and \(11, 10, 8\)"):
        dice_per_label(boxes(0, 6, 1), boxes(0, 6, 1)[1:])
    with pytest.raises(ValueError, match="float32"):
        dice_per_label(boxes(0, 6, 1), boxes(0, 6, 1).astype(np.float32))
