"""SUV against values computed by hand, and every reason why there is none."""

import numpy as np
import pytest

from m2m_bids.quantification.suv import (
    NoSUVError,
    activity_bq,
    concentration_bq_ml,
    half_life_s,
    suv_scale,
    weight_in_kg,
)

SCAN = {
    "Units": "Bq/mL",
    "InjectedRadioactivity": 200,
    "InjectedRadioactivityUnits": "MBq",
    "InjectionStart": 0,
    "ImageDecayCorrected": True,
    "ImageDecayCorrectionTime": 0,
    "TracerRadionuclide": "F18",
    "ModeOfAdministration": "bolus",
}


def test_uniform_body_has_suv_one():
    """200 MBq spread evenly in 70 kg of density 1 g/mL."""
    scale = suv_scale(SCAN, 70)
    assert scale.factors * 200e6 / 70e3 == pytest.approx(1)
    assert scale.injected_bq == 200e6


def test_images_corrected_to_any_time_give_the_same_suv():
    """An activity at injection, stated for a scan that begins a half-life later."""
    later = {**SCAN, "ImageDecayCorrectionTime": 109.77 * 60 + 30, "InjectionStart": 30}
    at_injection, at_scan = suv_scale(SCAN, 70), suv_scale(later, 70)
    assert at_scan.injected_bq == pytest.approx(100e6)
    assert at_scan.factors * 0.5 == pytest.approx(at_injection.factors)


def test_uncorrected_frames_are_corrected():
    """Counts of a decaying source, integrated numerically, against its activity at injection."""
    starts, durations, injection = np.array([0.0, 600, 5000]), np.array([600.0, 60, 1800]), 20.0
    constant = np.log(2) / half_life_s("C11")
    measured = []
    for start, duration in zip(starts, durations, strict=True):
        times = start + duration * (np.arange(20000) + 0.5) / 20000
        measured.append(np.exp(-constant * (times - injection)).mean())
    scan = {
        **SCAN,
        "ImageDecayCorrected": False,
        "TracerRadionuclide": "C11",
        "InjectionStart": injection,
        "FrameTimesStart": starts.tolist(),
        "FrameDuration": durations.tolist(),
    }
    suv = suv_scale(scan, 70, 3).factors * np.array(measured)
    # Midpoint sums of 20,000 steps are exact to 1e-8.
    np.testing.assert_allclose(suv, suv_scale(SCAN, 70).factors[0], rtol=1e-6)


def test_units():
    mci = {**SCAN, "InjectedRadioactivity": 200 / 37, "InjectedRadioactivityUnits": "mCi"}
    assert suv_scale(mci, 70).factors == pytest.approx(suv_scale(SCAN, 70).factors)
    kilo = suv_scale({**SCAN, "Units": "kBq/ml"}, 70)
    assert kilo.factors == pytest.approx(1e3 * suv_scale(SCAN, 70).factors)
    assert [activity_bq(unit) for unit in ("Bq", "GBq", "µCi")] == [1, 1e9, 3.7e4]
    assert concentration_bq_ml("MBq/mL") == 1e6
    assert concentration_bq_ml("Bq/cm3") == concentration_bq_ml("BQML") == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"Units": None}, "Units None is not an activity concentration"),
        ({"Units": "counts"}, "'counts' is not an activity concentration"),
        ({"Units": "mBq/mL"}, "'mBq' is not a unit of activity"),
        ({"Units": "g/mL"}, "SUV already"),
        ({"InjectedRadioactivity": None}, "InjectedRadioactivity is not given"),
        ({"InjectedRadioactivity": "n/a"}, "InjectedRadioactivity is 'n/a'"),
        ({"InjectedRadioactivity": 0}, "not positive"),
        ({"InjectedRadioactivityUnits": "mbq"}, "'mbq' is not a unit of activity"),
        ({"InjectedRadioactivityUnits": None}, "None is not a unit of activity"),
        ({"InjectionStart": None}, "InjectionStart is not given"),
        ({"ImageDecayCorrected": None}, "ImageDecayCorrected is not given"),
        ({"ImageDecayCorrectionTime": None}, "ImageDecayCorrectionTime is not given"),
        ({"ModeOfAdministration": "infusion"}, "no one time of injection"),
        (
            {"ImageDecayCorrectionTime": 60, "TracerRadionuclide": "Xx9"},
            "TracerRadionuclide is 'Xx9'",
        ),
        (
            {"ImageDecayCorrected": False, "FrameTimesStart": None},
            "not corrected for decay, and FrameTimesStart is missing",
        ),
        (
            {"ImageDecayCorrected": False, "FrameTimesStart": [0], "FrameDuration": [0]},
            "not corrected for decay, and FrameDuration has a value that is not positive",
        ),
    ],
)
def test_reasons_why_there_is_none(change, reason):
    with pytest.raises(NoSUVError, match=reason):
        suv_scale({**SCAN, **change}, 70)


@pytest.mark.parametrize("weight", [0, -1, np.nan])
def test_weight_must_be_positive(weight):
    with pytest.raises(NoSUVError, match="body weight"):
        suv_scale(SCAN, weight)


@pytest.mark.parametrize(
    ("value", "units"),
    [("n/a", "kg"), (70, None), (70, "lb"), (0, "kg"), (70000, "kg"), ("nan", "g")],
)
def test_weights_that_are_not_understood(value, units):
    with pytest.raises(NoSUVError, match="body weight"):
        weight_in_kg(value, units)
