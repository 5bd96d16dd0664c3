import json

import pytest

from m2m_bids.bids.derivatives import missing_outputs
from m2m_bids.bids.diffusion import RAW_FIT, maps_beside
from m2m_bids.bids.naming import expected_diffusivity_outputs, expected_space_outputs
from m2m_bids.bids.query import query
from m2m_bids.bids.request import MADE_FROM_FIELD, Request
from m2m_bids.bids.spaces import parse_space

STEM = "sub-01/ses-1/dwi/sub-01_ses-1"
SPACE = f"{STEM}_space-ACPC"
PREPROC = f"{SPACE}_desc-preproc_dwi"


BVAL = "0 1000 1000 1000 1000 1000 1000"
BVEC = "0 1 0 0 1 1 0\n0 0 1 0 1 0 1\n0 0 0 1 0 1 1"


def add(root, *names, content=None):
    """Write files; gradients are of seven volumes that determine a tensor."""
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content or {".bval": BVAL, ".bvec": BVEC}.get(file.suffix, "image"))
    return root


@pytest.fixture
def raw(tmp_path):
    """A session with a T1w and a raw diffusion-weighted image."""
    names = [f"{STEM}_dwi{end}" for end in (".nii.gz", ".bval", ".bvec", ".json")]
    return add(tmp_path / "bids", "sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz", *names)


@pytest.fixture
def qsiprep(tmp_path):
    names = [f"{PREPROC}{end}" for end in (".nii.gz", ".bval", ".bvec")]
    return add(tmp_path / "qsiprep", *names)


def used(scans):
    return [scan for scan in scans if not scan.reason]


def test_fa_is_fitted_to_a_raw_image(raw):
    (scan,) = query(raw)
    assert scan.name == "sub-01_ses-1_param-FA_dwimap"
    assert (scan.modality, scan.source, scan.reason) == ("fa", "raw", "")
    assert scan.gradients == (raw / f"{STEM}_dwi.bval", raw / f"{STEM}_dwi.bvec")
    assert scan.sidecar == RAW_FIT
    assert scan.sources == [scan.file, *scan.gradients, scan.t1w]
    assert scan.t1w_choice == "same session"


def test_preprocessed_image_is_preferred(raw, qsiprep):
    scans = query(raw, derivatives={"qsiprep": qsiprep})
    (scan,) = used(scans)
    assert scan.file == qsiprep / f"{PREPROC}.nii.gz"
    assert scan.gradients == (qsiprep / f"{PREPROC}.bval", qsiprep / f"{PREPROC}.bvec")
    assert scan.name == "sub-01_ses-1_param-FA_dwimap"
    assert scan.sidecar == {}
    (other,) = [scan for scan in scans if scan.reason]
    assert "fitted to the preprocessed" in other.reason
    assert other.is_alternative


def test_brain_mask_beside_a_preprocessed_image_is_used(raw, qsiprep):
    """That of the same space and entities, and not one that lacks its content."""
    add(qsiprep, f"{STEM}_desc-brain_mask.nii.gz", f"{SPACE}_run-1_desc-brain_mask.nii.gz")
    (scan,) = used(query(raw, derivatives={"qsiprep": qsiprep}))
    assert scan.mask is None
    mask = qsiprep / f"{SPACE}_desc-brain_mask.nii.gz"
    mask.symlink_to("absent")
    (scan,) = used(query(raw, derivatives={"qsiprep": qsiprep}))
    assert scan.mask is None
    mask.unlink()
    mask.touch()
    (scan,) = used(query(raw, derivatives={"qsiprep": qsiprep}))
    assert scan.mask == mask
    assert scan.sources == [scan.file, *scan.gradients, mask, scan.t1w]


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("space-T1w_desc-preproc_dwi", "space-T1w_brainmask"),
        ("dwi_space-T1w_preproc", "dwi_space-T1w_brainmask"),  # as Clinica wrote it before 2023
    ],
)
@pytest.mark.parametrize("has_database", [True, False])
def test_preprocessed_image_of_caps(raw, tmp_path, image, mask, has_database):
    folder = "subjects/sub-01/ses-1/dwi/preprocessing/sub-01_ses-1"
    names = [f"{folder}_{image}{end}" for end in (".nii.gz", ".bval", ".bvec")]
    caps = add(tmp_path / "caps", *names, f"{folder}_{mask}.nii.gz")
    scans = query(
        raw,
        derivatives={"caps": caps},
        participant_labels=["01"],
        database_dir=tmp_path / "database" if has_database else None,
    )
    (scan,) = used(scans)
    assert (scan.file, scan.mask) == (caps / names[0], caps / f"{folder}_{mask}.nii.gz")
    assert scan.gradients == (caps / names[1], caps / names[2])
    assert scan.name == "sub-01_ses-1_param-FA_dwimap"


@pytest.mark.parametrize("place", ["derivative", "raw"])
def test_map_is_preferred_to_any_fit(raw, qsiprep, place):
    if place == "raw":
        map_file = add(raw, f"{STEM}_FA.nii.gz") / f"{STEM}_FA.nii.gz"
    else:
        name = f"{STEM}_space-ACPC_model-tensor_param-fa_dwimap.nii.gz"
        map_file = add(qsiprep, name) / name
    (scan,) = query(raw, derivatives={"qsiprep": qsiprep})
    assert scan.file == map_file
    assert scan.gradients is None
    assert scan.sources == [map_file, scan.t1w]


def test_map_of_another_session_or_space_is_no_reason_against_a_fit(raw, qsiprep):
    other = "sub-01/ses-2/dwi/sub-01_ses-2_FA.nii.gz"
    add(raw, other)
    add(qsiprep, f"{STEM}_space-MNI152NLin2009cAsym_param-FA_dwimap.nii.gz")
    (qsiprep / f"{PREPROC}.nii.gz").unlink()
    found = used(query(raw, derivatives={"qsiprep": qsiprep}))
    assert [scan.file for scan in found] == [raw / f"{STEM}_dwi.nii.gz", raw / other]


def test_preprocessed_image_in_a_standard_space_is_left_out(raw, tmp_path):
    stem = f"{STEM}_space-MNI152NLin2009cAsym_desc-preproc_dwi"
    root = add(tmp_path / "d", *(f"{stem}{end}" for end in (".nii.gz", ".bval", ".bvec")))
    scans = query(raw, derivatives={"d": root})
    assert [scan.source for scan in used(scans)] == ["raw"]
    assert any("standard space" in scan.reason for scan in scans)


def test_other_images_of_derivatives_are_no_input(raw, tmp_path):
    names = [f"{STEM}_desc-denoised_dwi{end}" for end in (".nii.gz", ".bval", ".bvec")]
    root = add(tmp_path / "d", *names, f"{STEM}_dwiref.nii.gz")
    (scan,) = query(raw, derivatives={"d": root})
    assert scan.source == "raw"


def test_gradients_are_inherited(raw):
    """The nearest folder's, and of one folder the most specific that agree with the image."""
    for end in ("bval", "bvec"):
        (raw / f"{STEM}_dwi.{end}").unlink()
    add(raw, "dwi.bval", "dwi.bvec", "sub-01/sub-01_acq-b_dwi.bvec", "sub-01/sub-01_dwi.bval")
    (scan,) = query(raw)
    assert scan.gradients == (raw / "sub-01/sub-01_dwi.bval", raw / "dwi.bvec")
    add(raw, "sub-01/ses-1/sub-01_ses-1_dwi.bval")
    assert query(raw)[0].gradients.bval == raw / "sub-01/ses-1/sub-01_ses-1_dwi.bval"


@pytest.mark.parametrize(
    ("lost", "message"),
    [(["bval"], "no .bval file"), (["bvec"], "no .bvec file"),
     (["bval", "bvec"], "no .bval and .bvec file")],
)  # fmt: skip
def test_image_without_gradients_is_left_out(raw, lost, message):
    for end in lost:
        (raw / f"{STEM}_dwi.{end}").unlink()
    (scan,) = query(raw)
    assert message in scan.reason


@pytest.mark.parametrize(
    ("content", "message"),
    [("0 0 0", "no volume with diffusion weighting"), ("0\n5\n50", "no volume with"),
     ("0 b 1000", "cannot be read as b-values"), ("\n", "no volume with")],
)  # fmt: skip
def test_image_without_weighting_is_left_out(raw, content, message):
    """A reversed b0 image, of a name of its own, beside the image that is used."""
    names = [f"{STEM}_dir-PA_dwi{end}" for end in (".nii.gz", ".bval", ".bvec")]
    add(raw, *names, content=content)
    scans = query(raw)
    assert [scan.name for scan in used(scans)] == ["sub-01_ses-1_param-FA_dwimap"]
    (reversed_b0,) = [scan for scan in scans if scan.reason]
    assert reversed_b0.name == "sub-01_ses-1_dir-PA_param-FA_dwimap"
    assert message in reversed_b0.reason


@pytest.mark.parametrize(
    ("bval", "bvec", "message"),
    [
        ("0 1000 1000 1000 1000 1000 2000", BVEC, "5 directions with 50 < b <= 1200"),
        (BVAL, BVEC.replace("0 1 0 0 1 1 0\n", "0 0 0 0 1 1 0\n", 1), "5 directions"),
        (BVAL.replace("0 1000", "100 1000", 1), BVEC, "no volume without diffusion weighting"),
        (BVAL + " 1000", BVEC, "3 x 7 numbers, expected 3 x 8"),
        (BVAL, "0 1 x", "cannot be read as a table of numbers"),
    ],
    ids=["high b", "one direction lost", "no b0", "other numbers", "text"],
)
def test_gradients_without_a_tensor_are_told_when_scans_are_listed(
    raw, qsiprep, bval, bvec, message
):
    """And the raw image is fitted where those of the preprocessed one do not suffice."""
    (qsiprep / f"{PREPROC}.bval").write_text(bval)
    (qsiprep / f"{PREPROC}.bvec").write_text(bvec)
    scans = query(raw, derivatives={"qsiprep": qsiprep})
    assert [scan.source for scan in used(scans)] == ["raw"]
    (other,) = [scan for scan in scans if scan.reason]
    assert message in other.reason
    assert str(qsiprep / PREPROC) in other.reason


def test_phases_are_left_out(raw):
    add(raw, *(f"{STEM}_part-phase_dwi{end}" for end in (".nii.gz", ".bval", ".bvec")))
    assert len(used(query(raw))) == 1
    assert any("magnitudes" in scan.reason for scan in query(raw))


def test_link_without_content_is_left_out(raw):
    file = raw / f"{STEM}_dwi.bvec"
    file.unlink()
    file.symlink_to("absent")
    (scan,) = query(raw)
    assert "link without its content" in scan.reason


@pytest.mark.parametrize(
    ("fa", "others"),
    [
        (f"{SPACE}_model-tensor_param-fa_dwimap.nii.gz", "_model-tensor_param-{}_dwimap"),
        (f"{SPACE}_param-FA_desc-fa_dwimap.nii.gz", "_param-{}_desc-fa_dwimap"),
        (f"{SPACE}_desc-FA_dwi.nii.gz", "_desc-{}_dwi"),
        (f"{SPACE}_desc-preproc_FA.nii.gz", "_desc-preproc_{}"),
    ],
)
def test_diffusivities_of_the_same_name_belong_to_a_map(tmp_path, fa, others):
    labels = ("md", "ad") if "param-fa_dwimap" in fa else ("MD", "AD")
    names = [f"{SPACE}{others.format(label)}.nii.gz" for label in labels]
    add(tmp_path, fa, *names, f"{STEM}_param-RD_dwimap.nii.gz")
    found = maps_beside(tmp_path / fa)
    assert found == dict(zip(("MD", "AD"), (tmp_path / name for name in names), strict=True))


def test_diffusivities_are_outputs(raw, qsiprep, tmp_path):
    (fitted,) = query(raw)
    assert fitted.diffusivities == {"MD": None, "AD": None, "RD": None}
    out = tmp_path / "out"
    stem = "sub-01/ses-1/dwi/sub-01_ses-1_space-T1w"
    expected = {out / f"{stem}_param-{p}_desc-preproc_dwimap.nii.gz" for p in ("MD", "AD", "RD")}
    asked = Request("rigid", {}, {}, {})
    assert expected <= set(missing_outputs(fitted, out, asked))
    add(raw, f"{STEM}_FA.nii.gz", f"{STEM}_MD.nii.gz")
    (given,) = query(raw)
    assert given.diffusivities == {"MD": raw / f"{STEM}_MD.nii.gz"}
    assert len(expected & set(missing_outputs(given, out, asked))) == 1


def test_diffusivities_in_every_space_are_outputs(raw, tmp_path, fill):
    add(raw, f"{STEM}_FA.nii.gz", f"{STEM}_MD.nii.gz", f"{STEM}_RD.nii.gz")
    (scan,) = query(raw)
    out, space = tmp_path / "out", parse_space("T1w:res-native")
    record = {"TemplateTransforms": {"a.h5": "1"}}
    fa = expected_space_outputs(scan, out, space, "rigid")
    md, rd = (expected_diffusivity_outputs(scan, out, name, space) for name in ("MD", "RD"))
    assert md["image"].name == (
        "sub-01_ses-1_space-T1w_res-native_param-MD_desc-preproc_dwimap.nii.gz"
    )
    files = [file for made in (fa, md, rd) for file in made.values()]

    def missing(record):
        asked = Request("rigid", {}, {}, {space: record})
        return [file for file in missing_outputs(scan, out, asked) if "res-native" in file.name]

    assert missing(record) == files
    fill(*(file for file in files if file.suffix == ".gz"))
    for made in (fa, md, rd):
        made["image_json"].write_text(json.dumps({MADE_FROM_FIELD: record}))
    assert missing(record) == []
    md["image"].unlink()
    assert missing(record) == [md["image"]]
    fill(md["image"])
    assert missing({"TemplateTransforms": {"a.h5": "2"}}) == files
    # As after an interruption between both files.
    md["image_json"].write_text(json.dumps({MADE_FROM_FIELD: {}}))
    assert missing(record) == [*md.values()]
