"""Interface over `m2m_bids.quality`: measure a registered scan."""

from nipype.interfaces.base import (
    BaseInterfaceInputSpec,
    File,
    SimpleInterface,
    TraitedSpec,
    isdefined,
    traits,
)


class _MeasureScanInputSpec(BaseInterfaceInputSpec):
    moving_file = File(exists=True, mandatory=True, desc="static PET or FA image, native grid")
    t1w_file = File(exists=True, mandatory=True, desc="T1w image")
    mask_file = File(exists=True, mandatory=True, desc="brain mask on its grid")
    dseg_file = File(exists=True, mandatory=True, desc="tissues of the T1w: 1 GM, 2 WM, 3 CSF")
    template2anat = File(exists=True, mandatory=True, desc="ITK affine: MNI points to T1w points")
    rigid_xfm = File(exists=True, mandatory=True, desc="ITK affine: T1w points to moving points")
    best_xfm = File(exists=True, mandatory=True, desc="ITK transform that was used, the same way")
    modality = traits.Enum("pet", "fa", mandatory=True, desc="kind of the moving image")
    template = traits.Str("", usedefault=True, desc="target, if it is a template and no T1w")
    quality = traits.Dict(desc="numbers of the deformable step")
    objections = traits.List(traits.Str(), desc="why that was rejected")


class _MeasureScanOutputSpec(TraitedSpec):
    measures = traits.Dict(desc="decision, numbers of data/qc.json, and what they warn of")


class MeasureScan(SimpleInterface):
    """Measure how a registered scan lies on its T1w."""

    input_spec = _MeasureScanInputSpec
    output_spec = _MeasureScanOutputSpec

    def _run_interface(self, runtime):
        import math

        from m2m_bids.api import Quality
        from m2m_bids.quality.limits import warnings_of
        from m2m_bids.quality.measures import Anatomy, deformation_numbers, measure_scan
        from m2m_bids.spatial.images import load_image
        from m2m_bids.spatial.itk import read_affine, read_chain

        inputs = self.inputs
        anatomy = Anatomy(
            *(load_image(file) for file in (inputs.t1w_file, inputs.mask_file, inputs.dseg_file)),
            read_affine(inputs.template2anat),
        )
        numbers = measure_scan(
            load_image(inputs.moving_file),
            anatomy,
            modality=inputs.modality,
            rigid=read_affine(inputs.rigid_xfm),
            used=read_chain(inputs.best_xfm),
        )
        linear = decision = "affine" if inputs.template else "rigid"
        if isdefined(inputs.quality) and inputs.quality:
            numbers |= deformation_numbers(inputs.quality)
            numbers["decision_margin"] = Quality(**inputs.quality).margin
            decision = linear if inputs.objections else "m2m"
        # JSON has no other numbers than finite ones.
        known = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._results["measures"] = {
            "target": inputs.template or "T1w",
            "decision": decision,
            **known,
            "warnings": list(warnings_of(known, is_same_person=not inputs.template).values()),
        }
        return runtime
