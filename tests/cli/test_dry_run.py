from m2m_bids.bids.query import query
from m2m_bids.cli.dry_run import dry_run_table
from m2m_bids.settings import Settings


def cohort(tmp_path):
    bids_dir, dti = tmp_path / "bids", tmp_path / "dti"
    for file in (
        bids_dir / "sub-1/ses-M000/anat/sub-1_ses-M000_T1w.nii.gz",
        bids_dir / "sub-1/ses-M000/pet/sub-1_ses-M000_trc-FDG_pet.nii.gz",
        bids_dir / "sub-2/pet/sub-2_pet.nii.gz",
        bids_dir / "sub-3/anat/sub-3_T1w.nii.gz",
        dti / "sub-1/ses-M012/dwi/sub-1_ses-M012_param-FA_dwimap.nii.gz",
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return {"bids_dir": bids_dir, "output_dir": tmp_path / "out", "derivatives": (("dti", dti),)}


def table(settings, weights=None):
    scans = query(settings.bids_dir, derivatives=settings.derivative_dirs)
    return dry_run_table(scans, settings, weights)


def test_table(tmp_path):
    text = table(Settings(**cohort(tmp_path), refine=9))
    assert text.splitlines() == [
        "m2m-bids would register 2 of 3 scans.",
        "",
        "sub-1_ses-M000_trc-FDG_pet",
        "  pet     sub-1/ses-M000/pet/sub-1_ses-M000_trc-FDG_pet.nii.gz",
        "  T1w     sub-1/ses-M000/anat/sub-1_ses-M000_T1w.nii.gz (same session)",
        "  from    the BIDS dataset",
        "  weights default of m2m-bids, 9 steps of refinement",
        "",
        "sub-1_ses-M012_param-FA_dwimap",
        "  fa      sub-1/ses-M012/dwi/sub-1_ses-M012_param-FA_dwimap.nii.gz",
        "  T1w     sub-1/ses-M000/anat/sub-1_ses-M000_T1w.nii.gz (nearest session (ses-M000))",
        "  from    derivatives dataset dti",
        "  weights default of m2m-bids, 9 steps of refinement",
        "",
        "Left out: 1",
        (f"  sub-2_pet: no T1w image (anat/*_T1w.nii[.gz]) of its subject in {tmp_path / 'bids'}"),
        "",
        "Participants without a PET or FA scan: 3",
    ]


def test_weights(tmp_path):
    options = cohort(tmp_path)
    (tmp_path / "w").mkdir()
    assert f"weights {tmp_path / 'w'}" in table(Settings(**options, weights=tmp_path / "w"))
    assert "none (rigid only)" in table(Settings(**options, transform="rigid"))
    text = table(Settings(**options, refine=0), {"pet": "t1w-pet, SHA-256 abc"})
    assert "weights t1w-pet, SHA-256 abc\n" in text
    assert "weights default of m2m-bids\n" in text


def test_only_selected_participants_are_missed(tmp_path):
    settings = Settings(**cohort(tmp_path), participant_label=("1",))
    assert "Participants without" not in table(settings)
