import json
import logging

import nibabel as nb
import numpy as np
import pytest

from m2m_bids.bids.layout import group_by_folder, index_dataset, read_sidecar
from m2m_bids.bids.query import QueryError, query, read_bids_filters
from m2m_bids.bids.tracers import is_same_tracer

ADNI = "sub-ADNI011S0002"


def add(root, *names, content=b"image"):
    """Make files of a few bytes; the query never reads an image."""
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return root


def image(root, name, offset_mm=0.0, is_centred=True):
    affine = np.diag([3.0, 3.0, 3.0, 1.0])
    affine[:3, 3] = (-12.0 if is_centred else 0.0) + offset_mm
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    nb.Nifti1Image(np.ones((8, 8, 8), np.float32), affine).to_filename(file)


@pytest.fixture
def clinica(tmp_path):
    """An ADNI-like dataset as Clinica writes it: no PET or T1w sidecars, sessions.tsv, dwi/."""
    root = tmp_path / "bids"
    anat, pet = f"{ADNI}/ses-M000/anat/{ADNI}_ses-M000", f"{ADNI}/ses-M000/pet/{ADNI}_ses-M000"
    image(root, f"{anat}_T1w.nii.gz")
    for tracer, rec in (("18FFDG", "coregavg"), ("18FFDG", "coregiso"), ("18FAV45", None)):
        image(root, f"{pet}_trc-{tracer}{f'_rec-{rec}' if rec else ''}_pet.nii.gz")
    image(root, f"{ADNI}/ses-M006/pet/{ADNI}_ses-M006_trc-18FFDG_rec-coregavg_pet.nii.gz")
    dwi = f"{ADNI}/ses-M000/dwi/{ADNI}_ses-M000"
    image(root, f"{dwi}_FA.nii.gz", offset_mm=60.0, is_centred=False)
    image(root, f"{dwi}_dwi.nii.gz")
    add(root, f"{dwi}_dwi.bval", f"{dwi}_dwi.bvec", f"{anat}_FLAIR.nii.gz")
    add(root, f"{ADNI}/ses-M000/func/{ADNI}_ses-M000_task-rest_bold.nii.gz")
    legacy = "sub-ADNI022S0001"
    image(root, f"{legacy}/ses-M00/anat/{legacy}_ses-M00_T1w.nii.gz")
    image(root, f"{legacy}/ses-M00/pet/{legacy}_ses-M00_task-rest_acq-fdg_pet.nii.gz")
    add(root, "sub-ADNI033S0003/ses-M000/pet/sub-ADNI033S0003_ses-M000_trc-18FFBB_pet.nii.gz")
    for sub in (ADNI, legacy):
        table = f"session_id\tdiagnosis\nses-M000\tCN\nses-M999\t{sub}\n".encode()
        add(root, f"{sub}/{sub}_sessions.tsv", content=table)
        scans = b"filename\tscan_id\n"
        add(root, f"{sub}/ses-M000/{sub}_ses-M000_scans.tsv", content=scans)
    add(root, "participants.tsv", "conversion_info/v0/fdg_pet_paths.tsv")
    return root


def by_name(scans):
    return {scan.name: scan for scan in scans}


def test_clinica_dataset(clinica):
    scans = by_name(query(clinica))
    assert list(scans) == [
        f"{ADNI}_ses-M000_param-FA_dwimap",
        f"{ADNI}_ses-M000_trc-18FAV45_pet",
        f"{ADNI}_ses-M000_trc-18FFDG_rec-coregavg_pet",
        f"{ADNI}_ses-M000_trc-18FFDG_rec-coregiso_pet",
        f"{ADNI}_ses-M006_trc-18FFDG_rec-coregavg_pet",
        "sub-ADNI022S0001_ses-M00_task-rest_acq-fdg_pet",
        "sub-ADNI033S0003_ses-M000_trc-18FFBB_pet",
    ]
    followup = scans[f"{ADNI}_ses-M006_trc-18FFDG_rec-coregavg_pet"]
    assert followup.t1w == clinica / f"{ADNI}/ses-M000/anat/{ADNI}_ses-M000_T1w.nii.gz"
    assert followup.t1w_entities == {"sub": ADNI[4:], "ses": "M000"}
    assert followup.t1w_choice == "nearest session (ses-M000)"
    assert scans[f"{ADNI}_ses-M000_param-FA_dwimap"].t1w_choice == "same session"
    assert scans["sub-ADNI022S0001_ses-M00_task-rest_acq-fdg_pet"].tracer == "fdg"
    without = scans["sub-ADNI033S0003_ses-M000_trc-18FFBB_pet"]
    assert without.t1w is None
    assert "no T1w image" in without.reason
    assert all(scan.sidecar == {} for scan in scans.values())
    assert [scan.name for scan in scans.values() if scan.reason] == [without.name]


def test_real_dataset(shared_data):
    root = shared_data / "real-bids"
    scans = by_name(query(root, derivatives={"dti": root / "derivatives/dti"}))
    assert list(scans) == [
        "sub-01_ses-M000_param-FA_dwimap",
        "sub-01_ses-M000_trc-99mTcHMPAO_pet",
        "sub-02_ses-M012_param-FA_dwimap",
        "sub-03_ses-M000_param-FA_dwimap",
    ]
    assert not any(scan.reason for scan in scans.values())
    late = scans["sub-02_ses-M012_param-FA_dwimap"]
    assert late.source == "dti"
    assert late.t1w == root / "sub-02/ses-M000/anat/sub-02_ses-M000_T1w.nii.gz"


@pytest.mark.parametrize(
    ("dataset", "names", "with_t1w"),
    [
        ("pet001", ["sub-01_ses-01_trc-CIMBI36_pet"], True),
        ("pet002", [f"sub-{s}_ses-{v}_pet" for s in ("01", "02") for v in ("baseline", "rescan")],
         True),
        ("pet003", ["sub-01_ses-01_pet"], True),
        ("pet004", ["sub-01_pet"], False),
        ("pet005", ["sub-01_ses-baseline_pet", "sub-01_ses-intervention_task-eyes_pet"], True),
        ("pet006", ["sub-01_pet"], False),
    ],
)  # fmt: skip
def test_bids_examples(shared_data, dataset, names, with_t1w):
    scans = query(shared_data / "bids-examples" / dataset)
    assert [scan.name for scan in scans] == names
    assert [scan.t1w is not None for scan in scans] == [with_t1w] * len(names)
    assert all(scan.t1w_choice == ("same session" if with_t1w else "") for scan in scans)


def test_scans_without_a_t1w_may_go_to_a_template(tmp_path):
    """Only for lack of a T1w: what is left out for another reason stays so."""
    names = ("sub-1/anat/sub-1_T1w.nii", "sub-1/pet/sub-1_pet.nii", "sub-2/pet/sub-2_pet.nii")
    for name in (*names, "sub-2/pet/sub-2_trc-X_pet.nii"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("image")
    (tmp_path / "sub-2/pet/sub-2_trc-X_pet.nii").unlink()
    (tmp_path / "sub-2/pet/sub-2_trc-X_pet.nii").symlink_to("absent")
    near, far, absent = query(tmp_path, template="MNI")
    assert (near.space, near.linear, near.template) == ("T1w", "rigid", "")
    assert (far.space, far.linear, far.t1w, far.reason) == ("MNI", "affine", None, "")
    assert "no T1w image" in far.t1w_choice
    assert "link without its content" in absent.reason
    assert (absent.space, absent.template) == ("T1w", "")
    (near, far, _) = query(tmp_path)
    assert "no T1w image" in far.reason
    assert far.template == ""


def test_a_session_without_a_t1w_may_go_to_a_template(tmp_path):
    for name in ("ses-1/anat/sub-1_ses-1_T1w.nii", "ses-2/pet/sub-1_ses-2_pet.nii"):
        (tmp_path / "sub-1" / name).parent.mkdir(parents=True)
        (tmp_path / "sub-1" / name).write_text("image")
    (scan,) = query(tmp_path, template="MNI")
    assert scan.space == "T1w"
    (scan,) = query(tmp_path, template="MNI", anatomical_reference="sessionwise")
    assert scan.space == "MNI"
    assert "sessionwise" in scan.t1w_choice


def test_metadata_agrees_with_pybids(shared_data):
    from bids.layout import BIDSLayout

    root = shared_data / "bids-examples/pet002"
    layout = BIDSLayout(root, validate=False)
    for scan in query(root):
        expected = layout.get_metadata(str(scan.file))
        assert scan.sidecar == expected
        assert scan.sidecar["InjectedMassUnits"] == "ug"
        assert len(scan.sidecar["FrameDuration"]) > 1


def test_metadata_is_inherited(tmp_path):
    root = add(tmp_path, "sub-1/pet/sub-1_trc-A_run-1_pet.nii.gz", "sub-1/anat/sub-1_T1w.nii")
    add(root, "pet.json", content=b'{"Units": "root", "TimeZero": "root", "TracerName": "root"}')
    add(root, "trc-A_pet.json", content=b'{"TracerName": "A", "TimeZero": "A", "Other": 1}')
    add(root, "trc-B_pet.json", content=b'{"TracerName": "B"}')
    add(root, "sub-1/pet/sub-1_trc-A_pet.json", content=b'{"TimeZero": "near"}')
    add(root, "sub-1/pet/sub-1_trc-A_run-2_pet.json", content=b'{"TimeZero": "other run"}')
    (scan,) = query(root)
    expected = {"Units": "root", "TracerName": "A", "TimeZero": "near", "Other": 1}
    assert scan.sidecar == expected


@pytest.mark.parametrize("content", [b"{not json", b"[1, 2]", b"\xff\xfe"])
def test_broken_sidecar_leaves_only_its_scan_out(tmp_path, content):
    root = add(tmp_path, *(f"sub-{i}/pet/sub-{i}_pet.nii.gz" for i in (1, 2)))
    add(root, *(f"sub-{i}/anat/sub-{i}_T1w.nii.gz" for i in (1, 2)))
    add(root, "sub-1/pet/sub-1_pet.json", content=content)
    first, second = query(root)
    assert "sub-1_pet.json" in first.reason
    assert second.reason == ""


@pytest.mark.parametrize(
    "name",
    [
        "sub-1_ses-A_param-FA_dwimap",
        "sub-1_ses-A_param-fa_dwimap",
        "sub-1_ses-A_space-ACPC_model-tensor_param-fa_dwimap",
        "sub-1_ses-A_space-T1w_param-FA_dwimap",
        "sub-1_ses-A_desc-FA_dwimap",
        "sub-1_ses-A_space-b0_desc-preproc_FA",
    ],
)
def test_fa_of_a_derivative(tmp_path, name):
    root = add(tmp_path / "bids", "sub-1/ses-A/anat/sub-1_ses-A_T1w.nii.gz")
    others = ("param-MD_dwimap", "dwi", "MD", "desc-preproc_dwi")
    files = (name, *(f"sub-1_ses-A_{other}" for other in others))
    dti = add(tmp_path / "dti", *(f"sub-1/ses-A/dwi/{file}.nii.gz" for file in files))
    (scan,) = query(root, derivatives={"dti": dti})
    assert scan.file.name == f"{name}.nii.gz"
    assert (scan.source, scan.modality, scan.reason) == ("dti", "fa", "")


@pytest.mark.parametrize(
    "description",
    [
        *(b"", b'{"DatasetType": "derivative"}', b"[1]"),
        pytest.param(b"[" * 20000, id="deep"),
    ],
)
def test_description_of_a_derivative_does_not_matter(tmp_path, description):
    root = add(tmp_path / "bids", "sub-1/anat/sub-1_T1w.nii.gz")
    dti = add(tmp_path / "dti", "sub-1/dwi/sub-1_param-FA_dwimap.nii.gz")
    add(dti, "dataset_description.json", content=description)
    if description.startswith(b"["):
        with pytest.raises(QueryError, match=r"dti: cannot be indexed.*dataset_description\.json"):
            query(root, derivatives={"dti": dti})
    else:
        assert query(root, derivatives={"dti": dti})[0].reason == ""


def test_standard_space_is_left_out(tmp_path):
    root = add(tmp_path / "bids", "sub-1/anat/sub-1_T1w.nii.gz")
    names = ("space-MNI152NLin2009cAsym_res-1_param-FA", "space-ACPC_param-FA")
    dti = add(tmp_path / "dti", *(f"sub-1/dwi/sub-1_{name}_dwimap.nii.gz" for name in names))
    scans = by_name(query(root, derivatives={"dti": dti}))
    assert scans["sub-1_param-FA_dwimap"].reason == ""
    template = scans[f"dti:sub-1_{names[0]}_dwimap.nii.gz"]
    assert "standard space MNI152NLin2009cAsym" in template.reason


def test_better_version_of_a_scan_is_used(tmp_path):
    root = add(tmp_path / "bids", "sub-1/anat/sub-1_T1w.nii.gz", "sub-1/dwi/sub-1_FA.nii.gz")
    add(root, "sub-1/pet/sub-1_pet.nii", "sub-1/pet/sub-1_pet.nii.gz")
    dti = add(tmp_path / "dti", "sub-1/dwi/sub-1_space-T1w_param-fa_dwimap.nii.gz")
    dsi = add(tmp_path / "dsi", "sub-1/dwi/sub-1_param-fa_dwimap.nii.gz")
    add(dsi, "sub-1/dwi/sub-1_space-T1w_param-fa_dwimap.nii.gz")
    maps = {
        "dti": dti / "sub-1/dwi/sub-1_space-T1w_param-fa_dwimap.nii.gz",
        "dsi": dsi / "sub-1/dwi/sub-1_param-fa_dwimap.nii.gz",
    }
    for first, second in (("dti", "dsi"), ("dsi", "dti")):
        folders = {"dti": dti, "dsi": dsi}
        scans = query(root, derivatives={name: folders[name] for name in (first, second)})
        used = [scan.file for scan in scans if not scan.reason]
        assert used == [maps[first], root / "sub-1/pet/sub-1_pet.nii.gz"]
        assert len({scan.name for scan in scans}) == len(scans) == 6
        reasons = [scan.reason for scan in scans if scan.reason]
        assert sum(f"outputs of {maps[first]} ({first}) have the" in why for why in reasons) == 2
        assert sum(f"derivative: {maps[first]} ({first})" in why for why in reasons) == 1


def test_maps_of_the_scanner_give_way_to_a_derivative(tmp_path):
    """Whatever their names; in a session where the derivative has none they are used."""
    names = [f"sub-1/ses-{s}/dwi/sub-1_ses-{s}_acq-{a}_FA.nii" for s in "AB" for a in "xy"]
    root = add(tmp_path / "bids", "sub-1/ses-A/anat/sub-1_ses-A_T1w.nii", *names)
    standard = "sub-1/ses-B/dwi/sub-1_ses-B_space-MNI152Lin_model-tensor_param-fa_dwimap.nii"
    own = "sub-1/ses-A/dwi/sub-1_ses-A_space-ACPC_model-tensor_param-fa_dwimap.nii"
    dti = add(tmp_path / "dti", own, standard)
    scans = query(root, derivatives={"dti": dti})
    assert [scan.file for scan in scans if not scan.reason] == [dti / own] + [
        root / name for name in names[2:]
    ]
    left_out = [scan for scan in scans if scan.file in (root / names[0], root / names[1])]
    assert all(str(dti / own) in scan.reason and scan.is_alternative for scan in left_out)


@pytest.mark.parametrize("order", [("dki", "tensor"), ("tensor", "dki"), ("dki", None)])
@pytest.mark.parametrize("is_one_dataset", [True, False])
def test_fa_is_that_of_a_tensor(tmp_path, order, is_one_dataset):
    root = add(tmp_path / "bids", "sub-1/anat/sub-1_T1w.nii.gz")
    derivatives = {}
    for model in order:
        label = f"_model-{model}" if model else ""
        folder = tmp_path / ("one" if is_one_dataset else f"of{model}")
        add(folder, f"sub-1/dwi/sub-1_space-ACPC{label}_param-fa_dwimap.nii.gz")
        derivatives[folder.name] = folder
    used, left_out = sorted(query(root, derivatives=derivatives), key=lambda scan: scan.reason)
    assert (used.reason, used.entities.get("model")) == ("", order[1] if order[0] == "dki" else
                                                         "tensor")  # fmt: skip
    assert left_out.entities["model"] == "dki"
    assert f"{used.file} ({used.source}) is used: FA of a tensor" in left_out.reason
    assert "--bids-filter-file" in left_out.reason


def test_t1w_is_never_of_another_subject(tmp_path):
    root = add(tmp_path, "sub-1/ses-A/pet/sub-1_ses-A_pet.nii.gz")
    add(root, "sub-2/ses-A/anat/sub-2_ses-A_T1w.nii.gz", "sub-10/anat/sub-10_T1w.nii.gz")
    add(root, "sub-2/ses-A/anat/sub-1_ses-A_T1w.nii.gz")  # whose is it? left alone
    (scan,) = query(root)
    assert scan.t1w is None
    assert "no T1w image" in scan.reason


def test_dataset_in_a_folder_that_looks_like_bids(tmp_path):
    root = tmp_path / "pet" / "sub-9_ses-Z_run-7_trc-X" / "bids"
    add(root, "sub-1/ses-A/anat/sub-1_ses-A_T1w.nii.gz", "sub-1/ses-A/pet/sub-1_ses-A_pet.nii.gz")
    (scan,) = query(root, filters={"t1w": {"session": "A", "subject": "1", "datatype": "anat"}})
    assert scan.entities == {"sub": "1", "ses": "A"}
    assert scan.t1w_choice == "same session"


@pytest.fixture
def adni(tmp_path):
    """Oddities of ADNI: runs, several T1w, sessions without T1w, dates against the labels."""
    root = tmp_path / "adni"
    sub = "sub-ADNI011S0002"
    for ses, names in {
        "M000": ["anat/{}_T1w.nii.gz", "anat/{}_acq-mprage_run-02_T1w.nii.gz",
                 "pet/{}_trc-18FFDG_rec-coregavg_run-01_pet.nii.gz",
                 "pet/{}_trc-18FFDG_rec-coregiso_run-01_pet.nii.gz",
                 "pet/{}_trc-18FFDG_rec-coregiso_run-02_pet.nii.gz"],
        "M012": ["pet/{}_trc-18FAV1451_pet.nii.gz"],
        "M018": ["anat/{}_run-1_T1w.nii.gz", "anat/{}_run-2_T1w.nii.gz",
                 "pet/{}_trc-11CPIB_pet.nii.gz"],
    }.items():  # fmt: skip
        folder = root / sub / f"ses-{ses}"
        add(folder, *(name.format(f"{sub}_ses-{ses}") for name in names))
        scans = "filename\tscan_id\tmri_field\n" + "".join(f"{name}\t1\t3\n" for name in names)
        add(folder, f"{sub}_ses-{ses}_scans.tsv", content=scans.encode())
    legacy = "sub-ADNI022S0001"
    add(root / legacy / "ses-M00", f"anat/{legacy}_ses-M00_T1w.nii.gz",
        f"pet/{legacy}_ses-M00_task-rest_acq-fdg_pet.nii.gz")  # fmt: skip
    # The visit called M012 was, in fact, 13 months before that called M018.
    dates = ("2010-01-04", "2010-04-20", "2011-05-20")
    rows = zip(("M000", "M012", "M018"), dates, strict=True)
    table = "session_id\texamination_date\n" + "".join(f"ses-{s}\t{d}\n" for s, d in rows)
    add(root / sub, f"{sub}_sessions.tsv", content=table.encode())
    return root


def t1w_of(scans):
    return {scan.name: scan.t1w.name if scan.t1w else None for scan in scans}


class TestAnatomicalReference:
    def test_nearest_by_date(self, adni):
        scans = by_name(query(adni, participant_labels=[ADNI]))
        tau = scans[f"{ADNI}_ses-M012_trc-18FAV1451_pet"]
        assert tau.t1w_entities["ses"] == "M000"  # 106 days against 395; by labels it is M018
        assert tau.t1w_choice == (
            "nearest session by examination_date (ses-M000), first of 2 images"
        )
        assert tau.t1w.name == f"{ADNI}_ses-M000_T1w.nii.gz"
        (adni / ADNI / f"{ADNI}_sessions.tsv").unlink()
        tau = by_name(query(adni))[tau.name]
        assert tau.t1w.name == f"{ADNI}_ses-M018_run-1_T1w.nii.gz"
        assert tau.t1w_choice == "nearest session (ses-M018), first of 2 images"

    def test_sessionwise(self, adni):
        scans = query(adni, anatomical_reference="sessionwise")
        (left_out,) = [scan for scan in scans if scan.reason]
        assert left_out.session == "M012"
        assert left_out.t1w is None
        assert left_out.reason.startswith("no T1w image in its session ses-M012, and --subject-")
        assert f"{ADNI}_ses-M018_run-1_T1w.nii.gz" in left_out.reason
        assert {scan.t1w_entities["ses"] == scan.session for scan in scans if scan.t1w} == {True}

    def test_first(self, adni):
        scans = query(adni, participant_labels=[ADNI], anatomical_reference="first-lex")
        assert set(t1w_of(scans).values()) == {f"{ADNI}_ses-M000_T1w.nii.gz"}
        assert {scan.t1w_choice for scan in scans} == {
            "first session (ses-M000), first of 2 images"
        }


class TestFurtherSelection:
    def test_reconstruction(self, adni):
        scans = query(adni, reconstruction_labels=["rec-coregiso"])
        assert {scan.entities.get("rec") for scan in scans} == {"coregiso"}
        assert len(scans) == 2
        both = query(adni, reconstruction_labels=["coregiso", "coregavg"])
        assert len(both) == 3

    def test_reconstruction_keeps_fa(self, clinica):
        scans = query(clinica, reconstruction_labels=["coregiso"])
        assert sorted(scan.modality for scan in scans) == ["fa", "pet"]

    def test_missing_reconstruction(self, adni, caplog):
        with pytest.raises(QueryError, match=r"rec-acdyn was found\. .*coregavg, coregiso"):
            query(adni, reconstruction_labels=["acdyn"])
        with caplog.at_level(logging.WARNING):
            query(adni, reconstruction_labels=["acdyn", "coregiso"])
        assert "rec-acdyn" in caplog.text

    @pytest.mark.parametrize("label", ["2", "02", "run-2"])
    def test_run(self, adni, label):
        (scan,) = query(adni, run_labels=[label])
        assert scan.name == f"{ADNI}_ses-M000_trc-18FFDG_rec-coregiso_run-02_pet"

    def test_subjects_sessions(self, adni, tmp_path):
        file = tmp_path / "pairs.tsv"
        file.write_text(f"participant_id\tsession_id\n{ADNI}\tses-M012\n")
        (scan,) = query(adni, subjects_sessions_tsv=file)
        assert (scan.subject, scan.session, scan.t1w_entities["ses"]) == (ADNI[4:], "M012", "M000")
        with pytest.raises(QueryError, match=r"pairs\.tsv: has no row of sub-ADNI022S0001"):
            query(adni, subjects_sessions_tsv=file, participant_labels=["ADNI022S0001"])
        file.write_text(f"participant_id\tsession_id\n{ADNI}\tses-M999\n")
        message = rf"pairs\.tsv: .*adni has no {ADNI}/ses-M999\. Give"
        with pytest.raises(QueryError, match=message):
            query(adni, subjects_sessions_tsv=file)

    def test_absent_rows_of_a_table_do_not_stop_the_others(self, adni, tmp_path, caplog):
        file = tmp_path / "pairs.tsv"
        rows = (f"{ADNI}\tses-M012", f"{ADNI}\tses-M999", "sub-X\tses-M000")
        file.write_text("participant_id\tsession_id\n" + "\n".join(rows) + "\n")
        with caplog.at_level(logging.WARNING):
            (scan,) = query(adni, subjects_sessions_tsv=file)
        assert (scan.subject, scan.session) == (ADNI[4:], "M012")
        assert f"has no {ADNI}/ses-M999, sub-X/ses-M000" in caplog.text


class TestDerivativesWithFA:
    def test_caps(self, clinica, tmp_path):
        dti = f"ses-M000/dwi/dti_based_processing/{{}}/{ADNI}_ses-M000_{{}}_FA.nii.gz"
        native = dti.format("native_space", "space-b0_desc-preproc")
        standard = dti.format("normalized_space", "space-MNI152Lin_res-1x1x1")
        caps = add(tmp_path / "caps/subjects" / ADNI, native, standard).parents[1]
        scans = query(clinica, derivatives={"caps": caps}, modalities=["fa"])
        used = {scan.file: scan.reason for scan in scans}
        assert used[caps / "subjects" / ADNI / native] == ""
        reason = used[caps / "subjects" / ADNI / standard]
        assert reason.startswith("in standard space MNI152Lin")

    def test_caps_of_before_2023(self, clinica, tmp_path):
        """Names kept the suffix of the image that a map was made from."""
        folder = f"{ADNI}/ses-M000/dwi/dti_based_processing/native_space"
        stem = f"{folder}/{ADNI}_ses-M000_acq-axial_dwi_space-T1w"
        names = [f"{stem}_{parameter}.nii.gz" for parameter in ("FA", "MD")]
        caps = add(tmp_path / "caps/subjects", *names).parent
        scans = query(clinica, derivatives={"caps": caps}, modalities=["fa"])
        (scan,) = [scan for scan in scans if not scan.reason]
        assert scan.file == caps / "subjects" / names[0]
        assert scan.name == f"{ADNI}_ses-M000_acq-axial_param-FA_dwimap"
        assert scan.diffusivities == {"MD": caps / "subjects" / names[1]}

    def test_qsirecon(self, clinica, tmp_path):
        name = f"{ADNI}_ses-M000_space-{{}}_model-tensor_param-fa_dwimap.nii.gz"
        qsirecon = add(tmp_path / "qsirecon-TORTOISE", *(
            f"{ADNI}/ses-M000/dwi/{name.format(space)}" for space in ("T1w", "MNI152NLin2009cAsym")
        ))  # fmt: skip
        scans = query(clinica, derivatives={"qsirecon": qsirecon}, modalities=["fa"])
        reasons = {scan.file.name: scan.reason for scan in scans if scan.source == "qsirecon"}
        assert reasons[name.format("T1w")] == ""
        assert "in standard space" in reasons[name.format("MNI152NLin2009cAsym")]

    def test_dataset_without_fa_is_told(self, clinica, tmp_path, caplog):
        name = f"{ADNI}_ses-M000_space-ACPC_desc-preproc_dwi.nii.gz"
        qsiprep = add(tmp_path / "qsiprep", f"{ADNI}/ses-M000/dwi/{name}")
        nested = f"derivatives/qsirecon-TORTOISE/{ADNI}/ses-M000/dwi"
        outer = add(tmp_path / "qsirecon", f"{nested}/{ADNI}_ses-M000_param-fa_dwimap.nii.gz")
        add(outer, f"{ADNI}/ses-M000/dwi/{ADNI}_ses-M000_dwi.json")
        with caplog.at_level(logging.WARNING):
            query(clinica, derivatives={"qsiprep": qsiprep, "qsirecon": outer})
        assert f"qsiprep: {qsiprep} has no FA map" in caplog.text
        assert f"-d qsirecon-TORTOISE={outer}/derivatives/qsirecon-TORTOISE" in caplog.text


class TestSelection:
    def test_labels_with_and_without_prefix(self, clinica):
        for prefix in ("", "sub-"):
            scans = query(clinica, participant_labels=[f"{prefix}ADNI022S0001"])
            assert [scan.subject for scan in scans] == ["ADNI022S0001"]
        scans = query(clinica, session_labels=["ses-M006"])
        assert [scan.session for scan in scans] == ["M006"]
        assert scans[0].t1w_choice == "nearest session (ses-M000)"

    def test_modalities(self, clinica):
        assert {scan.modality for scan in query(clinica, modalities=["fa"])} == {"fa"}
        assert {scan.modality for scan in query(clinica, modalities=["pet"])} == {"pet"}

    @pytest.mark.parametrize("label", ["trc-18FFDG", "18FFDG", "FDG", "fdg", "18FDG"])
    def test_tracer(self, clinica, label):
        scans = query(clinica, tracer_labels=[label], modalities=["pet"])
        assert {scan.tracer for scan in scans} == {"18FFDG", "fdg"}
        assert len(scans) == 4

    @pytest.mark.parametrize("label", ["PIB", "11CPIB", "trc-pib"])
    def test_tracer_of_the_sidecar(self, tmp_path, label):
        """``acq`` is a tracer only where one is called so; unknown ``trc`` hide no sidecar."""
        ends = ("acq-dynamic", "trc-blinded", "acq-fdg", "trc-18FFDG")
        add(tmp_path, "sub-1/anat/sub-1_T1w.nii")
        add(tmp_path, *(f"sub-1/pet/sub-1_{end}_pet.nii" for end in ends))
        for end in ends[:2]:
            sidecar = b'{"TracerName": "[11C]PIB"}'
            add(tmp_path, f"sub-1/pet/sub-1_{end}_pet.json", content=sidecar)
        scans = query(tmp_path, tracer_labels=[label])
        assert [(scan.entities.get("acq"), scan.tracer) for scan in scans] == [
            ("dynamic", "[11C]PIB"),
            (None, "blinded"),
        ]
        with pytest.raises(QueryError, match=r"have: 18FFDG, \[11C\]PIB, blinded, fdg\."):
            query(tmp_path, tracer_labels=["dynamic"])

    def test_tracer_keeps_fa(self, clinica):
        scans = query(clinica, tracer_labels=["AV45"])
        assert sorted(scan.modality for scan in scans) == ["fa", "pet"]

    def test_missing_participant(self, clinica):
        message = r"no participant ADNI011S0003.*Did you mean ADNI011S0002.*ADNI022S0001"
        with pytest.raises(QueryError, match=message):
            query(clinica, participant_labels=["ADNI011S0003"])

    def test_missing_session(self, clinica):
        with pytest.raises(QueryError, match=r"session M999.*sessions: M00, M000, M006"):
            query(clinica, session_labels=["M999"])

    def test_one_of_two_sessions_is_missing(self, clinica, caplog):
        with caplog.at_level(logging.WARNING):
            scans = query(clinica, session_labels=["M006", "M999"])
        assert [scan.session for scan in scans] == ["M006"]
        assert "session M999" in caplog.text

    def test_session_of_a_dataset_without_sessions(self, tmp_path):
        add(tmp_path, "sub-1/anat/sub-1_T1w.nii.gz", "sub-1/pet/sub-1_pet.nii.gz")
        with pytest.raises(QueryError, match=r"session A was found\. They have none"):
            query(tmp_path, session_labels=["A"])

    def test_missing_tracer(self, clinica, caplog):
        with pytest.raises(QueryError, match=r"tracer PIB.*have: 18FAV45, 18FFBB, 18FFDG, fdg"):
            query(clinica, tracer_labels=["PIB"])
        with caplog.at_level(logging.WARNING):  # one participant may lack it and still have FA
            scans = query(clinica, tracer_labels=["PIB"], participant_labels=[ADNI])
        assert [scan.modality for scan in scans] == ["fa"]
        assert "tracer PIB" in caplog.text

    def test_no_scan(self, clinica):
        anat_only = add(clinica, "sub-2/anat/sub-2_T1w.nii.gz")
        add(anat_only, "derivatives/qsirecon/sub-2/dwi/sub-2_param-FA_dwimap.nii.gz")
        message = r"No PET or FA scan.*participant 2.*_pet\.nii.*-d qsirecon=.*qsirecon"
        with pytest.raises(QueryError, match=message):
            query(anat_only, participant_labels=["2"])

    def test_not_a_dataset(self, tmp_path):
        with pytest.raises(QueryError, match="holds no sub-"):
            query(tmp_path)

    def test_missing_derivative(self, clinica, tmp_path):
        with pytest.raises(QueryError, match="is not a folder"):
            query(clinica, derivatives={"dti": tmp_path / "none"})

    def test_link_without_content(self, clinica):
        file = clinica / f"{ADNI}/ses-M006/pet/{ADNI}_ses-M006_trc-18FFDG_rec-coregavg_pet.nii.gz"
        file.unlink()
        file.symlink_to(clinica / ".git/annex/objects/x")
        scan = by_name(query(clinica))[file.name.removesuffix(".nii.gz")]
        assert "link without its content" in scan.reason

    @pytest.mark.parametrize("end", ["pet/{}_pet", "anat/{}_T1w", "dwi/{}_dwi", "dwi/{}_FA"])
    def test_empty_file(self, tmp_path, end):
        """As a copy that was cut off leaves it: told before anything is run."""
        names = [f"sub-1/{name.format('sub-1')}.nii" for name in ("pet/{}_pet", "anat/{}_T1w")]
        empty = f"sub-1/{end.format('sub-1')}.nii"
        add(tmp_path, *names)
        add(tmp_path, empty, content=b"")
        kind = "fa" if "dwi" in end else "pet"
        (scan,) = query(tmp_path, modalities=[kind])
        assert f"{tmp_path / empty} is empty" in scan.reason


class TestFilters:
    def write(self, folder, content):
        file = folder / "filter.json"
        file.write_text(json.dumps(content))
        return read_bids_filters(file)

    def test_null_and_star(self, clinica, tmp_path):
        without_rec = self.write(tmp_path, {"pet": {"reconstruction": None}})
        tracers = {scan.tracer for scan in query(clinica, modalities=["pet"], filters=without_rec)}
        assert tracers == {"18FAV45", "18FFBB", "fdg"}
        with_rec = self.write(tmp_path, {"pet": {"rec": "*"}})
        tracers = {scan.tracer for scan in query(clinica, modalities=["pet"], filters=with_rec)}
        assert tracers == {"18FFDG"}

    def test_values_and_lists(self, clinica, tmp_path):
        filters = self.write(
            tmp_path, {"pet": {"reconstruction": ["coregiso", None], "tracer": "18FFDG"}}
        )
        scans = query(clinica, modalities=["pet"], filters=filters)
        assert [scan.entities["rec"] for scan in scans] == ["coregiso"]

    def test_t1w_filter_says_so(self, clinica, tmp_path):
        filters = self.write(tmp_path, {"t1w": {"acquisition": "mprage"}})
        assert all("mprage" in scan.reason for scan in query(clinica, filters=filters))

    def test_fa_by_case(self, tmp_path):
        root = add(tmp_path / "bids", "sub-1/anat/sub-1_T1w.nii.gz")
        dwi = (f"sub-1/dwi/sub-1_model-{m}_param-fa_dwimap.nii.gz" for m in ("dki", "tensor"))
        dti = add(tmp_path / "dti", *dwi)
        filters = self.write(tmp_path, {"fa": {"model": "tensor"}})
        scans = query(root, derivatives={"dti": dti}, filters=filters)
        assert [scan.entities["model"] for scan in scans] == ["tensor"]

    def test_keys_of_other_apps_are_passed_over(self, tmp_path):
        assert self.write(tmp_path, {"bold": {"task": "rest"}, "T1w": {"run": 1}}) == {
            "t1w": {"run": 1}
        }

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ([], "expected a JSON object"),
            ({"pte": {}}, "unknown key 'pte'"),
            ({"pet": "FDG"}, "must be an object"),
            ({"pet": {"tracer": {"a": 1}}}, "must be a label"),
            ({"pet": {"trace": "FDG"}}, r"pet\.trace: no such entity, expected .*tracer"),
            ({"fa": {"x": []}}, r"fa\.x: no such entity"),
            # Arguments of pybids.
            ({"pet": {"return_type": "id"}}, r"pet\.return_type: no such"),
            ({"t1w": {"scope": "raw"}}, r"t1w\.scope: no such"),
        ],
    )
    def test_bad_files(self, tmp_path, content, message):
        with pytest.raises(QueryError, match=rf"filter\.json: .*{message}"):
            self.write(tmp_path, content)

    def test_unreadable_files(self, tmp_path):
        with pytest.raises(QueryError, match=r"none\.json"):
            read_bids_filters(tmp_path / "none.json")
        (tmp_path / "bad.json").write_text("{")
        with pytest.raises(QueryError, match=r"bad\.json"):
            read_bids_filters(tmp_path / "bad.json")

    def test_unknown_entity(self, clinica):
        with pytest.raises(QueryError, match="trace"):
            query(clinica, filters={"pet": {"trace": "FDG"}})


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("18FFDG", "FDG", True),
        ("18FFDG", "18FDG", True),
        ("fdg", "18FFDG", True),
        ("11CPIB", "PIB", True),
        ("18FAV45", "AV45", True),
        ("18FAV45", "18FAV1451", False),
        ("11CPIB", "18FPIB", False),
        ("FDG", "FBB", False),
        ("99mTcHMPAO", "HMPAO", True),
        ("[18F]FDG", "18FFDG", True),
        ("PI-2620", "18FPI2620", True),
    ],
)
def test_is_same_tracer(one, other, expected):
    assert is_same_tracer(one, other) is expected
    assert is_same_tracer(other, one) is expected


def test_read_sidecar_without_any(tmp_path):
    assert read_sidecar(tmp_path / "sub-1_pet.nii.gz", group_by_folder([])) == {}


def test_only_chosen_participants_are_indexed(clinica):
    layout = index_dataset(clinica, ["ADNI011S0002"])
    assert layout.get_subjects() == ["ADNI011S0002"]
    assert layout.get(suffix="bold") == []
