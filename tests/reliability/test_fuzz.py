"""
Input that may hold anything: each case ends in a result or in one line that names the file.

The unmarked tests run some hundred cases, the slow ones more than two thousand. Cases are the same
every time.
"""

import contextlib
import gzip
import json
import logging
import math
import warnings

import nibabel as nb
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from m2m_bids.bids.body_weight import find_body_weight
from m2m_bids.bids.layout import QueryError, read_bids_filters, read_sidecar
from m2m_bids.bids.naming import parse_name
from m2m_bids.bids.tables import absent_sessions, read_subjects_sessions, session_times
from m2m_bids.cli import run as cli
from m2m_bids.cli.plugins import read_plugin_file
from m2m_bids.preprocessing.pet import static_reference
from m2m_bids.preprocessing.pet_timing import frame_timing
from m2m_bids.quantification.statistics import frame_times
from m2m_bids.quantification.suv import NoSUVError, suv_scale, weight_in_kg
from m2m_bids.spatial.conform import to_ras
from m2m_bids.spatial.gradients import check_sufficient, read_gradients
from m2m_bids.spatial.images import ImageError, load_image, require_3d

NAME = "sub-1_trc-FDG_pet"


def cases(few, many):
    """Run a test with few examples, and, marked slow, with many."""
    return pytest.mark.parametrize("n_cases", [few, pytest.param(many, marks=pytest.mark.slow)])


def fuzz(n_cases, check, *strategies):
    """Call a function with examples, the same every time."""
    options = settings(
        max_examples=n_cases,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            options(given(*strategies)(check))()
    finally:
        logging.disable(logging.NOTSET)


def is_one_line_of(error, file):
    """Check a message; what it quotes of a file may have line ends, which `main` replaces."""
    message = str(error)
    assert str(file) in message, message
    assert "Traceback" not in message


# --- images ----------------------------------------------------------------------------------

FLOATS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, math.nan, math.inf, -math.inf, 1e30, 1e-30]),
    st.floats(width=32),
)
INTEGERS = st.one_of(st.integers(-3, 12), st.sampled_from([-(2**15), 2**15 - 1, 0, 1]))
# RGB, RGBA, complex, 64 bits, 128 bits, bits and codes that do not exist are among them.
DTYPES = st.sampled_from(
    [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2304, 3, 9999]
)
FIELDS = {
    "dim": st.lists(st.one_of(st.integers(0, 4), INTEGERS), min_size=8, max_size=8),
    "datatype": DTYPES,
    "bitpix": st.sampled_from([0, 1, 8, 16, 24, 32, 64, -8]),
    "pixdim": st.lists(FLOATS, min_size=8, max_size=8),
    "vox_offset": st.sampled_from([0, 16, 351, 352, 353, 368, 544, 1e9, -1, 2**20]),
    "scl_slope": FLOATS,
    "scl_inter": FLOATS,
    "qform_code": INTEGERS,
    "sform_code": INTEGERS,
    "quatern_b": FLOATS,
    "quatern_c": FLOATS,
    "qoffset_x": FLOATS,
    "srow_x": st.lists(FLOATS, min_size=4, max_size=4),
    "srow_y": st.lists(FLOATS, min_size=4, max_size=4),
    "srow_z": st.lists(FLOATS, min_size=4, max_size=4),
    "intent_code": INTEGERS,
    "xyzt_units": st.integers(0, 255),
    "magic": st.sampled_from([b"n+1", b"ni1", b"n+2", b"xxx", b""]),
    "sizeof_hdr": st.sampled_from([348, 540, 0, -1, 1543569408]),
}
KINDS = ["uint8", "int16", "int32", "float32", "float64", "int64", "uint16", "complex64"]


@st.composite
def images(draw):
    """Bytes of an image of which some fields, bytes or the length are wrong, and its suffix."""
    order = draw(st.sampled_from("<>"))
    header_class = draw(st.sampled_from([nb.Nifti1Header, nb.Nifti1Header, nb.Nifti2Header]))
    shape = draw(st.sampled_from([(2, 3, 4), (1, 1, 1), (2, 2, 2, 3), (3, 2), (2, 2, 2, 1, 2)]))
    dtype = np.dtype(draw(st.sampled_from(KINDS))).newbyteorder(order)
    header = header_class(endianness=order)
    header.set_data_shape(shape)
    header.set_data_dtype(dtype)
    header["vox_offset"] = header_class.single_vox_offset
    header["magic"] = header_class.single_magic
    affine = np.array([[-2, 0.1, 0, 3], [0, 2.5, 0.2, 4], [0.3, 0, 3, 5], [0, 0, 0, 1]])
    header.set_sform(affine, draw(st.sampled_from([0, 1, 4])))
    header.set_qform(affine, draw(st.sampled_from([0, 1, 2])))
    n_fields = draw(st.integers(0, 3))
    for name in draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=n_fields, unique=True)):
        value = draw(FIELDS[name])
        with contextlib.suppress(OverflowError), np.errstate(all="ignore"):
            header[name] = value
    voxels = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    content = bytearray(header.binaryblock + bytes(4) + voxels.tobytes(order="F"))
    for position in draw(st.lists(st.integers(0, len(content) - 1), max_size=2)):
        content[position] = draw(st.integers(0, 255))
    damage = draw(st.sampled_from(["none", "none", "none", "cut", "longer"]))
    if damage == "cut":
        content = content[: draw(st.integers(0, len(content)))]
    elif damage == "longer":
        content += bytes(draw(st.integers(1, 100)))
    if draw(st.booleans()):
        return _compressed(draw, bytes(content)), ".nii.gz"
    return bytes(content), ".nii"


def _compressed(draw, content):
    packed = bytearray(gzip.compress(content, mtime=0))
    damage = draw(st.sampled_from(["none", "none", "none", "cut", "flip", "plain"]))
    if damage == "cut":
        return bytes(packed[: draw(st.integers(0, len(packed)))])
    if damage == "flip":
        packed[draw(st.integers(0, len(packed) - 1))] ^= 1 << draw(st.integers(0, 7))
    return content if damage == "plain" else bytes(packed)


@cases(250, 1500)
def test_images(tmp_path, n_cases):
    def check(case):
        content, suffix = case
        file = tmp_path / f"{NAME}{suffix}"
        file.write_bytes(content)
        try:
            image = load_image(file)
            assert np.isfinite(image.affine).all()
            assert abs(np.linalg.det(image.affine[:3, :3])) > 0
            assert image.get_data_dtype().kind in "iufb"
            assert np.asarray(image.dataobj).dtype.isnative
            assert min(image.shape) > 0
            volume = to_ras(require_3d(image, file))
            assert np.isfinite(volume.affine).all()
            image.set_filename(file)
            static_reference(image)
        except ImageError as error:
            is_one_line_of(error, file)

    fuzz(n_cases, check, images())


# --- metadata --------------------------------------------------------------------------------

TEXT = st.text(max_size=12) | st.sampled_from(
    ["n/a", "MBq", "Bq/mL", "kg", "<script>alert(1)</script>", "../../etc/passwd", "\ud800",
     "${HOME}", "{0}", "%s", "\x00", "a\nb", "", "18F", "bolus"]
)  # fmt: skip
NUMBERS = st.one_of(
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.sampled_from([0, 1, 60, 370, 1e400, -1.5, 10**400]),
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
PET_FIELDS = (
    *("Units", "TracerName", "TimeZero", "BodyWeight", "InjectedRadioactivity", "InjectionStart"),
    *("ImageDecayCorrected", "FrameTimesStart", "FrameDuration", "InjectedMass", "Other"),
)
SIDECARS = st.dictionaries(st.sampled_from(PET_FIELDS), VALUES, max_size=12)
BROKEN_JSON = st.one_of(
    st.binary(max_size=30),
    st.sampled_from([b"", b"{", b"[]", b"null", b"\xff\xfe{}", b'{"a": NaN}', b"[" * 20000,
                     b'{"Units": ' + b"[" * 900 + b"]" * 900 + b"}", b"9" * 5000,
                     b'{"BodyWeight": ' + b"9" * 5000 + b"}", b"\xef\xbb\xbf{}"]),
)  # fmt: skip


def json_bytes(value):
    """Spell a value as JSON of Python, with NaN and surrogates where it has them."""
    return json.dumps(value).encode("utf-8")


@cases(60, 400)
def test_sidecars(tmp_path, n_cases):
    image, file = tmp_path / f"{NAME}.nii.gz", tmp_path / f"{NAME}.json"
    sidecars = {tmp_path: [(parse_name(file), file)]}

    def check(content, n_frames):
        file.write_bytes(content)
        try:
            metadata = read_sidecar(image, sidecars)
        except ValueError as error:
            is_one_line_of(error, file)
            return
        written = json.dumps(metadata, ensure_ascii=False, allow_nan=False).encode("utf-8")
        assert json.loads(written) == metadata
        timing = frame_timing(metadata, n_frames)
        assert timing.durations_s is None or (timing.durations_s > 0).all()
        frame_times(metadata, n_frames)
        weight = find_body_weight(tmp_path, {"sub": "1"}, metadata)
        with contextlib.suppress(NoSUVError):
            assert 0 < weight_in_kg(weight.value, weight.units) <= 700
        with contextlib.suppress(NoSUVError):
            assert np.isfinite(suv_scale(metadata, 70.0, n_frames).factors).all()

    fuzz(n_cases, check, SIDECARS.map(json_bytes) | BROKEN_JSON, st.integers(1, 3))


# --- tables ----------------------------------------------------------------------------------

CELLS = st.one_of(
    TEXT,
    st.sampled_from(
        ["sub-1", "1", "ses-M000", "M000", "2010-01-01", "01/01/2010", "0001-01-01T00:00:00",
         "9999-12-31T23:59:59+14:00", "70", "1e400", "-1", "nan", '"', "2010-13-45", "٣"]
    ),
)  # fmt: skip
COLUMNS = st.sampled_from(
    ["participant_id", "session_id", "acq_time", "examination_date", "age", "weight",
     "body_weight", "x", ""]
)  # fmt: skip


@st.composite
def tables(draw):
    """Bytes of a table, of which most have the right columns."""
    columns = draw(st.lists(COLUMNS, max_size=5))
    rows = draw(st.lists(st.lists(CELLS, max_size=6), max_size=4))
    text = "\n".join("\t".join(row) for row in [columns, *rows])
    content = text.encode(draw(st.sampled_from(["utf-8", "utf-16"])), "surrogatepass")
    end = draw(st.sampled_from([b"", b"\n", b"\x00", b"\xff", b'"' + b"a" * 200_000]))
    return content + end


@cases(60, 400)
def test_tables(tmp_path, n_cases):
    subject = tmp_path / "sub-1"
    (subject / "ses-M000").mkdir(parents=True)
    files = [
        tmp_path / "participants.tsv",
        subject / "sub-1_sessions.tsv",
        subject / "ses-M000" / "sub-1_ses-M000_scans.tsv",
        tmp_path / "wanted.tsv",
    ]
    described = tmp_path / "participants.json"

    def check(content, description):
        for file in files:
            file.write_bytes(content)
        described.write_bytes(description)
        times = session_times(subject, ["M000"])
        assert times is None or math.isfinite(times.days["M000"])
        find_body_weight(tmp_path, {"sub": "1", "ses": "M000"}, {})
        try:
            absent_sessions(tmp_path, read_subjects_sessions(files[-1]))
        except QueryError as error:
            is_one_line_of(error, files[-1])

    fuzz(n_cases, check, tables(), VALUES.map(json_bytes) | BROKEN_JSON)


# --- options that are files ------------------------------------------------------------------

# Entities, none, and arguments of pybids.
FILTER_NAMES = ["ses", "session", "run", "acq", "x", "return_type", "scope"]
FILTERS = st.dictionaries(
    st.sampled_from(["t1w", "pet", "fa", "bold", "PET", "x"]),
    VALUES | st.dictionaries(st.sampled_from(FILTER_NAMES), VALUES),
    max_size=3,
)
YAML = st.sampled_from(
    [b"", b"plugin: SLURM", b"plugin: [1]", b"plugin_args: {a: 1}", b"- 1", b"a: b: c", b"\x00",
     b"plugin: X\nplugin_args: 3", b"plugin: X\n? {a: 1}\n: 2", b"&a [*a]", b"\xff\xfe",
     b"plugin: X\nplugin_args: !!python/object/apply:os.system ['exit 3']", b"%TAG ! x",
     b"!!timestamp 9999-99-99", b"plugin: MultiProc\nplugin_args: {n_procs: 2}", b"[" * 3000,
     b"1_0: !!int 'x'", b"!!float x", b"? [a]\n: b"]
)  # fmt: skip


@cases(50, 300)
def test_filter_and_plugin_files(tmp_path, n_cases):
    file = tmp_path / "file"

    def check(filters, plugin):
        file.write_bytes(filters)
        try:
            assert set(read_bids_filters(file)) <= {"t1w", "pet", "fa"}
        except QueryError as error:
            is_one_line_of(error, file)
        file.write_bytes(plugin)
        try:
            assert isinstance(read_plugin_file(file)["plugin_args"], dict)
        except ValueError as error:
            is_one_line_of(error, file)

    fuzz(n_cases, check, FILTERS.map(json_bytes) | BROKEN_JSON, YAML | st.binary(max_size=40))


# --- gradients -------------------------------------------------------------------------------

WORDS = st.sampled_from(
    ["0", "1000", "-1", "nan", "inf", "1e400", "x", "0.7", ",", "\ud800", "1_0"]
)


@cases(60, 300)
def test_gradients(tmp_path, n_cases):
    bval, bvec = tmp_path / "a.bval", tmp_path / "a.bvec"
    lines = st.lists(st.lists(WORDS, max_size=4).map(" ".join), max_size=4).map("\n".join)
    content = lines.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=9)
    good = st.just(b"0 1000 1000")
    directions = st.just(b"0 1 0\n0 0 1\n0 0 0")

    def check(b_values, vectors):
        bval.write_bytes(b_values)
        bvec.write_bytes(vectors)
        try:
            gradients = read_gradients(bval, bvec, n_volumes=3, vox2ras=np.diag([2.0, 2, 3, 1]))
        except ImageError as error:
            is_one_line_of(error, bvec if str(bvec) in str(error) else bval)
            return
        assert np.isfinite(gradients.directions).all()
        with pytest.raises(ImageError, match=r"dwi\.nii"):
            check_sufficient(gradients, "dwi.nii")

    fuzz(n_cases, check, content | good, content | directions)


# --- the command line ------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path):
    """A dataset whose images are empty files: a dry run reads none."""
    root = tmp_path / "bids"
    for name in (
        "sub-1/ses-M000/anat/sub-1_ses-M000_T1w.nii.gz",
        "sub-1/ses-M012/pet/sub-1_ses-M012_trc-FDG_pet.nii.gz",
        "sub-1/ses-M012/dwi/sub-1_ses-M012_dwi.nii.gz",
        "sub-1/ses-M012/dwi/sub-1_ses-M012_dwi.bvec",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("image")
    return root


@cases(6, 150)
def test_dry_runs(dataset, tmp_path, capsys, n_cases):
    stem = dataset / "sub-1/ses-M012"
    options = {
        "--bids-filter-file": tmp_path / "filter.json",
        "--subjects-sessions-tsv": tmp_path / "wanted.tsv",
    }
    files = {
        "description": dataset / "dataset_description.json",
        "sidecar": stem / "pet/sub-1_ses-M012_trc-FDG_pet.json",
        "bval": stem / "dwi/sub-1_ses-M012_dwi.bval",
        "sessions": dataset / "sub-1/sub-1_sessions.tsv",
        "participants": dataset / "participants.tsv",
        "filter": options["--bids-filter-file"],
        "wanted": options["--subjects-sessions-tsv"],
    }
    good = {
        "description": b'{"Name": "x", "BIDSVersion": "1.10.0"}',
        "bval": b"0 1000",
        "filter": b"{}",
        "wanted": b"participant_id\tsession_id\nsub-1\tses-M012\n",
    }
    json_content = VALUES.map(json_bytes) | BROKEN_JSON
    contents = {
        "description": json_content,
        "sidecar": SIDECARS.map(json_bytes) | json_content,
        "bval": st.binary(max_size=9) | st.just(b"nan x"),
        "sessions": tables(),
        "participants": tables(),
        "filter": FILTERS.map(json_bytes) | json_content,
        "wanted": tables(),
    }
    changed = st.sampled_from(sorted(files)).flatmap(
        lambda name: st.tuples(st.just(name), contents[name])
    )

    def check(case):
        name, content = case
        for each, file in files.items():
            value = content if each == name else good.get(each)
            file.write_bytes(value) if value is not None else file.unlink(missing_ok=True)
        arguments = [dataset, tmp_path / "out", "participant", "--dry-run", "--device", "cpu",
                     "--transform", "rigid"]  # fmt: skip
        for option, file in options.items():
            arguments += [option, file]
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as ended:
            code = ended.code
        captured = capsys.readouterr()
        assert code in (0, 2), captured.err
        assert "Traceback" not in captured.out + captured.err
        if code == 2:
            last = captured.err.strip().splitlines()[-1]
            assert last.startswith("m2m-bids: error: ")
            assert last.isprintable()
            # The beginning alone: messages of others say "unexpected end of data".
            assert not last.startswith("m2m-bids: error: unexpected "), last
            assert str(files[name]) in last or str(dataset) in last, last

    fuzz(n_cases, check, changed)
