"""Interfaces that keep what is known of a registration, and what is shown of it."""

from pathlib import Path

from nipype.interfaces.base import (
    BaseInterfaceInputSpec,
    File,
    SimpleInterface,
    TraitedSpec,
    traits,
)


class _MoveImagesInputSpec(BaseInterfaceInputSpec):
    xfm = File(exists=True, desc="ITK transform, T1w points to moving points; nothing without it")
    reference_file = File(exists=True, mandatory=True, desc="T1w image")
    moving_file = File(exists=True, mandatory=True, desc="static PET or FA image")
    moving_labels = File(exists=True, desc="labels in its world")


class _MoveImagesOutputSpec(TraitedSpec):
    moved_file = File(desc="moving image on the grid of the T1w")
    moved_labels = File(desc="its labels on the grid of the T1w")


class MoveImages(SimpleInterface):
    """Bring a moving image and its labels to the T1w; a registration that failed moves nothing."""

    input_spec = _MoveImagesInputSpec
    output_spec = _MoveImagesOutputSpec

    def _run_interface(self, runtime):
        from m2m_bids.spatial.images import load_image, save_image
        from m2m_bids.spatial.itk import read_chain
        from m2m_bids.spatial.resampling import resample

        inputs = self.inputs
        if not inputs.xfm:
            return runtime
        chain, reference = read_chain(inputs.xfm), load_image(inputs.reference_file)
        files = {"moved_file": inputs.moving_file, "moved_labels": inputs.moving_labels}
        for name, file in files.items():
            if file:
                order = 1 if name == "moved_file" else 0
                moved = resample(load_image(file), chain, reference, order=order)
                out_file = save_image(moved, Path(runtime.cwd) / f"{name}.nii.gz")
                self._results[name] = str(out_file)
        return runtime


class _SaveRecordInputSpec(BaseInterfaceInputSpec):
    record = traits.Dict(mandatory=True, desc="fields that are known before")
    made_with = traits.Dict(mandatory=True, desc="what the record depends on")
    registration = traits.Dict(mandatory=True, desc="fields that the registration gives")
    measures = traits.Dict(mandatory=True, desc="fields that the measurement gives")
    moved_file = File(exists=True, desc="moved image, to be shown")
    moved_labels = File(exists=True, desc="moved labels, to be shown")
    out_dir = traits.Str(mandatory=True, desc="folder to write")


class _SaveRecordOutputSpec(TraitedSpec):
    out_file = File(exists=True, desc="the record, JSON")


class SaveRecord(SimpleInterface):
    """Write the record of a pair and method, and the images to be shown, as one folder."""

    input_spec = _SaveRecordInputSpec
    output_spec = _SaveRecordOutputSpec
    _always_run = True  # its folder is outside of the node's own

    def _run_interface(self, runtime):
        from m2m_bids.evaluation.record_files import save_record

        inputs = self.inputs
        images = {"moved.nii.gz": inputs.moved_file, "moved_labels.nii.gz": inputs.moved_labels}
        out_file = save_record(
            Path(inputs.out_dir),
            {**inputs.record, **inputs.registration, **inputs.measures},
            inputs.made_with,
            {name: Path(file) for name, file in images.items() if file},
        )
        self._results["out_file"] = str(out_file)
        return runtime
