"""Interfaces over `m2m_bids.preprocessing`: one image in, one image out."""

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

# Files of datasets are declared without ``exists``: one that has vanished since the query fails
# its own scan, when it is read. Nipype's check would end the whole run.


class _ImageOutputSpec(TraitedSpec):
    out_file = File(desc="resulting image")


class _ConformT1wInputSpec(BaseInterfaceInputSpec):
    in_file = File(mandatory=True, desc="T1w image as it came")


class _ConformT1wOutputSpec(TraitedSpec):
    out_file = File(desc="3-D T1w image, axes nearly right, anterior, superior")


class ConformT1w(SimpleInterface):
    """Check a T1w image and reorder its axes to RAS+, without interpolation."""

    input_spec = _ConformT1wInputSpec
    output_spec = _ConformT1wOutputSpec

    def _run_interface(self, runtime):
        from m2m_bids.preprocessing.anatomical import load_t1w
        from m2m_bids.spatial.images import save_image

        image = load_t1w(self.inputs.in_file)
        self._results["out_file"] = str(save_image(image, Path(runtime.cwd) / "t1w.nii"))
        return runtime


class _ExtractBrainInputSpec(BaseInterfaceInputSpec):
    in_file = File(exists=True, mandatory=True, desc="T1w image, RAS+")
    source = traits.Enum(
        *("auto", "template", "skip", "synthstrip"),
        usedefault=True,
        desc="tell whether there is a skull, take it that there is one, or that there is none; or "
        "by SynthStrip, which 'auto' takes too if it is given",
    )
    synthstrip_model = File(exists=True, desc="weights of SynthStrip")
    random_seed = traits.Int(0, usedefault=True, desc="seed of ANTs")
    n_threads = traits.Int(0, usedefault=True, nohash=True, desc="threads of SynthStrip")


class _ExtractBrainOutputSpec(TraitedSpec):
    mask_file = File(desc="brain mask on the grid of the T1w")
    template2anat = File(desc="ITK affine: maps points of MNI space to points of the T1w")
    is_skull_stripped = traits.Bool(desc="whether the T1w came without skull")
    method = traits.Str(desc="how the mask was found")


class ExtractBrain(SimpleInterface):
    """Find the brain in a T1w image by the embedded template or by SynthStrip."""

    input_spec = _ExtractBrainInputSpec
    output_spec = _ExtractBrainOutputSpec

    @staticmethod
    def network_voxels(file: Path) -> int:
        """Count the voxels of SynthStrip's grid for an image, which say what memory it takes."""
        import nibabel as nb

        from m2m_bids.preprocessing.synthstrip import network_shape

        return int(network_shape(nb.load(file)).prod())

    def _run_interface(self, runtime):
        from m2m_bids.preprocessing.anatomical import extract_brain
        from m2m_bids.spatial.images import load_image, save_image
        from m2m_bids.spatial.itk import write_affine

        inputs, folder = self.inputs, Path(runtime.cwd)
        image = load_image(inputs.in_file)
        image.set_filename(inputs.in_file)  # messages name it
        with temporary_files_in(runtime.cwd):
            brain = extract_brain(
                image,
                source=inputs.source,
                synthstrip_model=inputs.synthstrip_model or None,
                random_seed=inputs.random_seed,
                n_threads=inputs.n_threads,
            )
        self._results["mask_file"] = str(save_image(brain.mask, folder / "mask.nii"))
        xfm = write_affine(brain.template2anat, folder / "template2anat.txt")
        self._results["template2anat"] = str(xfm)
        self._results["is_skull_stripped"] = brain.is_skull_stripped
        self._results["method"] = brain.method
        return runtime


class _AlignTemplateInputSpec(BaseInterfaceInputSpec):
    in_file = File(exists=True, mandatory=True, desc="T1w image, RAS+")
    mask_file = File(exists=True, mandatory=True, desc="brain mask on its grid")
    xfm_file = File(exists=True, desc="ITK transform, MNI to T1w points; otherwise registered")
    random_seed = traits.Int(0, usedefault=True, desc="seed of ANTs")


class _AlignTemplateOutputSpec(TraitedSpec):
    template2anat = File(desc="ITK affine: maps points of MNI space to points of the T1w")
    is_skull_stripped = traits.Bool(desc="whether the T1w came without skull")


class AlignTemplate(SimpleInterface):
    """Find the affine from the template to a T1w image whose brain mask is known."""

    input_spec = _AlignTemplateInputSpec
    output_spec = _AlignTemplateOutputSpec

    def _run_interface(self, runtime):
        from m2m_bids.preprocessing.anatomical import (
            affine_of_transform,
            align_template,
            is_stripped,
        )
        from m2m_bids.spatial.images import load_image
        from m2m_bids.spatial.itk import write_affine

        image, mask = load_image(self.inputs.in_file), load_image(self.inputs.mask_file)
        if isdefined(self.inputs.xfm_file):
            affine = affine_of_transform(self.inputs.xfm_file, mask)
            is_skull_stripped = is_stripped(image, affine)
        else:
            with temporary_files_in(runtime.cwd):
                brain = align_template(image, mask, random_seed=self.inputs.random_seed)
            affine, is_skull_stripped = brain.template2anat, brain.is_skull_stripped
        xfm = write_affine(affine, Path(runtime.cwd) / "template2anat.txt")
        self._results["template2anat"] = str(xfm)
        self._results["is_skull_stripped"] = is_skull_stripped
        return runtime


class _TakeMaskInputSpec(BaseInterfaceInputSpec):
    in_file = File(mandatory=True, desc="brain mask of another program")
    t1w_file = File(exists=True, mandatory=True, desc="T1w image, RAS+")


class TakeMask(SimpleInterface):
    """Take over a brain mask that another program has made."""

    input_spec = _TakeMaskInputSpec
    output_spec = _ImageOutputSpec

    def _run_interface(self, runtime):
        from m2m_bids.preprocessing.precomputed import take_mask
        from m2m_bids.spatial.images import load_image, save_image

        mask = take_mask(self.inputs.in_file, load_image(self.inputs.t1w_file))
        self._results["out_file"] = str(save_image(mask, Path(runtime.cwd) / "mask.nii"))
        return runtime


class _TakeFreeSurferInputSpec(BaseInterfaceInputSpec):
    t1w_file = File(exists=True, mandatory=True, desc="T1w image, RAS+")
    label_file = File(exists=True, mandatory=True, desc="aparc+aseg.mgz or aseg.mgz")
    original_file = File(exists=True, mandatory=True, desc="orig.mgz, the T1w conformed")
    brainmask_file = File(exists=True, desc="brainmask.mgz")


class _TakeFreeSurferOutputSpec(TraitedSpec):
    mask_file = File(desc="brain mask on the grid of the T1w")
    dseg_file = File(desc="grey matter 1, white matter 2, fluid 3, on the same grid")


class TakeFreeSurfer(SimpleInterface):
    """Take over brain mask and tissues that FreeSurfer has made, if they are of this T1w."""

    input_spec = _TakeFreeSurferInputSpec
    output_spec = _TakeFreeSurferOutputSpec

    def _run_interface(self, runtime):
        from m2m_bids.preprocessing.freesurfer import take_freesurfer
        from m2m_bids.spatial.images import load_image, save_image

        inputs, folder = self.inputs, Path(runtime.cwd)
        t1w = load_image(inputs.t1w_file)
        t1w.set_filename(inputs.t1w_file)  # messages name it
        brainmask = inputs.brainmask_file if isdefined(inputs.brainmask_file) else None
        brain = take_freesurfer(t1w, inputs.label_file, inputs.original_file, brainmask)
        self._results["mask_file"] = str(save_image(brain.mask, folder / "mask.nii"))
        self._results["dseg_file"] = str(save_image(brain.tissues, folder / "dseg.nii"))
        return runtime


class _TakeTissuesInputSpec(BaseInterfaceInputSpec):
    in_files = InputMultiObject(
        File(exists=True), mandatory=True, desc="labels, or maps of grey, white and fluid"
    )
    t1w_file = File(exists=True, mandatory=True, desc="T1w image without bias field, RAS+")
    mask_file = File(exists=True, mandatory=True, desc="brain mask on its grid")


class TakeTissues(SimpleInterface):
    """Take over tissues that another program has made."""

    input_spec = _TakeTissuesInputSpec
    output_spec = _ImageOutputSpec

    def _run_interface(self, runtime):
        from m2m_bids.preprocessing.precomputed import take_tissues
        from m2m_bids.spatial.images import load_image, save_image

        dseg = take_tissues(
            self.inputs.in_files,
            load_image(self.inputs.t1w_file),
            load_image(self.inputs.mask_file),
        )
        self._results["out_file"] = str(save_image(dseg, Path(runtime.cwd) / "dseg.nii"))
        return runtime


class _InMaskInputSpec(BaseInterfaceInputSpec):
    in_file = File(exists=True, mandatory=True, desc="T1w image, RAS+")
    mask_file = File(exists=True, mandatory=True, desc="brain mask on its grid")


class CorrectBias(SimpleInterface):
    """Divide a T1w image by its bias field (N4)."""

    input_spec = _InMaskInputSpec
    output_spec = _ImageOutputSpec

    def _run_interface(self, runtime):
        from m2m_bids.preprocessing.anatomical import correct_bias_field
        from m2m_bids.spatial.images import load_image, save_image

        image = correct_bias_field(
            load_image(self.inputs.in_file), load_image(self.inputs.mask_file)
        )
        self._results["out_file"] = str(save_image(image, Path(runtime.cwd) / "corrected.nii"))
        return runtime


class _SegmentTissuesInputSpec(_InMaskInputSpec):
    template2anat = File(exists=True, mandatory=True, desc="ITK affine, MNI to T1w points")


class _SegmentTissuesOutputSpec(_ImageOutputSpec):
    probability_files = traits.List(File(), desc="maps of grey matter, white matter and fluid")


class SegmentTissues(SimpleInterface):
    """Label grey matter (1), white matter (2) and fluid (3) in the brain."""

    input_spec = _SegmentTissuesInputSpec
    output_spec = _SegmentTissuesOutputSpec

    def _run_interface(self, runtime):
        from m2m_bids.preprocessing.anatomical import segment_tissues
        from m2m_bids.spatial.images import load_image, save_image
        from m2m_bids.spatial.itk import read_affine

        folder = Path(runtime.cwd)
        tissues = segment_tissues(
            load_image(self.inputs.in_file),
            load_image(self.inputs.mask_file),
            read_affine(self.inputs.template2anat),
        )
        self._results["out_file"] = str(save_image(tissues.labels, folder / "dseg.nii"))
        self._results["probability_files"] = [
            str(save_image(image, folder / f"probability{index}.nii.gz"))
            for index, image in enumerate(tissues.probabilities)
        ]
        return runtime


class _StaticReferenceInputSpec(BaseInterfaceInputSpec):
    in_file = File(mandatory=True, desc="PET image, 3-D or 4-D")
    sidecar = traits.Dict(desc="PET metadata, for the timing of the frames")
    kind = traits.Str("auto", usedefault=True, desc="as in `preprocessing.pet.static_reference`")
    frame_xfms = traits.List(
        File(exists=True), desc="ITK affine per frame: reference points to frame points"
    )


class _StaticReferenceOutputSpec(TraitedSpec):
    out_file = File(desc="3-D image, in the units of the scan")
    registered_file = File(desc="what registration is to see of it: not negative")
    method = traits.Str(desc="how it was made from the frames")


class StaticReference(SimpleInterface):
    """Make one static image of a PET scan."""

    input_spec = _StaticReferenceInputSpec
    output_spec = _StaticReferenceOutputSpec

    def _run_interface(self, runtime):
        from m2m_bids.preprocessing.pet import static_reference
        from m2m_bids.spatial.images import save_image
        from m2m_bids.spatial.itk import read_affine

        inputs = self.inputs
        image, timing = _load_scan(inputs.in_file, inputs.sidecar)
        reference = static_reference(
            image,
            timing,
            kind=inputs.kind,
            reference2frames=[
                read_affine(file)
                for file in (inputs.frame_xfms if isdefined(inputs.frame_xfms) else [])
            ],
        )
        folder = Path(runtime.cwd)
        self._results.update(
            out_file=str(save_image(reference.image, folder / "petref.nii")),
            registered_file=str(save_image(reference.registered, folder / "registered.nii")),
            method=reference.method,
        )
        return runtime


def _load_scan(file: str, sidecar: dict):
    """Load a PET scan and the timing of its frames."""
    from m2m_bids.preprocessing.pet import as_frames
    from m2m_bids.preprocessing.pet_timing import frame_timing
    from m2m_bids.spatial.images import load_image

    image = load_image(file)
    image.set_filename(file)  # messages name it
    image = as_frames(image)
    n_frames = image.shape[3] if image.ndim == 4 else 1
    return image, frame_timing(sidecar if isdefined(sidecar) else {}, n_frames)


class _EstimateMotionInputSpec(BaseInterfaceInputSpec):
    in_file = File(mandatory=True, desc="PET image, 3-D or 4-D")
    sidecar = traits.Dict(desc="PET metadata, for the timing of the frames")
    random_seed = traits.Int(0, usedefault=True, desc="seed of ANTs")


class _EstimateMotionOutputSpec(TraitedSpec):
    frame_xfms = traits.List(
        File(), desc="ITK affine per frame: reference points to frame points; empty for a volume"
    )
    motion_file = File(desc="table of motion parameters, mm and radians; none for a volume")
    description = traits.Dict(desc="sidecar of the table")


class EstimateMotion(SimpleInterface):
    """Estimate the motion of the head between the frames of a PET scan, if it has any."""

    input_spec = _EstimateMotionInputSpec
    output_spec = _EstimateMotionOutputSpec

    def _run_interface(self, runtime):
        from m2m_bids.preprocessing.pet import is_dynamic
        from m2m_bids.preprocessing.pet_motion import (
            describe_motion,
            estimate_motion,
            write_parameters,
        )
        from m2m_bids.spatial.itk import write_affine

        image, timing = _load_scan(self.inputs.in_file, self.inputs.sidecar)
        self._results["frame_xfms"] = []
        if not is_dynamic(image):
            return runtime
        with temporary_files_in(runtime.cwd):
            motion = estimate_motion(image, timing, random_seed=self.inputs.random_seed)
        folder = Path(runtime.cwd)
        self._results["frame_xfms"] = [
            str(write_affine(affine, folder / f"frame{index:03d}.txt"))
            for index, affine in enumerate(motion.reference2frames)
        ]
        self._results["motion_file"] = str(write_parameters(motion, folder / "motion.tsv"))
        self._results["description"] = describe_motion(motion, timing)
        return runtime


class _FitTensorInputSpec(BaseInterfaceInputSpec):
    in_file = File(mandatory=True, desc="diffusion-weighted image, 4-D")
    bval_file = File(mandatory=True, desc="b-values, FSL's form")
    bvec_file = File(mandatory=True, desc="directions, FSL's form")
    mask_file = File(desc="brain mask in its space; found in the image by default")
    is_raw = traits.Bool(mandatory=True, desc="whether motion is corrected")
    random_seed = traits.Int(0, usedefault=True, desc="seed of ANTs")


class _FAOutputSpec(TraitedSpec):
    out_file = File(desc="FA map, 3-D, not negative")
    method = traits.Str(desc="how it was made")


class _FitTensorOutputSpec(_FAOutputSpec):
    md_file = File(desc="mean diffusivity, mm^2/s")
    ad_file = File(desc="axial diffusivity, mm^2/s")
    rd_file = File(desc="radial diffusivity, mm^2/s")


class FitTensor(SimpleInterface):
    """Fit a tensor to a diffusion-weighted image, and make maps of it."""

    input_spec = _FitTensorInputSpec
    output_spec = _FitTensorOutputSpec

    def _run_interface(self, runtime):
        from m2m_bids.preprocessing.tensor import fit_dwi
        from m2m_bids.spatial.images import load_image, save_image

        inputs = self.inputs
        image = load_image(inputs.in_file)
        image.set_filename(inputs.in_file)  # messages name it
        with temporary_files_in(runtime.cwd):
            maps = fit_dwi(
                image,
                inputs.bval_file,
                inputs.bvec_file,
                is_raw=inputs.is_raw,
                mask_file=inputs.mask_file if isdefined(inputs.mask_file) else None,
                random_seed=inputs.random_seed,
            )
        folder = Path(runtime.cwd)
        self._results.update(
            out_file=str(save_image(maps.fa, folder / "fitted.nii")),
            md_file=str(save_image(maps.md, folder / "md.nii")),
            ad_file=str(save_image(maps.ad, folder / "ad.nii")),
            rd_file=str(save_image(maps.rd, folder / "rd.nii")),
            method=maps.method,
        )
        return runtime


class _CleanFAInputSpec(BaseInterfaceInputSpec):
    in_file = File(mandatory=True, desc="FA map as it came")
    fit_method = traits.Str(desc="how it was fitted, if it was")


class CleanFA(SimpleInterface):
    """Bring an FA map into [0, 1] and mask what is no brain."""

    input_spec = _CleanFAInputSpec
    output_spec = _FAOutputSpec

    def _run_interface(self, runtime):
        from m2m_bids.preprocessing.diffusion import clean_fa
        from m2m_bids.spatial.images import load_image, require_3d, save_image

        file = self.inputs.in_file
        image = load_image(file)
        image.set_filename(file)  # messages name it
        image = clean_fa(require_3d(image, file))
        self._results["out_file"] = str(save_image(image, Path(runtime.cwd) / "fa.nii"))
        method = "FA map: not finite and negative values 0, above 1 the median of their neighbours"
        if isdefined(self.inputs.fit_method):
            method = f"{self.inputs.fit_method}; {method}"
        self._results["method"] = method
        return runtime


class _RegisterRigidInputSpec(BaseInterfaceInputSpec):
    moving_file = File(exists=True, mandatory=True, desc="static PET or FA image")
    fixed_file = File(exists=True, mandatory=True, desc="T1w image")
    mask_file = File(exists=True, mandatory=True, desc="brain mask on the grid of the T1w")
    is_affine = traits.Bool(
        False, usedefault=True, desc="whether size and shear are estimated too, for a template"
    )
    random_seed = traits.Int(0, usedefault=True, desc="seed of ANTs")


class _RegisterRigidOutputSpec(TraitedSpec):
    xfm = File(desc="ITK affine that carries images to the T1w: fixed points to moving points")
    inverse_xfm = File(desc="its inverse")
    score = traits.Float(desc="mutual information, nats")
    start = traits.Str(desc="name of the start that won")


class RegisterRigid(SimpleInterface):
    """Align an image with a T1w by a rotation and a shift, or with a template affinely."""

    input_spec = _RegisterRigidInputSpec
    output_spec = _RegisterRigidOutputSpec

    def _run_interface(self, runtime):
        import numpy as np

        from m2m_bids.preprocessing.coregistration import register_affine, register_rigid
        from m2m_bids.spatial.images import load_image
        from m2m_bids.spatial.itk import write_affine

        align = register_affine if self.inputs.is_affine else register_rigid
        with temporary_files_in(runtime.cwd):
            result = align(
                load_image(self.inputs.moving_file),
                load_image(self.inputs.fixed_file),
                load_image(self.inputs.mask_file),
                random_seed=self.inputs.random_seed,
            )
        folder = Path(runtime.cwd)
        xfm = write_affine(result.fixed2moving, folder / "rigid.txt")
        inverse = write_affine(np.linalg.inv(result.fixed2moving), folder / "rigid_inverse.txt")
        self._results.update(
            xfm=str(xfm),
            inverse_xfm=str(inverse),
            score=result.score,
            start=result.starts[0].name,
        )
        return runtime
