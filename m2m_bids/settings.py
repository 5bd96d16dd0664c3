"""The settings of a run: one frozen object, validated once, saved beside the outputs."""

import logging
import os
import re
import tempfile
import tomllib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from m2m_bids.bids.quantification import QuantificationOptions
from m2m_bids.bids.spaces import T1W, OutputSpace, parse_space

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
DEFAULT_REFINE_STEPS = 60
DEFAULT_RANDOM_SEED = 0
DEFAULT_MAX_STEPS = 50_000
DEFAULT_N_PAIRS = 20
DEFAULT_BASELINE_SPACING_MM = 1.5
MODALITIES = ("pet", "fa")
ANATOMICAL_REFERENCES = ("nearest", "sessionwise", "first-lex")
BRAIN_EXTRACTIONS = ("auto", "template", "synthstrip", "skip")
NO_T1W = ("skip", "register-to-template")
TRANSFORMS = ("m2m", "rigid")
SUVR_REGIONS = (
    *("auto", "none", "cerebellar-grey", "whole-cerebellum", "brainstem"),
    "eroded-white-matter",
)
PVC_METHODS = ("none", "gtm", "rbv")
ANALYSIS_LEVELS = ("participant", "group", "train", "evaluate")
NETWORK_SIZES = ("compact", "paper")
PRECISIONS = ("auto", "bfloat16", "float32")
# What --config-file does not bring back: where a run reads and writes is said anew, and an
# action that was asked for once is not repeated.
NOT_REUSED = frozenset(
    {
        "bids_dir",
        "output_dir",
        "run_uuid",
        "clean_workdir",
        "dry_run",
        "prepare_only",
        "reports_only",
        "resume",
        "templateflow_home",
        "verbose",
        "write_graph",
    }
)

_LABEL = re.compile(r"[a-zA-Z0-9+]+")
_DATASET_NAME = re.compile(r"[a-zA-Z0-9_.+-]+")
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
_PET_REFERENCE = re.compile(r"auto|twa|sum|frame:\d{1,4}")
_RUN_UUID = re.compile(r"\d{8}-\d{6}_[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def new_run_uuid() -> str:
    """Make the name of a run, ``YYYYMMDD-HHMMSS_<uuid4>`` in local time."""
    return f"{datetime.now():%Y%m%d-%H%M%S}_{uuid.uuid4()}"


def available_cpus() -> int:
    """Count the CPU cores that this process may use, those of its SLURM job if it is in one."""
    has_affinity = hasattr(os, "sched_getaffinity")
    n_cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
        if (share := os.environ.get(name, "")).isdigit():
            return min(n_cores, int(share))
    return n_cores


def _templateflow_home() -> Path:
    """Find the TemplateFlow archive, before niworkflows is imported (see `interfaces.bids`)."""
    return Path(os.environ.get("TEMPLATEFLOW_HOME") or "~/.cache/templateflow")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """
    Every option of a run.

    Paths become absolute; labels have no prefix. An instance has been validated.

    Attributes
    ----------
    bids_dir, output_dir : Path
        Raw BIDS dataset, and root of the output dataset.
    analysis_level : {"participant", "group", "train", "evaluate"}
        Register scans, look at all that were registered, train a network on them, or compare
        methods of registration on them.
    participant_label, session_label, tracer_label : tuple of str
        Labels to process; empty for all.
    rec_label, run_label : tuple of str
        Reconstructions of PET scans, and runs of scans, to process; empty for all.
    subjects_sessions_tsv : Path, optional
        Table of the participants and sessions to process.
    subject_anatomical_reference : {"nearest", "sessionwise", "first-lex"}
        The T1w of a scan: of its session or else the nearest one, of its session only, or of the
        first session.
    modalities : tuple of str
        Kinds of scans to register: "pet", "fa".
    derivatives : tuple of (str, Path)
        Derivatives datasets by name; without any, those in ``bids_dir/derivatives/``. See also
        `derivative_dirs`.
    bids_filter_file : Path, optional
        JSON file of further queries.
    bids_database_dir : Path, optional
        Folder of indices of the datasets, for later runs.
    skip_bids_validation : bool
        Whether the input is not validated.
    work_dir : Path
        Folder of intermediate results.
    clean_workdir : bool
        Whether the work folder is emptied before the run.
    purge_workdir_on_success : bool
        Whether intermediate results of participants without failed scans are removed at the end.
    nprocs, omp_nthreads : int
        Threads of all processes together, and of one process. 0 stands for a number that fits
        the machine and is replaced by it.
    mem_gb : float, optional
        Memory that all processes may use together, in GB; None for what there is.
    device : str
        "auto", "cpu", "cuda" or "cuda:N".
    plugin_file : Path, optional
        YAML file with Nipype's ``plugin`` and ``plugin_args``.
    config_file : Path, optional
        The file that options were read from.
    stop_on_first_crash : bool
        Whether one failed scan ends the run.
    weights : Path, optional
        Folder of network weights; None for those of the package.
    refine : int
        Steps of refinement after the network; 0 for none.
    brain_extraction : {"auto", "template", "synthstrip", "skip"}
        Whether a T1w is looked at to tell if it came without skull, is taken to have one, or to
        have none; or SynthStrip, which "auto" takes too where its model is given.
    synthstrip_model : Path, optional
        SynthStrip's weights.
    no_t1w : {"skip", "register-to-template"}
        What becomes of scans without a T1w: left out, or registered to the embedded template.
    transform : {"m2m", "rigid"}
        The last step of registration.
    output_spaces : tuple of str
        Spaces that registered scans are written in, ``NAME[:cohort-LABEL][:res-LABEL]``; the
        T1w's own grid is always among them. See also `further_spaces`.
    pet_reference : str
        Static image of a dynamic PET scan: "auto", "twa", "sum" or "frame:N".
    hmc_off : bool
        Whether the frames of dynamic PET scans are left as they lie.
    random_seed : int
        Seed of every random number.
    network, network_size, objective : str
        What "train" trains: names as in `m2m_bids.cohort.TrainingOptions`. ``weights`` is what it
        starts from.
    pre_aligned : str
        Number, or share with "%", of the participants whose own pair may be the bridge.
    aligned_share : float
        How often the bridge is such a pair, where there are any.
    max_steps, validate_every : int
        Iterations of the training, and between validations.
    grid_size, grid_spacing_mm : int, float
        Grid of the network; 0 and None for that of the network's size.
    batch_size : int
        In each process; 0 for the default of the network's size and objective.
    learning_rate : float, optional
        None for the default of the network's size.
    precision : {"auto", "bfloat16", "float32"}
        "auto" for bfloat16 where the device computes in it.
    run_name : str
        Folder of the training below ``output_dir/training``; empty for network and objective.
    resume : bool
        Whether a training that is there is continued.
    prepare_only : bool
        Whether the images are prepared, and nothing is trained.
    pairs : Path, optional
        Table of the pairs that "evaluate" registers; None for a sample of them.
    n_pairs : int
        Pairs of a sample, for each kind of image and of pair.
    methods : tuple of str
        Keys of the methods that "evaluate" compares; empty for all.
    compare : tuple of (str, Path)
        Folders of further weights to compare, by name.
    networks_alone : bool
        Run them without refinement and check.
    fs_subjects_dir : Path, optional
        FreeSurfer's folder of subjects, with the labels to quantify or to evaluate with, and
        brain masks and tissues that no derivatives dataset has.
    suvr_region : str
        Reference region of SUVR: "auto", "none", or its name.
    suvr_mask : str
        Path of a mask of it in the T1w's space, with ``{sub}`` and ``{ses}`` for labels; or empty.
    pvc : {"none", "gtm", "rbv"}
        Correction for partial volume effects.
    psf_fwhm_mm : tuple of float
        Width of the scanner's point spread function, or three: to the right, to the front, up.
    smooth_fwhm_mm : tuple of float
        Widths of the kernels by which copies of images are smoothed.
    baseline_spacing_mm : float
        Voxels of the images that methods other than M2M-Reg see.
    dry_run, write_graph, reports_only : bool
        Only list the scans; write the graph of the workflow; only write reports.
    verbose : int
        How often -v was given.
    templateflow_home : Path
        Folder of the TemplateFlow archive: ``$TEMPLATEFLOW_HOME``, or TemplateFlow's default.
    run_uuid : str
        Name of the run, ``YYYYMMDD-HHMMSS_<uuid4>``.

    Raises
    ------
    ValueError
        If an option is invalid; the message names it, its value and what is expected.
    """

    bids_dir: Path
    output_dir: Path
    analysis_level: str = "participant"
    participant_label: tuple[str, ...] = ()
    session_label: tuple[str, ...] = ()
    tracer_label: tuple[str, ...] = ()
    rec_label: tuple[str, ...] = ()
    run_label: tuple[str, ...] = ()
    subjects_sessions_tsv: Path | None = None
    subject_anatomical_reference: Literal["nearest", "sessionwise", "first-lex"] = "nearest"
    modalities: tuple[str, ...] = MODALITIES
    derivatives: tuple[tuple[str, Path], ...] = ()
    bids_filter_file: Path | None = None
    bids_database_dir: Path | None = None
    skip_bids_validation: bool = False
    work_dir: Path = Path("work")
    clean_workdir: bool = False
    purge_workdir_on_success: bool = False
    nprocs: int = 0
    omp_nthreads: int = 0
    mem_gb: float | None = None
    device: str = "auto"
    plugin_file: Path | None = None
    config_file: Path | None = None
    stop_on_first_crash: bool = False
    weights: Path | None = None
    refine: int = DEFAULT_REFINE_STEPS
    brain_extraction: Literal["auto", "template", "synthstrip", "skip"] = "auto"
    synthstrip_model: Path | None = None
    no_t1w: Literal["skip", "register-to-template"] = "skip"
    transform: Literal["m2m", "rigid"] = "m2m"
    output_spaces: tuple[str, ...] = (T1W,)
    pet_reference: str = "auto"
    hmc_off: bool = False
    random_seed: int = DEFAULT_RANDOM_SEED
    network: str = "gradicon"
    network_size: Literal["compact", "paper"] = "compact"
    objective: str = "m2m+gcc"
    pre_aligned: str = "0"
    aligned_share: float = 1.0
    max_steps: int = DEFAULT_MAX_STEPS
    validate_every: int = 500
    grid_size: int = 0
    grid_spacing_mm: float | None = None
    batch_size: int = 0
    learning_rate: float | None = None
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    run_name: str = ""
    resume: bool = False
    prepare_only: bool = False
    pairs: Path | None = None
    n_pairs: int = DEFAULT_N_PAIRS
    methods: tuple[str, ...] = ()
    compare: tuple[tuple[str, Path], ...] = ()
    networks_alone: bool = False
    fs_subjects_dir: Path | None = None
    suvr_region: str = "auto"
    suvr_mask: str = ""
    pvc: Literal["none", "gtm", "rbv"] = "none"
    psf_fwhm_mm: tuple[float, ...] = ()
    smooth_fwhm_mm: tuple[float, ...] = ()
    baseline_spacing_mm: float = DEFAULT_BASELINE_SPACING_MM
    dry_run: bool = False
    write_graph: bool = False
    reports_only: bool = False
    verbose: int = 0
    templateflow_home: Path = field(default_factory=_templateflow_home)
    run_uuid: str = field(default_factory=new_run_uuid)

    def __post_init__(self) -> None:
        """Make paths absolute, fill in what depends on the machine, and validate."""
        for name in _PATHS:
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, _absolute(path))
        given = self.derivatives or nested_derivatives(self.bids_dir)
        for name, folders in (("derivatives", given), ("compare", self.compare)):
            absolute = tuple((label, _absolute(path)) for label, path in folders)
            object.__setattr__(self, name, absolute)
        for name in _TUPLES:
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))
        widths = tuple(dict.fromkeys(float(width) for width in self.smooth_fwhm_mm))
        object.__setattr__(self, "smooth_fwhm_mm", widths)
        object.__setattr__(self, "psf_fwhm_mm", tuple(float(width) for width in self.psf_fwhm_mm))
        _check_choices(self)
        _check_brain_extraction(self)
        _check_numbers(self)
        _check_quantification(self)
        _check_folders(self)
        _check_files(self)
        nprocs = self.nprocs or available_cpus()
        object.__setattr__(self, "nprocs", nprocs)
        object.__setattr__(self, "omp_nthreads", self.omp_nthreads or max(1, min(nprocs - 1, 8)))

    @property
    def derivative_dirs(self) -> dict[str, Path]:
        """Derivatives datasets by name."""
        return dict(self.derivatives)

    @property
    def frames_request(self) -> dict[str, Any]:
        """How the frames of dynamic PET scans are used, as their sidecars tell."""
        return {"Reference": self.pet_reference, "MotionCorrection": not self.hmc_off}

    @property
    def quantification_options(self) -> QuantificationOptions:
        """How scans are quantified."""
        return QuantificationOptions(
            fs_subjects_dir=self.fs_subjects_dir,
            derivatives=self.derivative_dirs,
            suvr_region=self.suvr_region,
            suvr_mask=self.suvr_mask,
            pvc=self.pvc,
            psf_fwhm_mm=self.psf_fwhm_mm,
            smooth_fwhm_mm=self.smooth_fwhm_mm,
        )

    @property
    def anatomy_sources(self) -> tuple[Path, dict[str, Path], Path | None, list[str]]:
        """Where other programs' anatomy may be: see `m2m_bids.bids.precomputed.find_anatomy`."""
        spaces = [space for space in self.further_spaces if space.is_template]
        templates = [*dict.fromkeys(space.template for space in spaces)]
        return self.bids_dir, self.derivative_dirs, self.fs_subjects_dir, templates

    @property
    def further_spaces(self) -> list[OutputSpace]:
        """Output spaces beside the T1w's own grid."""
        return [
            space
            for text in self.output_spaces
            if (space := parse_space(text)) != (T1W, None, None)
        ]

    @property
    def datasets(self) -> dict[str, Path]:
        """Every dataset that outputs may be made of, by the name that BIDS URIs use."""
        freesurfer = {"freesurfer": self.fs_subjects_dir} if self.fs_subjects_dir else {}
        return {"raw": self.bids_dir, **freesurfer, **self.derivative_dirs}

    @property
    def evaluation_dir(self) -> Path:
        """Folder of the comparison of methods."""
        return self.output_dir / "evaluation"

    @property
    def training_dir(self) -> Path:
        """Folder of the trainings and of the images that they share."""
        return self.output_dir / "training"

    @property
    def run_dir(self) -> Path:
        """Folder of this training."""
        return self.training_dir / (self.run_name or f"{self.network}-{self.objective}")

    @property
    def config_toml(self) -> Path:
        """File under the output's ``logs/`` that keeps the settings of this run."""
        return self.output_dir / "logs" / f"config_{self.run_uuid}.toml"

    def to_toml(self, file: Path | None = None) -> Path:
        """
        Save the settings in one step, by default as `config_toml`.

        Returns
        -------
        Path
            The file.
        """
        import tomli_w

        file = self.config_toml if file is None else Path(file)
        text = tomli_w.dumps({"schema_version": SCHEMA_VERSION, "settings": self._to_table()})
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=".m2m-bids-config.") as folder:
            partial = Path(folder) / file.name
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, file)
        return file

    def _to_table(self) -> dict[str, Any]:
        """Spell the settings in types that TOML has; options that are None are absent."""
        table: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in _NAMED_FOLDERS:
                table[item.name] = {name: str(path) for name, path in value}
            elif isinstance(value, tuple):
                table[item.name] = list(value)
            elif value is not None:
                table[item.name] = str(value) if isinstance(value, Path) else value
        return table

    @classmethod
    def from_toml(cls, file: Path, **overrides: Any) -> "Settings":
        """
        Read settings that `to_toml` has saved.

        Without overrides the result equals what was saved, the run's name included.

        Raises
        ------
        ValueError
            If the file or one of its options is invalid.
        """
        return cls(**{**read_toml(file), **overrides})


_PATHS = (
    "bids_dir",
    "output_dir",
    "subjects_sessions_tsv",
    "bids_filter_file",
    "bids_database_dir",
    "work_dir",
    "plugin_file",
    "config_file",
    "weights",
    "pairs",
    "synthstrip_model",
    "fs_subjects_dir",
    "templateflow_home",
)
_LABELS = ("participant_label", "session_label", "tracer_label", "rec_label", "run_label")
_TUPLES = (*_LABELS, "modalities", "methods", "output_spaces")
_NAMED_FOLDERS = ("derivatives", "compare")
_NUMBERS = ("psf_fwhm_mm", "smooth_fwhm_mm")
_FLOATS = ("mem_gb", "learning_rate", "aligned_share", "grid_spacing_mm", "baseline_spacing_mm")


def nested_derivatives(bids_dir: Path) -> tuple[tuple[str, Path], ...]:
    """
    List the derivatives datasets inside a BIDS dataset, in ``derivatives/<name>/``.

    Those of this app are left out: they are outputs.
    """
    found = []
    for folder in sorted((bids_dir / "derivatives").glob("*/")):
        description = folder / "dataset_description.json"
        is_own = description.is_file() and '"m2m-bids"' in description.read_text(errors="replace")
        if _DATASET_NAME.fullmatch(folder.name) and _has_subjects(folder) and not is_own:
            found.append((folder.name, folder))
    return tuple(found)


def _has_subjects(folder: Path) -> bool:
    """Tell whether a folder has those of subjects, at its top or, as Clinica's, one below."""
    return any(folder.glob("sub-*/")) or any(folder.glob("subjects/sub-*/"))


def read_toml(file: Path) -> dict[str, Any]:
    """
    Read the options of a settings file, in the types of `Settings`, without validating them.

    Unknown options, of a newer version say, are left out with a warning.

    Raises
    ------
    ValueError
        If the file cannot be read, is not TOML, or is of a later schema.
    """
    try:
        content = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"--config-file {file}: cannot be read as TOML ({error})") from error
    version = content.get("schema_version")
    if not isinstance(version, int) or not isinstance(content.get("settings"), dict):
        raise ValueError(
            f"--config-file {file}: no settings of m2m-bids. Give a config_*.toml file from the "
            "logs/ folder of an earlier output."
        )
    if version > SCHEMA_VERSION:
        raise ValueError(
            f"--config-file {file}: has schema version {version}, this version of m2m-bids "
            f"reads up to {SCHEMA_VERSION}. Update m2m-bids."
        )
    known = {item.name: item for item in fields(Settings)}
    options = {}
    for name, value in content["settings"].items():
        if name not in known:
            logger.warning("%s: unknown option %r is ignored.", file, name)
            continue
        options[name] = _from_toml_value(name, value, f"--config-file {file}: option {name}")
    return options


def _from_toml_value(name: str, value: Any, where: str) -> Any:
    """Convert one value of a settings file to the type that `Settings` has."""
    if name in _NAMED_FOLDERS:
        if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
            raise ValueError(f"{where}: expected a table of NAME = PATH, found {value!r}")
        return tuple((key, Path(path)) for key, path in value.items())
    default = {item.name: item.default for item in fields(Settings)}[name]
    if name in _TUPLES:
        is_valid = isinstance(value, list) and all(isinstance(item, str) for item in value)
        value = tuple(value) if is_valid else value
    elif name in _NUMBERS:
        value = tuple(value) if isinstance(value, list) else (value,)
        is_valid = all(type(item) in (int, float) for item in value)
    elif name in _PATHS:
        is_valid = isinstance(value, str)
        value = Path(value) if is_valid else value
    elif name in _FLOATS:
        is_valid = isinstance(value, int | float) and not isinstance(value, bool)
    else:
        is_valid = type(value) is (str if name == "run_uuid" else type(default))
    if not is_valid:
        raise ValueError(f"{where}: {value!r} is of the wrong type")
    return value


def _absolute(path: Path | str) -> Path:
    """Make a path absolute and expand ``~``; links are kept."""
    return Path(os.path.normpath(Path(path).expanduser().absolute()))


def _is_within(inner: Path, outer: Path) -> bool:
    """Tell whether a path is another one or below it, links resolved."""
    inner, outer = inner.resolve(), outer.resolve()
    return inner == outer or outer in inner.parents


def _check_choices(settings: Settings) -> None:
    """Raise ValueError for a label, device or choice that does not exist."""
    for name in _LABELS:
        for label in getattr(settings, name):
            if not _LABEL.fullmatch(label):
                option = "--" + name.replace("_", "-")
                raise ValueError(f"{option}: {label!r} is no label (letters and digits only)")
    choices: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
        "analysis level": ((settings.analysis_level,), ANALYSIS_LEVELS),
        "--modalities": (settings.modalities, MODALITIES),
        "--subject-anatomical-reference": (
            (settings.subject_anatomical_reference,),
            ANATOMICAL_REFERENCES,
        ),
        "--brain-extraction": ((settings.brain_extraction,), BRAIN_EXTRACTIONS),
        "--no-t1w": ((settings.no_t1w,), NO_T1W),
        "--transform": ((settings.transform,), TRANSFORMS),
        "--suvr-region": ((settings.suvr_region,), SUVR_REGIONS),
        "--pvc": ((settings.pvc,), PVC_METHODS),
        "--network-size": ((settings.network_size,), NETWORK_SIZES),
        "--precision": ((settings.precision,), PRECISIONS),
    }
    for option, (values, allowed) in choices.items():
        if not values or not set(values) <= set(allowed):
            raise ValueError(f"{option}: {list(values)} must be of {', '.join(allowed)}")
    for text in settings.output_spaces:
        parse_space(text)
    if not _DEVICE.fullmatch(settings.device):
        raise ValueError(f"--device: {settings.device!r} must be auto, cpu, cuda or cuda:N")
    if not _PET_REFERENCE.fullmatch(settings.pet_reference):
        raise ValueError(
            f"--pet-reference: {settings.pet_reference!r} must be auto, twa, sum or frame:N, "
            "N from 0"
        )
    if not _RUN_UUID.fullmatch(settings.run_uuid):
        raise ValueError(f"run_uuid: {settings.run_uuid!r} is not YYYYMMDD-HHMMSS_<uuid4>")
    for option, folders, taken in (
        ("--derivatives", settings.derivatives, "raw"),
        ("--compare", settings.compare, "default"),
    ):
        names = [name for name, _ in folders]
        for name in names:
            if not _DATASET_NAME.fullmatch(name) or name == taken or names.count(name) > 1:
                raise ValueError(
                    f"{option}: {name!r} must be a name of letters, digits and _.+-, used once, "
                    f"and not {taken!r}; give another one with NAME=PATH"
                )


def _check_brain_extraction(settings: Settings) -> None:
    """Raise ValueError for options that need or contradict each other."""
    has_model = settings.synthstrip_model is not None
    if settings.brain_extraction == "synthstrip" and not has_model:
        raise ValueError(
            "--brain-extraction synthstrip needs its weights: give --synthstrip-model FILE "
            "(synthstrip.1.pt of FreeSurfer)"
        )
    if settings.brain_extraction in ("template", "skip") and has_model:
        raise ValueError(
            f"--brain-extraction {settings.brain_extraction} and --synthstrip-model: give one of "
            "both"
        )


def _check_numbers(settings: Settings) -> None:
    """Raise ValueError for a number out of its range."""
    lowest = {
        **dict.fromkeys(("nprocs", "omp_nthreads", "refine", "random_seed", "verbose"), 0),
        **{"batch_size": 0, "max_steps": 1, "validate_every": 1, "grid_size": 0, "n_pairs": 1},
    }
    for name, low in lowest.items():
        value = getattr(settings, name)
        if not isinstance(value, int) or value < low:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option}: {value!r} must be a whole number, at least {low}")
    if settings.random_seed >= 2**32:
        raise ValueError(f"--random-seed: {settings.random_seed} must be below 2^32")
    if settings.mem_gb is not None and not 0 < settings.mem_gb < float("inf"):
        raise ValueError(f"--mem: {settings.mem_gb} GB must be more than 0")
    if settings.learning_rate is not None and not 0 < settings.learning_rate < 1:
        raise ValueError(f"--learning-rate: {settings.learning_rate} must be between 0 and 1")
    if bool(settings.grid_size) != bool(settings.grid_spacing_mm):
        raise ValueError("--grid-size and --grid-spacing: give both or none")
    if settings.grid_spacing_mm is not None and not 0.1 <= settings.grid_spacing_mm <= 20:
        raise ValueError(f"--grid-spacing: {settings.grid_spacing_mm} mm must be from 0.1 to 20")
    if not 0.5 <= settings.baseline_spacing_mm <= 6:
        raise ValueError(
            f"--baseline-spacing: {settings.baseline_spacing_mm} mm must be from 0.5 to 6"
        )
    if not 0 <= settings.aligned_share <= 1:
        raise ValueError(f"--aligned-share: {settings.aligned_share} must be from 0 to 1")
    if settings.run_name and not _DATASET_NAME.fullmatch(settings.run_name):
        raise ValueError(
            f"--run-name: {settings.run_name!r} must be of letters, digits and _.+-, without /"
        )


def _check_quantification(settings: Settings) -> None:
    """Raise ValueError for widths out of range, and options that contradict each other."""
    widths = settings.psf_fwhm_mm
    if (settings.pvc != "none") != bool(widths):
        raise ValueError(
            f"--pvc {settings.pvc} and --psf-fwhm: give both or none; the width is that of the "
            "scanner's point spread function, in mm"
        )
    if len(widths) not in (0, 1, 3) or not all(0.5 <= width <= 30 for width in widths):
        raise ValueError(f"--psf-fwhm: {list(widths)} must be one or three widths, 0.5 to 30 mm")
    for width in settings.smooth_fwhm_mm:
        if not 0.5 <= width <= 30:
            raise ValueError(f"--smooth-fwhm: {width} mm must be from 0.5 to 30")
    if not settings.suvr_mask:
        return
    if settings.suvr_region != "auto":
        raise ValueError("--suvr-mask and --suvr-region: give one of both")
    try:
        settings.suvr_mask.format(sub="01", ses="01")
    except (LookupError, ValueError, AttributeError) as error:
        raise ValueError(
            f"--suvr-mask: {settings.suvr_mask!r} may have {{sub}} and {{ses}} in braces only"
        ) from error


def _check_folders(settings: Settings) -> None:
    """Raise ValueError for a missing input, or an output that would touch an input."""
    bids_dir, output_dir, work_dir = settings.bids_dir, settings.output_dir, settings.work_dir
    if not bids_dir.is_dir():
        raise ValueError(f"bids_dir: {bids_dir} is not a folder. Give the root of the dataset.")
    if _is_within(output_dir, bids_dir):
        raise ValueError(
            f"output_dir: {output_dir} is the BIDS folder {bids_dir} or inside it. Inputs are "
            "never written to: give a folder outside of it."
        )
    if _is_within(work_dir, bids_dir):
        raise ValueError(
            f"--work-dir: {work_dir} is the BIDS folder {bids_dir} or inside it. Give a folder "
            "outside of it with -w (default: ./work)."
        )
    if _is_within(bids_dir, work_dir) or _is_within(output_dir, work_dir):
        raise ValueError(
            f"--work-dir: {work_dir} holds the BIDS or the output folder, and may be emptied. "
            "Give a folder of its own with -w."
        )
    database = settings.bids_database_dir
    for name, path in (("bids_dir", bids_dir), *settings.derivatives):
        if database is not None and _is_within(database, path):
            raise ValueError(
                f"--bids-database-dir: {database} is in the dataset {name}={path}. Inputs are "
                "never written to: give a folder outside of it."
            )
    for name, path in (
        ("output_dir", output_dir),
        ("--work-dir", work_dir),
        *([("--bids-database-dir", database)] if database else []),
    ):
        if path.exists() and not path.is_dir():
            raise ValueError(f"{name}: {path} is a file. Give a folder.")
    for name, path in settings.derivatives:
        if not path.is_dir():
            raise ValueError(f"--derivatives: {name}={path} is not a folder.")
        if _is_within(output_dir, path) or _is_within(work_dir, path):
            raise ValueError(
                f"--derivatives: {name}={path} holds the output or work folder. Inputs are never "
                "written to: give other folders."
            )
    subjects_dir = settings.fs_subjects_dir
    if subjects_dir and any(_is_within(path, subjects_dir) for path in (output_dir, work_dir)):
        raise ValueError(
            f"--fs-subjects-dir: {subjects_dir} holds the output or work folder. Inputs are never "
            "written to: give other folders."
        )


def _check_files(settings: Settings) -> None:
    """Raise ValueError for a file that is missing or cannot be used."""
    files = {
        "--bids-filter-file": settings.bids_filter_file,
        "--subjects-sessions-tsv": settings.subjects_sessions_tsv,
        "--config-file": settings.config_file,
        "--use-plugin": settings.plugin_file,
        "--pairs": settings.pairs,
        "--synthstrip-model": settings.synthstrip_model,
    }
    for option, file in files.items():
        if file is not None and not file.is_file():
            raise ValueError(f"{option}: {file} is not a file.")
    weights = [
        ("--weights", settings.weights),
        *((f"--compare {k}", v) for k, v in settings.compare),
    ]
    for option, folder in weights:
        if folder is not None and not folder.is_dir():
            raise ValueError(f"{option}: {folder} is not a folder of weights.")
    if settings.fs_subjects_dir is not None and not settings.fs_subjects_dir.is_dir():
        raise ValueError(
            f"--fs-subjects-dir: {settings.fs_subjects_dir} is not a folder. Give the one that "
            "holds a folder for each subject, as $SUBJECTS_DIR does."
        )
