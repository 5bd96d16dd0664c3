"""A map of fractional anisotropy, fitted where there is none, and cleaned; its diffusivities."""

from pathlib import Path
from typing import Any

from nipype.interfaces import utility as niu
from nipype.pipeline import engine as pe
from niworkflows.engine.workflows import LiterateWorkflow as Workflow

from m2m_bids.bids.derivatives import bids_uri
from m2m_bids.bids.diffusion import DIFFUSIVITIES, GradientFiles
from m2m_bids.bids.naming import expected_diffusivity_outputs
from m2m_bids.bids.query import Scan
from m2m_bids.bids.spaces import OutputSpace
from m2m_bids.interfaces.outputs import SaveInSpace
from m2m_bids.interfaces.preprocessing import CleanFA, FitTensor
from m2m_bids.interfaces.registration import ResampleImage
from m2m_bids.workflows.outputs import placement
from m2m_bids.workflows.registration import RegistrationOptions

MAPS = ("md_file", "ad_file", "rd_file")
_CLEANING = """\
Maps of fractional anisotropy were cleaned: not finite and negative values were set to zero, values
above one replaced by the median of their neighbours, and what is not connected to the brain
removed.
"""
_FIT = """\
A tensor was fitted to the diffusion-weighted images by weighted least squares with DIPY
[@garyfallidis2014], to the volumes with b-values of at most 1200 s/mm², in {}.
"""
_OWN_MASK = "a mask (median_otsu) of the mean of those without diffusion weighting"
_GIVEN_MASK = "the brain masks that came with them, where those are of the same space"
_MOTION = """\
Before, volumes were aligned rigidly with the first one without diffusion weighting: weighted ones
by least squares with what the others predict (their mean, then a tensor), the means of both kinds
by mutual information (ANTs); gradients were rotated accordingly. Eddy currents and susceptibility
distortion were not corrected.
"""


def init_fa_reference_wf(*, name: str = "reference_wf") -> Workflow:
    """
    Clean an FA map.

    Parameters
    ----------
    name : str
        Name of the workflow.

    Inputs
    ------
    in_file
        FA map as it came.

    Outputs
    -------
    out_file
        FA in [0, 1], zero outside the brain.
    method
        What was done.
    md_file, ad_file, rd_file
        Not set: a fit gives them (`init_fa_fit_wf`).
    """
    workflow = _init_cleaning_wf(f"#### Diffusion\n\n{_CLEANING}", name)
    inputnode, clean_fa = (workflow.get_node(node) for node in ("inputnode", "clean_fa"))
    workflow.connect([(inputnode, clean_fa, [("in_file", "in_file")])])
    return workflow


def _init_cleaning_wf(description: str, name: str) -> Workflow:
    """Start a workflow that ends in the cleaning of an FA map, wherever that comes from."""
    workflow = Workflow(name=name)
    workflow.__desc__ = description
    inputnode = pe.Node(niu.IdentityInterface(fields=["in_file"]), name="inputnode")
    outputnode = pe.Node(
        niu.IdentityInterface(fields=["out_file", "method", *MAPS]), name="outputnode"
    )
    clean_fa = pe.Node(CleanFA(), name="clean_fa", mem_gb=1)
    workflow.add_nodes([inputnode])
    workflow.connect([
        (clean_fa, outputnode, [("out_file", "out_file"), ("method", "method")]),
    ])  # fmt: skip
    return workflow


def init_fa_fit_wf(
    *,
    gradients: GradientFiles,
    mask: Path | None = None,
    is_raw: bool,
    random_seed: int,
    name: str = "reference_wf",
) -> Workflow:
    """
    Fit a tensor to a diffusion-weighted image, and clean its FA map.

    Parameters
    ----------
    gradients : GradientFiles
        Gradients of the image.
    mask : Path, optional
        Brain mask on its grid; by default one is found in the image.
    is_raw : bool
        Whether motion between its volumes is corrected first.
    random_seed : int
        Seed of ANTs.
    name : str
        Name of the workflow.

    Inputs
    ------
    in_file
        Diffusion-weighted image.

    Outputs
    -------
    out_file
        FA in [0, 1], zero outside the brain.
    method
        What was done.
    md_file, ad_file, rd_file
        Mean, axial and radial diffusivity, mm^2/s.
    """
    kind, motion = ("raw", _MOTION) if is_raw else ("preprocessed", "")
    fit = _FIT.format(_GIVEN_MASK if mask else _OWN_MASK)
    text = f"#### Diffusion, {kind} images\n\n{fit}{motion}{_CLEANING}"
    workflow = _init_cleaning_wf(text, name)
    inputnode, outputnode, clean_fa = (
        workflow.get_node(node) for node in ("inputnode", "outputnode", "clean_fa")
    )
    fit_tensor = pe.Node(
        FitTensor(
            bval_file=str(gradients.bval),
            bvec_file=str(gradients.bvec),
            is_raw=is_raw,
            random_seed=random_seed,
        ),
        name="fit_tensor",
        mem_gb=4,
    )
    if mask is not None:
        fit_tensor.inputs.mask_file = str(mask)
    workflow.connect([
        (inputnode, fit_tensor, [("in_file", "in_file")]),
        (fit_tensor, clean_fa, [("out_file", "in_file"), ("method", "fit_method")]),
        (fit_tensor, outputnode, [(field, field) for field in MAPS]),
    ])  # fmt: skip
    return workflow


def init_diffusivities_wf(
    *,
    scan: Scan,
    output_dir: Path,
    datasets: dict[str, Path],
    options: RegistrationOptions,
    space: OutputSpace | None = None,
    given_xfms: tuple[Path, ...] = (),
    made_from: dict[str, Any] | None = None,
    name: str = "diffusivities_wf",
) -> Workflow:
    """
    Bring the diffusivities of an FA scan by FA's transform to where FA is, and write them.

    Parameters
    ----------
    scan : Scan
        FA scan.
    output_dir : Path
        Root of the output dataset.
    datasets : dict of str to Path
        Datasets that sources are in, by the name in BIDS URIs.
    options : RegistrationOptions
        How FA was registered.
    space : OutputSpace, optional
        Where they are brought; by default to the T1w.
    given_xfms : tuple of Path
        Transforms that another program has made and that are used: sources of the maps.
    made_from : dict, optional
        What the maps depend on, which their sidecars keep.
    name : str
        Name of the workflow.

    Inputs
    ------
    reference_file
        Image on whose grid FA is.
    xfm
        ITK transforms, outermost first: points of that grid to points of FA.
    m2m_xfms
        As `init_registration_wf` gives it.
    md_file, ad_file, rd_file
        As `init_fa_fit_wf` gives them; set here where the scan has them as files.
    """
    workflow = Workflow(name=name)
    inputnode = pe.Node(
        niu.IdentityInterface(fields=["reference_file", "xfm", "m2m_xfms", *MAPS]),
        name="inputnode",
    )
    for parameter, file in scan.diffusivities.items():
        field, key = f"{parameter.lower()}_file", parameter.lower()
        if file is not None:
            setattr(inputnode.inputs, field, str(file))
        resample = pe.Node(ResampleImage(), name=f"resample_{key}", mem_gb=1.5)
        saver = _diffusivity_saver(
            scan, parameter, output_dir, datasets, options, space, given_xfms
        )
        save = pe.Node(saver, name=f"save_{key}")
        save.inputs.made_from = made_from or {}
        workflow.connect([
            (inputnode, resample, [
                (field, "in_file"), ("reference_file", "reference_file"), ("xfm", "xfm"),
            ]),
            (inputnode, save, [("m2m_xfms", "m2m_xfms")]),
            (resample, save, [("out_file", "image")]),
        ])  # fmt: skip
    return workflow


def _diffusivity_saver(
    scan: Scan,
    parameter: str,
    output_dir: Path,
    datasets: dict[str, Path],
    options: RegistrationOptions,
    space: OutputSpace | None,
    given_xfms: tuple[Path, ...],
) -> SaveInSpace:
    """Make the interface that writes a diffusivity."""
    files = expected_diffusivity_outputs(scan, output_dir, parameter, space)
    outputs = {key: str(file) for key, file in files.items()}
    file = scan.diffusivities[parameter]
    sources = [*([] if file is None else [file]), *scan.sources, *given_xfms]
    # Of maps that others have made the unit is not known.
    units = {"Units": "mm^2/s"} if file is None else {}
    return SaveInSpace(
        outputs={"m2m": outputs, "rigid": outputs},
        sidecar={
            "sources": [bids_uri(source, output_dir, datasets) for source in sources],
            **placement(scan, output_dir, datasets, space),
            "is_skull_stripped": True,
            "source_metadata": {**scan.sidecar, **units},
            "description": f"{DIFFUSIVITIES[parameter]} diffusivity, brought to "
            f"{space or scan.template or 'the T1w'} by the transform of FA, in one interpolation.",
        },
        provenance=options.provenance,
        linear=scan.linear,
    )
