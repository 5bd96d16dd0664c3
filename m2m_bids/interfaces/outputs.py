"""Interfaces that put the files of a finished scan, and its figures, into the output dataset."""

import shutil
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

FIGURE_ENDS = (".svg", ".html")


class _DescribeT1wInputSpec(BaseInterfaceInputSpec):
    sources = traits.List(traits.Str(), mandatory=True, desc="BIDS URIs")
    is_skull_stripped = traits.Bool(mandatory=True, desc="whether the T1w came without skull")
    is_precomputed = traits.Bool(usedefault=True, desc="whether another program prepared it")


class _DescribeT1wOutputSpec(TraitedSpec):
    sidecar = traits.Dict(desc="JSON object")


class DescribeT1w(SimpleInterface):
    """Compose the sidecar of a prepared T1w."""

    input_spec = _DescribeT1wInputSpec
    output_spec = _DescribeT1wOutputSpec

    def _run_interface(self, runtime):
        from m2m_bids.bids.derivatives import image_sidecar

        self._results["sidecar"] = image_sidecar(
            self.inputs.sources,
            is_skull_stripped=self.inputs.is_skull_stripped,
            description="Axes reordered to RAS+, bias field removed "
            + ("by another program." if self.inputs.is_precomputed else "(N4)."),
        )
        return runtime


class _DescribeMaskInputSpec(BaseInterfaceInputSpec):
    sources = traits.List(traits.Str(), mandatory=True, desc="BIDS URIs")
    method = traits.Str(mandatory=True, desc="how it was found")


class DescribeMask(SimpleInterface):
    """Compose the sidecar of a brain mask."""

    input_spec = _DescribeMaskInputSpec
    output_spec = _DescribeT1wOutputSpec

    def _run_interface(self, runtime):
        from m2m_bids.bids.derivatives import image_sidecar

        sidecar = image_sidecar(self.inputs.sources, description=self.inputs.method)
        self._results["sidecar"] = {**sidecar, "Type": "Brain"}
        return runtime


class _SaveClassesInputSpec(BaseInterfaceInputSpec):
    image = File(exists=True, mandatory=True, desc="the 11 classes, on the grid of the T1w")
    outputs = traits.Dict(
        mandatory=True, desc="paths, as `bids.naming.expected_class_outputs` gives them"
    )
    sources = traits.List(traits.Str(), mandatory=True, desc="BIDS URIs")


class _SaveOutputSpec(TraitedSpec):
    out_files = traits.List(File(), desc="files of the output dataset")


class SaveClasses(SimpleInterface):
    """Copy the 11 classes of a T1w, with their look-up table and sidecar."""

    input_spec = _SaveClassesInputSpec
    output_spec = _SaveOutputSpec
    _always_run = True

    def _run_interface(self, runtime):
        from m2m_bids.bids.derivatives import image_sidecar, write_json, write_text
        from m2m_bids.evaluation.labels import CLASSES

        outputs = {key: Path(file) for key, file in self.inputs.outputs.items()}
        sidecar = image_sidecar(
            self.inputs.sources,
            description="The 11 classes that M2M-Reg is evaluated with, left and right together, "
            "by nearest voxel from FreeSurfer's labels; 0 is what belongs to none.",
        )
        rows = [f"{number}\t{name}" for number, name in CLASSES.items()]
        write_text(outputs["table"], "\n".join(["index\tname", *rows]) + "\n")
        write_json(outputs["image_json"], sidecar)
        _copy(self.inputs.image, outputs["image"])
        self._results["out_files"] = [str(file) for file in outputs.values()]
        return runtime


class _SaveProbabilitiesInputSpec(BaseInterfaceInputSpec):
    in_files = traits.List(
        File(exists=True),
        desc="maps of grey matter, white matter and fluid; none if another program's are used",
    )
    outputs = traits.Dict(
        mandatory=True, desc="paths, as `bids.naming.expected_anat_outputs` gives them"
    )
    sources = traits.List(traits.Str(), mandatory=True, desc="BIDS URIs")


class SaveProbabilities(SimpleInterface):
    """Copy the probabilities of tissues with their sidecars, or remove those of an earlier run."""

    input_spec = _SaveProbabilitiesInputSpec
    output_spec = _SaveOutputSpec
    _always_run = True

    def _run_interface(self, runtime):
        from m2m_bids.bids.derivatives import image_sidecar, write_json
        from m2m_bids.bids.naming import TISSUES

        outputs = {key: Path(file) for key, file in self.inputs.outputs.items()}
        self._results["out_files"] = []
        if not isdefined(self.inputs.in_files):
            _remove([str(outputs[f"{key}{end}"]) for key in TISSUES for end in ("", "_json")])
            return runtime
        sidecar = image_sidecar(
            self.inputs.sources,
            description="Posterior probability, by a Gaussian mixture with a Markov random field.",
        )
        for key, file in zip(TISSUES, self.inputs.in_files, strict=True):
            write_json(outputs[f"{key}_json"], sidecar)
            self._results["out_files"] += [_copy(file, outputs[key]), str(outputs[f"{key}_json"])]
        return runtime


class _SaveFiguresInputSpec(BaseInterfaceInputSpec):
    in_files = traits.List(
        File(exists=True), mandatory=True, desc="SVG or HTML files, named by content"
    )
    drawn = traits.List(
        traits.Str(), mandatory=True, desc="content of all figures that there may be of this kind"
    )
    figures_dir = traits.Str(mandatory=True, desc="folder of the subject's figures")
    stem = traits.Str(mandatory=True, desc="entities of the scan, as in its file name")
    suffix = traits.Str(mandatory=True, desc="suffix of the figures")


class SaveFigures(SimpleInterface):
    """Copy a scan's figures as ``<stem>_desc-<name>_<suffix>``, in place of older ones."""

    input_spec = _SaveFiguresInputSpec
    output_spec = _SaveOutputSpec
    _always_run = True

    def _run_interface(self, runtime):
        inputs, folder = self.inputs, Path(self.inputs.figures_dir)

        def destination(name: str, extension: str) -> Path:
            return folder / f"{inputs.stem}_desc-{name}_{inputs.suffix}{extension}"

        files = [Path(file) for file in inputs.in_files]
        written = [_copy(str(file), destination(file.stem, file.suffix)) for file in files]
        for older in (destination(name, end) for name in inputs.drawn for end in FIGURE_ENDS):
            if str(older) not in written:
                older.unlink(missing_ok=True)
        self._results["out_files"] = written
        return runtime


class _ReplacingInputSpec(BaseInterfaceInputSpec):
    made_from = traits.Dict(desc="what the outputs depend on, kept in a sidecar (`bids.request`)")
    obsolete_files = traits.List(
        traits.Str(), desc="files that an earlier run wrote and that no longer belong to the scan"
    )


class _SaveScanInputSpec(_ReplacingInputSpec):
    preproc = File(exists=True, mandatory=True, desc="registered image")
    rigid = File(exists=True, mandatory=True, desc="rigidly registered image")
    rigid_xfm = File(exists=True, mandatory=True, desc="ITK affine to the target")
    rigid_inverse_xfm = File(exists=True, mandatory=True, desc="its inverse")
    rigid_score = traits.Float(desc="mutual information, nats")
    rigid_start = traits.Str(desc="the start that won")
    reference_method = traits.Str(desc="how the static image was made")
    m2m_xfms = traits.List(File(exists=True), desc="composite and inverse, or empty")
    quality = traits.Dict(desc="numbers of the deformable step")
    objections = traits.List(traits.Str(), desc="why the deformable step was rejected")
    device_used = traits.Str(desc="device of the network")
    sha256 = traits.Str(desc="hash of the weights")
    measures = traits.Dict(mandatory=True, desc="numbers for quality control")
    static = File(exists=True, desc="static image of a dynamic scan, registered")
    motion_file = File(exists=True, desc="motion parameters of a dynamic scan")
    motion_description = traits.Dict(desc="sidecar of the motion parameters")
    frame_xfms = traits.List(
        File(exists=True), desc="ITK affine per frame: static to frame points"
    )
    outputs = traits.Dict(mandatory=True, desc="paths, as `bids.naming.expected_outputs` gives")
    frame_outputs = traits.Dict(desc="paths, as `bids.naming.frame_outputs` gives, for PET")
    sidecar = traits.Dict(mandatory=True, desc="arguments of `bids.derivatives.image_sidecar`")
    provenance = traits.Dict(mandatory=True, desc="fields of `bids.derivatives.Provenance`")
    template = traits.Str("", usedefault=True, desc="target, if it is a template and no T1w")
    methods = traits.Dict(desc="how the image is made, in words (`bids.methods`)")


class SaveScan(SimpleInterface):
    """
    Copy all outputs of one scan, each beside and then renamed.

    The sidecar of the registered image comes last: where it is, the scan is complete.
    """

    input_spec = _SaveScanInputSpec
    output_spec = _SaveOutputSpec
    _always_run = True

    def _run_interface(self, runtime):
        from m2m_bids.bids.derivatives import Provenance, image_sidecar, write_json

        inputs, outputs = self.inputs, self.inputs.outputs
        marker = Path(outputs["preproc_json"])
        marker.unlink(missing_ok=True)
        names = ("preproc", "rigid", "rigid_xfm", "rigid_inverse_xfm")
        files = {name: getattr(inputs, name) for name in names}
        m2m_xfms = inputs.m2m_xfms if isdefined(inputs.m2m_xfms) else []
        for name, file in zip(("m2m_xfm", "m2m_inverse_xfm"), m2m_xfms, strict=False):
            files[name] = file
        for name in {"m2m_xfm", "m2m_inverse_xfm"} & outputs.keys() - files.keys():
            Path(outputs[name]).unlink(missing_ok=True)
        written = [_copy(file, Path(outputs[name])) for name, file in files.items()]
        written += self._save_frames()
        _remove(inputs.obsolete_files)
        linear, description = "rigid", "Rigidly aligned with the T1w."
        if inputs.template:
            linear = "affine"
            description = f"Affinely aligned with the template {inputs.template}."
        rigid = Provenance(**{**inputs.provenance, "transform": linear})
        static = {**_of_volume(inputs), "description": description}
        write_json(Path(outputs["rigid_json"]), image_sidecar(**static, provenance=rigid))
        write_json(Path(outputs["qc_json"]), inputs.measures)
        write_json(marker, self._sidecar("m2m" if m2m_xfms else linear))
        written += [outputs["rigid_json"], outputs["qc_json"], str(marker)]
        self._results["out_files"] = written
        return runtime

    def _save_frames(self) -> list[str]:
        """Save what only dynamic scans have; of an earlier run nothing is left."""
        from m2m_bids.bids.derivatives import image_sidecar, write_json
        from m2m_bids.spatial.itk import read_affine, write_affine

        inputs = self.inputs
        outputs = inputs.frame_outputs if isdefined(inputs.frame_outputs) else {}
        for file in outputs.values():
            Path(file).unlink(missing_ok=True)
        written = []
        if isdefined(inputs.static):
            written = [_copy(inputs.static, Path(outputs["static"])), outputs["static_json"]]
            space = inputs.template or "the T1w"
            description = f"Static image in the space of {space}: {inputs.reference_method}."
            static = {**_of_volume(inputs), "description": description}
            write_json(Path(outputs["static_json"]), image_sidecar(**static))
        if isdefined(inputs.motion_file):
            written += [_copy(inputs.motion_file, Path(outputs["motion"])), outputs["motion_json"]]
            description = {**inputs.motion_description, "Sources": inputs.sidecar["sources"][:1]}
            write_json(Path(outputs["motion_json"]), description)
            matrices = [read_affine(file) for file in inputs.frame_xfms]
            written.append(str(write_affine(matrices, outputs["motion_xfm"])))
        return written

    def _sidecar(self, transform: str) -> dict:
        from m2m_bids.bids.derivatives import Provenance, image_sidecar
        from m2m_bids.bids.methods import METHODS_FIELD
        from m2m_bids.bids.request import MADE_FROM_FIELD

        inputs = self.inputs
        known = {"weights_sha256": inputs.sha256, "device": inputs.device_used}
        used = {name: value for name, value in known.items() if isdefined(value)}
        if isdefined(inputs.objections) and inputs.objections:
            used["fallback_reason"] = "; ".join(inputs.objections)
        provenance = Provenance(**{**inputs.provenance, "transform": transform, **used})
        sidecar = image_sidecar(**_of_image(inputs), provenance=provenance)
        numbers = {
            "StaticReference": inputs.reference_method,
            "LinearScore": inputs.rigid_score,
            "LinearStart": inputs.rigid_start,
            "DeformableQuality": inputs.quality,
            METHODS_FIELD: inputs.methods,
        }
        if isdefined(inputs.made_from):
            numbers[MADE_FROM_FIELD] = _record(inputs)
        return {
            **sidecar,
            **{name: value for name, value in numbers.items() if isdefined(value) and value != {}},
        }


class _SaveInSpaceInputSpec(BaseInterfaceInputSpec):
    image = File(exists=True, mandatory=True, desc="image of the scan in the space, or its frames")
    static = File(exists=True, desc="static image of a dynamic scan there")
    reference_method = traits.Str(desc="how the static image was made")
    xfm = File(exists=True, desc="ITK composite from the scan to the template")
    inverse_xfm = File(exists=True, desc="its inverse")
    m2m_xfms = traits.List(File(exists=True), desc="deformable transforms, empty if rejected")
    outputs = traits.Dict(
        mandatory=True,
        desc="paths for each transform, as `bids.naming.expected_space_outputs` gives, and for "
        "PET `static_outputs`",
    )
    sidecar = traits.Dict(mandatory=True, desc="arguments of `bids.derivatives.image_sidecar`")
    provenance = traits.Dict(mandatory=True, desc="fields of `bids.derivatives.Provenance`")
    linear = traits.Enum(
        "rigid", "affine", usedefault=True, desc="transform if none is deformable"
    )
    made_from = traits.Dict(desc="what these outputs depend on (`bids.request`)")


class SaveInSpace(SimpleInterface):
    """Copy the images of a scan in another space, a sidecar last, and the transforms there."""

    input_spec = _SaveInSpaceInputSpec
    output_spec = _SaveOutputSpec
    _always_run = True

    def _run_interface(self, runtime):
        from m2m_bids.bids.derivatives import Provenance, image_sidecar, write_json
        from m2m_bids.bids.request import MADE_FROM_FIELD

        inputs = self.inputs
        used = "m2m" if isdefined(inputs.m2m_xfms) and inputs.m2m_xfms else "rigid"
        outputs = {name: Path(file) for name, file in inputs.outputs[used].items()}
        outputs["image_json"].unlink(missing_ok=True)
        for files in inputs.outputs.values():
            for file in {Path(file) for file in files.values()} - set(outputs.values()):
                file.unlink(missing_ok=True)
        names = ("image", "xfm", "inverse_xfm")
        written = [
            _copy(getattr(inputs, name), outputs[name]) for name in names if name in outputs
        ]
        transform = inputs.linear if used == "rigid" else used
        provenance = Provenance(**{**inputs.provenance, "transform": transform})
        written += self._save_static(outputs, provenance)
        sidecar = image_sidecar(**_of_image(inputs), provenance=provenance)
        if isdefined(inputs.made_from) and inputs.made_from:
            sidecar[MADE_FROM_FIELD] = _record(inputs)
        write_json(outputs["image_json"], sidecar)
        self._results["out_files"] = [*written, str(outputs["image_json"])]
        return runtime

    def _save_static(self, outputs, provenance):
        """Save the static image of a dynamic scan; of an earlier run nothing is left."""
        from m2m_bids.bids.derivatives import image_sidecar, write_json

        inputs = self.inputs
        if not isdefined(inputs.static):
            _remove([str(outputs[name]) for name in {"static", "static_json"} & outputs.keys()])
            return []
        static = {
            **_of_volume(inputs),
            "description": f"{inputs.sidecar['description']} Static image: "
            f"{inputs.reference_method}.",
        }
        write_json(outputs["static_json"], image_sidecar(**static, provenance=provenance))
        return [_copy(inputs.static, outputs["static"]), str(outputs["static_json"])]


class _SaveTemplateInputSpec(BaseInterfaceInputSpec):
    image = File(exists=True, mandatory=True, desc="T1w on the grid of the template")
    xfm = File(exists=True, mandatory=True, desc="ITK composite from the T1w to the template")
    inverse_xfm = File(exists=True, mandatory=True, desc="its inverse")
    is_skull_stripped = traits.Bool(mandatory=True, desc="whether the T1w came without skull")
    outputs = traits.Dict(
        mandatory=True, desc="paths, as `bids.naming.expected_template_outputs` gives"
    )
    sources = traits.List(traits.Str(), mandatory=True, desc="BIDS URIs")
    description = traits.Str(mandatory=True, desc="how it came to the template")


class SaveTemplate(SimpleInterface):
    """Copy a T1w in a template's space and the transforms between both."""

    input_spec = _SaveTemplateInputSpec
    output_spec = _SaveOutputSpec
    _always_run = True

    def _run_interface(self, runtime):
        from m2m_bids.bids.derivatives import image_sidecar, write_json

        inputs, outputs = self.inputs, self.inputs.outputs
        files = {"preproc": inputs.image, "xfm": inputs.xfm, "inverse_xfm": inputs.inverse_xfm}
        written = [_copy(file, Path(outputs[name])) for name, file in files.items()]
        sidecar = image_sidecar(
            inputs.sources,
            is_skull_stripped=inputs.is_skull_stripped,
            description=inputs.description,
        )
        write_json(Path(outputs["preproc_json"]), sidecar)
        self._results["out_files"] = [*written, outputs["preproc_json"]]
        return runtime


class _SaveQuantificationInputSpec(_ReplacingInputSpec):
    files = traits.Dict(desc="files by key")
    facts = traits.Dict(desc="what sidecars say, by key")
    tacs_file = File(exists=True, desc="time-activity curves, besides `files`")
    preproc = File(exists=True, desc="the image itself, besides `files`")
    outputs = traits.Dict(
        mandatory=True, desc="paths, as `bids.naming.quantification_outputs` gives them"
    )
    image_sidecar = traits.Dict(mandatory=True, desc="sidecar of images, without facts")
    table_sidecar = traits.Dict(mandatory=True, desc="sidecar of tables, without facts")
    pvc_reason = traits.Str(
        "", usedefault=True, desc="why partial volume effects could not be corrected, or nothing"
    )
    waits_for = InputMultiObject(traits.Any, nohash=True, desc="what is to be saved before")


class SaveQuantification(SimpleInterface):
    """
    Copy tables and images of a scan, each with its sidecar, and remove those of earlier runs.

    The sidecar of the statistics comes last: where it is, the quantification is complete. Where
    there can be no statistics it says why.
    """

    input_spec = _SaveQuantificationInputSpec
    output_spec = _SaveOutputSpec
    _always_run = True

    def _run_interface(self, runtime):
        from m2m_bids.bids.derivatives import write_json

        inputs = self.inputs
        outputs = {key: Path(file) for key, file in inputs.outputs.items()}
        files = dict(inputs.files) if isdefined(inputs.files) else {}
        for key, file in (("tacs", inputs.tacs_file), ("preproc", inputs.preproc)):
            if isdefined(file):
                files[key] = file
        outputs["stat_json"].unlink(missing_ok=True)
        for key in {name.removesuffix("_json") for name in outputs} - files.keys():
            outputs[key].unlink(missing_ok=True)
            outputs[f"{key}_json"].unlink(missing_ok=True)
        _remove(inputs.obsolete_files)
        keys = [*sorted(files.keys() - {"stat"})]
        if "stat" in files or isdefined(inputs.made_from):
            keys.append("stat")
        written = []
        for key in keys:
            if key in files:
                written.append(_copy(files[key], outputs[key]))
            write_json(outputs[f"{key}_json"], self._sidecar(key, files.get(key)))
            written.append(str(outputs[f"{key}_json"]))
        self._results["out_files"] = written
        return runtime

    def _sidecar(self, key: str, file: str | None) -> dict:
        import nibabel as nb

        from m2m_bids.bids.derivatives import NO_PVC_FIELD, of_one_volume
        from m2m_bids.bids.request import MADE_FROM_FIELD
        from m2m_bids.quantification.tables import STAT_COLUMNS, TACS_COLUMNS

        inputs = self.inputs
        facts = inputs.facts.get(key, {}) if isdefined(inputs.facts) else {}
        columns = {"stat": STAT_COLUMNS, "tacs": TACS_COLUMNS}.get(key)
        if columns is None:
            is_volume = len(nb.load(file).shape) == 3
            described = of_one_volume(inputs.image_sidecar) if is_volume else inputs.image_sidecar
            return {**described, **facts}
        told = {}
        if key == "stat" and inputs.pvc_reason:
            told[NO_PVC_FIELD] = inputs.pvc_reason
        if key == "stat" and isdefined(inputs.made_from):
            told[MADE_FROM_FIELD] = inputs.made_from
        return {**inputs.table_sidecar, **facts, **told, **columns}


def _of_image(inputs: _SaveScanInputSpec | _SaveInSpaceInputSpec) -> dict:
    """Arguments of `image_sidecar` for the image of a scan: its frames, or its one volume."""
    return inputs.sidecar if isdefined(inputs.static) else _of_volume(inputs)


def _of_volume(inputs: _SaveScanInputSpec | _SaveInSpaceInputSpec) -> dict:
    """Arguments of `image_sidecar` for a volume: the static image of frames, or the scan."""
    from m2m_bids.bids.derivatives import of_one_volume, without_frames

    adapt = without_frames if isdefined(inputs.static) else of_one_volume
    return {**inputs.sidecar, "source_metadata": adapt(inputs.sidecar.get("source_metadata", {}))}


def _record(inputs: _SaveScanInputSpec | _SaveInSpaceInputSpec) -> dict:
    """Say what outputs depend on; those of a scan of one frame not on how frames are used."""
    from m2m_bids.bids.request import FRAMES

    is_dynamic = isdefined(inputs.static)
    return {key: value for key, value in inputs.made_from.items() if key != FRAMES or is_dynamic}


def _remove(files: list[str]) -> None:
    """Remove files that may be gone already."""
    for file in files if isdefined(files) else []:
        Path(file).unlink(missing_ok=True)


def _copy(file: str, destination: Path) -> str:
    """Copy a file to a name where it is never seen half-written."""
    from m2m_bids.whole_files import replacing

    with replacing(destination) as beside:
        shutil.copyfile(file, beside)
    return str(destination)
