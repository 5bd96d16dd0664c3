"""Interfaces for outputs in other spaces than the T1w's own grid."""

from pathlib import Path

from nipype.interfaces.base import (
    BaseInterfaceInputSpec,
    File,
    InputMultiObject,
    SimpleInterface,
    TraitedSpec,
    isdefined,
    traits,
)

from m2m_bids.interfaces.scratch import temporary_files_in


class _TemplateInputSpec(BaseInterfaceInputSpec):
    template = traits.Str(desc="name of the template")
    cohort = traits.Str(desc="cohort of the template")
    templateflow_home = traits.Str(nohash=True, desc="folder of the TemplateFlow archive")


def _load_template(inputs: _TemplateInputSpec, resolution: int = 1):
    """Load the template that the inputs name."""
    from m2m_bids.spatial.templates import load_template

    return load_template(
        inputs.template,
        Path(inputs.templateflow_home),
        cohort=inputs.cohort if isdefined(inputs.cohort) else None,
        resolution=resolution,
    )


class _TakeTemplateOutputSpec(TraitedSpec):
    t1w_file = File(desc="T1w image of the template, without skull")
    mask_file = File(desc="its brain mask")
    dseg_file = File(desc="its tissues: 1 GM, 2 WM, 3 CSF")
    template2anat = File(desc="ITK affine: its points to themselves")


class TakeTemplate(SimpleInterface):
    """Write the embedded template as a T1w image that is prepared for registration."""

    input_spec = BaseInterfaceInputSpec
    output_spec = _TakeTemplateOutputSpec

    def _run_interface(self, runtime):
        import numpy as np

        from m2m_bids.spatial.images import save_image
        from m2m_bids.spatial.itk import write_affine
        from m2m_bids.spatial.templates import embedded_template, embedded_tissues

        folder = Path(runtime.cwd)
        images = {
            "t1w_file": (embedded_template("t1"), "t1w.nii"),
            "mask_file": (embedded_template("mask"), "mask.nii"),
            "dseg_file": (embedded_tissues(), "dseg.nii"),
        }
        for field, (image, name) in images.items():
            self._results[field] = str(save_image(image, folder / name))
        xfm = write_affine(np.eye(4), folder / "template2anat.txt")
        self._results["template2anat"] = str(xfm)
        return runtime


class _NormalizeT1wInputSpec(_TemplateInputSpec):
    t1w_file = File(exists=True, mandatory=True, desc="T1w image without bias field")
    mask_file = File(exists=True, mandatory=True, desc="brain mask on its grid")
    template2anat = File(exists=True, mandatory=True, desc="ITK affine, MNI to T1w points")
    random_seed = traits.Int(0, usedefault=True, desc="seed of ANTs")


class _NormalizeT1wOutputSpec(TraitedSpec):
    xfm = File(desc="ITK composite that carries images to the template: its points to the T1w's")
    inverse_xfm = File(desc="its inverse")


class NormalizeT1w(SimpleInterface):
    """Register a T1w image to a template."""

    input_spec = _NormalizeT1wInputSpec
    output_spec = _NormalizeT1wOutputSpec

    def _run_interface(self, runtime):
        from m2m_bids.preprocessing.normalization import normalize_t1w
        from m2m_bids.spatial.images import load_image
        from m2m_bids.spatial.itk import read_affine, write_composite

        with temporary_files_in(runtime.cwd):
            result = normalize_t1w(
                load_image(self.inputs.t1w_file),
                load_image(self.inputs.mask_file),
                _load_template(self.inputs),
                template2anat=read_affine(self.inputs.template2anat),
                random_seed=self.inputs.random_seed,
            )
        folder = Path(runtime.cwd)
        xfm = write_composite(result.template2anat, folder / "xfm.h5")
        inverse = write_composite(result.anat2template, folder / "inverse_xfm.h5")
        self._results.update(xfm=str(xfm), inverse_xfm=str(inverse))
        return runtime


class _TakeTransformsInputSpec(_TemplateInputSpec):
    xfm_file = File(mandatory=True, desc="ITK composite, points of the template to the T1w's")
    inverse_xfm_file = File(mandatory=True, desc="its inverse")
    mask_file = File(exists=True, mandatory=True, desc="brain mask of the T1w")


class TakeTransforms(SimpleInterface):
    """Take over the transforms between a T1w and a template, if they carry brain to brain."""

    input_spec = _TakeTransformsInputSpec
    output_spec = _NormalizeT1wOutputSpec

    def _run_interface(self, runtime):
        from m2m_bids.preprocessing.precomputed import check_transform
        from m2m_bids.spatial.images import load_image

        inputs = self.inputs
        masks = load_image(inputs.mask_file), _load_template(inputs).mask
        check_transform(inputs.xfm_file, masks[1], masks[0])
        check_transform(inputs.inverse_xfm_file, masks[0], masks[1])
        self._results.update(xfm=inputs.xfm_file, inverse_xfm=inputs.inverse_xfm_file)
        return runtime


class _MakeGridInputSpec(_TemplateInputSpec):
    t1w_file = File(exists=True, desc="T1w image, for a grid in its own space")
    native_file = File(exists=True, mandatory=True, desc="image that gives native voxels")
    resolution = traits.Str(desc="native, or a number (`bids.spaces.OutputSpace`)")


class _MakeGridOutputSpec(TraitedSpec):
    out_file = File(desc="image on the grid")


class MakeGrid(SimpleInterface):
    """Make the grid of an output, in the space of a T1w or of a template."""

    input_spec = _MakeGridInputSpec
    output_spec = _MakeGridOutputSpec

    def _run_interface(self, runtime):
        from m2m_bids.spatial.conform import grid_with_spacing, spacing_in_ras
        from m2m_bids.spatial.images import load_image, save_image

        inputs = self.inputs
        is_native = inputs.resolution == "native"
        number = int(inputs.resolution) if isdefined(inputs.resolution) and not is_native else 1
        spacing = [number] * 3
        if isdefined(inputs.template):
            grid = _load_template(inputs, number).t1w
        else:
            grid = load_image(inputs.t1w_file)
        if is_native:
            spacing = spacing_in_ras(load_image(inputs.native_file))
        if is_native or not isdefined(inputs.template):
            grid = grid_with_spacing(grid, spacing)
        self._results["out_file"] = str(save_image(grid, Path(runtime.cwd) / "grid.nii.gz"))
        return runtime


class _ComposeTransformsInputSpec(BaseInterfaceInputSpec):
    xfm = InputMultiObject(
        File(exists=True), mandatory=True, desc="ITK transforms, outermost first"
    )


class _ComposeTransformsOutputSpec(TraitedSpec):
    out_file = File(desc="ITK composite of all")


class ComposeTransforms(SimpleInterface):
    """Put transforms into one file."""

    input_spec = _ComposeTransformsInputSpec
    output_spec = _ComposeTransformsOutputSpec

    def _run_interface(self, runtime):
        from m2m_bids.spatial.itk import read_chain, write_composite

        file = write_composite(read_chain(*self.inputs.xfm), Path(runtime.cwd) / "composite.h5")
        self._results["out_file"] = str(file)
        return runtime
