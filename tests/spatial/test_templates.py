"""Templates: the one that comes with nilearn, and those of a TemplateFlow archive on disk."""

import nibabel as nb
import numpy as np
import pytest

from m2m_bids.spatial.images import ImageError
from m2m_bids.spatial.templates import (
    EMBEDDED,
    embedded_tissues,
    find_template,
    load_template,
)

AFFINE = nb.affines.from_matvec(np.diag([-3.0, 3, 3]), (30, -40, -20))


def fill(home, name, *, cohort=None, res="_res-01"):
    """Put a small template into an archive."""
    folder, stem = home / f"tpl-{name}", f"tpl-{name}"
    if cohort:
        folder, stem = folder / f"cohort-{cohort}", f"{stem}_cohort-{cohort}"
    folder.mkdir(parents=True)
    for end in ("T1w", "desc-brain_mask"):
        image = nb.Nifti1Image(np.ones((4, 5, 6), np.uint8), AFFINE)
        nb.save(image, folder / f"{stem}{res}_{end}.nii.gz")
    return folder


@pytest.mark.parametrize("resolution", [1, 2])
def test_the_embedded_template_needs_no_archive(tmp_path, resolution):
    t1w, mask = load_template(EMBEDDED, tmp_path / "none", resolution=resolution)
    assert t1w.shape == mask.shape
    np.testing.assert_allclose(np.linalg.norm(t1w.affine[:3, :3], axis=0), resolution)
    volume_l = np.asarray(mask.dataobj).sum() * resolution**3 / 1e6
    assert 1.6 < volume_l < 2.1  # the ICBM brain with its ventricles
    # The origin is the anterior commissure: brain, nearly in the plane of symmetry.
    origin = np.rint(np.linalg.solve(mask.affine, [0, 0, 0, 1])).astype(int)
    assert np.asarray(mask.dataobj)[tuple(origin[:3])]


@pytest.mark.parametrize("cohort", [None, "2"])
@pytest.mark.parametrize(
    ("res", "resolution"), [("_res-02", 2), ("_res-2", 2), ("_res-01", 1), ("_res-1", 1), ("", 1)]
)
def test_a_template_of_the_archive(tmp_path, cohort, res, resolution):
    """MNIPediatricAsym has res-1, MNI152NLin2009cAsym has res-01, UNCInfant has none."""
    fill(tmp_path, "Small", cohort=cohort, res=res)
    template = load_template("Small", tmp_path, cohort=cohort, resolution=resolution)
    assert template.t1w.shape == template.mask.shape == (4, 5, 6)
    np.testing.assert_array_equal(template.t1w.affine, AFFINE)


def test_what_is_not_in_the_archive(tmp_path):
    folder = fill(tmp_path, "Small")
    with pytest.raises(ImageError, match=r"res-02_T1w.*TEMPLATEFLOW_HOME.*MNI152NLin2009aSym"):
        find_template("Small", tmp_path, resolution=2)
    # TemplateFlow's archive starts with empty files.
    (folder / "tpl-Small_res-01_desc-brain_mask.nii.gz").write_bytes(b"")
    with pytest.raises(ImageError, match=r"desc-brain_mask.nii.gz is not there"):
        find_template("Small", tmp_path)
    nb.save(nb.Nifti1Image(np.ones((4, 5, 6), np.uint8), AFFINE), folder / "tpl-Small_T1w.nii.gz")
    with pytest.raises(ImageError, match=r"tpl-Small_res-02_T1w.nii.gz is not there"):
        find_template("Small", tmp_path, resolution=2)  # without a number is not the second
    with pytest.raises(ImageError, match=r"tpl-Other.*cohort='3'"):
        find_template("Other", tmp_path, cohort="3")


def test_tissues_of_the_embedded_template(tmp_path):
    """Inside of its brain alone, and dark to bright in its T1w: fluid, grey, white."""
    t1w, mask = load_template(EMBEDDED, tmp_path)
    dseg = embedded_tissues()
    np.testing.assert_array_equal(dseg.affine, t1w.affine)
    labels, data = np.asarray(dseg.dataobj), np.asarray(t1w.dataobj)
    np.testing.assert_array_equal(labels > 0, np.asarray(mask.dataobj) > 0)
    grey, white, fluid = (np.median(data[labels == tissue]) for tissue in (1, 2, 3))
    assert fluid < grey - 0.1 < white - 0.2
    # Litres of tissue: a brain has more grey than white matter, and least fluid.
    litres = np.bincount(labels.ravel())[1:] / 1e6
    assert litres[0] > litres[1] > litres[2] > 0.1
