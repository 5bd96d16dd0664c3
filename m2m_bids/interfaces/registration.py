"""Interfaces over `m2m_bids.api` and `m2m_bids.spatial`: register and resample."""

from dataclasses import asdict
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


class _RegisterImagesInputSpec(BaseInterfaceInputSpec):
    moving_file = File(exists=True, mandatory=True, desc="static PET or FA image")
    fixed_file = File(exists=True, mandatory=True, desc="T1w image")
    mask_file = File(exists=True, mandatory=True, desc="brain mask on the grid of the T1w")
    dseg_file = File(exists=True, desc="tissues of the T1w: 1 GM, 2 WM, 3 CSF")
    rigid_xfm = File(exists=True, mandatory=True, desc="ITK affine: T1w points to moving points")
    rigid_inverse_xfm = File(exists=True, mandatory=True, desc="its inverse")
    template2anat = File(exists=True, mandatory=True, desc="ITK affine: MNI points to T1w points")
    modality = traits.Enum("pet", "fa", mandatory=True, desc="kind of the moving image")
    weights = traits.Directory(exists=True, mandatory=True, desc="weights folder")
    weights_sha256 = traits.Str(desc="hash on its card, so that other weights run anew")
    n_refine = traits.Int(60, usedefault=True, desc="steps of instance optimisation")
    device = traits.Str("auto", usedefault=True, nohash=True, desc="auto, cpu, cuda or cuda:N")
    use_gpu = traits.Bool(False, usedefault=True, nohash=True, desc="whether it takes a GPU slot")
    n_threads = traits.Int(0, usedefault=True, nohash=True, desc="threads of PyTorch")


class _RegisterImagesOutputSpec(TraitedSpec):
    best_xfm = File(desc="ITK transform to use: the composite, or the rigid one if it is rejected")
    best_inverse_xfm = File(desc="its inverse")
    m2m_xfms = traits.List(
        File(), desc="composite from moving to T1w and its inverse; empty if it is rejected"
    )
    displacement_file = File(desc="deformable map, rejected or not: displacement, T1w world, mm")
    jacobian_file = File(desc="Jacobian determinant of the deformable map, T1w world")
    cycle_error_file = File(desc="distance of T1w points after the map and the way back, mm")
    quality = traits.Dict(desc="numbers by which the step was judged")
    objections = traits.List(traits.Str(), desc="why it is rejected; empty if it is not")
    device_used = traits.Str(desc="device that the network ran on")
    sha256 = traits.Str(desc="hash of the weights that were loaded")


class RegisterImages(SimpleInterface):
    """Estimate the deformable step of a registration and judge it."""

    input_spec = _RegisterImagesInputSpec
    output_spec = _RegisterImagesOutputSpec

    def _run_interface(self, runtime):
        import nibabel as nb
        import numpy as np

        from m2m_bids.api import DeformableOptions, estimate_deformation
        from m2m_bids.spatial.images import load_image, save_image
        from m2m_bids.spatial.itk import read_affine, write_composite

        inputs = self.inputs
        rigid = read_affine(inputs.rigid_xfm)
        result = estimate_deformation(
            load_image(inputs.moving_file),
            load_image(inputs.fixed_file),
            load_image(inputs.mask_file),
            fixed2moving=rigid,
            template2fixed=read_affine(inputs.template2anat),
            options=DeformableOptions(
                modality=inputs.modality,
                weights=Path(inputs.weights),
                n_refine=inputs.n_refine,
                device=inputs.device,
                n_threads=inputs.n_threads,
            ),
            fixed_dseg=load_image(inputs.dseg_file) if inputs.dseg_file else None,
        )
        folder = Path(runtime.cwd)
        objections = result.quality.objections()
        best, m2m_xfms = (inputs.rigid_xfm, inputs.rigid_inverse_xfm), []
        if not objections:
            forward = write_composite((rigid, result.field), folder / "m2m.h5")
            inverse = write_composite(
                (result.inverse_field, np.linalg.inv(rigid)), folder / "m2m_inverse.h5"
            )
            best = m2m_xfms = [str(forward), str(inverse)]
        self._results.update(
            best_xfm=best[0],
            best_inverse_xfm=best[1],
            m2m_xfms=m2m_xfms,
            **{
                name: str(save_image(image, folder / f"{name}.nii"))
                for name, image in (
                    ("displacement_file", nb.Nifti1Image(result.field.data, result.field.affine)),
                    ("jacobian_file", result.jacobian),
                    ("cycle_error_file", result.cycle_error),
                )
            },
            quality=asdict(result.quality),
            objections=objections,
            device_used=result.device,
            sha256=result.weights_sha256,
        )
        return runtime


class _ResampleImageInputSpec(BaseInterfaceInputSpec):
    in_file = File(exists=True, mandatory=True, desc="image to resample, from its native grid")
    reference_file = File(exists=True, mandatory=True, desc="image on whose grid the output is")
    xfm = InputMultiObject(
        File(exists=True),
        mandatory=True,
        desc="ITK transforms, outermost first: reference points to image points",
    )
    order = traits.Int(3, usedefault=True, desc="spline order: 3 for images, 0 for labels")


class _ResampleImageOutputSpec(TraitedSpec):
    out_file = File(desc="image on the reference grid")


class ResampleImage(SimpleInterface):
    """Bring an image through its transforms with one interpolation."""

    input_spec = _ResampleImageInputSpec
    output_spec = _ResampleImageOutputSpec

    def _run_interface(self, runtime):
        from m2m_bids.spatial.images import load_image, save_image
        from m2m_bids.spatial.itk import read_chain
        from m2m_bids.spatial.resampling import resample

        image = resample(
            load_image(self.inputs.in_file),
            read_chain(*self.inputs.xfm),
            load_image(self.inputs.reference_file),
            order=self.inputs.order,
        )
        out_file = Path(runtime.cwd) / "resampled.nii.gz"
        self._results["out_file"] = str(save_image(image, out_file))
        return runtime


class _ResampleFramesInputSpec(BaseInterfaceInputSpec):
    in_file = File(mandatory=True, desc="PET scan as it came, 3-D or 4-D")
    frame_xfms = traits.List(
        File(exists=True), desc="ITK affine per frame, reference to frame points; empty for none"
    )
    static_file = File(
        exists=True, mandatory=True, desc="static image of the scan on the reference grid"
    )
    reference_file = File(exists=True, mandatory=True, desc="image on whose grid the output is")
    xfm = InputMultiObject(
        File(exists=True),
        desc="ITK transforms, outermost first: reference to static image points; none on its grid",
    )


class _ResampleFramesOutputSpec(TraitedSpec):
    out_file = File(desc="all frames on the reference grid; of a 3-D scan the static image")
    static_file = File(desc="static image of a 4-D scan; none for a 3-D one")


class ResampleFrames(SimpleInterface):
    """Bring every frame of a dynamic scan through its motion and its registration, at once."""

    input_spec = _ResampleFramesInputSpec
    output_spec = _ResampleFramesOutputSpec

    def _run_interface(self, runtime):
        from m2m_bids.preprocessing.pet import as_frames, is_dynamic
        from m2m_bids.spatial.images import load_image
        from m2m_bids.spatial.itk import read_chain
        from m2m_bids.spatial.resampling import resample_frames

        inputs = self.inputs
        image = as_frames(load_image(inputs.in_file))
        if not is_dynamic(image):
            self._results["out_file"] = inputs.static_file
            return runtime
        chain = read_chain(*inputs.xfm) if isdefined(inputs.xfm) else ()
        # Outermost first: points go from the reference grid to the static image, then the frame.
        chains = [(*read_chain(file), *chain) for file in inputs.frame_xfms or []]
        out_file = resample_frames(
            image,
            chains or [chain] * image.shape[3],
            load_image(inputs.reference_file),
            Path(runtime.cwd) / "frames.nii.gz",
        )
        self._results.update(out_file=str(out_file), static_file=inputs.static_file)
        return runtime
