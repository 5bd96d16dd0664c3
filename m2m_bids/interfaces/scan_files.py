"""Interface over `m2m_bids.evaluation.scan_files`: what is evaluated of a scan."""

from pathlib import Path

from nipype.interfaces.base import (
    BaseInterfaceInputSpec,
    Directory,
    File,
    SimpleInterface,
    TraitedSpec,
    traits,
)

from m2m_bids.evaluation.scan_files import SCAN_NAME

__all__ = ["SCAN_NAME", "SaveScanFiles"]

FILES = ("moving_file", "t1w_file", "mask_file", "dseg_file", "rigid_xfm", "template2anat")


class _SaveScanFilesInputSpec(BaseInterfaceInputSpec):
    moving_file = File(exists=True, mandatory=True, desc="static PET or FA image, native grid")
    t1w_file = File(exists=True, mandatory=True, desc="T1w image")
    mask_file = File(exists=True, mandatory=True, desc="brain mask on the grid of the T1w")
    dseg_file = File(exists=True, mandatory=True, desc="tissues on the grid of the T1w")
    rigid_xfm = File(exists=True, mandatory=True, desc="ITK affine: T1w points to moving points")
    template2anat = File(exists=True, mandatory=True, desc="ITK affine: MNI points to T1w points")
    description = traits.Dict(mandatory=True, desc="what the files were made of")
    out_dir = traits.Str(mandatory=True, desc="folder to write")


class _SaveScanFilesOutputSpec(TraitedSpec):
    out_dir = Directory(exists=True, desc="folder of the scan's files")


class SaveScanFiles(SimpleInterface):
    """Copy the files of a rigidly aligned scan into a folder of its own."""

    input_spec = _SaveScanFilesInputSpec
    output_spec = _SaveScanFilesOutputSpec
    _always_run = True  # its folder is outside of the node's own

    def _run_interface(self, runtime):
        from m2m_bids.evaluation.scan_files import ScanFiles, save_scan_files

        inputs = self.inputs
        files = ScanFiles(**{name: Path(getattr(inputs, name)) for name in FILES})
        folder = save_scan_files(Path(inputs.out_dir), dict(inputs.description), files)
        self._results["out_dir"] = str(folder)
        return runtime
