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

OUTLINED = {"white matter": (2,), "cortex": (1, 2)}
LABELS = {"pet": "PET", "fa": "FA"}
COLOR_MAPS = {"pet": "inferno", "fa": "gray"}
SUVR = "preprocSUVR"


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
    rigid_file = File(exists=True, mandatory=True, desc="moving image after linear alignment")
    final_file = File(exists=True, desc="moving image after the deformable step")
    objections = traits.List(traits.Str(), desc="why the deformable step was rejected")
    displacement_file = File(exists=True, desc="deformable map: displacement, T1w world, mm")
    jacobian_file = File(exists=True, desc="its Jacobian determinant")
    cycle_error_file = File(exists=True, desc="distance of points after forward and back, mm")
    modality = traits.Enum("pet", "fa", mandatory=True, desc="kind of the moving image")
    template = traits.Str(desc="the template that stands for a T1w, if none was there")


class RegistrationFigures(SimpleInterface):
    """Draw the moving image over the T1w before and after each step, and the deformable map."""

    input_spec = _RegistrationFiguresInputSpec
    output_spec = _FiguresOutputSpec

    def _run_interface(self, runtime):
        from m2m_bids.reports.figures import flicker, native_figure
        from m2m_bids.reports.viewer import write_viewer
        from m2m_bids.spatial.images import load_image

        inputs, folder = self.inputs, Path(runtime.cwd)
        t1w, mask, dseg = (
            load_image(file) for file in (inputs.t1w_file, inputs.mask_file, inputs.dseg_file)
        )
        states = {
            "initial": load_image(inputs.native_file),
            "affine" if inputs.template else "rigid": load_image(inputs.rigid_file),
        }
        if isdefined(inputs.final_file) and not inputs.objections:
            states["m2m"] = load_image(inputs.final_file)
        names = {
            "label": LABELS[inputs.modality],
            "target": "template" if inputs.template else "T1w",
        }
        colors = {"color_map": COLOR_MAPS[inputs.modality]}
        native = native_figure(
            states["initial"], folder / "native.svg", label=names["label"], **colors
        )
        figures = flicker(t1w, mask, states, folder, contours=_outlines(dseg), **names, **colors)
        # Two grey images over each other would not be told apart.
        viewer = write_viewer(t1w, mask, dseg, states, folder / "viewer.html", **names)
        out_files = [native, *figures.values(), viewer]
        if isdefined(inputs.displacement_file):
            out_files += self._draw_map(t1w, mask, folder, names)
        self._results["out_files"] = [str(file) for file in out_files]
        return runtime

    def _draw_map(self, t1w, mask, folder: Path, names: dict[str, str]) -> list[Path]:
        """Draw the deformable map, also one that was rejected."""
        from m2m_bids.reports.deformation import cycle_figure, grid_figure
        from m2m_bids.reports.jacobian import jacobian_figure
        from m2m_bids.spatial.images import load_image

        inputs, label = self.inputs, {"label": names["label"]}
        return [
            draw(load_image(file), mask, folder / f"{name}.svg", background=t1w, **words)
            for name, draw, file, words in (
                ("grid", grid_figure, inputs.displacement_file, label),
                ("jacobian", jacobian_figure, inputs.jacobian_file, names),
                ("cycle", cycle_figure, inputs.cycle_error_file, names),
            )
        ]


class _SUVRFigureInputSpec(BaseInterfaceInputSpec):
    files = traits.Dict(mandatory=True, desc="what was measured, as `QuantifyScan` gives it")
    facts = traits.Dict(mandatory=True, desc="what sidecars say, by key")
    mask_file = File(exists=True, mandatory=True, desc="brain mask on the grid of the T1w")
    dseg_file = File(exists=True, mandatory=True, desc="tissue labels on that grid")


class SUVRFigure(SimpleInterface):
    """Draw SUVR on the slices of the T1w, where there is one."""

    input_spec = _SUVRFigureInputSpec
    output_spec = _FiguresOutputSpec

    def _run_interface(self, runtime):
        from m2m_bids.reports.figures import quantity_figure
        from m2m_bids.spatial.images import load_image

        self._results["out_files"] = []
        file = self.inputs.files.get(SUVR)
        if file is None:
            return runtime
        figure = quantity_figure(
            load_image(file),
            load_image(self.inputs.mask_file),
            Path(runtime.cwd) / "suvr.svg",
            title="SUVR",
            note=f"Reference region: {self.inputs.facts[SUVR]['ReferenceRegion']}.",
            contours=_outlines(load_image(self.inputs.dseg_file)),
        )
        self._results["out_files"] = [str(figure)]
        return runtime


def _outlines(dseg):
    """Masks to outline, by their names in the legend."""
    from m2m_bids.reports.figures import select_labels

    return {name: select_labels(dseg, *labels) for name, labels in OUTLINED.items()}
