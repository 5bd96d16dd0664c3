"""The workflow of a T1w, run on the template as if it were one, with what FreeSurfer made."""

import nibabel as nb
import numpy as np
import pytest
from nibabel.affines import from_matvec
from scipy.spatial.transform import Rotation

from m2m_bids.bids.precomputed import FreeSurferFiles, Precomputed
from m2m_bids.spatial.itk import read_affine, write_affine
from m2m_bids.spatial.resampling import resample
from m2m_bids.spatial.templates import embedded_template
from m2m_bids.workflows.anatomical import init_anatomical_wf


def grid(axes, shape):
    centre = np.array([0.0, -18, 8])
    affine = from_matvec(axes, centre - axes @ ((np.array(shape) - 1) / 2))
    return nb.Nifti1Image(np.zeros(shape, np.uint8), affine)


def on(reference, name, order=1):
    return np.asarray(resample(embedded_template(name), (), reference, order=order).dataobj)


@pytest.fixture
def t1w(tmp_path):
    axes = Rotation.from_euler("xyz", [8, -5, 12], degrees=True).as_matrix() * (3.0, 3.5, 4.0)
    reference = grid(axes, (56, 60, 46))
    image = nb.Nifti1Image(on(reference, "t1"), reference.affine)
    image.to_filename(tmp_path / "T1w.nii.gz")
    return tmp_path / "T1w.nii.gz"


@pytest.fixture
def mri(tmp_path, t1w):
    conformed = grid(np.array([[-3.0, 0, 0], [0, 0, 3.0], [0, -3.0, 0]]), (64, 64, 76))
    grey, white, brain = (on(conformed, name) for name in ("gm", "wm", "mask"))
    labels = np.where(white > np.maximum(grey, 0.5), 41, np.where(grey > 0.5, 1035, 0))
    labels[(brain > 0.5) & (labels == 0)] = 24
    original = resample(nb.load(t1w), (), conformed, order=1).get_fdata()
    images = {"aparc+aseg": labels, "orig": original / original.max() * 255}
    for name, data in images.items():
        file = tmp_path / f"{name}.mgz"
        nb.MGHImage(data.astype(np.int32), conformed.affine).to_filename(file)
    return FreeSurferFiles(tmp_path / "aparc+aseg.mgz", tmp_path / "orig.mgz", None)


def test_freesurfer_gives_mask_and_tissues(t1w, mri, tmp_path):
    xfm = write_affine(np.eye(4), tmp_path / "xfm.txt")
    given = Precomputed(t1w=t1w, xfm=xfm, freesurfer=mri)
    workflow = init_anatomical_wf(random_seed=0, omp_nthreads=1, precomputed=given)
    workflow.base_dir = str(tmp_path / "work")
    workflow.config["execution"]["crashdump_dir"] = str(tmp_path)
    workflow.inputs.inputnode.t1w_file = str(t1w)
    graph = workflow.run(plugin="Linear")
    found = {node.name: node.result.outputs for node in graph.nodes()}
    mask, dseg = (
        nb.load(file)
        for file in (found["take_freesurfer"].mask_file, found["take_tissues"].out_file)
    )
    reference = nb.load(t1w)
    brain, white = (on(reference, name) for name in ("mask", "wm"))
    mask_data, labels = (np.asarray(image.dataobj) for image in (mask, dseg))
    np.testing.assert_allclose(dseg.affine, mask.affine)
    overlap = 2 * np.sum(mask_data * (brain > 0.5)) / (mask_data.sum() + np.sum(brain > 0.5))
    # Voxels of 3 to 4 mm, a fifth of which lie at the surface.
    assert overlap > 0.93
    assert np.array_equal(labels > 0, mask_data > 0)
    assert (labels[white > 0.9] == 2).mean() > 0.95
    np.testing.assert_allclose(
        read_affine(found["align_template"].template2anat), np.eye(4), atol=1e-6
    )
