"""
Make the pictures of the documentation from a simulated person.

    python docs/make_pictures.py WORK

simulates the person in WORK/bids, runs m2m-bids on it with all that it can write, and draws what
came out into docs/pictures/. A static scan and a dynamic one are run and, for the page of a
cohort, `tests/benchmarks/planted_failures.py` in WORK/cohort, which takes most of an hour. A
second call goes on where the first one stopped, and only draws where nothing is left to be run.
Needs Graphviz, and Chromium with Playwright for pictures of pages.
"""

import argparse
import json
import shutil
import subprocess
import sys
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import matplotlib as mpl
import nibabel as nb
import numpy as np
from nibabel.affines import apply_affine
from PIL import Image
from scipy.ndimage import map_coordinates

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap

if TYPE_CHECKING:
    from playwright.sync_api import Page

PICTURES = Path(__file__).parent / "pictures"
COHORT = Path(__file__).parents[1] / "tests" / "benchmarks" / "planted_failures.py"
STEP_MM = 0.8
APP = (sys.executable, "-m", "m2m_bids")
OPTIONS = (
    *("--output-spaces", "MNI152NLin2009aSym:res-2", "--suvr-region", "eroded-white-matter"),
    *("--pvc", "rbv", "--psf-fwhm", "6", "--smooth-fwhm", "8", "--write-graph"),
)
LIMIT_BYTES = 150_000
# Parts of the report of a static scan, by the name of their picture.
REPORT_PARTS = {
    "grid": "desc-grid_pet.svg",
    "jacobian": "desc-jacobian_pet.svg",
    "cycle": "desc-cycle_pet.svg",
    "flicker": "desc-m2m_pet.svg",
}


class Run(NamedTuple):
    """A dataset and what m2m-bids made of it."""

    bids_dir: Path
    out_dir: Path

    def one(self, pattern: str) -> Path:
        """Find the only output whose name ends so."""
        (file,) = self.out_dir.glob(f"sub-*/ses-*/*/*{pattern}")
        return file


def main() -> None:
    """Run what is to be run, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("work", type=Path, help="folder of data sets and outputs")
    work = parser.parse_args().work.absolute()
    bids_dir = work / "bids"
    if not bids_dir.is_dir():
        simulate = "from m2m_bids.cli.simulate import main; import sys; sys.exit(main())"
        command = [sys.executable, "-c", simulate, "cohort", bids_dir, "--subjects", "1"]
        subprocess.run(command, check=True)
    static = _run(bids_dir, work / "out", work / "work", OPTIONS)
    dynamic_dir = work / "dynamic"
    if not dynamic_dir.is_dir():
        _write_dynamic(bids_dir, dynamic_dir)
    anatomy = f"anatomy={static.out_dir}"
    rigid = ("--transform", "rigid", "--modalities", "pet", "--derivatives", anatomy)
    rigid += ("--skip-bids-validation",)
    dynamic = _run(dynamic_dir, work / "dynamic-out", work / "dynamic-work", rigid)
    PICTURES.mkdir(exist_ok=True)
    _draw(static)
    shutil.copy(static.out_dir / "logs" / "graph.svg", PICTURES / "graph.svg")
    subprocess.run([sys.executable, COHORT, work / "cohort"], check=True)
    _photograph(static, dynamic, work / "cohort" / "out" / "group.html")
    for file in PICTURES.iterdir():
        if file.stat().st_size > LIMIT_BYTES:
            raise SystemExit(f"{file}: {file.stat().st_size} bytes are too many for a repository")


def _run(bids_dir: Path, out_dir: Path, work_dir: Path, options: tuple[str, ...]) -> Run:
    command = [*APP, bids_dir, out_dir, "participant", "-w", work_dir, *options]
    subprocess.run(command, check=True)
    return Run(bids_dir, out_dir)


def _write_dynamic(bids_dir: Path, out_dir: Path) -> None:
    """Make a dynamic scan of the static one: six frames, and a head that moves twice."""
    shutil.copytree(bids_dir, out_dir, ignore=shutil.ignore_patterns("derivatives", "sourcedata"))
    (file,) = out_dir.glob("sub-*/ses-*/pet/*_pet.nii.gz")
    image = nb.load(file)
    data = np.asanyarray(image.dataobj).astype(np.float32)
    frames = []
    moved_mm = [(0, 0, 0), (0, 0, 0), (3, -2, 1), (3, -2, 1), (5, -4, 2), (5, -4, 2)]
    for share, shift_mm in zip((0.5, 0.7, 0.9, 1.0, 1.0, 0.95), moved_mm, strict=True):
        points = apply_affine(image.affine, np.moveaxis(np.indices(data.shape), 0, -1))
        back = apply_affine(np.linalg.inv(image.affine), points - np.asarray(shift_mm))
        moved = map_coordinates(data, np.moveaxis(back, -1, 0), order=1)
        frames.append(share * moved)
    nb.save(nb.Nifti1Image(np.stack(frames, axis=-1), image.affine), file)
    starts = [300.0 * number for number in range(6)]
    times = {"FrameTimesStart": starts, "FrameDuration": [300.0] * 6}
    file.with_suffix("").with_suffix(".json").write_text(json.dumps(times))


# --- slices ----------------------------------------------------------------------------------


class Slices:
    """The axial, coronal and sagittal slice through the middle of a brain."""

    def __init__(self, mask_file: Path) -> None:
        mask = nb.load(mask_file)
        voxels = np.argwhere(np.asanyarray(mask.dataobj) > 0)
        points = apply_affine(mask.affine, voxels)
        low, high = points.min(axis=0), points.max(axis=0)
        self._centre = (low + high) / 2
        self._half = (high - low).max() / 2 + 6

    def sample(self, image_file: Path, *, order: int = 1) -> list[np.ndarray]:
        """Interpolate an image on the slices; left is left."""
        data, affine = _read(image_file)
        steps = np.arange(-self._half, self._half, STEP_MM)
        tiles = []
        for across, up in ((0, 1), (0, 2), (1, 2)):
            points = np.tile(self._centre, (len(steps), len(steps), 1))
            points[..., across] += steps[None, :]
            points[..., up] += steps[::-1, None]
            voxels = apply_affine(np.linalg.inv(affine), points)
            tiles.append(map_coordinates(data, np.moveaxis(voxels, -1, 0), order=order))
        return tiles


@cache
def _read(image_file: Path) -> tuple[np.ndarray, np.ndarray]:
    image = nb.load(image_file)
    data = np.nan_to_num(np.asanyarray(image.dataobj).astype(np.float32))
    return data.mean(axis=-1) if data.ndim == 4 else data, image.affine


class Layer(NamedTuple):
    """An image and how to draw it: a colour map, "labels" in colours, or "outline"."""

    file: Path
    colours: str = "gray"

    @property
    def order(self) -> int:
        """Of its interpolation."""
        return 0 if self.colours in ("labels", "outline") else 1


def _mosaic(name: str, slices: Slices, rows: dict[str, list[Layer]]) -> None:
    """Draw rows of three slices, each row's layers above each other."""
    figure, axes = plt.subplots(
        len(rows), 3, figsize=(6.6, 2.25 * len(rows)), squeeze=False, facecolor="black"
    )
    for row, (title, layers) in zip(axes, rows.items(), strict=True):
        for layer in layers:
            _add(row, slices.sample(layer.file, order=layer.order), layer)
        for panel in row:
            panel.set_axis_off()
        row[0].text(0.03, 0.95, title, transform=row[0].transAxes, color="white", va="top",
                    fontsize=9, bbox={"color": "black", "alpha": 0.6, "pad": 2})  # fmt: skip
    figure.subplots_adjust(0, 0, 1, 1, 0.01, 0.01)
    figure.savefig(
        PICTURES / f"{name}.jpg", dpi=110, facecolor="black", pil_kwargs={"quality": 82}
    )
    plt.close(figure)


def _add(row: np.ndarray, tiles: list[np.ndarray], layer: Layer) -> None:
    if layer.colours == "outline":
        for panel, tile in zip(row, tiles, strict=True):
            panel.contour(tile, [0.5], colors=["#ff7f50"], linewidths=0.8)
        return
    if layer.colours == "labels":
        colours = ListedColormap(["#ff7f50", "#f5f5dc", "#4682b4"])
        for panel, tile in zip(row, tiles, strict=True):
            shown = np.ma.masked_equal(np.rint(tile), 0)
            panel.imshow(shown, cmap=colours, vmin=0.5, vmax=3.5, alpha=0.6)
        return
    pooled = np.concatenate([tile.ravel() for tile in tiles])
    high = np.percentile(pooled[pooled > 0], 99.5)
    for panel, tile in zip(row, tiles, strict=True):
        # What is over another layer is clear where it is dark.
        shares = np.clip(tile / high, 0, 1)
        alpha = None if layer.colours == "gray" else np.clip(1.6 * shares, 0, 0.75)
        panel.imshow(tile, cmap=layer.colours, vmin=0, vmax=high, alpha=alpha)


# --- pictures --------------------------------------------------------------------------------


def _draw(static: Run) -> None:
    t1w, mask = static.one("M000_desc-preproc_T1w.nii.gz"), static.one("desc-brain_mask.nii.gz")
    slices, grey = Slices(mask), Layer(t1w)
    for modality, suffix, raw, colours in (
        ("pet", "pet", "coregiso_pet.nii.gz", "inferno"),
        ("fa", "dwimap", "param-FA_dwimap.nii.gz", "viridis"),
    ):
        prefix = "space-T1w" if modality == "pet" else "space-T1w_param-FA"
        files = {
            "by the headers": _raw(static, raw),
            "rigid": static.one(f"{prefix}_desc-rigid_{suffix}.nii.gz"),
            "M2M-Reg": static.one(f"{prefix}_desc-preproc_{suffix}.nii.gz"),
        }
        rows = {title: [grey, Layer(file, colours)] for title, file in files.items()}
        _mosaic(f"{modality}_on_t1w", slices, rows)
        _mosaic(f"{modality}_preproc", slices, {"": [Layer(files["M2M-Reg"])]})
        _mosaic(f"{modality}_rigid", slices, {"": [Layer(files["rigid"])]})
    _mosaic("t1w_preproc", slices, {"": [grey]})
    _mosaic("brain_mask", slices, {"": [grey, Layer(mask, "outline")]})
    _mosaic("tissues", slices, {"": [grey, Layer(static.one("_dseg.nii.gz"), "labels")]})
    for picture, kind in (("suvr", "SUVR"), ("suvrsmoothed", "SUVRSmoothed8")):
        file = static.one(f"coregiso_space-T1w_desc-preproc{kind}_pet.nii.gz")
        _mosaic(picture, slices, {"": [Layer(file, "inferno")]})
    _mosaic("rbv", slices, {"": [Layer(static.one("pvc-rbv_desc-preproc_pet.nii.gz"), "inferno")]})
    _draw_template(static)


def _raw(run: Run, pattern: str) -> Path:
    (file,) = run.bids_dir.glob(f"**/sub-*/ses-*/*/*{pattern}")
    return file


def _draw_template(run: Run) -> None:
    t1w = run.one("space-MNI152NLin2009aSym_desc-preproc_T1w.nii.gz")
    pet = run.one("space-MNI152NLin2009aSym_res-2_desc-preproc_pet.nii.gz")
    slices = Slices(pet)
    _mosaic("template", slices, {"T1w": [Layer(t1w)], "PET": [Layer(pet, "inferno")]})


# --- pages -----------------------------------------------------------------------------------


def _photograph(static: Run, dynamic: Run, group_page: Path) -> None:
    """Take pictures of a report, its parts and its viewer, and of the page of a cohort."""
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        raise SystemExit("Chromium is not installed: there are no pictures of pages")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 1500}, offline=True)
        (report,) = static.out_dir.glob("sub-*.html")
        _open(page, report)
        # The folder where this was made is nobody's business.
        page.evaluate(
            "(path, body = document.body) => {"
            " body.innerHTML = body.innerHTML.replaceAll(path, '/data'); }",
            str(static.out_dir.parent),
        )
        _save_shot(page.screenshot(), "report", 900)
        _photograph_parts(page, report)
        _photograph_group(page, group_page)
        (motion,) = dynamic.out_dir.glob("sub-*/figures/*desc-motion_pet.svg")
        _photograph_figure(page, motion, "motion")
        browser.close()


def _open(page: "Page", file: Path) -> None:
    page.goto(file.as_uri())
    page.wait_for_timeout(1500)  # what is loaded late, and plots


def _photograph_parts(page: "Page", report: Path) -> None:
    figures = report.with_suffix("") / "figures"
    for name, end in REPORT_PARTS.items():
        (file,) = figures.glob(f"*{end}")
        _photograph_figure(page, file, name)
    _open(page, next(figures.glob("*desc-viewer_pet.html")))
    page.wait_for_selector("body[data-ready=yes]")
    page.set_viewport_size({"width": 1200, "height": 900})
    page.wait_for_timeout(500)
    _save_shot(page.screenshot(), "viewer", 1000)


def _photograph_figure(page: "Page", file: Path, name: str) -> None:
    """Take a figure, without margins; of one that alternates, both images."""
    _open(page, file)
    shape = page.evaluate(
        "(({width, height}) => height / width)(document.documentElement.viewBox.baseVal)"
    )
    page.set_viewport_size({"width": 1100, "height": round(1100 * shape)})
    shots = []
    for _ in range(1 + page.locator(".stage .moving").count()):
        page.keyboard.press("Tab")  # holds the first image, then the other
        page.wait_for_timeout(500)
        shots.append(np.asarray(Image.open(BytesIO(page.screenshot())).convert("RGB")))
    _save(Image.fromarray(np.concatenate(shots)), name, 760)


def _photograph_group(page: "Page", file: Path) -> None:
    page.set_viewport_size({"width": 1366, "height": 700})
    _open(page, file)
    for heading, name in (
        ("Distributions", "group_distributions"),
        ("All scans", "group_table"),
        ("Cohort images", "group_means"),
    ):
        page.get_by_role("heading", name=heading, exact=True).evaluate(
            "(h) => h.scrollIntoView({behavior: 'instant'})"
        )
        page.wait_for_timeout(800)
        if name == "group_distributions":  # with the ring of the keyboard's focus
            page.locator("#panels a[tabindex='0']").first.focus()
            page.keyboard.press("End")
            page.wait_for_timeout(500)
        _save_shot(page.screenshot(), name, 1100)


def _save_shot(content: bytes, name: str, width: int) -> None:
    _save(Image.open(BytesIO(content)).convert("RGB"), name, width)


def _save(image: Image.Image, name: str, width: int) -> None:
    image.thumbnail((width, 1200))
    image.save(PICTURES / f"{name}.jpg", quality=70, optimize=True)


if __name__ == "__main__":
    main()
