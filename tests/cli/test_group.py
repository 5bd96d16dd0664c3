import json
import shutil
from dataclasses import replace

import nibabel as nb
import numpy as np
import pandas as pd
import pytest

from m2m_bids.bids.naming import qc_file
from m2m_bids.bids.status import StatusRow, update_status
from m2m_bids.cli.run import main
from m2m_bids.quality.limits import column_names, definitions
from m2m_bids.reports.html import write_fragment, write_subject_report

RANDOM = np.random.default_rng(1)
SPACE = "space-MNI152NLin2009aSym"
GOOD = {
    "brain_dice": 0.92,
    "nmi": 1.12,
    "edge_agreement": 0.5,
    "white_above_grey": 0.3,
    "side_gap": 0.1,
    "fov_cut_percent": 0.5,
    "noise_percent": 4.0,
    "header_shift_mm": 12.0,
    "mean_displacement_mm": 2.0,
    "decision_margin": 0.8,
}

FDG = "trc-18FFDG"


def write_scan(
    out, subject, status="done", *, modality="pet", reason="n/a", tracer=FDG, **numbers
):
    """Write the row and the numbers of a scan as the level participant does."""
    end = f"{tracer}_pet" if modality == "pet" else "param-FA_dwimap"
    name = f"sub-{subject}_ses-M000_{end}"
    row = StatusRow(f"sub-{subject}", "ses-M000", modality, name, "T1w.nii.gz", status, reason)
    if status in ("done", "rigid only"):
        known = {name: value * RANDOM.normal(1, 0.03) for name, value in GOOD.items()}
        file = qc_file(name, out)
        file.parent.mkdir(parents=True, exist_ok=True)
        content = {"decision": "m2m" if status == "done" else "rigid", **known, **numbers}
        file.write_text(json.dumps({**content, "warnings": []}))
        (out / f"sub-{subject}.html").write_text("report")
    return row


def write_image(
    out,
    subject,
    modality="pet",
    *,
    stem=f"{SPACE}_desc-preproc_pet",
    frames=0,
    tracer=FDG,
):
    """Write a box of ones; of several frames, if there are any."""
    data = np.zeros((12, 14, 10), np.float32)
    data[3:9, 3:11, 2:8] = 1
    data = np.stack([data] * frames, axis=-1) if frames else data
    tracer = f"{tracer}_" if modality == "pet" else ""
    folder = out / f"sub-{subject}/ses-M000/{'pet' if modality == 'pet' else 'dwi'}"
    file = folder / f"sub-{subject}_ses-M000_{tracer}{stem}.nii.gz"
    nb.Nifti1Image(data, np.diag([2.0, 2, 2, 1])).to_filename(file)
    return file


def write_cohort(out, n_subjects):
    """Write a cohort of good scans, and one of each kind of others."""
    rows = [write_scan(out, f"{number:04}") for number in range(n_subjects)]
    rows += [write_scan(out, f"{n:04}", modality="fa") for n in range(n_subjects)]
    others = [
        write_scan(out, "swapped", side_gap=-0.08),
        write_scan(out, "cut", fov_cut_percent=31.0),
        write_scan(out, "odd", nmi=1.001),
        write_scan(out, "unknown", nmi=None),
        write_scan(out, "stiff", "rigid only", reason="it adds <b>nothing</b>"),
        write_scan(out, "still", "rigid only", reason="own error", mean_displacement_mm=0.8),
        write_scan(out, "alone", "skipped", reason="no T1w image"),
        write_scan(out, "torn", "failed", reason="a.nii.gz: truncated <script>alert(1)</script>"),
    ]
    update_status(out, rows + others)
    return len(rows) + len(others)


@pytest.fixture
def dataset(tmp_path):
    bids = tmp_path / "bids"
    bids.mkdir()
    (bids / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.10.0"}')
    return bids, tmp_path / "out"


def run(dataset, *options):
    return main([*map(str, dataset), "group", *options])


def test_no_scan_is_lost(dataset, capsys):
    n_scans = write_cohort(dataset[1], 12)
    assert run(dataset) == 0
    out = dataset[1]
    pet, fa = (pd.read_csv(out / f"group_{m}.tsv", sep="\t") for m in ("pet", "fa"))
    assert len(pet) + len(fa) == n_scans
    assert set(pet.status) == {"done", "rigid only", "skipped", "failed"}
    flags = pet.set_index("participant_id")["flags"].dropna()
    assert "left-right evidence is -0.08 (worry below 0.01)" in flags["sub-swapped"]
    assert flags["sub-cut"].startswith("brain outside the field of view is 31 %")
    assert "mutual information is 1, low in this cohort (median 1.1" in flags["sub-odd"]
    assert flags["sub-torn"] == "a.nii.gz: truncated <script>alert(1)</script>"
    assert flags["sub-stiff"] == "rigid only: it adds <b>nothing</b>"
    assert {"sub-alone", "sub-unknown", "sub-still"}.isdisjoint(flags.index)
    data = page_data(out)
    assert [scan["scan"] for scan in data["scans"]] == sorted(
        [*pet.scan, *fa.scan], key=[scan["scan"] for scan in data["scans"]].index
    )
    assert len(data["scans"]) == n_scans
    assert capsys.readouterr().out.startswith(f"{n_scans} scans, ")


def page_data(out):
    page = (out / "group.html").read_text()
    start = page.index('id="data">') + len('id="data">')
    return json.loads(page[start : page.index("</script>", start)])


def test_texts_stay_texts(dataset):
    write_cohort(dataset[1], 2)
    run(dataset)
    page = (dataset[1] / "group.html").read_text()
    assert "alert(1)" in page
    assert "<script>alert" not in page
    assert "<b>nothing" not in page


def test_links_lead_to_the_part_of_the_scan(dataset):
    out = dataset[1]
    rows = [write_scan(out, "01"), write_scan(out, "01", modality="fa")]
    rows.append(replace(rows[0], scan="sub-01_pet", status="failed", reason="torn"))
    update_status(out, rows)
    run(dataset)
    figures = out / "sub-01/figures"
    for stem, suffix in (("ses-M000_trc-18FFDG_", "pet"), ("ses-M000_", "dwimap"), ("", "pet")):
        write_fragment(figures, f"sub-01_{stem}desc-summary_{suffix}", "<p>what it is</p>")
    report = write_subject_report(out, "01", "run").read_text()
    links = {scan["scan"]: scan["report"] for scan in page_data(out)["scans"]}
    assert len(set(links.values())) == 3
    for link in links.values():
        page, _, place = link.partition("#")
        assert page == "sub-01.html"
        assert f'<div id="{place}" class="part">' in report


def test_limits_are_on_the_page_and_in_the_tables(dataset):
    write_cohort(dataset[1], 2)
    run(dataset)
    page = (dataset[1] / "group.html").read_text()
    described = json.loads((dataset[1] / "group_pet.json").read_text())
    for column, name in column_names(are_final=True).items():
        flagged = definitions()[name].flagged
        assert f"<em>Flagged:</em> {flagged}." in page
        assert described[column]["Description"].endswith(f"Flagged: {flagged}.")
    assert described["decision_margin"]["Description"].endswith("between -0.3 and 0.3.")


def test_columns_are_described(dataset):
    write_cohort(dataset[1], 2)
    run(dataset)
    for modality in ("pet", "fa"):
        table = pd.read_csv(dataset[1] / f"group_{modality}.tsv", sep="\t")
        described = json.loads((dataset[1] / f"group_{modality}.json").read_text())
        assert list(table.columns) == list(described)
    assert described["header_shift_mm"]["Units"] == "mm"
    assert ", after rigid alignment" in described["nmi_rigid"]["LongName"]


def test_a_part_is_written_beside_all_scans(dataset, caplog):
    out = dataset[1]
    n_scans = write_cohort(out, 3)
    run(dataset)
    before = {file.name: file.read_bytes() for file in out.glob("group*")}
    assert set(before) == {
        "group.html",
        *(f"group_{m}.{e}" for m in ("pet", "fa") for e in ("tsv", "json")),
    }
    assert "A part of the dataset" not in (out / "group.html").read_text()
    run(dataset, "--participant-label", "0001", "cut", "absent")
    assert "No scan of participants absent is in the table." in caplog.text
    assert (out / "group_part_fa.tsv").is_file()
    killed = out / "group" / f".{'0' * 32}.nii.gz"
    killed.parent.mkdir()
    killed.touch()
    (out / "group_part").mkdir()
    (out / "group_part" / "desc-mean_pet.nii.gz").touch()
    run(dataset, "--participant-label", "0001", "cut", "--modality", "pet")
    table = pd.read_csv(out / "group_part_pet.tsv", sep="\t")
    assert list(table.participant_id) == ["sub-0001", "sub-cut"]
    # That of another part is gone, and what a killed run left.
    assert not killed.exists()
    assert not (out / "group_part_fa.tsv").exists()
    assert not (out / "group_part_fa.json").exists()
    assert not (out / "group_part").exists()
    page = (out / "group_part.html").read_text()
    assert "participants 0001, cut; pet. The page of all scans is group.html." in page
    assert {name: (out / name).read_bytes() for name in before} == before
    # What leaves nothing out is no part.
    run(dataset, "--modality", "pet", "fa")
    assert len(page_data(out)["scans"]) == n_scans


def test_options_of_other_levels_are_refused(dataset, capsys):
    write_cohort(dataset[1], 1)
    assert run(dataset, "--session-label", "M000", "--tracer-label", "FDG") == 2
    assert "--session-label, --tracer-label: the level 'group'" in capsys.readouterr().err
    assert not (dataset[1] / "group.html").exists()


def test_unreadable_numbers_are_told(dataset):
    out = dataset[1]
    row = write_scan(out, "01")
    qc_file(row.scan, out).write_text("{")
    gone = write_scan(out, "02")
    qc_file(gone.scan, out).unlink()
    deep = write_scan(out, "03")
    qc_file(deep.scan, out).write_text("[" * 20000)
    update_status(out, [row, gone, deep])
    run(dataset)
    flags = pd.read_csv(out / "group_pet.tsv", sep="\t")["flags"]
    assert flags.str.contains("its numbers cannot be read").all()


def test_damaged_rows_and_numbers_do_not_stop_the_page(dataset):
    out = dataset[1]
    rows = [write_scan(out, label) for label in ("01", "02")]
    rows.append(replace(rows[0], participant_id="sub-O'Neil<b>", scan="sub-O'Neil<b>_pet"))
    rows.append(write_scan(out, "big", nmi=10**400))
    rows.append(write_scan(out, "list"))
    qc_file(rows[-1].scan, out).write_text("[]")
    update_status(out, rows)
    write_image(out, "01")
    write_image(out, "01", stem=f"{SPACE}_desc-two_desc-preproc_pet")
    assert run(dataset) == 0
    table = pd.read_csv(out / "group_pet.tsv", sep="\t").set_index("participant_id")
    assert "cannot be read" in table["flags"]["sub-O'Neil<b>"]
    assert "cannot be read" in table["flags"]["sub-list"]
    assert np.isnan(table.nmi["sub-big"])
    assert table.brain_dice["sub-big"] > 0.5


def test_nothing_was_run(dataset, capsys):
    assert run(dataset) == 2
    assert "run the level 'participant' first" in capsys.readouterr().err


def test_mean_images(dataset):
    out = dataset[1]
    update_status(out, [write_scan(out, label) for label in ("01", "02", "03")])
    affine = np.diag([-2.0, 2, 2, 1])
    shape = (12, 14, 10)
    brain = np.zeros(shape)
    brain[3:9, 3:11, 2:8] = 1
    for label, factor in (("01", 1.0), ("02", 30.0), ("03", 5.0)):
        stem = f"sub-{label}_ses-M000_trc-18FFDG_space-MNI152NLin2009aSym_res-2_desc-preproc_pet"
        data = factor * (
            brain + 0.5 * (label == "02") * brain * (np.arange(12) < 6)[:, None, None]
        )
        grid = affine if label != "03" else np.eye(4)
        image = nb.Nifti1Image(data.astype(np.float32), grid)
        image.to_filename(out / f"sub-{label}/ses-M000/pet/{stem}.nii.gz")
    run(dataset)
    stem = "trc-18FFDG_space-MNI152NLin2009aSym_res-2_desc-{}_pet"
    mean, sd = (nb.load(out / "group" / f"{stem.format(n)}.nii.gz") for n in ("mean", "sd"))
    # The second image, half of it 1.5 times as bright, is divided by its mean of 1.25.
    np.testing.assert_allclose(mean.get_fdata()[4, 5, 5], (1 + 1.2) / 2, rtol=1e-6)
    np.testing.assert_allclose(mean.get_fdata()[7, 5, 5], (1 + 0.8) / 2, rtol=1e-6)
    np.testing.assert_allclose(sd.get_fdata()[4, 5, 5], 0.2 / np.sqrt(2), rtol=1e-5)
    np.testing.assert_array_equal(mean.affine, affine)
    sidecar = json.loads((out / "group" / f"{stem.format('mean')}.json").read_text())
    assert len(sidecar["LeftOut"]) == 1
    assert "its grid" in sidecar["LeftOut"][0]
    assert "Standard deviation of PET 18FFDG" in (out / "group.html").read_text()


def test_static_images_of_dynamic_scans_are_averaged(dataset):
    out = dataset[1]
    update_status(out, [write_scan(out, label) for label in ("01", "02", "03", "04")])
    for label in ("01", "02", "03"):
        write_image(out, label, frames=3)
    # The first one lacks its static image, and must not tell what the grid is.
    write_image(out, "02", stem=f"{SPACE}_petref")
    write_image(out, "03", stem=f"{SPACE}_petref")
    write_image(out, "04")
    assert run(dataset) == 0
    sidecar = json.loads((out / f"group/trc-18FFDG_{SPACE}_desc-mean_pet.json").read_text())
    assert sidecar["Description"].startswith("Mean of 3 images")
    assert len(sidecar["LeftOut"]) == 1
    assert "sub-01" in sidecar["LeftOut"][0]
    assert "4-D" in sidecar["LeftOut"][0]


def test_images_on_further_grids_of_persons_are_not_averaged(dataset):
    """Only templates are a space that persons share."""
    out = dataset[1]
    update_status(out, [write_scan(out, label) for label in ("01", "02")])
    for label in ("01", "02"):
        for space in ("space-T1w", "space-T1w_res-native", f"{SPACE}_res-native"):
            write_image(out, label, stem=f"{space}_desc-preproc_pet")
    assert run(dataset) == 0
    means = [file.name for file in (out / "group").glob("*_desc-mean_pet.nii.gz")]
    assert means == [f"trc-18FFDG_{SPACE}_res-native_desc-mean_pet.nii.gz"]


def test_images_of_an_earlier_registration_are_not_averaged(dataset, caplog):
    """As where a space failed, and was not asked for again."""
    out = dataset[1]
    labels = ("01", "02", "03")
    update_status(out, [write_scan(out, label) for label in labels])
    for label in labels:
        weights = "a" if label == "02" else "b"
        for stem, made in (("space-T1w", {}), (SPACE, {"TemplateTransforms": {"a.h5": "1"}})):
            file = write_image(out, label, stem=f"{stem}_desc-preproc_pet")
            target = {"Target": "T1w", "Weights": "b" if stem == "space-T1w" else weights}
            sidecar = file.with_name(file.name.replace(".nii.gz", ".json"))
            sidecar.write_text(json.dumps({"MadeFrom": {**target, **made}}))
    assert run(dataset) == 0
    (mean,) = (out / "group").glob("*_desc-mean_pet.json")
    sources = json.loads(mean.read_text())["Sources"]
    assert [source.split("/sub-")[1][:2] for source in sources] == ["01", "03"]
    assert "left out of mean images: it is of another registration" in caplog.text


def test_means_that_are_no_longer_made_are_removed(dataset):
    out = dataset[1]
    update_status(out, [write_scan(out, label) for label in ("01", "02")])
    files = [write_image(out, label) for label in ("01", "02")]
    run(dataset)
    (out / "group/notes.txt").write_text("mine")
    assert len(list((out / "group").iterdir())) == 5
    for file in files:
        file.unlink()
    run(dataset)
    assert [file.name for file in (out / "group").iterdir()] == ["notes.txt"]


def test_too_few_images_are_told_with_their_reasons(dataset):
    out = dataset[1]
    update_status(out, [write_scan(out, label) for label in ("01", "02", "03")])
    write_image(out, "01", frames=3)
    write_image(out, "02")
    write_image(out, "03").write_bytes(b"no image")
    assert run(dataset) == 0
    assert not (out / "group").exists()
    page = (out / "group.html").read_text()
    assert "1 image; a mean takes two." in page
    assert "2 left out" in page
    assert "4-D image" in page
    assert "not a readable image" in page
    assert "There are no images in a template" not in page


def test_the_grid_is_that_of_most_images(dataset):
    out = dataset[1]
    update_status(out, [write_scan(out, label) for label in ("01", "02", "03")])
    files = [write_image(out, label) for label in ("01", "02", "03")]
    nb.Nifti1Image(np.ones((5, 5, 5), np.float32), np.eye(4)).to_filename(files[0])
    run(dataset)
    mean = nb.load(out / f"group/trc-18FFDG_{SPACE}_desc-mean_pet.nii.gz")
    assert mean.shape == (12, 14, 10)


def test_means_never_stop_the_page(dataset, monkeypatch):
    out = dataset[1]
    update_status(out, [write_scan(out, label) for label in ("01", "02")])
    for label in ("01", "02"):
        write_image(out, label)

    def fail(*_):
        raise RuntimeError("out of luck")

    monkeypatch.setattr("m2m_bids.quality.averages.scan_brain", fail)
    assert run(dataset) == 0
    assert "all images: out of luck" in (out / "group.html").read_text()


def test_each_cohort_has_mean_images_of_its_own(dataset):
    out = dataset[1]
    target = {"target": "MNI152NLin2009aSym"}
    rows = [write_scan(out, label) for label in ("01", "02")]
    rows += [write_scan(out, label, **target) for label in ("03", "04")]
    rows += [write_scan(out, label, modality="fa") for label in ("01", "02")]
    rows += [write_scan(out, label, modality="fa", **target) for label in ("03", "04")]
    update_status(out, rows)
    for label in ("01", "02", "03", "04"):
        write_image(out, label)
        write_image(out, label, "fa", stem=f"{SPACE}_param-FA_desc-preproc_dwimap")
    run(dataset)
    assert {file.name for file in (out / "group").glob("*.nii.gz")} == {
        f"{start}desc-{statistic}{route}_{suffix}.nii.gz"
        for start, suffix in (
            (f"trc-18FFDG_{SPACE}_", "pet"),
            (f"{SPACE}_param-FA_", "dwimap"),
        )
        for statistic in ("mean", "sd")
        for route in ("", "Template")
    }
    for file in (out / "group").glob("*desc-mean*.json"):
        sources = json.loads(file.read_text())["Sources"]
        people = {source.split("/sub-")[1][:2] for source in sources}
        assert people == ({"03", "04"} if "Template" in file.name else {"01", "02"})


def write_tracers(out, tracers):
    """Write a scan and its image of the tracer of each person."""
    update_status(out, [write_scan(out, label, tracer=name) for label, name in tracers.items()])
    for label, name in tracers.items():
        write_image(out, label, tracer=name)


def test_tracers_of_old_names_have_mean_images_of_their_own(dataset):
    """Names of before BIDS 1.6 have the tracer in ``acq-``."""
    out = dataset[1]
    tracers = {"01": "acq-fdg", "02": "acq-fdg", "03": "acq-av45", "04": "acq-av45"}
    write_tracers(out, tracers)
    run(dataset)
    assert {file.name for file in (out / "group").glob("*desc-mean*.nii.gz")} == {
        f"trc-{tracer}_{SPACE}_desc-mean_pet.nii.gz" for tracer in ("fdg", "av45")
    }


def test_spellings_of_a_tracer_are_one_tracer(dataset):
    out = dataset[1]
    tracers = {"01": "trc-18FFDG", "02": "trc-FDG", "03": "trc-FDG", "04": "acq-fdg"}
    write_tracers(out, tracers)
    run(dataset)
    (mean,) = (out / "group").glob("*desc-mean*.json")
    assert mean.name.startswith("trc-FDG_")
    assert len(json.loads(mean.read_text())["Sources"]) == 4
    table = pd.read_csv(out / "group_pet.tsv", sep="\t")
    assert table.kind.tolist() == ["PET FDG"] * 4


def write_sidecar(row, out):
    file = qc_file(row.scan, out)
    return file.with_name(file.name.replace("_desc-preproc_qc", "_space-T1w_desc-preproc_pet"))


def test_tracers_that_names_lack_are_those_of_sidecars(dataset, caplog):
    out = dataset[1]
    fields = {
        "01": {"TracerName": "[18F]FDG"},
        "02": {"TracerName": "[18F]FDG"},
        "03": {"TracerName": "PiB"},
        "04": {"TracerName": "PiB"},
        "05": {"TracerRadionuclide": "F18"},
        "06": {"TracerName": "F18", "TracerRadionuclide": "F18"},
        "07": {"TracerName": ["FDG"]},
        "09": {},
    }
    rows = []
    for label, content in fields.items():
        rows.append(write_scan(out, label, tracer="run-1", nmi=1.1 + 0.01 * int(label)))
        write_image(out, label, tracer="run-1")
        if content:
            write_sidecar(rows[-1], out).write_text(json.dumps(content))
    # A name that says it is believed; its sidecar is not read.
    rows.append(write_scan(out, "08", tracer="trc-PIB"))
    write_image(out, "08", tracer="trc-PIB")
    write_sidecar(rows[-1], out).write_text("{")
    update_status(out, rows)
    assert run(dataset) == 0
    kinds = pd.read_csv(out / "group_pet.tsv", sep="\t").set_index("participant_id").kind
    assert kinds.to_dict() == {
        **dict.fromkeys(("sub-01", "sub-02"), "PET 18FFDG"),
        **dict.fromkeys(("sub-03", "sub-04", "sub-08"), "PET PiB"),
        **dict.fromkeys(("sub-05", "sub-06", "sub-07", "sub-09"), "PET tracer unknown"),
    }
    means = {file.name: file for file in (out / "group").glob("*desc-mean_pet.json")}
    end = f"{SPACE}_desc-mean_pet.json"
    assert set(means) == {f"trc-18FFDG_{end}", f"trc-PiB_{end}", end}
    assert len(json.loads(means[end].read_text())["Sources"]) == 4
    assert "sub-09_ses-M000_run-1_space-T1w_desc-preproc_pet.json: cannot be read" in caplog.text
    assert "Mean of PET tracer unknown in MNI152NLin2009aSym" in (out / "group.html").read_text()


def test_outliers_are_of_one_tracer_of_the_sidecars(dataset):
    """Tracers of two heights: what is usual for one is odd for the other."""
    out = dataset[1]
    rows = []
    for number in range(18):
        name = "PiB" if number < 9 else "FDG"
        odd = number in (0, 17)
        white = 0.65 if (name == "PiB") != odd else 0.3
        rows.append(write_scan(out, f"{number:02}", tracer="run-1", white_above_grey=white))
        write_sidecar(rows[-1], out).write_text(json.dumps({"TracerName": name}))
    update_status(out, rows)
    run(dataset)
    table = pd.read_csv(out / "group_pet.tsv", sep="\t").set_index("participant_id")
    told = table["flags"].fillna("").str.contains("white above grey")
    assert list(told[told].index) == ["sub-00", "sub-17"]


@pytest.fixture
def context():
    """A browser without a network, whose pages share what they store."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("Chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser.new_context(viewport={"width": 1366, "height": 768}, offline=True)
        browser.close()


def rate(page, subject, rating):
    page.fill("#find", subject)
    page.locator("#scans tbody button", has_text=rating).click()


def pressed(page, subject):
    page.fill("#find", subject)
    return page.locator("#scans tbody button[aria-pressed=true]").all_inner_texts()


def saved_ratings(page):
    with page.expect_download() as download:
        page.click("#export")
    lines = [line.split("\t") for line in download.value.path().read_text().splitlines()]
    assert lines[0] == ["participant_id", "session_id", "scan", "rating", "note", "time"]
    return {line[0]: line[3:5] for line in lines[1:]}


@pytest.mark.slow
def test_ratings_of_two_tabs_are_kept(dataset, context):
    write_cohort(dataset[1], 2)
    run(dataset)
    first, second = context.new_page(), context.new_page()
    for page in (first, second):
        page.goto((dataset[1] / "group.html").as_uri())
    rate(first, "swapped", "bad")
    # Somebody writes a note while another tab rates: the words stay, and nothing is lost.
    second.fill("#find", "cut")
    note = second.locator("#scans tbody input")
    note.press_sequentially("low")
    rate(first, "odd", "good")
    note.press_sequentially("er part")
    note.blur()
    rate(second, "stiff", "doubtful")
    expected = {
        "sub-cut": ["n/a", "lower part"],
        "sub-odd": ["good", "n/a"],
        "sub-stiff": ["doubtful", "n/a"],
        "sub-swapped": ["bad", "n/a"],
    }
    assert pressed(first, "stiff") == ["doubtful"]
    assert saved_ratings(first) == saved_ratings(second) == expected
    first.reload()
    assert saved_ratings(first) == expected
    # A second press takes the rating back.
    rate(first, "odd", "good")
    assert pressed(second, "odd") == []


@pytest.mark.slow
def test_ratings_are_loaded_and_filtered(dataset, context, tmp_path):
    write_cohort(dataset[1], 2)
    run(dataset)
    page = context.new_page()
    page.goto((dataset[1] / "group.html").as_uri())
    rate(page, "swapped", "good")
    end = "_ses-M000_trc-18FFDG_pet"
    rows = [
        f"sub-swapped{end}\tbad\tan older one\t2020-01-01T00:00:00.000Z",
        f"sub-cut{end}\tbad\t<b>\tn/a",
        f"sub-odd{end}\tn/a\tseen\t2099-01-01T00:00:00.000Z",
        f"sub-gone{end}\tbad\tn/a\tn/a",
        f"sub-stiff{end}\tsplendid\tn/a\tn/a",
    ]
    file = tmp_path / "others.tsv"
    file.write_text("\n".join(["scan\trating\tnote\ttime", *rows]))
    page.set_input_files("#import", file)
    page.wait_for_function("document.getElementById('loaded').textContent")
    assert page.inner_text("#loaded") == (
        "2 ratings loaded from others.tsv; 1 left out, not newer than what is here; 1 left out, of"
        " scans that are not here; 1 left out, not one of good, doubtful, bad."
    )
    # Rated here later, though the other clock was ahead.
    rate(page, "odd", "doubtful")
    page.reload()
    assert saved_ratings(page) == {
        "sub-swapped": ["good", "n/a"],
        "sub-cut": ["bad", "<b>"],
        "sub-odd": ["doubtful", "seen"],
    }
    page.select_option("#rated", "bad")
    assert "sub-cut" in page.locator("#scans tbody th").inner_text()
    page.select_option("#rated", "not yet")
    assert page.inner_text("#count") == "9 of 12 scans; 3 rated"
    page.select_option("#rated", "")
    page.locator('#scans [data-name="rating"] button').click()
    assert page.locator("#scans tbody tr").first.locator("[aria-pressed=true]").count() == 1
    file.write_text("a\tb\n")
    page.set_input_files("#import", file)
    page.wait_for_function("document.getElementById('loaded').textContent.includes('no columns')")


@pytest.mark.slow
def test_the_first_rating_is_a_few_keys_away(dataset, context):
    write_cohort(dataset[1], 2)
    run(dataset)
    page = context.new_page()
    page.goto((dataset[1] / "group.html").as_uri())
    page.focus("#find")
    for _ in range(7):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "To the first rating"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.inner_text("#count").endswith("; 1 rated")


FOCUSED = "document.activeElement.getAttribute('aria-label')"


@pytest.fixture
def points_page(dataset, context):
    """The page of some scans, and what it complains of."""
    write_cohort(dataset[1], 4)
    (dataset[1] / "sub-0002.html").unlink()
    run(dataset)
    page = context.new_page()
    problems = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto((dataset[1] / "group.html").as_uri())
    yield page
    assert problems == []


def press(page, *keys):
    for key in keys:
        page.keyboard.press(key)
    return page.evaluate(FOCUSED)


@pytest.mark.slow
def test_every_point_is_reached_by_keys(points_page, dataset):
    page = points_page
    table = pd.read_csv(dataset[1] / "group_pet.tsv", sep="\t").dropna(subset="side_gap")
    table = table.sort_values("side_gap", kind="stable")
    page.locator('#panels [data-name="side_gap"] a[tabindex="0"]').focus()
    press(page, "ArrowDown", "Home")  # of FA, PET
    names = [page.evaluate(FOCUSED)]
    while (name := press(page, "ArrowRight")) != names[-1]:
        names.append(name)
    assert [name.split(":")[0] for name in names] == list(table.scan)
    values = [float(name.split(": ")[1].split(",")[0]) for name in names]
    np.testing.assert_allclose(values, table.side_gap, rtol=1e-3)
    assert names[0].endswith(": -0.08, to look at")
    assert [name.split(":")[0] for name in names if name.endswith(", without a report")] == [
        "sub-0002_ses-M000_trc-18FFDG_pet"
    ]
    assert press(page, "ArrowUp").split(":")[0].endswith("param-FA_dwimap")
    assert press(page, "ArrowDown", "Home", "PageDown", "ArrowLeft") == names[-2]
    assert press(page, "Home") == names[0]


@pytest.mark.slow
def test_the_focus_is_seen_told_and_leads_to_the_report(points_page):
    page = points_page
    panel = page.locator('#panels [data-name="nmi"]')
    panel.locator("a[href]").last.focus()
    name = page.evaluate(FOCUSED)
    assert panel.locator(".m2m-told").inner_text() == name
    ring, focused = panel.locator(".m2m-ring"), panel.locator("a[tabindex='0']")
    page.wait_for_timeout(500)  # scrolling is smooth
    boxes = [one.bounding_box() for one in (ring, focused)]
    middles = [(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2) for box in boxes]
    np.testing.assert_allclose(*middles, atol=0.5)
    # On its own stop of the tabulator, below the bar that stays on top.
    bar = page.locator("nav").bounding_box()
    assert boxes[0]["y"] > bar["y"] + bar["height"]
    assert press(page, "Tab") != name
    assert not ring.is_visible()
    assert panel.locator(".m2m-told").inner_text() == ""
    assert press(page, "Shift+Tab") == name
    subject = name.split("_")[0]
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/{subject}.html#*")


@pytest.mark.slow
def test_every_distribution_is_one_stop(points_page):
    """Those that are not yet drawn are not passed over."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is missing")
    page = points_page
    names = page.locator("#panels .m2m-panel").evaluate_all(
        "boxes => boxes.map(b => b.dataset.name)"
    )
    page.locator("#flagged a").last.focus()
    place = "document.activeElement.closest('.m2m-panel')?.dataset.name"
    visited = []
    for _ in names:
        assert press(page, "Tab").startswith("sub-")
        visited.append(page.evaluate(place))
    assert visited == names
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "find"
    page.keyboard.press("Shift+Tab")
    assert page.evaluate(place) == names[-1]
    assert [v["id"] for v in axe.Axe().run(page).response["violations"]] == []


@pytest.mark.slow
def test_page_of_a_thousand_subjects_in_a_browser(dataset, context, tmp_path):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is missing")
    n_scans = write_cohort(dataset[1], 1000)
    run(dataset)
    page = context.new_page()
    problems = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("requestfailed", lambda request: problems.append(request.url[:200]))
    page.goto((dataset[1] / "group.html").as_uri())
    assert page.inner_text("#count") == f"{n_scans} of {n_scans} scans; 0 rated"
    assert page.locator("#scans tbody tr").count() == 50
    # Sorted by reasons to look.
    assert "truncated" in page.locator("#scans .m2m-flags").first.inner_text()
    page.check("#only-flagged")
    page.fill("#find", "swapped")
    row = page.locator("#scans tbody tr")
    assert row.count() == 1
    row.locator("button", has_text="bad").click()
    row.locator("input").fill('left\tand "right" <b>')
    row.locator("input").blur()
    with page.expect_download() as download:
        page.click("#export")
    saved = download.value.path().read_text().splitlines()
    assert saved[1].split("\t")[2:5] == [
        "sub-swapped_ses-M000_trc-18FFDG_pet", "bad", 'left and "right" <b>',
    ]  # fmt: skip
    page.reload()
    page.fill("#find", "swapped")
    assert page.locator("#scans tbody [aria-pressed=true]").inner_text() == "bad"
    page.fill("#find", "")
    page.locator('[data-name="nmi"] button').last.focus()
    page.keyboard.press("Enter")
    header = page.locator('#scans [data-name="nmi"]')
    assert header.get_attribute("aria-sort") == "ascending"
    assert "odd" in page.locator("#scans tbody th").first.inner_text()
    page.locator('.m2m-panel[data-name="nmi"]').scroll_into_view_if_needed()
    points = page.locator('.m2m-panel[data-name="nmi"] a')
    points.first.wait_for()
    assert points.count() == n_scans - 3
    points.first.focus()
    page.keyboard.press("End")
    assert page.locator("#panels a[tabindex='0']").count() <= page.locator("#panels svg").count()
    page.evaluate("window.scrollTo(0, 0)")
    page.screenshot(path=tmp_path / "wide.png")
    results = axe.Axe().run(page)
    assert [v["id"] for v in results.response["violations"]] == []
    page.set_viewport_size({"width": 420, "height": 800})
    page.screenshot(path=tmp_path / "narrow.png")
    assert page.evaluate("document.documentElement.scrollWidth") <= 420
    assert problems == []
