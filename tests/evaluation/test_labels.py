"""Classes of label maps: FreeSurfer's numbers, tissues, and what cannot be compared."""

import numpy as np
import pytest

from m2m_bids.evaluation.labels import (
    CLASSES,
    NAMES,
    TISSUES,
    evaluation_labels,
    labels_in_common,
)
from m2m_bids.evaluation.overlap import dice_per_label
from m2m_bids.simulation.truth import LABELS

# The structures of aseg by their names in FreeSurfer's colour table, left and right, and the
# classes that the M2M-Reg paper's authors group them into.
ASEG = {
    "cerebral_white_matter": {
        "Cerebral-White-Matter": (2, 41),
        "Pallidum": (13, 52),
        "VentralDC": (28, 60),
        "WM-hypointensities": (77,),
    },
    "cerebral_cortex": {"Cerebral-Cortex": (3, 42)},
    "ventricles": {
        "Lateral-Ventricle": (4, 43),
        "Inf-Lat-Vent": (5, 44),
        "3rd-Ventricle": (14,),
        "4th-Ventricle": (15,),
        "choroid-plexus": (31, 63),
        "5th-Ventricle": (72,),
    },
    "cerebellar_white_matter": {"Cerebellum-White-Matter": (7, 46)},
    "cerebellar_cortex": {"Cerebellum-Cortex": (8, 47)},
    "thalamus": {"Thalamus": (10, 49)},
    "caudate_accumbens": {"Caudate": (11, 50), "Accumbens-area": (26, 58)},
    "putamen": {"Putamen": (12, 51)},
    "brain_stem": {"Brain-Stem": (16,), "Midbrain": (173,), "Pons": (174,), "Medulla": (175,)},
    "hippocampus": {"Hippocampus": (17, 53)},
    "amygdala": {"Amygdala": (18, 54)},
}
NO_CLASS = {
    "Unknown": 0,
    "CSF": 24,
    "Left-vessel": 30,
    "Right-vessel": 62,
    "non-WM-hypointensities": 80,
    "Optic-Chiasm": 85,
    "CC_Posterior": 251,
    "CC_Anterior": 255,
}


def classes_of(*numbers):
    """Names of the classes of FreeSurfer's numbers; the putamen is added so that there is one."""
    found = evaluation_labels(np.array([12, *numbers]), "freesurfer")
    return [CLASSES.get(number) for number in found[1:]]


@pytest.mark.parametrize("name", ASEG)
def test_aseg(name):
    numbers = [number for sides in ASEG[name].values() for number in sides]
    assert classes_of(*numbers) == [name] * len(numbers)


def test_every_number_of_aseg_is_as_listed():
    listed = {n: name for name, parts in ASEG.items() for sides in parts.values() for n in sides}
    found = classes_of(*range(1000))
    assert {n: name for n, name in enumerate(found) if name} == listed
    assert [found[number] for number in NO_CLASS.values()] == [None] * len(NO_CLASS)


@pytest.mark.parametrize(
    ("numbers", "name"),
    [
        ((1000, 1001, 1035, 2000, 2001, 2035, 2999), "cerebral_cortex"),
        ((11100, 11175, 12100, 12175), "cerebral_cortex"),
        ((3001, 3035, 4001, 4035, 5001, 5002), "cerebral_white_matter"),
        ((13101, 14175), "cerebral_white_matter"),
        # Nuclei of the brain stem's and the thalamus' own segmentations, and none at all.
        ((5003, 8103, 10999, 15000, 70000), None),
    ],
)
def test_aparc_and_wmparc(numbers, name):
    assert classes_of(*numbers) == [name] * len(numbers)


def test_both_sides_of_a_structure_are_one_class():
    left, right = np.zeros((2, 4, 4, 4), dtype=np.int32)
    left[:2], right[:2] = 17, 53
    one, other = (evaluation_labels(labels, "freesurfer") for labels in (left, right))
    assert dice_per_label(one, other) == {10: 1.0}


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_type_and_shape(dtype):
    labels = np.array([[0, 2], [1035, 53]], dtype=dtype)
    found = evaluation_labels(labels, "freesurfer")
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, [[0, 1], [2, 10]])


def test_negative_numbers_are_no_class():
    np.testing.assert_array_equal(evaluation_labels(np.array([-1, 2]), "freesurfer"), [0, 1])


def test_tissues_as_bids_numbers_them():
    found = evaluation_labels(np.array([0, 1, 2, 3, 4, 6]), "tissues")
    assert [NAMES.get(n) for n in found] == [
        None,
        "grey_matter",
        "white_matter",
        "csf",
        None,
        None,
    ]


def test_simulated_tissues_as_the_simulation_numbers_them():
    found = {
        name: NAMES[int(evaluation_labels(np.array([number]), "simulated")[0])]
        for name, number in LABELS.items()
    }
    assert found == {
        "GM": "grey_matter",
        "WM": "white_matter",
        "CSF": "csf_outside_lateral_ventricles",
        "ventricles": "lateral_ventricles",
    }


def test_no_number_and_no_name_means_two_things():
    assert not set(CLASSES) & set(TISSUES)
    assert len(set(NAMES.values())) == len(NAMES) == len(CLASSES) + len(TISSUES)
    assert list(CLASSES) == list(range(1, 12))


@pytest.mark.parametrize(
    ("labels", "scheme", "message"),
    [
        ([0, 24, 85], "freesurfer", r"none of the values \(0, 24, 85\).*'freesurfer'"),
        ([0, 17, 53], "tissues", "none of the values"),
        ([0, 0], "simulated", "none of the values"),
        ([2.5], "freesurfer", "whole numbers, got float64"),
        ([np.nan, 2], "freesurfer", "whole numbers"),
        ([np.inf, 2], "freesurfer", "whole numbers"),
        ([2 + 0j], "freesurfer", "whole numbers, got complex"),
        ([2], "aal", "scheme must be one of freesurfer, tissues, simulated, got 'aal'"),
    ],
)
def test_labels_that_cannot_be_used(labels, scheme, message):
    with pytest.raises(ValueError, match=message):
        evaluation_labels(np.array(labels), scheme)


def test_classes_in_common_are_all_of_the_scheme():
    assert labels_in_common(np.array([0, 1]), np.array([0, 10])) == tuple(CLASSES)
    assert labels_in_common(np.array([21]), np.array([23])) == (21, 22, 23)
    assert labels_in_common(np.array([25, 21]), np.array([0])) == (21, 22, 24, 25)


@pytest.mark.parametrize(("one", "other"), [([1, 2], [21]), ([21, 23], [25]), ([1], [99])])
def test_labels_of_different_schemes_are_not_compared(one, other):
    with pytest.raises(ValueError, match=f"different kinds: {NAMES[one[0]]}"):
        labels_in_common(np.array(one), np.array(other))
