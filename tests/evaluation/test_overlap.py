import numpy as np
import pytest

from m2m_bids.evaluation.overlap import dice_per_label, mean_dice


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
    assert mean_dice(a, b, labels=(1, 2, 5)) == pytest.approx(0.5)


def test_only_label_present_and_half_overlapping_scores_one_half():
    # A label absent from both must not lift the mean as a perfect score would.
    assert mean_dice(boxes(0, 6, 5), boxes(3, 9, 5), labels=range(1, 6)) == pytest.approx(0.5)


def test_background_is_no_label():
    assert dice_per_label(boxes(0, 3, 1), boxes(6, 9, 1)) == {1: 0.0}


def test_mean_weights_labels_not_voxels():
    a, b = boxes(0, 10, 1), boxes(0, 10, 1)
    a[10], b[11] = 2, 2
    assert mean_dice(a, b) == pytest.approx((1 + 0) / 2)


def test_no_label_at_all_is_an_error():
    empty = boxes(0, 0, 1)
    assert dice_per_label(empty, empty) == {}
    with pytest.raises(ValueError, match="found none"):
        mean_dice(empty, empty)


def test_other_shapes_and_fractions_are_errors():
    with pytest.raises(ValueError, match=r"\(12, 10, 8\) and \(11, 10, 8\)"):
        dice_per_label(boxes(0, 6, 1), boxes(0, 6, 1)[1:])
    with pytest.raises(ValueError, match="float32"):
        dice_per_label(boxes(0, 6, 1), boxes(0, 6, 1).astype(np.float32))
