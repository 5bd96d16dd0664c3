"""Interfaces over `m2m_bids.cohort`: images to train on."""

from pathlib import Path

from nipype.interfaces.base import (
    BaseInterfaceInputSpec,
    Directory,
    File,
    SimpleInterface,
    TraitedSpec,
    traits,
)


class _SaveTrainingScanInputSpec(BaseInterfaceInputSpec):
    moving_file = File(exists=True, mandatory=True, desc="static PET or FA image, native grid")
    t1w_file = File(exists=True, mandatory=True, desc="T1w image")
    mask_file = File(exists=True, mandatory=True, desc="brain mask on the grid of the T1w")
    dseg_file = File(exists=True, desc="labels on the grid of the T1w")
    rigid_xfm = File(exists=True, mandatory=True, desc="ITK affine: T1w points to moving points")
    template2anat = File(exists=True, mandatory=True, desc="ITK affine: MNI points to T1w points")
    description = traits.Dict(mandatory=True, desc="name, subject and modality of the scan")
    grid_size = traits.Int(mandatory=True, desc="voxels along every axis of the network's grid")
    spacing_mm = traits.Float(mandatory=True, desc="their size in MNI space, mm")
    out_dir = traits.Str(mandatory=True, desc="folder to write")


class _SaveTrainingScanOutputSpec(TraitedSpec):
    out_dir = Directory(exists=True, desc="folder of the scan's arrays")


class SaveTrainingScan(SimpleInterface):
    """Bring a rigidly aligned scan to a network's grid, and write it for training."""

    input_spec = _SaveTrainingScanInputSpec
    output_spec = _SaveTrainingScanOutputSpec
    _always_run = True  # its folder is outside of the node's own

    def _run_interface(self, runtime):
        from m2m_bids.cohort import save_training_scan
        from m2m_bids.spatial.itk import read_affine

        inputs = self.inputs
        files = {
            "moving": inputs.moving_file,
            "fixed": inputs.t1w_file,
            "mask": inputs.mask_file,
        }
        if inputs.dseg_file:
            files["labels"] = inputs.dseg_file
        folder = save_training_scan(
            Path(inputs.out_dir),
            dict(inputs.description),
            files,
            fixed2moving=read_affine(inputs.rigid_xfm),
            template2fixed=read_affine(inputs.template2anat),
            grid=(inputs.grid_size, inputs.spacing_mm),
        )
        self._results["out_dir"] = str(folder)
        return runtime
