"""Rigid alignment, then M2M-Reg with the check that it helped, then one interpolation."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nipype.interfaces import utility as niu
from nipype.pipeline import engine as pe
from niworkflows.engine.workflows import LiterateWorkflow as Workflow

from m2m_bids.interfaces.preprocessing import RegisterRigid
from m2m_bids.interfaces.quality import MeasureScan
from m2m_bids.interfaces.registration import RegisterImages, ResampleImage
from m2m_bids.interfaces.reports import RegistrationFigures


@dataclass(frozen=True)
class RegistrationOptions:
    """
    How scans are registered, the same for all of a run.

    Parameters
    ----------
    transform : {"m2m", "rigid"}
        Last step.
    weights : Path or None
        Weights folder; None for rigid alignment.
    weights_sha256 : str
        Hash on its card.
    n_refine : int
        Steps of instance optimisation.
    device : str
        Device of the network.
    use_gpu : bool
        Whether the network's node takes one of Nipype's GPU slots.
    random_seed : int
        Seed of ANTs.
    omp_nthreads : int
        Threads of PyTorch.
    network : str
        Network of the weights, as their card names it.
    """

    transform: Literal["m2m", "rigid"]
    weights: Path | None
    weights_sha256: str
    n_refine: int
    device: str
    use_gpu: bool
    random_seed: int
    omp_nthreads: int
    network: str = "gradicon"

    @property
    def provenance(self) -> dict[str, Any]:
        """What sidecars say of a registration as it was asked for: fields of `Provenance`."""
        return {
            "transform_requested": self.transform,
            "refine_steps": self.n_refine if self.transform == "m2m" else None,
            "random_seed": self.random_seed,
        }

    @property
    def record(self) -> dict[str, Any]:
        """What of these options registered images depend on, as their sidecars keep it."""
        record: dict[str, Any] = {"Transform": self.transform, "RandomSeed": self.random_seed}
        if self.transform == "m2m":
            record |= {"WeightsSHA256": self.weights_sha256, "RefinementSteps": self.n_refine}
        return record


OUTPUTS = (
    "preproc",
    "rigid",
    "rigid_xfm",
    "rigid_inverse_xfm",
    "rigid_score",
    "rigid_start",
    "m2m_xfms",
    "quality",
    "objections",
    "device_used",
    "sha256",
    "measures",
    "figures",
)
NETWORKS = {
    "gradicon": "a GradICON network [@tian2023]",
    "transmorph": "a TransMorph network [@chen2022]",
    "corrmlp": "a CorrMLP network [@meng2024]",
}
BEST_XFMS = ("best_xfm", "best_inverse_xfm")
_TO_T1W = """\
#### Registration

Each image was aligned with the T1w by a rigid transform (mutual information, several starts),
refined with ANTs [@avants2011].
"""
_TO_TEMPLATE = """\
#### Registration to a template

Where there was no T1w, images were registered to the template {}, as between persons: aligned
by an affine transform (mutual information, several rigid starts), refined with ANTs [@avants2011].
"""
_DEFORMABLE = """\
What it left over was estimated by M2M-Reg [@choo2025]: {network} predicts the
map, and the same objective, with the MNI152 template and its simulated counterpart as the
pre-aligned bridge pair, and with the T1w and what is simulated from its tissues as another,
refines it for the pair at hand. Where that moves the brain by less than 3.6 mm on average, as
within a person, it begins anew from the rigid alignment and bends less. The deformable map was
used only where it has no folds, agrees with the backward map through the bridge, improves the
mono-modal similarity, both to the bridge's image and to what is simulated from the T1w's tissues,
makes the image similar to the bridge's deep inside the brain, and is larger than its own error;
otherwise the rigid result is the output. Images were interpolated once, with cubic B-splines.
"""
_DEFORMABLE_TO_TEMPLATE = """\
What it left over was estimated by M2M-Reg [@choo2025], whose map {network} predicts
and the same objective refines, with the template and its simulated counterpart as the pre-aligned
bridge pair, and judged as the registration to a T1w is; where it was rejected, the affine result
is the output.
"""


def init_registration_wf(
    *,
    modality: Literal["pet", "fa"],
    options: RegistrationOptions,
    template: str = "",
    is_reported: bool = True,
    name: str = "registration_wf",
) -> Workflow:
    """
    Register a static image to a T1w, of the same person or a template's.

    Parameters
    ----------
    modality : {"pet", "fa"}
        Kind of the moving image.
    options : RegistrationOptions
        How.
    template : str
        Name of the template whose T1w it is, to which alignment is affine; empty for a person's.
    is_reported : bool
        Whether the result is drawn and measured; without, figures and measures are not given.
    name : str
        Name of the workflow.

    Inputs
    ------
    moving_file
        Static image, native grid, as it is registered: not negative.
    native_file
        The same as it is brought to the T1w.
    t1w_file, mask_file, dseg_file, template2anat
        As `init_anatomical_wf` gives them.

    Outputs
    -------
    preproc
        Registered image on the T1w's grid: by the deformable map if it was accepted.
    rigid
        Rigidly (to a template affinely) registered image.
    rigid_xfm, rigid_inverse_xfm
        ITK affines.
    rigid_score, rigid_start
        Mutual information, and the start that won.
    m2m_xfms
        ITK composite and its inverse; empty if rejected.
    quality, objections
        Numbers of the deformable step, and why it was rejected.
    device_used, sha256
        Device of the network and hash of its weights.
    measures
        Numbers of ``data/qc.json``, the decision, and warnings.
    figures
        SVG files, and a viewer (HTML).
    best_xfm, best_inverse_xfm
        ITK transforms that were used: deformable, or rigid.
    """
    workflow = Workflow(name=name)
    workflow.__desc__ = _TO_TEMPLATE.format(template) if template else _TO_T1W
    inputnode = pe.Node(
        niu.IdentityInterface(
            fields=[
                *("moving_file", "native_file"),
                *("t1w_file", "mask_file", "dseg_file", "template2anat"),
            ]
        ),
        name="inputnode",
    )
    outputnode = pe.Node(niu.IdentityInterface(fields=[*OUTPUTS, *BEST_XFMS]), name="outputnode")
    register_rigid = pe.Node(
        RegisterRigid(random_seed=options.random_seed, is_affine=bool(template)),
        name="register_rigid",
        mem_gb=1.5,
    )
    resample_rigid = pe.Node(ResampleImage(), name="resample_rigid", mem_gb=1.5)
    workflow.connect([
        (inputnode, register_rigid, [
            ("moving_file", "moving_file"), ("t1w_file", "fixed_file"), ("mask_file", "mask_file"),
        ]),
        (inputnode, resample_rigid, [("native_file", "in_file"), ("t1w_file", "reference_file")]),
        (register_rigid, resample_rigid, [("xfm", "xfm")]),
        (register_rigid, outputnode, [
            ("xfm", "rigid_xfm"),
            ("inverse_xfm", "rigid_inverse_xfm"),
            ("score", "rigid_score"),
            ("start", "rigid_start"),
        ]),
        (resample_rigid, outputnode, [("out_file", "rigid")]),
    ])  # fmt: skip
    if options.transform == "rigid":
        workflow.connect([
            (resample_rigid, outputnode, [("out_file", "preproc")]),
            (register_rigid, outputnode, [
                ("xfm", "best_xfm"), ("inverse_xfm", "best_inverse_xfm"),
            ]),
        ])  # fmt: skip
    else:
        _add_deformable_step(workflow, modality, options)
        text = _DEFORMABLE_TO_TEMPLATE if template else _DEFORMABLE
        workflow.__desc__ += text.format(network=NETWORKS[options.network])
    if is_reported:
        _add_report(workflow, modality, template)
    return workflow


def _add_deformable_step(
    workflow: Workflow, modality: Literal["pet", "fa"], options: RegistrationOptions
) -> None:
    """Add M2M-Reg behind the rigid alignment."""
    inputnode, outputnode, register_rigid = (
        workflow.get_node(name) for name in ("inputnode", "outputnode", "register_rigid")
    )
    register_m2m = pe.Node(
        RegisterImages(
            modality=modality,
            weights=str(options.weights),
            weights_sha256=options.weights_sha256,
            n_refine=options.n_refine,
            device=options.device,
            use_gpu=options.use_gpu,
            n_threads=options.omp_nthreads,
        ),
        name="register_m2m",
        mem_gb=2.5,
        # Nipype counts n_procs against the GPU slots too.
        n_procs=1 if options.use_gpu else options.omp_nthreads,
    )
    resample_m2m = pe.Node(ResampleImage(), name="resample_m2m", mem_gb=1.5)
    workflow.connect([
        (inputnode, register_m2m, [
            ("moving_file", "moving_file"),
            ("t1w_file", "fixed_file"),
            ("mask_file", "mask_file"),
            ("dseg_file", "dseg_file"),
            ("template2anat", "template2anat"),
        ]),
        (inputnode, resample_m2m, [("native_file", "in_file"), ("t1w_file", "reference_file")]),
        (register_rigid, register_m2m, [
            ("xfm", "rigid_xfm"), ("inverse_xfm", "rigid_inverse_xfm"),
        ]),
        (register_m2m, resample_m2m, [("best_xfm", "xfm")]),
        (register_m2m, outputnode, [
            (name, name)
            for name in (
                *("m2m_xfms", "quality", "objections", "device_used", "sha256"), *BEST_XFMS,
            )
        ]),
        (resample_m2m, outputnode, [("out_file", "preproc")]),
    ])  # fmt: skip


def _add_report(workflow: Workflow, modality: Literal["pet", "fa"], template: str) -> None:
    """Add what is drawn and measured of the result."""
    inputnode, outputnode, register_rigid, resample_rigid, register_m2m, resample_m2m = (
        workflow.get_node(name)
        for name in (
            *("inputnode", "outputnode", "register_rigid", "resample_rigid"),
            *("register_m2m", "resample_m2m"),
        )
    )
    draw_registration = pe.Node(
        RegistrationFigures(modality=modality, template=template),
        name="draw_registration",
        mem_gb=2,
    )
    measure_scan = pe.Node(
        MeasureScan(modality=modality, template=template), name="measure_scan", mem_gb=1.5
    )
    anatomy = [("t1w_file", "t1w_file"), ("mask_file", "mask_file"), ("dseg_file", "dseg_file")]
    workflow.connect([
        (inputnode, draw_registration, [("moving_file", "native_file"), *anatomy]),
        (inputnode, measure_scan, [
            ("moving_file", "moving_file"), ("template2anat", "template2anat"), *anatomy,
        ]),
        (register_rigid, measure_scan, [("xfm", "rigid_xfm")]),
        (resample_rigid, draw_registration, [("out_file", "rigid_file")]),
        (draw_registration, outputnode, [("out_files", "figures")]),
        (measure_scan, outputnode, [("measures", "measures")]),
    ])  # fmt: skip
    if register_m2m is None:
        workflow.connect(register_rigid, "xfm", measure_scan, "best_xfm")
        return
    workflow.connect([
        (register_m2m, measure_scan, [
            (field, field) for field in ("best_xfm", "quality", "objections")
        ]),
        (register_m2m, draw_registration, [
            (name, name)
            for name in ("objections", "displacement_file", "jacobian_file", "cycle_error_file")
        ]),
        (resample_m2m, draw_registration, [("out_file", "final_file")]),
    ])  # fmt: skip
