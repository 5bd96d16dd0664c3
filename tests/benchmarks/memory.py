"""
Peak memory of the app's steps, each in a process of its own, as a job of a cluster has it.

    python tests/benchmarks/memory.py steps WORK [WORK ...] [--only STEP ...]
    python tests/benchmarks/memory.py made [--only STEP ...]

``steps`` runs again what is in work folders (of runs without --purge-workdir-on-success), and also
says what each step declares. ``made`` runs, for images of several sizes that are made here, the
steps that `make demo` does not have. Peaks are the kernel's (VmHWM), in GB; ``programs_gb`` is of
the largest process that a step started, which is there beside its own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nibabel as nb
import numpy as np

from m2m_bids.workflows.memory import METHODS

STEP = """
import json, resource, sys
from pathlib import Path
from nipype.utils.filemanip import loadpkl

folder, empty = sys.argv[1:]
node = loadpkl(f"{folder}/_node.pklz")
node.inputs.trait_set(**loadpkl(f"{folder}/_inputs.pklz"))
node.input_source, node.base_dir, node._output_dir = {}, empty, None
node.run()
kb = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
peaks = {"peak_gb": kb, "programs_gb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss}
peaks = {name: round(kb * 1024 / 1e9, 3) for name, kb in peaks.items()}
print(json.dumps({**peaks, "declared_gb": round(node.mem_gb, 3)}))
"""
RADIUS_MM = 75.0


def measured(folder: Path) -> dict[str, float | str]:
    """Run the step of a folder again; say what it took, or why it failed."""
    with tempfile.TemporaryDirectory() as empty:
        command = [sys.executable, "-c", STEP, str(folder), empty]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def image(
    file: Path, shape: tuple[int, ...], size_mm: float, *, labels: int = 0, kind: type = np.int16
) -> str:
    """Write a head: a noisy ball in every volume, or its labels."""
    affine = np.diag([size_mm, size_mm, size_mm, 1.0])
    affine[:3, 3] = -size_mm * (np.array(shape[:3]) - 1) / 2
    axes = [size_mm * (np.arange(n) - (n - 1) / 2) for n in shape[:3]]
    squares = [axis.astype(np.float32) ** 2 for axis in axes]
    radius = np.sqrt(squares[0][:, None, None] + squares[1][:, None] + squares[2])
    inside = radius < RADIUS_MM
    if labels:
        # Blocks, as many as there are labels.
        n = round(labels ** (1 / 3))
        block = [
            np.clip(((a + RADIUS_MM) / (2 * RADIUS_MM) * n).astype(int), 0, n - 1) for a in axes
        ]
        data = 1 + block[0][:, None, None] * n * n + block[1][:, None] * n + block[2]
        data = np.where(inside, data, 0).astype(np.int16)
    else:
        generator = np.random.default_rng(0)
        data = np.empty(shape, kind)
        for volume in np.ndindex(shape[3:]):
            noise = generator.normal(0, 20, shape[:3])
            data[(..., *volume)] = inside * (1000 - 5 * radius) / (1 + sum(volume) % 7) + noise
    nb.Nifti1Image(data, affine).to_filename(file)
    return str(file)


def tensor(folder: Path, shape: tuple[int, ...], *, is_raw: bool):
    from m2m_bids.interfaces.preprocessing import FitTensor

    directions = np.random.default_rng(1).normal(size=(3, shape[3]))
    directions /= np.linalg.norm(directions, axis=0)
    b_values = np.where(np.arange(shape[3]) % 13, 1000, 0)
    np.savetxt(folder / "bval", b_values[None], "%d")
    np.savetxt(folder / "bvec", directions * (b_values > 0), "%.6f")
    return FitTensor(
        in_file=image(folder / "dwi.nii.gz", shape, 2.0),
        bval_file=str(folder / "bval"),
        bvec_file=str(folder / "bvec"),
        is_raw=is_raw,
    )


def cleaning(folder: Path, n: int):
    from m2m_bids.interfaces.preprocessing import CleanFA

    head = nb.load(image(folder / "head.nii", (n,) * 3, 220 / n, kind=np.float32))
    nb.Nifti1Image(head.get_fdata(dtype=np.float32) / 2000, head.affine).to_filename(
        folder / "fa.nii.gz"
    )
    return CleanFA(in_file=str(folder / "fa.nii.gz"))


def motion(folder: Path, shape: tuple[int, ...], size_mm: float):
    from m2m_bids.interfaces.preprocessing import EstimateMotion

    starts = [120.0 * number for number in range(1, shape[3] + 1)]
    sidecar = {"FrameTimesStart": starts, "FrameDuration": [120.0] * shape[3]}
    return EstimateMotion(in_file=image(folder / "pet.nii.gz", shape, size_mm), sidecar=sidecar)


def static(folder: Path, shape: tuple[int, ...], size_mm: float):
    from m2m_bids.interfaces.preprocessing import StaticReference
    from m2m_bids.spatial.itk import write_affine

    xfms = [write_affine(np.eye(4), folder / f"{n}.txt") for n in range(shape[3])]
    node = motion(folder, shape, size_mm)
    return StaticReference(
        in_file=node.inputs.in_file,
        sidecar=node.inputs.sidecar,
        kind="twa",
        frame_xfms=[str(file) for file in xfms],
    )


def correction(folder: Path, shape: tuple[int, ...], t1w: int, labels: int, method: str):
    from m2m_bids.interfaces.quantification import CorrectPartialVolume
    from m2m_bids.spatial.itk import write_affine

    return CorrectPartialVolume(
        in_file=image(folder / "pet.nii.gz", shape, 2.0, kind=np.float32),
        label_file=image(folder / "labels.nii.gz", (t1w,) * 3, 220 / t1w, labels=labels),
        inverse_xfm=str(write_affine(np.eye(4), folder / "xfm.txt")),
        scheme="freesurfer",
        method=method,
        psf_fwhm_mm=[5.0],
        metadata={},
    )


def alignment(folder: Path, shape: tuple[int, ...], size_mm: float):
    from m2m_bids.interfaces.registration import ResampleFrames

    node = static(folder, shape, size_mm)
    volume = image(folder / "static.nii", shape[:3], size_mm, kind=np.float32)
    return ResampleFrames(
        in_file=node.inputs.in_file,
        frame_xfms=node.inputs.frame_xfms,
        static_file=volume,
        reference_file=volume,
    )


def composite(folder: Path) -> str:
    """Write a map to the T1w: rigid, then a field of 3 mm, as `register_m2m` does."""
    from m2m_bids.spatial.fields import DisplacementField
    from m2m_bids.spatial.itk import write_composite

    affine = np.diag([3.0, 3.0, 3.0, 1.0])
    affine[:3, 3] = -110
    field = DisplacementField(np.zeros((74, 74, 74, 3)), affine)
    return str(write_composite((np.eye(4), field), folder / "m2m.h5"))


def resampling(folder: Path, n_frames: int, t1w: int):
    node = alignment(folder, (128, 128, 63, n_frames), 2.0)
    reference = image(folder / "t1w.nii.gz", (t1w,) * 3, 220 / t1w)
    node.inputs.trait_set(reference_file=reference, xfm=composite(folder))
    return node


def to_space(folder: Path, n_moving: int, n_grid: int):
    from m2m_bids.interfaces.registration import ResampleImage

    return ResampleImage(
        in_file=image(folder / "moving.nii.gz", (n_moving,) * 3, 220 / n_moving, kind=np.float32),
        reference_file=image(folder / "grid.nii.gz", (n_grid,) * 3, 200 / n_grid),
        xfm=[composite(folder)],
    )


def corrected(folder: Path, n_frames: int, t1w: int):
    from m2m_bids.interfaces.quantification import ResampleCorrected

    shape = (128, 128, 63, n_frames)[: 4 if n_frames > 1 else 3]
    return ResampleCorrected(
        in_file=image(folder / "corrected.nii.gz", shape, 2.0, kind=np.float32),
        reference_file=image(folder / "t1w.nii.gz", (t1w,) * 3, 220 / t1w),
        xfm=[composite(folder)],
    )


def figure(folder: Path, n_frames: int, t1w: int):
    from m2m_bids.interfaces.reports import SUVR, SUVRFigure

    shape, size_mm = (t1w,) * 3, 220 / t1w
    scan = (*shape, n_frames)[: 4 if n_frames > 1 else 3]
    return SUVRFigure(
        files={SUVR: image(folder / "suvr.nii.gz", scan, size_mm, kind=np.float32)},
        facts={SUVR: {"ReferenceRegion": "whole-cerebellum"}},
        mask_file=image(folder / "mask.nii.gz", shape, size_mm, labels=1),
        dseg_file=image(folder / "dseg.nii.gz", shape, size_mm, labels=8),
    )


def quantification(folder: Path, t1w: int, n_frames: int, *smooth_fwhm_mm: float):
    from m2m_bids.interfaces.quantification import QuantifyScan
    from m2m_bids.spatial.itk import write_affine

    shape, size_mm = (t1w,) * 3, 220 / t1w
    starts = [120.0 * number for number in range(n_frames)]
    metadata = {
        **{"Units": "Bq/mL", "InjectedRadioactivity": 100, "InjectedRadioactivityUnits": "MBq"},
        **{"InjectionStart": 0, "ImageDecayCorrected": True, "ImageDecayCorrectionTime": 0},
        **{"FrameTimesStart": starts, "FrameDuration": [120.0] * n_frames},
    }
    labels = image(folder / "labels.nii", shape, size_mm, labels=64)
    return QuantifyScan(
        in_file=image(folder / "frames.nii.gz", (*shape, n_frames), size_mm, kind=np.float32),
        native_file=image(folder / "pet.nii", (128, 128, 63), 2.0, kind=np.float32),
        label_file=labels,
        xfm=str(write_affine(np.eye(4), folder / "xfm.txt")),
        scan={
            **{"scheme": "freesurfer", "metadata": metadata, "weight": 60, "weight_units": "kg"},
            **{"suvr_region": "whole-cerebellum", "smooth_fwhm_mm": list(smooth_fwhm_mm)},
        },
    )


def aligning(folder: Path, n: int):
    from m2m_bids.interfaces.preprocessing import AlignTemplate

    return AlignTemplate(
        in_file=image(folder / "t1w.nii.gz", (n,) * 3, 220 / n),
        mask_file=image(folder / "mask.nii.gz", (n,) * 3, 220 / n, labels=1),
    )


def comparing(folder: Path, method: str, spacing_mm: float):
    from m2m_bids.api import DEFAULT_WEIGHTS
    from m2m_bids.interfaces.evaluation import RegisterByMethod
    from m2m_bids.simulation.pairs import EXTENT_MM, cached_template, simulate_pair
    from m2m_bids.spatial.images import save_image
    from m2m_bids.spatial.itk import write_affine

    pair = simulate_pair(1000, "fa", spacing_mm=3.0)
    mask = (np.asarray(pair.fixed_labels.dataobj) > 0).astype(np.uint8)
    mask = nb.Nifti1Image(mask, pair.fixed_image.affine)
    template = cached_template(round(EXTENT_MM / 3.0) + 1, 3.0)
    template2fixed = pair.fixed_image.affine @ np.linalg.inv(template.affine)
    node = RegisterByMethod(
        method=method,
        modality="fa",
        moving_file=str(save_image(pair.moving_image, folder / "fa.nii")),
        fixed_file=str(save_image(pair.fixed_image, folder / "t1w.nii")),
        mask_file=str(save_image(mask, folder / "mask.nii")),
        rigid_xfm=str(write_affine(pair.rigid_fixed2moving, folder / "rigid.txt")),
        template2anat=str(write_affine(template2fixed, folder / "template2anat.txt")),
        spacing_mm=spacing_mm,
        n_threads=1,
    )
    if method.startswith("m2m:"):
        node.inputs.weights = str(DEFAULT_WEIGHTS)
    return node


def synthstrip(folder: Path, n: int):
    import torch
    from nipreps.synthstrip.model import StripModel

    from m2m_bids.interfaces.preprocessing import ExtractBrain

    file = folder / "model.pt"
    torch.save({"model_state_dict": StripModel().state_dict()}, file)
    in_file = image(folder / "t1w.nii.gz", (n, n, n), 1.0)
    return ExtractBrain(in_file=in_file, synthstrip_model=str(file), source="synthstrip")


def made() -> dict[str, list[tuple]]:
    """Name the steps that are made here, with arguments of their makers."""
    small, large = (64, 64, 40, 33), (96, 96, 60, 65)
    volumes = [((128, 128, 63, 1), 2.0), ((256, 256, 89, 1), 1.2)]
    frames = [((128, 128, 63, 6), 2.0), ((128, 128, 63, 24), 2.0), ((256, 256, 89, 12), 1.2)]
    box = (128, 128, 63)
    # Frames, and voxels along an axis of the T1w.
    dynamic = [(6, 128), (24, 128), (12, 192)]
    any_scan = [(1, 64), (1, 128), (1, 224), *dynamic]
    pvc = [
        ((*box, 1), 128, 8, "gtm"),
        ((*box, 1), 224, 8, "gtm"),
        ((*box, 1), 224, 8, "rbv"),
        ((*box, 1), 224, 125, "gtm"),
        ((*box, 24), 224, 125, "gtm"),
        ((*box, 24), 224, 125, "rbv"),
        ((*box, 60), 128, 125, "rbv"),
    ]
    return {
        "fit_tensor": [
            (tensor, shape, {"is_raw": r}) for r in (False, True) for shape in (small, large)
        ],
        "clean_fa": [(cleaning, n) for n in (96, 128, 192)],
        "estimate_motion": [(motion, *case) for case in (*volumes, *frames)],
        "static_reference": [(static, *case) for case in frames],
        "align_frames": [(alignment, *case) for case in (*volumes, *frames)],
        "correct_pv": [(correction, *case) for case in pvc],
        "quantify_scan": [
            (quantification, *case)
            for case in ((64, 1), (128, 12), (192, 12), (128, 12, 6.0, 8.0))
        ],
        "resample_frames": [(resampling, *case) for case in ((1, 224), *dynamic)],
        # A scan, and a T1w, on the grids of a template of 2 and 1 mm.
        "resample_scan": [(to_space, 96, n) for n in (100, 200)],
        "resample_t1w": [(to_space, n_t1w, n) for n_t1w in (128, 224) for n in (100, 200)],
        "resample_corrected": [(corrected, *case) for case in any_scan],
        "draw_suvr": [(figure, *case) for case in any_scan],
        "align_template": [(aligning, n) for n in (64, 128, 224)],
        "register": [(comparing, method, size_mm) for method in METHODS for size_mm in (3.0, 1.5)],
        "synthstrip": [(synthstrip, n) for n in (192, 256)],
    }


def made_steps(only: list[str]) -> Iterator[tuple[dict, Path]]:
    """Make steps, each in a folder that ends with it."""
    from nipype import Node
    from nipype.utils.filemanip import savepkl

    for name, cases in made().items():
        for make, *arguments in cases if not only or name in only else []:
            options = arguments.pop() if isinstance(arguments[-1], dict) else {}
            with tempfile.TemporaryDirectory() as text:
                folder = Path(text)
                node = Node(make(folder, *arguments, **options), name=name, base_dir=text)
                savepkl(f"{text}/_node.pklz", node)
                savepkl(f"{text}/_inputs.pklz", node.inputs.get_traitsfree())
                yield {"step": name, "of": [*arguments, *options.values()]}, folder


def steps(works: list[Path], only: list[str]) -> Iterator[tuple[dict, Path]]:
    """Find the steps of work folders."""
    for work in works:
        for file in sorted(work.rglob("_node.pklz"), key=lambda file: file.parent.name):
            folder = file.parent
            if not only or folder.name in only:
                yield {"step": folder.name, "of": folder.parent.name}, folder


def main() -> None:
    """Measure, and print a line for each step."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("steps", "made"):
        command = commands.add_parser(name)
        command.add_argument("--only", nargs="+", default=[])
        if name == "steps":
            command.add_argument("works", nargs="+", type=Path)
    args = parser.parse_args()
    found = made_steps(args.only) if args.command == "made" else steps(args.works, args.only)
    for known, folder in found:
        sys.stdout.write(json.dumps(known | measured(folder)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
