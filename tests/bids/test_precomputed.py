import nibabel as nb
import numpy as np
import pytest
from nibabel.orientations import apply_orientation, inv_ornt_aff

from m2m_bids.bids.labels import LabelFile
from m2m_bids.bids.precomputed import describe_findings, find_precomputed

ENTITIES = {"sub": "1", "ses": "M000"}
STEM = "sub-1_ses-M000"
XFM = f"{STEM}_from-T1w_to-MNI152NLin2009cAsym_mode-image_xfm.h5"
# Oblique, of unequal voxel sizes, no two axes in the order of RAS+.
AFFINE = nb.affines.from_matvec(
    [[0.1, -1.9, 0.2], [0.05, 0.2, -1.5], [1.2, 0.05, 0.1]], [10, -20, 30]
)
SHAPE = (5, 6, 7)


def write(file, shape=SHAPE, affine=AFFINE):
    file.parent.mkdir(parents=True, exist_ok=True)
    nb.Nifti1Image(np.ones(shape, np.uint8), affine).to_filename(file)
    return file


@pytest.fixture
def t1w(tmp_path):
    return write(tmp_path / f"bids/sub-1/ses-M000/anat/{STEM}_T1w.nii.gz")


@pytest.fixture
def anat(tmp_path):
    folder = tmp_path / "fmriprep/sub-1/ses-M000/anat"
    folder.mkdir(parents=True)
    return folder


def find(t1w, anat, entities=ENTITIES, templates=()):
    return find_precomputed(t1w, entities, {"fmriprep": anat.parents[2]}, templates=templates)


def reordered(shape=SHAPE):
    """Shape and affine of the same image, stored in another order of axes and with flips."""
    orientation = np.array([[2, -1], [0, 1], [1, -1]])
    moved = apply_orientation(np.zeros(shape), orientation)
    return moved.shape, AFFINE @ inv_ornt_aff(orientation, shape)


def test_everything_is_found(t1w, anat):
    shape, affine = reordered()
    files = [
        write(anat / f"{STEM}_{end}.nii.gz", shape, affine)
        for end in ("desc-preproc_T1w", "desc-brain_mask", "dseg", "label-GM_probseg")
    ]
    xfm = anat / XFM
    xfm.touch()
    (anat / xfm.name.replace("T1w_to-MNI152NLin2009cAsym", "MNI152NLin2009cAsym_to-T1w")).touch()
    found = find(t1w, anat)
    assert (found.t1w, found.mask, found.dseg, found.xfm) == (*files[:2], (files[2],), xfm)
    assert found.findings == (
        *(
            f"fmriprep: {piece}: {file}"
            for piece, file in zip(("t1w", "mask", "dseg"), files[:3], strict=True)
        ),
        f"fmriprep: aparcaseg: missed: no {anat}/{STEM}_desc-aparcaseg_dseg.nii.gz",
        f"fmriprep: aseg: missed: no {anat}/{STEM}_desc-aseg_dseg.nii.gz",
        f"fmriprep: xfm: {xfm}",
    )
    assert found.files == (*files[:3], xfm)


def test_what_is_missed_is_named(t1w, anat):
    mask = write(anat / f"{STEM}_desc-brain_mask.nii")
    found = find(t1w, anat)
    assert found.files == (mask,)
    expected = [
        f"fmriprep: t1w: missed: no {anat}/{STEM}_desc-preproc_T1w.nii.gz",
        f"fmriprep: mask: {mask}",
        f"fmriprep: dseg: missed: no {anat}/{STEM}_dseg.nii.gz",
        f"fmriprep: probseg: missed: no {anat}/{STEM}_label-GM_probseg.nii.gz",
        f"fmriprep: aparcaseg: missed: no {anat}/{STEM}_desc-aparcaseg_dseg.nii.gz",
        f"fmriprep: aseg: missed: no {anat}/{STEM}_desc-aseg_dseg.nii.gz",
        f"fmriprep: xfm: missed: no {anat / XFM}",
    ]
    assert list(found.findings) == expected
    lines = list(describe_findings({t1w: found}))
    assert lines == [f"Derivatives of {STEM}_T1w.nii.gz:", *(f"  {line}" for line in expected)]


def test_probabilities_stand_for_labels(t1w, anat):
    names = [f"{STEM}_label-{tissue}_probseg.nii.gz" for tissue in ("GM", "WM", "CSF")]
    files = tuple(write(anat / name) for name in names)
    assert find(t1w, anat).dseg == files
    files[2].unlink()
    assert find(t1w, anat).dseg == ()


def shifted(offset_mm):
    affine = AFFINE.copy()
    affine[0, 3] += offset_mm
    return affine


@pytest.mark.parametrize(
    ("shape", "affine", "reason"),
    [
        ((5, 6, 8), AFFINE, "its shape 6 x 8 x 5 is not that of sub-1_ses-M000_T1w"),
        (SHAPE, shifted(0.5), "corners are up to 0.5 mm"),
        (SHAPE, AFFINE @ np.diag([1, 1, 1.1, 1]), "corners are up to"),
        (SHAPE, AFFINE @ np.diag([-1, 1, 1, 1]), "corners are up to"),
        ((*SHAPE, 2), AFFINE, "5 x 6 x 7 x 2: expected one volume"),
    ],
)
def test_other_grid_is_refused(t1w, anat, shape, affine, reason):
    mask = write(anat / f"{STEM}_desc-brain_mask.nii.gz", shape, affine)
    dseg = write(anat / f"{STEM}_dseg.nii.gz", (*SHAPE, 1))  # a fourth axis of one is none
    found = find(t1w, anat)
    assert (found.mask, found.dseg) == (None, (dseg,))
    assert found.findings[1].startswith(f"fmriprep: mask: refused: {mask}: ")
    assert reason in found.findings[1]


def test_broken_files_are_refused(t1w, anat):
    (anat / f"{STEM}_desc-brain_mask.nii.gz").touch()
    (anat / f"{STEM}_dseg.nii.gz").write_bytes(b"not gzip")
    (anat / f"{STEM}_desc-preproc_T1w.nii.gz").write_bytes(b"")
    found = find(t1w, anat)
    assert found.files == ()
    assert ["cannot be read" in line for line in found.findings[:3]] == [True] * 3


def test_files_of_several_t1w_are_not_taken(t1w, anat):
    merged = write(anat.parents[1] / "anat/sub-1_desc-brain_mask.nii.gz")
    run = write(anat / f"{STEM}_dseg.nii.gz")
    found = find(t1w, anat, ENTITIES | {"run": "1"})
    assert found.files == ()
    assert f"({merged} lacks ses-M000_run-1: it may be of several" in found.findings[1]
    assert f"({run} lacks run-1: it may be of several" in found.findings[2]


def test_datasets_complete_each_other(t1w, anat, tmp_path):
    mask = write(anat / f"{STEM}_desc-brain_mask.nii.gz")
    other = tmp_path / "smriprep/sub-1/ses-M000/anat"
    for end in ("desc-brain_mask", "dseg"):
        write(other / f"{STEM}_{end}.nii.gz")
    derivatives = {"fmriprep": anat.parents[2], "smriprep": tmp_path / "smriprep"}
    found = find_precomputed(t1w, ENTITIES, derivatives)
    assert (found.mask, found.dseg) == (mask, (other / f"{STEM}_dseg.nii.gz",))


def test_dataset_without_anatomy_is_not_searched(t1w, tmp_path):
    (tmp_path / "qsirecon/sub-1/ses-M000/dwi").mkdir(parents=True)
    assert find_precomputed(t1w, ENTITIES, {"qsirecon": tmp_path / "qsirecon"}).findings == ()


def test_subject_without_session(tmp_path):
    t1w = write(tmp_path / "bids/sub-1/anat/sub-1_T1w.nii.gz")
    mask = write(tmp_path / "fmriprep/sub-1/anat/sub-1_desc-brain_mask.nii.gz")
    found = find_precomputed(t1w, {"sub": "1"}, {"fmriprep": tmp_path / "fmriprep"})
    assert found.mask == mask
    assert "lacks" not in " ".join(found.findings)


def write_mgz(file, shape=SHAPE, affine=AFFINE):
    file.parent.mkdir(parents=True, exist_ok=True)
    nb.MGHImage(np.ones(shape, np.uint8), affine).to_filename(file)
    return file


@pytest.fixture
def mri(t1w, tmp_path):
    """What FreeSurfer made of the T1w; conformed images have a grid of their own."""
    folder = tmp_path / "freesurfer/sub-1_ses-M000/mri"
    for name in ("aparc+aseg", "orig", "brainmask"):
        write_mgz(folder / f"{name}.mgz", (9, 9, 9), np.diag([-1, 1, 1, 1]))
    write_mgz(folder / "rawavg.mgz", *reordered())
    return folder


def find_with(t1w, mri, derivatives=None):
    label = LabelFile(mri / "aparc+aseg.mgz", "freesurfer")
    return find_precomputed(t1w, ENTITIES, derivatives or {}, label)


def test_freesurfer_of_this_t1w_is_taken(t1w, mri):
    found = find_with(t1w, mri)
    files = tuple(mri / f"{name}.mgz" for name in ("aparc+aseg", "brainmask"))
    assert found.mask_files == found.tissue_files == found.files == files
    assert (found.mask, found.dseg) == (None, ())
    assert found.freesurfer.original == mri / "orig.mgz"
    listed = ", ".join(map(str, files))
    assert found.findings == (
        f"freesurfer: mask: {listed}",
        f"freesurfer: dseg: {listed}",
        f"freesurfer: labels: {files[0]}",
    )
    (mri / "brainmask.mgz").unlink()
    assert find_with(t1w, mri).mask_files == files[:1]


def test_datasets_come_before_freesurfer(t1w, mri, anat):
    mask = write(anat / f"{STEM}_desc-brain_mask.nii.gz")
    found = find_with(t1w, mri, {"fmriprep": anat.parents[2]})
    assert found.mask_files == (mask,)
    assert found.tissue_files[0] == mri / "aparc+aseg.mgz"
    assert found.findings[-3].endswith("brainmask.mgz; not used, a dataset has one")


@pytest.mark.parametrize("name", ["rawavg", "orig/001"])
def test_freesurfer_of_another_image_is_refused(t1w, mri, name):
    (mri / "rawavg.mgz").unlink()
    file = write_mgz(mri / f"{name}.mgz", SHAPE, shifted(0.5))
    found = find_with(t1w, mri)
    assert (found.files, found.labels) == ((), None)
    (finding,) = found.findings
    assert finding.startswith(f"freesurfer: refused: {file}, which FreeSurfer was given, is not")
    assert "corners are up to 0.5 mm" in finding


def test_freesurfer_that_cannot_be_compared_is_refused(t1w, mri):
    (mri / "orig.mgz").unlink()
    assert find_with(t1w, mri).findings == (
        f"freesurfer: refused: no {mri / 'orig.mgz'} to tell by that it is of this T1w",
    )


def test_without_its_input_freesurfer_is_compared_later(t1w, mri):
    (mri / "rawavg.mgz").unlink()
    assert find_with(t1w, mri).freesurfer is not None


def test_labels_are_taken_on_the_grid_of_the_t1w_alone(t1w, anat):
    aseg = write(anat / f"{STEM}_desc-aseg_dseg.nii.gz", *reordered())
    far = write(anat / f"{STEM}_desc-aparcaseg_dseg.nii.gz", SHAPE, shifted(20))
    found = find(t1w, anat)
    assert found.labels == LabelFile(aseg, "freesurfer")
    told = [line for line in found.findings if "aseg: " in line]
    assert told[0].startswith(f"fmriprep: aparcaseg: refused: {far}: its corners are up to 20 mm")
    assert told[1] == f"fmriprep: aseg: {aseg}"
    write(far)
    assert find(t1w, anat).labels.file == far
    aseg.unlink()
    far.unlink()
    found = find(t1w, anat)
    assert found.labels is None
    for kind in ("aparcaseg", "aseg"):
        missed = f"missed: no {anat}/{STEM}_desc-{kind}_dseg.nii.gz"
        assert f"fmriprep: {kind}: {missed}" in found.findings


def test_labels_of_freesurfer_come_before_those_of_datasets(t1w, mri, anat):
    of_dataset = write(anat / f"{STEM}_desc-aparcaseg_dseg.nii.gz")
    derivatives = {"fmriprep": anat.parents[2]}
    original = mri / "orig.mgz"
    expected = LabelFile(mri / "aparc+aseg.mgz", "freesurfer", original)
    assert find_with(t1w, mri, derivatives).labels == expected
    write_mgz(mri / "rawavg.mgz", SHAPE, shifted(30))
    assert find_with(t1w, mri, derivatives).labels.file == of_dataset
    assert find_with(t1w, mri).labels is None


def test_labels_of_a_later_dataset_are_not_hidden_by_tissues(t1w, anat, tmp_path):
    tissues = write(anat / f"{STEM}_dseg.nii.gz")
    labels = write(tmp_path / f"b/sub-1/ses-M000/anat/{STEM}_desc-aseg_dseg.nii.gz")
    derivatives = {"fmriprep": anat.parents[2], "b": tmp_path / "b"}
    found = find_precomputed(t1w, ENTITIES, derivatives)
    assert (found.dseg, found.labels.file) == ((tissues,), labels)


def xfm_pair(folder, template="MNI152Lin"):
    pair = tuple(
        folder / f"{STEM}_from-{start}_to-{end}_mode-image_xfm.h5"
        for start, end in (("T1w", template), (template, "T1w"))
    )
    for file in pair:
        file.touch()
    return pair


def test_transforms_to_a_template_are_found_in_both_directions(t1w, anat):
    there, back = xfm_pair(anat)
    found = find(t1w, anat, templates=["MNI152Lin", "Other"])
    assert found.template_xfms == {"MNI152Lin": (there, back)}
    assert found.findings[-2:] == (
        f"fmriprep: xfm to MNI152Lin: {there}, {back}",
        f"fmriprep: xfm to Other: missed: no {anat}/{STEM}_from-T1w_to-Other_mode-image_xfm.h5",
    )
    assert not find(t1w, anat, {"sub": "1"}, ["MNI152Lin"]).template_xfms
    back.unlink()
    found = find(t1w, anat, templates=["MNI152Lin"])
    assert not found.template_xfms
    assert found.findings[-1] == f"fmriprep: xfm to MNI152Lin: missed: no {back}"


@pytest.mark.parametrize("piece", ["preproc_T1w", "brain_mask"])
def test_transforms_of_another_image_are_refused(t1w, anat, tmp_path, piece):
    """Where a dataset's T1w or mask is another image's, its transforms are; others go on."""
    write(anat / f"{STEM}_desc-{piece}.nii.gz", SHAPE, shifted(20))
    (anat / XFM).touch()
    xfm_pair(anat)
    found = find(t1w, anat, templates=["MNI152Lin"])
    assert (found.xfm, found.template_xfms) == (None, {})
    said = f"refused: the {'mask' if 'mask' in piece else 't1w'} beside it is refused"
    assert found.findings[-2:] == (f"fmriprep: xfm: {said}", f"fmriprep: xfm to MNI152Lin: {said}")
    other = tmp_path / "other/sub-1/ses-M000/anat"
    write(other / f"{STEM}_desc-brain_mask.nii.gz")
    (other / XFM).touch()
    pair = xfm_pair(other)
    datasets = {"fmriprep": anat.parents[2], "other": tmp_path / "other"}
    found = find_precomputed(t1w, ENTITIES, datasets, templates=["MNI152Lin"])
    assert (found.xfm, found.template_xfms) == (other / XFM, {"MNI152Lin": pair})
