"""Write files into the output dataset under BIDS names."""

import atexit
import os
import re
import shutil
import tempfile
from pathlib import Path


def _keep_templateflow_out_of_home() -> None:
    """
    Point TemplateFlow to a temporary folder unless the caller chose one.

    niworkflows imports TemplateFlow, which on import fills ``$TEMPLATEFLOW_HOME``, by default in
    the home directory, and fails where that is read-only, as in a container. Nothing here needs a
    template. A folder with one (empty) template in it is left as it is, without unpacking the
    2300 placeholders that come with TemplateFlow. Worker processes inherit the variable.
    """
    if "TEMPLATEFLOW_HOME" not in os.environ:
        home = tempfile.mkdtemp(prefix="m2m-bids-templateflow-")
        Path(home, "tpl-none").mkdir()
        os.environ["TEMPLATEFLOW_HOME"] = home
        os.environ["TEMPLATEFLOW_AUTOUPDATE"] = "off"
        creator = os.getpid()
        # A forked worker runs this at its own exit too; the folder is its parent's.
        atexit.register(lambda: os.getpid() == creator and shutil.rmtree(home, ignore_errors=True))


_keep_templateflow_out_of_home()

from bids.layout import Config, parse_file_entities  # noqa: E402
from nipype.interfaces.base import isdefined  # noqa: E402
from niworkflows.interfaces.bids import (  # noqa: E402
    BIDS_DERIV_ENTITIES,
    BIDS_DERIV_PATTERNS,
)
from niworkflows.interfaces.bids import (  # noqa: E402
    DerivativesDataSink as _DerivativesDataSink,
)
from niworkflows.utils.bids import relative_to_root  # noqa: E402

from m2m_bids.whole_files import flush  # noqa: E402

_OWN_ENTITIES = [
    {"name": "param", "pattern": r"[_/\\]+param-([a-zA-Z0-9+]+)"},
    {"name": "segmentation", "pattern": r"[_/\\]+seg-([a-zA-Z0-9+]+)"},
    {"name": "chunk", "pattern": r"[_/\\]+chunk-([0-9]+)"},
    # The stock patterns of these three also match inside other words, or miss them.
    {"name": "model", "pattern": r"[_/\\]+model-([a-zA-Z0-9+]+)"},
    {"name": "resolution", "pattern": r"[_/\\]+res-([a-zA-Z0-9+]+)"},
    {"name": "density", "pattern": r"[_/\\]+den-([a-zA-Z0-9+]+)"},
]
_OWN_NAMES = {entity["name"] for entity in _OWN_ENTITIES}
_FOLDER = "sub-{subject}[/ses-{session}]/{datatype<%s>|%s}/"
_FIGURES = "sub-{subject}/{datatype<figures>}/"
_ANAT = (
    "sub-{subject}[_ses-{session}][_task-{task}][_acq-{acquisition}][_ce-{ceagent}]"
    "[_rec-{reconstruction}][_run-{run}][_echo-{echo}][_part-{part}]"
)
_PET = (
    "sub-{subject}[_ses-{session}][_task-{task}][_acq-{acquisition}][_ce-{ceagent}]"
    "[_trc-{tracer}][_rec-{reconstruction}][_run-{run}]"
)
_DWI = (
    "sub-{subject}[_ses-{session}][_acq-{acquisition}][_rec-{reconstruction}][_dir-{direction}]"
    "[_run-{run}]"
)
_XFM = (
    "[_chunk-{chunk}]_from-{from}_to-{to}_mode-{mode<image|points>|image}[_desc-{desc}]"
    "_{suffix<xfm>}{extension<.txt|.h5|.nii.gz|.json>|.h5}"
)
_SPACE = "[_space-{space}][_chunk-{chunk}][_res-{resolution}]"
_MAP = "[_model-{model}][_param-{param}][_desc-{desc}]"
_SEGMENTED = "[_seg-{segmentation}][_label-{label}][_desc-{desc}]"
_IMAGE = "{extension<.nii|.nii.gz|.json>|.nii.gz}"
_PAGE = "{extension<.svg|.html>|.svg}"


def _patterns() -> tuple[str, ...]:
    """Path patterns of this app, the most particular first."""
    anat, pet, dwi = (_FOLDER % (name, name) for name in ("anat", "pet", "dwi"))
    stat = "{suffix<jacobian|statmap>}"
    return (
        f"{anat}{_ANAT}{_XFM}",
        f"{pet}{_PET}{_XFM}",
        f"{dwi}{_DWI}[_model-{{model}}][_param-{{param}}]{_XFM}",
        f"{anat}{_ANAT}{_SPACE}{_SEGMENTED}_{{suffix<T1w|dseg|mask|probseg>}}{_IMAGE}",
        f"{pet}{_PET}{_SPACE}[_desc-{{desc}}]_{{suffix<pet|mask>}}{_IMAGE}",
        f"{pet}{_PET}{_SPACE}[_desc-{{desc}}]_{stat}{_IMAGE}",
        f"{pet}{_PET}{_SPACE}{_SEGMENTED}_{{suffix<tacs|dseg>}}{{extension<.tsv|.nii.gz|.json>}}",
        f"{dwi}{_DWI}{_SPACE}{_MAP}_{{suffix<dwimap|mask>}}{_IMAGE}",
        f"{dwi}{_DWI}{_SPACE}{_MAP}_{stat}{_IMAGE}",
        f"{_FIGURES}{_PET}{_SPACE}[_desc-{{desc}}]_{{suffix<pet>}}{_PAGE}",
        f"{_FIGURES}{_DWI}{_SPACE}{_MAP}_{{suffix<dwimap>}}{_PAGE}",
        f"{_FIGURES}{_ANAT}{_SPACE}[_desc-{{desc}}]_{{suffix<T1w>}}{_PAGE}",
    )


class DerivativesDataSink(_DerivativesDataSink):
    """
    Write a file into the output dataset under the BIDS name that was asked for, or not at all.

    Adds to niworkflows' interface the entities ``param``, ``segmentation`` and ``chunk``,
    transforms as ``.txt``, ``.h5`` and ``.nii.gz``, ``_dwimap`` and this app's figures. Unlike it,

    - a keyword that is no entity raises, where niworkflows writes it into the JSON sidecar;
      metadata go through ``meta_dict``;
    - an entity, asked for or of the source file, for which the name has no place raises, where
      niworkflows leaves it out, so that two files may get one name; name those of the source
      file that should go in ``dismiss_entities``;
    - files appear whole: they are written to a hidden folder of the dataset first.

    Raises
    ------
    TypeError
        For a keyword that is neither an input nor an entity.
    ValueError
        If an entity has no place in the name, or no name fits.
    """

    out_path_base = ""
    _config_entities_dict = [  # noqa: RUF012
        *(entity for entity in BIDS_DERIV_ENTITIES if entity["name"] not in _OWN_NAMES),
        *_OWN_ENTITIES,
    ]
    _config_entities = frozenset(entity["name"] for entity in _config_entities_dict)
    _file_patterns = (*_patterns(), *BIDS_DERIV_PATTERNS)

    def __init__(self, **inputs):
        known = {*self.input_spec.class_editable_traits(), *self._config_entities}
        if unknown := sorted(set(inputs) - known):
            raise TypeError(
                f"{', '.join(unknown)}: no input of DerivativesDataSink and no BIDS entity. "
                "Give metadata for the JSON sidecar in meta_dict."
            )
        super().__init__(**inputs)

    def _run_interface(self, runtime):
        known = set(self._static_traits)
        if unknown := sorted(set(self.inputs.copyable_trait_names()) - known):
            raise TypeError(f"{', '.join(unknown)}: not an input of DerivativesDataSink")
        base_directory = self.inputs.base_directory
        root = Path(base_directory if isdefined(base_directory) else runtime.cwd).absolute()
        root.mkdir(parents=True, exist_ok=True)
        subject = Path(self.inputs.source_file[0]).name.partition("_")[0]
        with tempfile.TemporaryDirectory(dir=root, prefix=f".m2m-bids-{subject}.") as staging:
            # niworkflows joins this to base_directory; set on the instance, not on the class.
            self.out_path_base = Path(staging).name
            try:
                runtime = super()._run_interface(runtime)
            finally:
                del self.out_path_base
            for file in self._results["out_file"]:
                self._check_name(Path(file).relative_to(staging))
            moved = {
                str(file): str(root / file.relative_to(staging))
                for file in Path(staging).rglob("*")
                if file.is_file()
            }
            # Data last: a file that is there has its sidecar.
            for file in sorted(moved, key=lambda name: not name.endswith(".json")):
                Path(moved[file]).parent.mkdir(parents=True, exist_ok=True)
                flush(file)
                os.replace(file, moved[file])
        self._results["out_file"] = [moved[file] for file in self._results["out_file"]]
        if "out_meta" in self._results:
            self._results["out_meta"] = moved[self._results["out_meta"]]
        return runtime

    def _check_name(self, file: Path) -> None:
        """Compare the entities in a name with those asked for and those of the source."""
        written = self._entities_of(file)
        sources = [self._entities_of(relative_to_root(f)) for f in self.inputs.source_file]
        expected = {
            name: value
            for name, value in sources[0].items()
            if all(other.get(name) == value for other in sources[1:])
            and name not in (self.inputs.dismiss_entities or [])
        }
        for name in self._config_entities:
            value = getattr(self.inputs, name)
            if isdefined(value) and value is not None:
                expected[name] = value
        for name in ("extension", "fmap", "scans"):
            expected.pop(name, None)
        lost = {
            name: value for name, value in expected.items() if not _holds(value, written.get(name))
        }
        if lost:
            listed = ", ".join(f"{name}={value}" for name, value in sorted(lost.items()))
            raise ValueError(
                f"{file}: the name has no place for {listed}. Choose another suffix, or name the "
                "source file's entity in dismiss_entities."
            )

    def _entities_of(self, file: Path) -> dict[str, object]:
        """Entities in a path relative to the dataset's root."""
        config = Config(
            name="m2m-bids",
            entities=self._config_entities_dict,
            default_path_patterns=self._file_patterns,
        )
        path = str(file) if str(file).startswith(os.sep) else f"{os.sep}{file}"
        return parse_file_entities(path, config=[config])


def _holds(asked: object, written: object) -> bool:
    """Whether a written entity is one of those asked for; ``run-01`` is run 1."""
    values = asked if isinstance(asked, list | tuple) else [asked]
    return any(_plain(value) == _plain(written) for value in values)


def _plain(value: object) -> str:
    """Write an entity as text without leading zeros."""
    return re.sub(r"^0+(?=\d+$)", "", str(value))
