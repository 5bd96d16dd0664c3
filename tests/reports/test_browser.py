"""Reports and viewers as a reader meets them: in Chromium, from files, without a network."""

import re
import shutil

import nibabel as nb
import numpy as np
import pytest

from m2m_bids.reports.citation import Citation
from m2m_bids.reports.deformation import cycle_figure, grid_figure
from m2m_bids.reports.figures import (
    anatomical_figure,
    flicker,
    native_figure,
    quantity_figure,
    select_labels,
)
from m2m_bids.reports.fragments import summary_html, table_html
from m2m_bids.reports.html import write_subject_report
from m2m_bids.reports.jacobian import jacobian_figure
from m2m_bids.reports.motion import motion_figure
from m2m_bids.reports.viewer import write_viewer

pytestmark = pytest.mark.slow

EVIL = "<script>alert('x')</script>"
WIDE, NARROW = {"width": 1366, "height": 768}, {"width": 390, "height": 800}
OFFSET = 200  # so that every image below is positive


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="no playwright: pip install 'm2m-bids[test]'"
    )
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if program is None:
        pytest.skip("no chromium on PATH")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program)
        yield opened
        opened.close()


class Visit:
    """A page without a network, and all that it complains of."""

    def __init__(self, browser, size, **options):
        self.complaints = []
        self.context = browser.new_context(viewport=size, **options)
        self.context.set_offline(True)
        self.context.route(re.compile(r"^(?!file:|data:)"), self._refuse)
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self._hear(message.type, message.text))
        self.page.on("pageerror", lambda error: self._hear("error", str(error)))
        self.page.on("requestfailed", lambda request: self._hear("error", request.url))
        self.page.on("dialog", lambda dialog: (self._hear("error", "dialog"), dialog.dismiss()))

    def _refuse(self, route):
        self._hear("error", f"network: {route.request.url}")
        route.abort()

    def _hear(self, kind, text):
        if kind in ("error", "warning"):
            self.complaints.append(text)


@pytest.fixture
def visit(browser):
    """Open files; what they complain of fails the test, unless it is asked for before."""
    visits = []

    def run(file, size=WIDE, **options):
        visits.append(Visit(browser, size, **options))
        visits[-1].page.goto(file.as_uri())
        return visits[-1]

    yield run
    complaints = [text for one in visits for text in one.complaints]
    for one in visits:
        one.context.close()
    assert complaints == []


def violations(page):
    """What axe objects to, with where; pages in frames are looked at by themselves."""
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="no axe: pip install 'm2m-bids[test]'"
    )
    found = axe.Axe().run(page, options={"iframes": False}).response["violations"]
    return [(one["id"], [node["target"] for node in one["nodes"]][:5]) for one in found]


@pytest.fixture(scope="module")
def anatomy():
    """The MNI152 template, 4 mm: T1w, mask, tissues."""
    from nilearn.datasets import load_mni152_brain_mask, load_mni152_template, load_mni152_wm_mask

    t1w, mask, white = (
        load(resolution=4)
        for load in (load_mni152_template, load_mni152_brain_mask, load_mni152_wm_mask)
    )
    labels = np.asarray(mask.dataobj).astype(np.uint8) + np.asarray(white.dataobj).astype(np.uint8)
    return t1w, mask, nb.Nifti1Image(labels, mask.affine)


def ramp(like, axis):
    """World coordinate along an axis, and an offset."""
    points = np.moveaxis(np.indices(like.shape), 0, -1) @ like.affine[:3, :3].T
    data = points[..., axis] + like.affine[axis, 3] + OFFSET
    return nb.Nifti1Image(data.astype(np.float32), like.affine)


@pytest.fixture(scope="module")
def viewer(anatomy, tmp_path_factory):
    """A viewer whose images are brighter to the right, to the front and upwards."""
    t1w, mask, dseg = anatomy
    states = {name: ramp(mask, axis) for axis, name in enumerate(("initial", "rigid", "m2m"))}
    folder = tmp_path_factory.mktemp("viewer")
    return write_viewer(t1w, mask, dseg, states, folder / "viewer.html", label="PET")


@pytest.fixture(scope="module")
def report(anatomy, viewer, tmp_path_factory):
    """A report with every kind of figure, and strings that try to be code."""
    t1w, mask, dseg = anatomy
    root = tmp_path_factory.mktemp("out")
    figures, work = root / "sub-01" / "figures", root / "work"
    anatomical_figure(t1w, mask, dseg, figures / "sub-01_desc-anatomical_T1w.svg")
    contours = {"white matter": select_labels(dseg, 2), "cortex": select_labels(dseg, 1, 2)}
    states = dict.fromkeys(("initial", "rigid", "m2m"), t1w)
    ones = nb.Nifti1Image(np.ones(mask.shape, np.float32), mask.affine)
    still = nb.Nifti1Image(np.zeros((*mask.shape, 3), np.float32), mask.affine)
    work.mkdir()
    drawn = {
        **flicker(t1w, mask, states, work, contours=contours),
        "native": native_figure(t1w, work / "native.svg"),
        "motion": motion_figure(np.zeros((5, 6)), work / "motion.svg"),
        "grid": grid_figure(still, mask, work / "grid.svg", background=t1w),
        "jacobian": jacobian_figure(ones, mask, work / "jacobian.svg", background=t1w),
        "cycle": cycle_figure(ones, mask, work / "cycle.svg", background=t1w),
        "suvr": quantity_figure(t1w, mask, work / "suvr.svg", title="SUVR", contours=contours),
        "viewer": viewer,
    }
    rows = [{"region": f"{EVIL} {n}", "mean": 0.5, "n_voxels": n} for n in range(60)]
    for stem, suffix in (("trc-FDG", "pet"), ("run-1", "dwimap")):
        for name, file in drawn.items():
            shutil.copy(file, figures / f"sub-01_{stem}_desc-{name}_{suffix}{file.suffix}")
        summary = summary_html({"Tracer": EVIL}, message="Used.", level="success")
        (figures / f"sub-01_{stem}_desc-summary_{suffix}.html").write_text(summary)
        table = table_html(rows, name=f'regions of "{stem}"')
        (figures / f"sub-01_{stem}_desc-regions_{suffix}.html").write_text(table)
    citation = Citation(
        f"# Cite\n\n## Methods\n\n#### A\n\n{EVIL} `code` <https://a.b>\n",
        "",
        f"@misc{{a, title={{{EVIL}}}}}",
    )
    log = root / "sub-01" / "log" / "run"
    log.mkdir(parents=True)
    (log / "crash-1.txt").write_text(f"Node: wf.node\n{EVIL}\n{'x' * 500}")
    numbers = [{"scan": "sub-01_pet", "status": status, "reason": EVIL, "folds (%)": 0.1} for
               status in ("done", "rigid only", "skipped", "failed")]  # fmt: skip
    return write_subject_report(
        root, "01", "run", rows=numbers, facts={"Weights": EVIL}, about={"m2m-bids": "0.1"},
        weights={"Network": EVIL}, command=f"m2m-bids '{EVIL}'",
        citation=citation, crash_files=list(log.iterdir()),
    )  # fmt: skip


def scroll_through(page):
    """Go down the page, so that what is loaded late is there."""
    for element in page.locator("img, iframe").all():
        element.scroll_into_view_if_needed()
    page.wait_for_function("Array.from(document.images).every((image) => image.complete)")


def has_no_overflow(page):
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


# --- report ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_report_shows_everything(visit, report, size):
    page = visit(report, size).page
    scroll_through(page)
    shown = page.evaluate(
        "[document.images.length, Array.from(document.images).filter((i) => i.naturalWidth > 0"
        " && i.clientHeight > 50).length, Array.from(document.querySelectorAll('object'))"
        ".filter((o) => o.clientHeight > 50).length]"
    )
    assert shown == [11, 11, 8]
    viewers = [frame for frame in page.frames if "desc-viewer" in frame.url]
    assert len(viewers) == 2
    for frame in viewers:
        frame.wait_for_selector("body[data-ready=yes]")
    assert has_no_overflow(page)
    assert page.locator("nav >> text=Errors").is_visible()
    assert page.get_by_text(EVIL).count() > 60


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_report_is_accessible(visit, report, size):
    page = visit(report, size).page
    scroll_through(page)
    assert violations(page) == []


def test_menu_opens_with_the_keyboard(visit, report):
    page = visit(report).page
    page.locator("nav >> text=PET").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_function("location.hash === '#trc-FDG_summary_pet'")
    # Bootstrap scrolls smoothly; the title ends below the menu.
    page.wait_for_function(
        "(({y}) => y > 30 && y < 200)"
        "(document.querySelector('#trc-FDG_summary_pet h3').getBoundingClientRect())"
    )


def test_report_moves_with_its_folder(visit, report, tmp_path):
    moved = tmp_path / "my 'out' #2" / "out"
    shutil.copytree(report.parent, moved)
    page = visit(moved / report.name).page
    scroll_through(page)
    assert page.evaluate("Array.from(document.images).every((image) => image.naturalWidth > 0)")


def test_missing_figure_is_noticed(visit, report, tmp_path):
    """The tests above would fail."""
    moved = tmp_path / "out"
    shutil.copytree(report.parent, moved)
    next((moved / "sub-01" / "figures").glob("*desc-grid_pet.svg")).unlink()
    seen = visit(moved / report.name)
    seen.page.locator("img[src*=desc-grid_pet]").scroll_into_view_if_needed()
    seen.page.wait_for_timeout(500)
    assert any("desc-grid_pet.svg" in text for text in seen.complaints)
    seen.complaints.clear()


def test_flicker_can_be_held(visit, report):
    file = next((report.parent / "sub-01" / "figures").glob("*desc-m2m_pet.svg"))
    opacity = "getComputedStyle(document.querySelector('.stage .moving')).opacity"
    seen = visit(file)
    seen.page.keyboard.press("Tab")
    assert seen.page.evaluate(opacity) == "0"  # the T1w alone
    seen.page.keyboard.press("Tab")
    assert seen.page.evaluate(opacity) == "1"
    name = "getComputedStyle(document.querySelector('.stage .moving')).animationName"
    assert visit(file).page.evaluate(name) == "flicker"
    assert visit(file, reduced_motion="reduce").page.evaluate(name) == "none"


# --- viewer ----------------------------------------------------------------------------------


@pytest.fixture
def opened(visit, viewer):
    page = visit(viewer).page
    page.wait_for_selector("body[data-ready=yes]")
    return page


def picture(page, plane):
    """The canvas of a plane, once what was asked for is drawn."""
    page.wait_for_timeout(100)
    return page.evaluate(f"document.getElementById('{plane}').toDataURL()")


def position(page):
    """Cross-hair in mm, and the value there."""
    page.wait_for_timeout(100)
    text = page.locator("#position").inner_text()
    numbers = re.fullmatch(
        r"x = (-?\d+), y = (-?\d+), z = (-?\d+) mm; PET about ([\d.e+]+)( or more)?", text
    )
    return np.array([float(number) for number in numbers.groups()[:4]])


def test_slices_go_where_keys_say(opened):
    before = {plane: picture(opened, plane) for plane in ("axial", "coronal", "sagittal")}
    start = position(opened)
    opened.locator("#axial").focus()
    for _ in range(8):
        opened.keyboard.press("PageUp")
    np.testing.assert_allclose(position(opened)[:3] - start[:3], (0, 0, 12), atol=1)
    assert picture(opened, "axial") != before["axial"]
    opened.keyboard.press("Shift+ArrowRight")
    opened.keyboard.press("ArrowUp")
    np.testing.assert_allclose(position(opened)[:3] - start[:3], (7.5, 1.5, 12), atol=1)
    opened.locator("#sagittal").focus()
    opened.keyboard.press("Shift+ArrowDown")
    np.testing.assert_allclose(position(opened)[:3] - start[:3], (7.5, 1.5, 4.5), atol=1)
    opened.keyboard.press("Tab")
    opened.keyboard.press("ArrowRight")  # the slider of the sagittal slices
    np.testing.assert_allclose(position(opened)[:3] - start[:3], (9, 1.5, 4.5), atol=1)
    assert "slice" in opened.locator("#panels input").nth(2).get_attribute("aria-valuetext")


def test_states_show_their_images(opened):
    """Each image rises along an axis of its own: what is read is what is there."""
    opened.locator("#coronal").focus()
    for key in ("ArrowLeft",) * 9 + ("ArrowUp",) * 6 + ("PageUp",) * 4:
        opened.keyboard.press(key)
    pictures = []
    for axis, key in enumerate("123"):
        opened.keyboard.press(key)
        where = position(opened)
        # Half a millimetre of rounding, a step of 8 bit, and what JPEG changes.
        assert where[3] == pytest.approx(where[axis] + OFFSET, abs=5)
        assert opened.locator(f"#state{axis}").is_checked()
        pictures.append(picture(opened, "coronal"))
    assert len(set(pictures)) == 3
    opened.locator("#state2").focus()
    opened.keyboard.press("ArrowLeft")
    assert opened.locator("#state1").is_checked()
    assert picture(opened, "coronal") == pictures[1]


def test_mouse_moves_the_crosshair_and_the_wheel_the_slices(opened):
    box = opened.locator("#axial").bounding_box()
    start = position(opened)
    opened.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + box["height"] * 0.25)
    opened.mouse.wheel(0, -300)  # without the focus it is the page's
    np.testing.assert_array_equal(position(opened), start)
    opened.mouse.down()
    opened.mouse.up()
    moved = position(opened)
    assert moved[0] < start[0] - 25  # left
    assert moved[1] > start[1] + 25  # front
    opened.mouse.wheel(0, -100)
    opened.mouse.wheel(0, -100)
    assert position(opened)[2] == pytest.approx(moved[2] + 3, abs=1)


def test_controls_change_the_picture(opened):
    seen = [picture(opened, "axial")]
    for control, key in (("#opacity", "ArrowRight"), ("#brightness", "ArrowLeft")):
        opened.locator(control).focus()
        opened.keyboard.press(key)
        seen.append(picture(opened, "axial"))
    for box in ("#outline0", "#outline1", "#crosshair"):
        opened.locator(box).focus()
        opened.keyboard.press("Space")
        seen.append(picture(opened, "axial"))
    opened.keyboard.press("0")
    seen.append(picture(opened, "axial"))
    assert len(set(seen)) == len(seen)
    assert opened.locator("output[for=opacity]").inner_text() == "65 %"
    opened.keyboard.press("0")
    assert picture(opened, "axial") == seen[-2]


def test_opacity_is_that_of_the_image(opened):
    """At 0 all states look alike, at 100 % none of the T1w is left."""
    opened.locator("#opacity").fill("0")
    opened.locator("#state0").check()
    first = picture(opened, "axial")
    opened.locator("#state1").check()
    assert picture(opened, "axial") == first
    for box in ("#outline1", "#crosshair"):
        opened.locator(box).uncheck()
    opened.wait_for_timeout(100)
    share_in_color = """(() => {
        const canvas = document.createElement("canvas");
        canvas.width = canvas.height = 300;
        const context = canvas.getContext("2d", {willReadFrequently: true});
        context.drawImage(document.getElementById("axial"), 0, 0, 300, 300);
        const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
        let colored = 0;
        for (let n = 0; n < pixels.length; n += 4) colored += pixels[n] - pixels[n + 2] > 8;
        return colored / (pixels.length / 4);
    })()"""
    assert opened.evaluate(share_in_color) == 0
    opened.locator("#opacity").fill("100")
    opened.wait_for_timeout(100)
    assert opened.evaluate(share_in_color) > 0.5


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_viewer_fits_and_is_accessible(visit, viewer, size):
    page = visit(viewer, size).page
    page.wait_for_selector("body[data-ready=yes]")
    assert has_no_overflow(page)
    boxes = [
        page.locator(f"#{plane}").bounding_box() for plane in ("axial", "coronal", "sagittal")
    ]
    assert all(box["width"] > 200 for box in boxes)
    if size is WIDE:
        assert max(box["y"] + box["height"] for box in boxes) < size["height"]
    assert violations(page) == []


def test_viewer_says_that_it_needs_scripts(visit, viewer):
    page = visit(viewer, java_script_enabled=False).page
    assert page.get_by_text("needs JavaScript").is_visible()


def test_broken_image_is_told(visit, viewer, tmp_path):
    text = re.sub(r'(image/jpeg;base64,)[^"]{300}', r"\1", viewer.read_text())
    broken = tmp_path / "broken.html"
    broken.write_text(text)
    seen = visit(broken)
    seen.page.get_by_text("could not be shown").wait_for()
    seen.complaints.clear()
