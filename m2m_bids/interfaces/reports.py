"""Interfaces over `m2m_bids.reports`: draw figures."""

from pathlib import Path

from nipype.interfaces.base import (
    BaseInterfaceInputSpec,
    File,
    SimpleInterface,
    TraitedSpec,
    isdefined,
    traits,
)

WHITE_MATTER = 2
LABELS = {"pet": "PET", "fa": "FA"}
COLOR_MAPS = {"pet": "inferno", "fa": "gray"}


class _AnatomicalFigureInputSpec(BaseInterfaceInputSpec):
    t1w_file = File(exists=True, mandatory=True, desc="T1w image")
    mask_file = File(exists=True, mandatory=True, desc="brain mask on its grid")
    dseg_file = File(exists=True, mandatory=True, desc="tissue labels on its grid")


class _FiguresOutputSpec(TraitedSpec):
    out_files = traits.List(File(), desc="SVG files, named after what they show")


class AnatomicalFigure(SimpleInterface):
    """Draw brain mask and tissues over the T1w."""

    input_spec = _AnatomicalFigureInputSpec
    output_spec = _FiguresOutputSpec

    def _run_interface(self, runtime):
        from m2m_bids.reports.figures import anatomical_figure
        from m2m_bids.spatial.images import load_image

        out_file = anatomical_figure(
            load_image(self.inputs.t1w_file),
            load_image(self.inputs.mask_file),
            load_image(self.inputs.dseg_file),
            Path(runtime.cwd) / "anatomical.svg",
        )
        self._results["out_files"] = [str(out_file)]
        return runtime


class _MotionFigureInputSpec(BaseInterfaceInputSpec):
    motion_file = File(exists=True, desc="table of motion parameters, mm and radians")


class MotionFigure(SimpleInterface):
    """Plot the motion of the head between frames, if there are any."""

    input_spec = _MotionFigureInputSpec
    output_spec = _FiguresOutputSpec

    def _run_interface(self, runtime):
        import numpy as np

        from m2m_bids.reports.motion import motion_figure

        self._results["out_files"] = []
        if isdefined(self.inputs.motion_file):
            parameters = np.loadtxt(self.inputs.motion_file, skiprows=1, ndmin=2)
            figure = motion_figure(parameters, Path(runtime.cwd) / "motion.svg")
            self._results["out_files"] = [str(figure)]
        return runtime


class _RegistrationFiguresInputSpec(BaseInterfaceInputSpec):
    t1w_file = File(exists=True, mandatory=True, desc="T1w image")
    mask_file = File(exists=True, mandatory=True, desc="brain mask on its grid")
    dseg_file = File(exists=True, mandatory=True, desc="tissue labels on its grid")
    native_file = File(exists=True, mandatory=True, desc="moving image where its header puts it")
    rigid_file = File(exists=True, mandatory=True, desc="moving image after rigid alignment")
    final_file = File(exists=True, desc="moving image after the deformable step")
    objections = traits.List(traits.Str(), desc="why the deformable step was rejected")
    jacobian_file = File(exists=True, desc="Jacobian determinant of the deformable map")
    modality = traits.Enum("pet", "fa", mandatory=True, desc="kind of the moving image")


class RegistrationFigures(SimpleInterface):
    """Draw the moving image over the T1w before and after each step, and the Jacobian."""

    input_spec = _RegistrationFiguresInputSpec
    output_spec = _FiguresOutputSpec

    def _run_interface(self, runtime):
        from m2m_bids.reports.figures import flicker, select_labels
        from m2m_bids.reports.jacobian import jacobian_figure
        from m2m_bids.spatial.images import load_image

        inputs = self.inputs
        folder = Path(runtime.cwd)
        t1w, mask = load_image(inputs.t1w_file), load_image(inputs.mask_file)
        states = {
            "initial": load_image(inputs.native_file),
            "rigid": load_image(inputs.rigid_file),
        }
        if isdefined(inputs.final_file) and not inputs.objections:
            states["m2m"] = load_image(inputs.final_file)
        white = select_labels(load_image(inputs.dseg_file), WHITE_MATTER)
        figures = flicker(
            t1w,
            mask,
            states,
            folder,
            contours={"white matter": white},
            label=LABELS[inputs.modality],
            color_map=COLOR_MAPS[inputs.modality],
        )
        out_files = [str(file) for file in figures.values()]
        if isdefined(inputs.jacobian_file):
            figure = jacobian_figure(
                load_image(inputs.jacobian_file),
                mask,
                folder / "jacobian.svg",
                background=t1w,
                label=LABELS[inputs.modality],
            )
            out_files.append(str(figure))
        self._results["out_files"] = out_files
        return runtime
