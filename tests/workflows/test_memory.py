import struct

import nibabel as nb
import numpy as np
import pytest
from nipype import Node, Workflow
from nipype.interfaces.utility import IdentityInterface

from m2m_bids.interfaces.evaluation import MeasureRegistration, RegisterByMethod
from m2m_bids.interfaces.labels import PrepareLabels
from m2m_bids.interfaces.preprocessing import ExtractBrain
from m2m_bids.interfaces.quantification import QuantifyScan
from m2m_bids.interfaces.records import MoveImages
from m2m_bids.workflows.memory import MARGIN, MEASURED, SYNTHSTRIP, declare_memory

T1W_NODES = ("extract_brain", "register_m2m", "save_scan")


def subject():
    """A subject's workflow, with one of a scan in it."""
    workflow, scan_wf = Workflow(name="sub_1_wf"), Workflow(name="a_pet_wf")
    interface = IdentityInterface(fields=["a"])
    workflow.add_nodes([Node(interface, name=name, mem_gb=4) for name in T1W_NODES])
    scan_wf.add_nodes([Node(interface, name="fit_tensor", mem_gb=4)])
    workflow.add_nodes([scan_wf])
    return workflow


def declared(workflow):
    return {node.name: node.mem_gb for node in workflow._get_all_nodes()}


def image(folder, name, shape, size_mm=1.0):
    affine = np.diag([size_mm, size_mm, size_mm, 1.0])
    nb.Nifti1Image(np.zeros(shape, np.uint8), affine).to_filename(folder / name)
    return folder / name


def test_steps_declare_what_was_measured(tmp_path):
    workflow = subject()
    t1w = image(tmp_path, "T1w.nii", (100, 200, 50))
    scan = image(tmp_path, "dwi.nii", (100, 100, 50, 4))
    declare_memory(workflow, [t1w], {"a_pet_wf": scan})
    brain, tensor = MEASURED["extract_brain"], MEASURED["fit_tensor"]
    assert declared(workflow) == pytest.approx(
        {
            "extract_brain": MARGIN * (brain.fixed + brain.of_t1w * 1),
            "fit_tensor": MARGIN * (tensor.fixed + tensor.of_scan * 2),
            "register_m2m": MARGIN * MEASURED["register_m2m"].fixed,
            "save_scan": 4,
        }
    )


@pytest.mark.parametrize("smooth_fwhm_mm", [[], [8.0], [6.0, 8.0]])
@pytest.mark.parametrize("name", ["quantify_scan", "quantify_corrected"])
def test_frames_of_pet_count_on_the_grid_of_the_t1w(tmp_path, name, smooth_fwhm_mm):
    workflow, scan_wf = Workflow(name="sub_1_wf"), Workflow(name="a_pet_wf")
    known = {"scheme": "tissues", "is_pet": True, "smooth_fwhm_mm": smooth_fwhm_mm}
    scan_wf.add_nodes([Node(QuantifyScan(scan=known), name=name, mem_gb=2)])
    workflow.add_nodes([scan_wf])
    t1w = image(tmp_path, "T1w.nii", (100, 200, 50))
    frames = image(tmp_path, "pet.nii", (10, 10, 10, 24))
    declare_memory(workflow, [t1w], {"a_pet_wf": frames})
    need = MEASURED["quantify_scan, PET" + (", smoothed" if smooth_fwhm_mm else "")]
    assert declared(workflow)[name] == pytest.approx(
        MARGIN * (need.fixed + 24 * need.of_frames * 1)
    )
    declare_memory(workflow, [t1w], {"a_pet_wf": image(tmp_path, "volume.nii", (10, 10, 10))})
    larger = max(need.of_t1w, need.of_frames)
    assert declared(workflow)[name] == pytest.approx(MARGIN * (need.fixed + larger * 1))


@pytest.mark.parametrize(
    ("name", "n_frames", "measured_gb"),
    [
        ("resample_frames", 24, 0.492),
        ("resample_frames", 1, 0.106),
        ("align_frames", 24, 0.334),
        ("align_frames", 1, 0.106),
        ("estimate_motion", 24, 0.389),
        ("estimate_motion", 1, 0.111),
        ("resample_corrected", 24, 0.542),
        ("resample_corrected", 1, 0.256),
        ("resample_m2m", 1, 0.256),
        ("draw_suvr", 24, 0.493),
        ("draw_suvr", 1, 0.194),
        ("clean_fa", 1, 0.123),
        ("align_template", 1, 0.742),
        ("normalize_t1w", 1, 0.88),
        ("compose_xfms", 1, 0.163),
    ],
)
def test_steps_declare_within_a_third_what_they_took(tmp_path, name, n_frames, measured_gb):
    """The kernel's peak, by the benchmark; of a volume there are no frames to bring."""
    workflow, scan_wf = Workflow(name="sub_1_wf"), Workflow(name="a_pet_wf")
    scan_wf.add_nodes([Node(IdentityInterface(fields=["a"]), name=name, mem_gb=2)])
    workflow.add_nodes([scan_wf])
    t1w = image(tmp_path, "T1w.nii", (128, 128, 128))
    scan = image(tmp_path, "scan.nii", (128, 128, 63, n_frames))
    declare_memory(workflow, [t1w], {"a_pet_wf": scan})
    assert measured_gb <= declared(workflow)[name] <= 1.3 * measured_gb


@pytest.mark.parametrize(
    ("method", "spacing_mm", "measured_gb"),
    [
        ("rigid", 1.5, 0.102),
        ("syn-mi", 3.0, 0.57),
        ("syn-mi", 1.5, 1.27),
        ("niftyreg-lncc", 3.0, 0.25),
        ("niftyreg-lncc", 1.5, 0.48),
        ("fireants-mi", 3.0, 1.1),
        ("fireants-mi", 1.5, 2.06),
        ("fireants-lncc", 1.5, 1.69),
        ("m2m:default", 1.5, 1.33),
    ],
)
def test_methods_declare_by_the_cube_that_they_see(method, spacing_mm, measured_gb):
    """Within a third of what the step and the processes that it starts hold at their peak."""
    workflow = Workflow(name="pair_wf")
    interface = RegisterByMethod(method=method, spacing_mm=spacing_mm)
    workflow.add_nodes([Node(interface, name="register_a", mem_gb=4)])
    declare_memory(workflow, [], {})
    assert measured_gb <= declared(workflow)["register_a"] <= 1.3 * measured_gb


def test_unknown_weights_keep_what_their_step_declares():
    workflow = Workflow(name="pair_wf")
    workflow.add_nodes([Node(RegisterByMethod(method="m2m:mine"), name="register_a", mem_gb=4)])
    declare_memory(workflow, [], {})
    assert declared(workflow)["register_a"] == 4


@pytest.mark.parametrize(
    ("interface", "measured_gb"),
    [(MeasureRegistration(), 0.347), (MoveImages(), 0.216), (PrepareLabels(), 0.217)],
)
def test_steps_of_other_levels_declare_by_their_interface(tmp_path, interface, measured_gb):
    """Whatever method their names say."""
    workflow = Workflow(name="pair_wf")
    workflow.add_nodes([Node(interface, name="step_syn_mi", mem_gb=4)])
    declare_memory(workflow, [image(tmp_path, "T1w.nii", (120, 120, 120))], {})
    assert measured_gb <= declared(workflow)["step_syn_mi"] <= 1.3 * measured_gb


def test_the_largest_t1w_counts(tmp_path):
    workflow = subject()
    sizes = {"a.nii": (100, 100, 100), "b.nii": (100, 100, 300)}
    files = [image(tmp_path, name, shape) for name, shape in sizes.items()]
    declare_memory(workflow, files, {})
    brain = MEASURED["extract_brain"]
    assert declared(workflow)["extract_brain"] == pytest.approx(
        MARGIN * (brain.fixed + 3 * brain.of_t1w)
    )
    assert declared(workflow)["fit_tensor"] == MARGIN * MEASURED["fit_tensor"].fixed


def test_synthstrip_takes_what_its_grid_does(tmp_path):
    """Which is of 1 mm, whatever the voxels are."""
    workflow = Workflow(name="sub_1_wf")
    (tmp_path / "model.pt").touch()
    interface = ExtractBrain(synthstrip_model=str(tmp_path / "model.pt"))
    workflow.add_nodes([Node(interface, name="extract_brain", mem_gb=8)])
    declare_memory(workflow, [image(tmp_path, "T1w.nii", (60, 120, 60), 2.0)], {})
    millions = 192 * 256 * 192 / 1e6
    assert declared(workflow)["extract_brain"] == pytest.approx(
        MARGIN * (SYNTHSTRIP.fixed + SYNTHSTRIP.of_t1w * millions)
    )


def test_an_image_that_cannot_be_read_is_left_to_its_step(tmp_path):
    (tmp_path / "T1w.nii.gz").touch()
    workflow = subject()
    files = [tmp_path / "T1w.nii.gz", tmp_path / "missing.nii"]
    declare_memory(workflow, files, {"a_pet_wf": files[1]})
    # As for images of 1 mm.
    assert 0.8 < declared(workflow)["extract_brain"] < 1


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (70, struct.pack("<h", 999)),  # a type that does not exist
        (40, struct.pack("<h", 9)),  # number of axes
        (42, struct.pack("<h", -5)),  # negative size
        (108, struct.pack("<f", np.nan)),  # place of the data
        (252, struct.pack("<hhf", 1, 0, 5.0)),  # a quaternion that is none
    ],
)
def test_damaged_images_do_not_keep_others_from_running(tmp_path, offset, value):
    """Their own steps say what is wrong with them."""
    file = image(tmp_path, "pet.nii", (10, 10, 10))
    content = bytearray(file.read_bytes())
    content[offset : offset + len(value)] = value
    file.write_bytes(content)
    workflow = subject()
    declare_memory(workflow, [file], {"a_pet_wf": file})
    assert all(0 < memory < 4.1 for memory in declared(workflow).values())
