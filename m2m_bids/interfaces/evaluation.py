"""Interfaces over `m2m_bids.baselines` and `m2m_bids.evaluation`: register, and measure it."""

from pathlib import Path

from nipype.interfaces.base import (
    BaseInterfaceInputSpec,
    Directory,
    File,
    SimpleInterface,
    TraitedSpec,
    traits,
)


class _RegisterByMethodInputSpec(BaseInterfaceInputSpec):
    method = traits.Str(mandatory=True, desc="key of the method; m2m:NAME is M2M-Reg")
    moving_file = File(exists=True, mandatory=True, desc="static PET or FA image")
    fixed_file = File(exists=True, mandatory=True, desc="T1w image")
    mask_file = File(exists=True, mandatory=True, desc="brain mask on the grid of the T1w")
    dseg_file = File(exists=True, desc="tissues of the T1w: 1 GM, 2 WM, 3 CSF")
    rigid_xfm = File(exists=True, mandatory=True, desc="ITK affine: T1w points to moving points")
    template2anat = File(exists=True, mandatory=True, desc="ITK affine: MNI points to T1w points")
    modality = traits.Enum("pet", "fa", mandatory=True, desc="kind of the moving image")
    weights = Directory(exists=True, desc="weights folder of M2M-Reg")
    weights_sha256 = traits.Str(desc="hash on its card, so that other weights run anew")
    n_refine = traits.Int(60, usedefault=True, desc="steps of instance optimisation of M2M-Reg")
    spacing_mm = traits.Float(1.5, usedefault=True, desc="voxels that other methods see, mm")
    random_seed = traits.Int(0, usedefault=True, desc="seed of methods that draw samples")
    device = traits.Str("auto", usedefault=True, nohash=True, desc="auto, cpu, cuda or cuda:N")
    use_gpu = traits.Bool(False, usedefault=True, nohash=True, desc="whether it takes a GPU slot")
    n_threads = traits.Int(0, usedefault=True, nohash=True, desc="threads; 0 leaves them open")


class _RegisterByMethodOutputSpec(TraitedSpec):
    xfm = File(desc="ITK transform, T1w points to moving points; undefined unless it is done")
    fields = traits.Dict(desc="status, reason, seconds and peak_memory_gb of the record")
    report_file = File(exists=True, desc="these fields, JSON")


class RegisterByMethod(SimpleInterface):
    """Register a pair by a method; a missing program or a failure is reported, not raised."""

    input_spec = _RegisterByMethodInputSpec
    output_spec = _RegisterByMethodOutputSpec
    _always_run = True  # a program that was missing may be there now

    @property
    def n_voxels(self) -> int:
        """Count the voxels of the cube that programs see, which say what memory they take."""
        from m2m_bids.baselines.base import EXTENT_MM

        return round(EXTENT_MM / self.inputs.spacing_mm) ** 3

    def _run_interface(self, runtime):
        from dataclasses import asdict

        from m2m_bids.baselines.base import Options
        from m2m_bids.baselines.run import REPORT_NAME, PairFiles, run_method

        inputs = self.inputs
        files = PairFiles(
            moving_file=inputs.moving_file,
            fixed_file=inputs.fixed_file,
            mask_file=inputs.mask_file,
            dseg_file=inputs.dseg_file or None,
            rigid_xfm=inputs.rigid_xfm,
            template2anat=inputs.template2anat,
            modality=inputs.modality,
        )
        options = Options(
            device=inputs.device,
            n_threads=inputs.n_threads,
            random_seed=inputs.random_seed,
            spacing_mm=inputs.spacing_mm,
            n_refine=inputs.n_refine,
        )
        folder = Path(runtime.cwd)
        weights = Path(inputs.weights) if inputs.weights else None
        report, xfm_file = run_method(inputs.method, files, options, folder, weights=weights)
        self._results["fields"] = asdict(report)
        self._results["report_file"] = str(folder / REPORT_NAME)
        if xfm_file is not None:
            self._results["xfm"] = str(xfm_file)
        return runtime


class _MeasureRegistrationInputSpec(BaseInterfaceInputSpec):
    xfm = File(exists=True, desc="ITK transform, T1w points to moving points; nothing without it")
    mask_file = File(exists=True, mandatory=True, desc="brain mask on the grid of the T1w")
    fixed_labels = File(exists=True, mandatory=True, desc="classes to evaluate of the T1w")
    moving_labels = File(exists=True, desc="classes to evaluate in the world of the moving image")
    landmarks = File(exists=True, desc="table of points in both images")
    reference_xfm = File(
        exists=True, desc="true or reference ITK transform, used where there are no landmarks"
    )


class _MeasureRegistrationOutputSpec(TraitedSpec):
    fields = traits.Dict(desc="overlap, folds and landmark error of the record, as far as known")


class MeasureRegistration(SimpleInterface):
    """Measure a registration where labels or the truth are known; one that failed has nothing."""

    input_spec = _MeasureRegistrationInputSpec
    output_spec = _MeasureRegistrationOutputSpec

    def _run_interface(self, runtime):
        from m2m_bids.evaluation.measures import landmarks_of, measure_registration
        from m2m_bids.spatial.images import load_image
        from m2m_bids.spatial.itk import read_chain
        from m2m_bids.spatial.landmarks import read_landmarks

        inputs = self.inputs
        self._results["fields"] = {}
        if not inputs.xfm:
            return runtime
        mask = load_image(inputs.mask_file)
        landmarks = None
        if inputs.landmarks:
            landmarks = read_landmarks(Path(inputs.landmarks))
        elif inputs.reference_xfm:
            landmarks = landmarks_of(read_chain(inputs.reference_xfm), mask)
        self._results["fields"] = measure_registration(
            read_chain(inputs.xfm),
            mask,
            fixed_labels=load_image(inputs.fixed_labels),
            moving_labels=load_image(inputs.moving_labels) if inputs.moving_labels else None,
            landmarks=landmarks,
        )
        return runtime
