"""FA fitted by a workflow as a run has it, on a phantom of two tracts."""

import json

import nibabel as nb
import numpy as np
import pytest

from m2m_bids.bids.diffusion import GradientFiles
from m2m_bids.bids.query import Scan
from m2m_bids.spatial.itk import write_affine
from m2m_bids.workflows.diffusion import (
    init_diffusivities_wf,
    init_fa_fit_wf,
    init_fa_reference_wf,
)
from m2m_bids.workflows.registration import RegistrationOptions

AFFINE = np.diag([3.0, 2.5, 3.5, 1.0])
DIRECTIONS = np.array([[1, 0, 1], [-1, 0, 1], [0, 1, 1], [0, 1, -1], [1, 1, 0], [-1, 1, 0]])
DIRECTIONS = DIRECTIONS / np.sqrt(2)
# Tracts along x and z, in mm^2/s: FA 0.80 and 0.54.
TENSORS = 1e-3 * np.stack([np.diag([1.7, 0.3, 0.3]), np.diag([0.5, 0.5, 1.3])])
FA, MD = (0.7990, 0.5406), (0.7667e-3, 0.7667e-3)


@pytest.fixture
def dwi(tmp_path):
    shape = (18, 18, 16)
    grid = np.moveaxis(np.indices(shape), 0, -1)
    is_brain = np.linalg.norm((grid - 8) / (7, 7, 6), axis=-1) < 1
    which = (grid[..., 0] > 8).astype(int)
    b_values = np.array([0.0, *[1000] * 6])
    directions = np.vstack([np.zeros(3), DIRECTIONS])
    volumes = [
        is_brain * 1000 * np.exp(-b * np.einsum("i,nij,j->n", g, TENSORS, g))[which]
        for b, g in zip(b_values, directions, strict=True)
    ]
    noise = np.random.default_rng(0).normal(0, 3, (*shape, 7))
    data = np.abs(np.stack(volumes, axis=-1) + noise).astype(np.float32)
    nb.Nifti1Image(data, AFFINE).to_filename(tmp_path / "dwi.nii.gz")
    np.savetxt(tmp_path / "dwi.bval", b_values[None])
    # The affine's determinant is positive: the first component is reversed.
    np.savetxt(tmp_path / "dwi.bvec", (directions * [-1, 1, 1]).T)
    inside = is_brain & (np.linalg.norm((grid - 8) / (5, 5, 4), axis=-1) < 1)
    tracts = [inside & (grid[..., 0] < 7), inside & (grid[..., 0] > 10)]
    return tmp_path / "dwi.nii.gz", tracts


@pytest.mark.parametrize("is_raw", [True, False], ids=["raw", "preprocessed"])
def test_run(dwi, tmp_path, is_raw):
    file, tracts = dwi
    gradients = GradientFiles(tmp_path / "dwi.bval", tmp_path / "dwi.bvec")
    workflow = init_fa_fit_wf(gradients=gradients, is_raw=is_raw, random_seed=1)
    workflow.base_dir = str(tmp_path / "work")
    workflow.inputs.inputnode.in_file = str(file)
    workflow.config["execution"]["crashdump_dir"] = str(tmp_path)
    plugin_args = {"n_procs": 1, "mp_context": "forkserver"}
    graph = workflow.run(plugin="MultiProc", plugin_args=plugin_args)
    results = {node.name: node.result.outputs for node in graph.nodes()}
    fa = nb.load(results["clean_fa"].out_file).get_fdata()
    md = nb.load(results["fit_tensor"].md_file).get_fdata()
    for tract, true_fa, true_md in zip(tracts, FA, MD, strict=True):
        assert abs(np.median(fa[tract]) - true_fa) < 0.02
        np.testing.assert_allclose(np.median(md[tract]), true_md, rtol=0.02)
    method = results["clean_fa"].method
    assert method.endswith("above 1 the median of their neighbours")
    assert "6 volumes with b <= 1000 and 1 without" in method
    assert ("without correction of eddy currents and susceptibility" in method) is is_raw


def test_mask_that_came_with_the_image_is_used(dwi, tmp_path):
    """The tensor is fitted in all of it; the one that is found misses some of this brain's rim."""
    file, _ = dwi
    image = nb.load(file)
    brain = image.get_fdata()[..., 0] > 500
    mask_file = tmp_path / "mask.nii.gz"
    nb.Nifti1Image(brain.astype(np.uint8), AFFINE).to_filename(mask_file)
    found = {}
    for name, mask in (("given", mask_file), ("own", None)):
        workflow = init_fa_fit_wf(
            gradients=GradientFiles(tmp_path / "dwi.bval", tmp_path / "dwi.bvec"),
            mask=mask,
            is_raw=False,
            random_seed=1,
        )
        workflow.base_dir = str(tmp_path / name)
        workflow.inputs.inputnode.in_file = str(file)
        results = {node.name: node.result.outputs for node in workflow.run().nodes()}
        found[name] = nb.load(results["fit_tensor"].md_file).get_fdata() > 0
        is_told = "in the brain mask that came with" in results["clean_fa"].method
        assert is_told is (mask is not None)
        assert ("median_otsu" in workflow.__desc__) is (mask is None)
    np.testing.assert_array_equal(found["given"], brain)
    assert (found["own"] & brain).sum() < brain.sum()


def test_methods_text_tells_what_was_not_corrected(tmp_path):
    files = GradientFiles(tmp_path / "bval", tmp_path / "bvec")
    for file in files:
        file.touch()
    texts = {
        is_raw: init_fa_fit_wf(gradients=files, is_raw=is_raw, random_seed=0).__desc__
        for is_raw in (True, False)
    }
    assert "distortion were not corrected" in " ".join(texts[True].split())
    assert "aligned" not in texts[False]
    for text in texts.values():
        assert "DIPY" in text
        assert "were cleaned" in text
    assert "DIPY" not in init_fa_reference_wf().__desc__


RIGID = RegistrationOptions(
    transform="rigid",
    weights=None,
    weights_sha256="",
    n_refine=0,
    device="cpu",
    use_gpu=False,
    random_seed=4,
    omp_nthreads=1,
)


@pytest.mark.parametrize("is_fitted", [True, False], ids=["fitted", "given"])
def test_diffusivities_take_the_transform_of_fa(tmp_path, is_fitted):
    """A linear ramp in the world, so that the shifted map is known."""
    dwi_dir = tmp_path / "bids/sub-1/dwi"
    dwi_dir.mkdir(parents=True)
    ends = ("dwi.nii.gz", "dwi.bval", "dwi.bvec", "FA.nii.gz", "T1w.nii.gz")
    dwi_file, bval, bvec, fa_file, t1w_file = (dwi_dir / f"sub-1_{end}" for end in ends)
    scan = Scan(
        modality="fa",
        file=dwi_file if is_fitted else fa_file,
        entities={"sub": "1"},
        t1w=t1w_file,
        t1w_entities={"sub": "1"},
        gradients=GradientFiles(bval, bvec) if is_fitted else None,
    )
    x = AFFINE[0, 0] * np.indices((16, 12, 10))[0]
    maps = {}
    for place, parameter in enumerate(("MD", "AD", "RD"), start=1):
        maps[parameter] = dwi_dir / f"sub-1_{parameter}.nii.gz"
        nb.Nifti1Image((place * 1e-4 * x).astype(np.float32), AFFINE).to_filename(maps[parameter])
    nb.Nifti1Image(np.ones((16, 12, 10), np.float32), AFFINE).to_filename(t1w_file)
    out = tmp_path / "out"
    workflow = init_diffusivities_wf(
        scan=scan, output_dir=out, datasets={"raw": tmp_path / "bids"}, options=RIGID
    )
    workflow.base_dir = str(tmp_path / "work")
    shift = np.eye(4)
    shift[0, 3] = 6.0
    inputs = workflow.inputs.inputnode
    inputs.reference_file = str(t1w_file)
    inputs.xfm = str(write_affine(shift, tmp_path / "shift.txt"))
    if is_fitted:
        inputs.md_file, inputs.ad_file, inputs.rd_file = map(str, maps.values())
    workflow.run(plugin="Linear")
    for place, parameter in enumerate(maps, start=1):
        file = out / f"sub-1/dwi/sub-1_space-T1w_param-{parameter}_desc-preproc_dwimap.nii.gz"
        # Away from the end that the shift leaves the map at, where a cubic spline bends.
        found = nb.load(file).get_fdata()[2:10]
        np.testing.assert_allclose(found, place * 1e-4 * (x[2:10] + 6), rtol=1e-3)
        sidecar = json.loads(file.with_name(file.name.replace(".nii.gz", ".json")).read_text())
        assert sidecar.get("Units") == ("mm^2/s" if is_fitted else None)
        first = dwi_file.name if is_fitted else maps[parameter].name
        assert sidecar["Sources"][0] == f"bids:raw:sub-1/dwi/{first}"
        assert sidecar["Transform"] == "rigid"
