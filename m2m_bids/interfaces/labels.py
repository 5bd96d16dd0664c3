"""Interface over `m2m_bids.evaluation.label_images`: labels to evaluate with."""

from pathlib import Path

from nipype.interfaces.base import (
    BaseInterfaceInputSpec,
    File,
    SimpleInterface,
    TraitedSpec,
    isdefined,
    traits,
)


class _PrepareLabelsInputSpec(BaseInterfaceInputSpec):
    label_file = File(exists=True, mandatory=True, desc="label image, NIfTI or .mgz")
    scheme = traits.Enum(
        "freesurfer", "tissues", "simulated", mandatory=True, desc="what its numbers mean"
    )
    original_file = File(
        exists=True,
        requires=["t1w_file"],
        desc="the T1w on the grid of the labels, to check them by",
    )
    t1w_file = File(
        exists=True, requires=["mask_file"], desc="T1w image in the world of the labels"
    )
    mask_file = File(exists=True, desc="brain mask on the grid of the T1w")
    rigid_xfm = File(
        exists=True, desc="ITK affine, T1w points to points of the scan that gets the labels"
    )


class _PrepareLabelsOutputSpec(TraitedSpec):
    out_file = File(desc="classes to evaluate, uint8")


class PrepareLabels(SimpleInterface):
    """
    Bring labels to the classes that are evaluated, and to an image's world.

    Without ``t1w_file`` they keep their grid; with it they are on the grid of the T1w, and with
    ``rigid_xfm`` in the world of the scan.
    """

    input_spec = _PrepareLabelsInputSpec
    output_spec = _PrepareLabelsOutputSpec

    def _run_interface(self, runtime):
        from m2m_bids.evaluation.label_images import labels_in_scan, read_labels
        from m2m_bids.preprocessing.freesurfer import check_labels
        from m2m_bids.spatial.images import load_image, save_image
        from m2m_bids.spatial.itk import read_affine
        from m2m_bids.spatial.labels import labels_on_t1w

        inputs = self.inputs
        labels = read_labels(Path(inputs.label_file), inputs.scheme)
        if inputs.t1w_file:
            t1w, mask = (load_image(file) for file in (inputs.t1w_file, inputs.mask_file))
            if isdefined(inputs.original_file):
                t1w.set_filename(inputs.t1w_file)  # messages name it
                check_labels(inputs.label_file, inputs.original_file, t1w)
            labels = labels_on_t1w(labels, t1w, mask, inputs.label_file)
        if inputs.rigid_xfm:
            labels = labels_in_scan(labels, read_affine(inputs.rigid_xfm))
        out_file = save_image(labels, Path(runtime.cwd) / "labels.nii.gz")
        self._results["out_file"] = str(out_file)
        return runtime
