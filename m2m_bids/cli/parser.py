"""The command line: arguments to Settings."""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

from m2m_bids import __version__
from m2m_bids.cli.plugins import read_plugin_file
from m2m_bids.settings import (
    ANALYSIS_LEVELS,
    ANATOMICAL_REFERENCES,
    BRAIN_EXTRACTIONS,
    DEFAULT_BASELINE_SPACING_MM,
    DEFAULT_MAX_STEPS,
    DEFAULT_N_PAIRS,
    DEFAULT_RANDOM_SEED,
    DEFAULT_REFINE_STEPS,
    MODALITIES,
    NETWORK_SIZES,
    NO_T1W,
    NOT_REUSED,
    PRECISIONS,
    PVC_METHODS,
    SUVR_REGIONS,
    TRANSFORMS,
    Settings,
    read_toml,
)

# GB per unit; a bare number is in MB, as in fMRIPrep.
_UNITS_GB = {"K": 1e-6, "M": 1e-3, "": 1e-3, "G": 1.0, "T": 1e3}
_EPILOG = """\
Long options may be spelled with underscores too (--participant_label).

examples:
  m2m-bids /data/bids /data/out participant -d qsirecon=/data/qsirecon
  m2m-bids /data/bids /data/out participant --participant-label 01 02 --modalities pet
  m2m-bids /data/bids /data/out participant --dry-run
  m2m-bids /data/bids /data/out group
  m2m-bids /data/bids /data/out train --modality pet --pre-aligned 10% --max-steps 20000
  m2m-bids /data/bids /data/out participant --weights /data/out/training/gradicon-m2m+gcc/weights
  m2m-bids /data/bids /data/out evaluate --fs-subjects-dir /data/freesurfer --n-pairs 50
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and whose long options take underscores too."""

    def error(self, message: str) -> NoReturn:
        line = " ".join(message.split())
        self.exit(2, f"{self.prog}: error: {line} (see {self.prog} --help)\n")

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args([_with_dashes(arg) for arg in args], namespace)


def _with_dashes(argument: str) -> str:
    """Spell a long option with dashes; values are left alone."""
    if not argument.startswith("--"):
        return argument
    option, equals, value = argument.partition("=")
    return option.replace("_", "-") + equals + value


def _label(prefix: str) -> Callable[[str], str]:
    """Make an argument type: a BIDS label, with or without its prefix."""

    def label(value: str) -> str:
        stripped = value.removeprefix(prefix)
        if not re.fullmatch(r"[a-zA-Z0-9+]+", stripped):
            raise argparse.ArgumentTypeError(f"{value!r} is no label (letters and digits only)")
        return stripped

    return label


def _memory_gb(value: str) -> float:
    """
    Read an amount of memory in GB.

    Examples
    --------
    >>> [_memory_gb(text) for text in ("8000", "8G", "8gb", "0.5T", "8000M")]
    [8.0, 8.0, 8.0, 500.0, 8.0]
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", value.strip(), re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(
            f"{value!r} is no amount of memory: give a number of MB, or one with K, M, G or T"
        )
    return float(match.group(1)) * _UNITS_GB[match.group(2).upper()]


def _named_folder(value: str) -> tuple[str, Path]:
    """Read NAME=PATH."""
    name, _, path = value.partition("=")
    if not name or not path:
        raise argparse.ArgumentTypeError(f"{value!r}: expected NAME=PATH")
    return name, Path(path)


def _derivative(value: str) -> tuple[str, Path]:
    """Read NAME=PATH, or PATH, whose name is that of its folder."""
    if "=" not in value:
        return Path(value).absolute().name, Path(value)
    return _named_folder(value)


def _weights(value: str) -> Path:
    """Read a weights folder; "default" is the one that comes with the package."""
    if value == "default":
        return Path(str(files("m2m_bids.data") / "weights" / "default"))
    return Path(value)


def _whole_number(lowest: int) -> Callable[[str], int]:
    """Make an argument type: an integer that is not below `lowest`."""

    def whole_number(value: str) -> int:
        if not re.fullmatch(r"[+-]?\d+", value) or int(value) < lowest:
            raise argparse.ArgumentTypeError(
                f"{value!r} is no whole number that is at least {lowest}"
            )
        return int(value)

    return whole_number


def build_parser() -> argparse.ArgumentParser:
    """
    Build the parser of ``m2m-bids``.

    Options that are not given are absent from the namespace; their defaults are in `Settings`.
    """
    parser = _Parser(
        prog="m2m-bids",
        description="Register PET and FA images of a BIDS dataset to the T1w image of the same "
        "participant: rigidly, then deformably with M2M-Reg.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("bids_dir", type=Path, help="root folder of the raw BIDS dataset")
    parser.add_argument("output_dir", type=Path, help="output folder, outside of bids_dir")
    parser.add_argument(
        "analysis_level",
        choices=ANALYSIS_LEVELS,
        help="'participant' registers scans; 'group' collects the quality of all that were "
        "registered; 'train' trains a network on them; 'evaluate' compares methods of "
        "registration on them",
    )
    _add_selection(parser.add_argument_group("which scans"))
    _add_registration(parser.add_argument_group("registration"))
    _add_quantification(parser.add_argument_group("quantification"))
    _add_training(parser.add_argument_group("training (level 'train')"))
    _add_evaluation(parser.add_argument_group("evaluation (level 'evaluate')"))
    _add_performance(parser.add_argument_group("performance"))
    _add_running(parser.add_argument_group("running"))
    _add_information(parser.add_argument_group("information"))
    return parser


def _add_selection(group: argparse._ArgumentGroup) -> None:
    """Add options that select scans."""
    several: dict[str, Any] = {"nargs": "+", "action": "extend", "metavar": "LABEL"}
    group.add_argument(
        "--participant-label",
        type=_label("sub-"),
        help="participants, with or without 'sub-' (default: all)",
        **several,
    )
    group.add_argument(
        "--session-label",
        "--session-id",
        type=_label("ses-"),
        dest="session_label",
        help="sessions of the scans, with or without 'ses-'; a scan's T1w may be of another "
        "session (default: all)",
        **several,
    )
    group.add_argument(
        "--tracer-label",
        type=_label("trc-"),
        help="PET tracers, with or without 'trc-' and isotope: FDG is 18FFDG (default: all)",
        **several,
    )
    group.add_argument(
        "--rec-label",
        type=_label("rec-"),
        help="reconstructions of PET, with or without 'rec-' (default: all)",
        **several,
    )
    group.add_argument(
        "--run-label",
        type=_label("run-"),
        help="runs of the scans, with or without 'run-'; scans without run are left out "
        "(default: all)",
        **several,
    )
    group.add_argument(
        "--subjects-sessions-tsv",
        "-tsv",
        type=Path,
        metavar="FILE",
        help="table of the sessions to process, as Clinica's: tab-separated columns "
        "participant_id and session_id; what is not there is told, and the others go on",
    )
    group.add_argument(
        "--subject-anatomical-reference",
        choices=ANATOMICAL_REFERENCES,
        help="the T1w of a scan: of its session, else of the nearest one ('nearest'); of its "
        "session only ('sessionwise'); of the first session ('first-lex') (default: nearest)",
    )
    group.add_argument(
        "--modalities",
        "--modality",
        dest="modalities",
        nargs="+",
        choices=MODALITIES,
        help="kinds of images to register, to train on or to evaluate (default: pet fa)",
    )
    group.add_argument(
        "-d",
        "--derivatives",
        nargs="+",
        action="extend",
        type=_derivative,
        metavar="NAME=PATH",
        help="derivatives datasets with FA maps, preprocessed DWI, anatomy or labels; a PATH "
        "alone is named after its folder (default: those in the BIDS dataset's derivatives/)",
    )
    group.add_argument(
        "--bids-filter-file",
        type=Path,
        metavar="FILE",
        help='JSON file of pybids queries under "t1w", "pet" and "fa"; null means that an '
        'entity is absent, "*" that it is present',
    )
    group.add_argument(
        "--bids-database-dir",
        type=Path,
        metavar="FOLDER",
        help="folder to keep the index of the dataset in, outside of it; made anew where a "
        "folder of the dataset has changed (default: none is kept)",
    )
    group.add_argument(
        "--skip-bids-validation",
        action="store_true",
        help="do not validate the BIDS dataset first",
    )


def _add_registration(group: argparse._ArgumentGroup) -> None:
    """Add options that change results."""
    group.add_argument(
        "--brain-extraction",
        choices=BRAIN_EXTRACTIONS,
        help="brain of a T1w image: by the registered template ('template'), by SynthStrip "
        "('synthstrip'), where it has signal, for images without skull ('skip'), or as the image "
        "tells ('auto', by SynthStrip if its model is given) (default: auto)",
    )
    group.add_argument(
        "--synthstrip-model",
        type=Path,
        metavar="FILE",
        help="SynthStrip's weights, synthstrip.1.pt of FreeSurfer; they are not part of m2m-bids, "
        "and its network has to be installed: pip install nipreps-synthstrip (default: none)",
    )
    group.add_argument(
        "--no-t1w",
        choices=NO_T1W,
        help="scans without a T1w: left out ('skip'), or registered to the template "
        "MNI152NLin2009aSym by an affine transform and M2M-Reg ('register-to-template') "
        "(default: skip)",
    )
    group.add_argument(
        "--transform",
        choices=TRANSFORMS,
        help="last step: 'rigid' alone, or 'm2m', rigid and deformable (default: m2m)",
    )
    group.add_argument(
        "--refine",
        type=_whole_number(0),
        metavar="N",
        help="steps of refinement of each pair after the network's prediction; 0 turns it off "
        f"(default: {DEFAULT_REFINE_STEPS})",
    )
    group.add_argument(
        "--weights",
        type=_weights,
        metavar="FOLDER",
        help="network weights; 'default' are those that come with m2m-bids (default: these). "
        "For 'train', weights to start from (default: none)",
    )
    group.add_argument(
        "--output-spaces",
        nargs="+",
        action="extend",
        metavar="SPACE",
        help="spaces to write registered scans in, beside the T1w's own grid: T1w:res-native, "
        "T1w:res-2 (mm), MNI152NLin2009aSym (comes with m2m-bids), or NAME[:cohort-LABEL]"
        "[:res-native|:res-N] of a TemplateFlow archive (default: T1w)",
    )
    group.add_argument(
        "--pet-reference",
        metavar="{auto,twa,sum,frame:N}",
        help="static image of a dynamic PET scan: 'twa' is the mean weighted by the frames' "
        "durations, 'auto' that or, where they cannot be used, the plain mean; 'sum' registers "
        "the sum of the frames and writes what 'auto' does; frames count from 0 (default: auto)",
    )
    group.add_argument(
        "--hmc-off",
        action="store_true",
        help="do not correct dynamic PET scans for motion of the head between frames",
    )
    group.add_argument(
        "--random-seed",
        type=_whole_number(0),
        metavar="N",
        help=f"seed of every random number (default: {DEFAULT_RANDOM_SEED})",
    )


def _add_quantification(group: argparse._ArgumentGroup) -> None:
    """Add options on regional tables, SUVR and what comes with them."""
    group.add_argument(
        "--fs-subjects-dir",
        type=Path,
        metavar="FOLDER",
        help="FreeSurfer's subjects, named sub-LABEL or sub-LABEL_ses-LABEL, read only: labels to "
        "measure in, or to evaluate with, and brain mask and tissues of T1w images for which no "
        "derivatives dataset has them (default: a dseg of a derivatives dataset, or what m2m-bids "
        "finds itself)",
    )
    group.add_argument(
        "--suvr-region",
        choices=SUVR_REGIONS,
        help="reference region of SUVR; 'auto' needs FreeSurfer labels and goes by the tracer: "
        "amyloid whole-cerebellum, FDG brainstem (the pons where it has a label of its own), tau "
        "cerebellar-grey, others none (default: auto)",
    )
    group.add_argument(
        "--suvr-mask",
        metavar="FILE",
        help="another reference region: a mask in the T1w's space, with {sub} and {ses} for the "
        "labels of the T1w, such as /data/masks/sub-{sub}_ses-{ses}_mask.nii.gz",
    )
    group.add_argument(
        "--pvc",
        choices=PVC_METHODS,
        help="correction of PET for partial volume effects on its native grid: 'gtm' gives "
        "regional values, 'rbv' an image too (default: none)",
    )
    group.add_argument(
        "--psf-fwhm",
        dest="psf_fwhm_mm",
        nargs="+",
        type=float,
        metavar="MM",
        help="width of the scanner's point spread function for --pvc: one, or three (left-right, "
        "front-back, up-down)",
    )
    group.add_argument(
        "--smooth-fwhm",
        dest="smooth_fwhm_mm",
        nargs="+",
        action="extend",
        type=float,
        metavar="MM",
        help="write smoothed copies of images in T1w space too, one for each width "
        "(default: none)",
    )


def _add_training(group: argparse._ArgumentGroup) -> None:
    """Add options of the level ``train``."""
    group.add_argument(
        "--network", metavar="NAME", help="gradicon, transmorph or corrmlp (default: gradicon)"
    )
    group.add_argument(
        "--network-size",
        choices=NETWORK_SIZES,
        help="'compact', for processors, on 64 voxels of 3 mm, or 'paper', for GPUs, on 128 of "
        "1.5 mm (default: compact)",
    )
    group.add_argument(
        "--grid-size",
        type=_whole_number(16),
        metavar="N",
        help="another grid: voxels along an axis",
    )
    group.add_argument(
        "--grid-spacing",
        dest="grid_spacing_mm",
        type=float,
        metavar="MM",
        help="another grid: size of its voxels; N times MM should be about 192 mm",
    )
    group.add_argument(
        "--objective",
        metavar="NAME",
        help="m2m+gcc (M2M-Reg with GradCyCon), m2m, or a similarity of both modalities: lncc, "
        "lncc2, mi, mind-ssc (default: m2m+gcc)",
    )
    group.add_argument(
        "--pre-aligned",
        metavar="N|N%",
        help="participants whose own rigidly aligned pair may be the bridge: a number or a share "
        "(default: 0, unsupervised)",
    )
    group.add_argument(
        "--aligned-share",
        type=float,
        metavar="P",
        help="how often the bridge is a pre-aligned pair, where there are any (default: 1)",
    )
    for option, name in (("--max-steps", "iterations"), ("--validate-every", "iterations")):
        default = DEFAULT_MAX_STEPS if option == "--max-steps" else 500
        group.add_argument(
            option, type=_whole_number(1), metavar="N", help=f"{name} (default: {default})"
        )
    group.add_argument(
        "--batch-size",
        type=_whole_number(1),
        metavar="N",
        help="cycles of an iteration in each process (default: 2, or the paper's)",
    )
    group.add_argument(
        "--learning-rate", type=float, metavar="RATE", help="of Adam (default: by network size)"
    )
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="of the network; 'auto' takes bfloat16 where the device computes in it "
        "(default: auto)",
    )
    group.add_argument(
        "--run-name",
        metavar="NAME",
        help="folder below OUT/training (default: NETWORK-OBJECTIVE)",
    )
    group.add_argument(
        "--resume", action="store_true", help="continue the training that is in that folder"
    )
    group.add_argument(
        "--prepare-only",
        action="store_true",
        help="prepare the images and stop; training in several processes needs it before",
    )


def _add_evaluation(group: argparse._ArgumentGroup) -> None:
    """Add options of the level ``evaluate``."""
    group.add_argument(
        "--pairs",
        type=Path,
        metavar="FILE",
        help="table (.tsv) of the pairs to register, with the columns moving and fixed and, "
        "optional, modality, landmarks and reference_xfm (default: a sample of all pairs)",
    )
    group.add_argument(
        "--n-pairs",
        type=_whole_number(1),
        metavar="N",
        help="pairs of the sample, for each kind of image: N of different participants and, "
        f"where the truth is known, N of the same one (default: {DEFAULT_N_PAIRS})",
    )
    group.add_argument(
        "--methods",
        nargs="+",
        action="extend",
        metavar="KEY",
        help="methods to compare: initial, rigid, syn-mi, niftyreg-lncc, fireants-mi, "
        "fireants-lncc, m2m (default: all)",
    )
    group.add_argument(
        "--compare",
        nargs="+",
        action="extend",
        type=_named_folder,
        metavar="NAME=PATH",
        help="folders of further network weights to compare, each under a name",
    )
    group.add_argument(
        "--networks-alone",
        action="store_true",
        help="run the networks of --compare without refinement and check, as papers do, not as "
        "'participant' does",
    )
    group.add_argument(
        "--baseline-spacing",
        dest="baseline_spacing_mm",
        type=float,
        metavar="MM",
        help="voxels of the images that methods other than M2M-Reg see; larger ones are faster "
        f"(default: {DEFAULT_BASELINE_SPACING_MM:g}, as in the paper)",
    )


def _add_performance(group: argparse._ArgumentGroup) -> None:
    """Add options that change how fast a run is."""
    group.add_argument(
        "--nprocs",
        "--nthreads",
        "--n-cpus",
        dest="nprocs",
        type=_whole_number(1),
        metavar="N",
        help="threads of all processes together (default: all cores)",
    )
    group.add_argument(
        "--omp-nthreads",
        type=_whole_number(1),
        metavar="N",
        help="threads of PyTorch in one process; ANTs has one (default: one less than --nprocs, "
        "at most 8)",
    )
    group.add_argument(
        "--mem",
        "--mem-mb",
        dest="mem_gb",
        type=_memory_gb,
        metavar="SIZE",
        help="memory of all processes together, in MB or with a suffix K, M, G or T",
    )
    group.add_argument(
        "--device",
        metavar="{auto,cpu,cuda,cuda:N}",
        help="where the network runs; 'cuda' fails without a GPU, 'auto' takes one if there is "
        "one (default: auto)",
    )
    group.add_argument(
        "--use-plugin",
        "--nipype-plugin-file",
        dest="plugin_file",
        type=Path,
        metavar="FILE",
        help="YAML file with 'plugin:' (MultiProc, SLURM, SLURMGraph, Dask, or another of Nipype) "
        "and 'plugin_args:'; see docs/cluster.md",
    )


def _add_running(group: argparse._ArgumentGroup) -> None:
    """Add options on the way a run goes."""
    group.add_argument(
        "-w",
        "--work-dir",
        type=Path,
        metavar="FOLDER",
        help="folder of intermediate results (default: ./work)",
    )
    group.add_argument(
        "--clean-workdir", action="store_true", help="empty the work folder before the run"
    )
    group.add_argument(
        "--purge-workdir-on-success",
        action="store_true",
        help="remove the intermediate results of each participant of whom no scan has failed",
    )
    group.add_argument(
        "--config-file",
        type=Path,
        metavar="FILE",
        help="take options from logs/config_*.toml of an earlier run; options that are given "
        "here win, folders and the run's name are always new",
    )
    group.add_argument(
        "--stop-on-first-crash",
        action="store_true",
        help="end the run when one scan fails (default: go on with the others)",
    )
    group.add_argument(
        "--reports-only",
        action="store_true",
        help="only write reports, of the outputs that are there, whatever options made them",
    )


def _add_information(group: argparse._ArgumentGroup) -> None:
    """Add options that show something."""
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="list the scans, their T1w and weights, and why any is left out; compute nothing",
    )
    group.add_argument(
        "--write-graph",
        action="store_true",
        help="draw the workflow by subject and stage, logs/graph.svg, and Nipype's own graphs",
    )
    group.add_argument(
        "--notrack",
        action="store_true",
        help="accepted as in fMRIPrep, without effect: nothing is ever tracked",
    )
    group.add_argument(
        "-v", "--verbose", action="count", help="more messages; -vv for all of them"
    )
    group.add_argument("--version", action="version", version=f"m2m-bids {__version__}")


def parse_args(argv: Sequence[str] | None = None) -> Settings:
    """
    Turn command-line arguments into settings.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; those of the process by default.

    Returns
    -------
    Settings
        Validated settings of a new run.

    Raises
    ------
    SystemExit
        With code 2 and one line on standard error, if an argument is invalid.
    """
    parser = build_parser()
    given = vars(parser.parse_args(argv))
    given.pop("notrack", None)
    try:
        options = {}
        if config_file := given.get("config_file"):
            saved = read_toml(config_file)
            options = {name: saved[name] for name in saved if name not in NOT_REUSED}
        options.update(
            {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in given.items()
            }
        )
        settings = Settings(**options)
        if settings.plugin_file is not None:
            read_plugin_file(settings.plugin_file)
    except ValueError as error:
        parser.error(str(error))
    return settings
