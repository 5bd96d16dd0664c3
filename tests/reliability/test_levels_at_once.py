"""The levels ``group``, ``train`` and ``evaluate``, each run twice at once."""

import sys
import time

import pytest

from m2m_bids.bids.derivatives import write_json
from m2m_bids.bids.locks import hold_level, hold_participants, is_held, locked
from m2m_bids.bids.naming import qc_file
from m2m_bids.bids.status import StatusRow, update_status
from m2m_bids.registration.weights import read_card

pytestmark = pytest.mark.slow
WAITS = "waiting for another run (process"
PET = ("--modalities", "pet")
TRAIN = (
    *PET,
    *("--grid-size", "36", "--grid-spacing", "5.4", "--batch-size", "1"),
    *("--max-steps", "3"),
)


def both(app, *options):
    """Start the same command twice; return codes and texts, the one that waited last."""
    processes = [app.start(*options), app.start(*options)]
    codes = [process.wait(timeout=3000) for process in processes]
    texts = [process.log.read_text() for process in processes]
    ended = sorted(zip(codes, texts, strict=True), key=lambda item: WAITS in item[1])
    assert [WAITS in text for _, text in ended] == [False, True]
    return ended


def wait_for(process, text):
    end = time.monotonic() + 300
    while text not in process.log.read_text():
        assert time.monotonic() < end
        assert process.poll() is None, process.log.read_text()
        time.sleep(0.1)


def test_group_waits(app):
    app = app._replace(options=(), level="group")
    name = "sub-01_trc-18FFDG_pet"
    write_json(qc_file(name, app.out), {"decision": "rigid", "nmi": 1.1})
    update_status(app.out, [StatusRow("sub-01", "n/a", "pet", name, "T1w", "rigid only", "x")])
    with hold_level("group", [app.out]):
        process = app.start()
        wait_for(process, WAITS)
        assert f"works on group in {app.out}" in process.log.read_text()
        assert not list(app.out.glob("group*"))
    assert process.wait(timeout=300) == 0, process.log.read_text()
    assert (app.out / "group.html").is_file()
    assert not any(map(is_held, app.out.rglob("*.lock")))


def test_evaluations_take_turns(app, people, tmp_path):
    """The second finds all registrations done."""
    options = (*PET, "--methods", "initial", "rigid", "--n-pairs", "1")
    app = app._replace(data=people, options=options, level="evaluate")
    first, second = both(app)
    assert [code for code, _ in (first, second)] == [0, 0], first[1] + second[1]
    assert "preparing" not in second[1]
    assert "2 methods: 0 registrations to do" in second[1]
    alone = app._replace(out=tmp_path / "alone", work=tmp_path / "work2")
    assert alone.run().code == 0
    tables = [(a.out / "evaluation/summary.tsv").read_text() for a in (app, alone)]
    assert without_seconds(tables[0]) == without_seconds(tables[1])
    assert not any(map(is_held, app.out.rglob("*.lock")))


def without_seconds(table):
    """Rows of a table without the columns that tell times."""
    header, *rows = [line.split("\t") for line in table.splitlines()]
    kept = [i for i, name in enumerate(header) if not name.startswith("seconds")]
    assert 0 < len(kept) < len(header)
    return [[row[i] for i in kept] for row in (header, *rows)]


def test_trainings_in_one_folder(app, people):
    """Continued ones take turns; one that is to begin is refused at once."""
    app = app._replace(data=people, options=TRAIN, level="train")
    prepared = both(app, "--prepare-only")
    assert [code for code, _ in prepared] == [0, 0], prepared[0][1] + prepared[1][1]
    # The second has found the images there.
    assert ["preparing 4 scans" in text for _, text in prepared] == [True, False]

    first, second = both(app, "--resume")
    assert [code for code, _ in (first, second)] == [0, 0], first[1] + second[1]
    run_dir = app.out / "training" / "gradicon-m2m+gcc"
    assert app.run("--run-name", "alone").code == 0
    cards = [read_card(folder / "weights") for folder in (run_dir, run_dir.with_name("alone"))]
    assert cards[0].sha256 == cards[1].sha256

    # Of the processes of one training the first has the folder, and the other is not refused.
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    together = app.run("--run-name", "two", prefix=[*torchrun, "--standalone", "--no-python"])
    assert together.code == 0, together.text
    assert WAITS not in together.text
    assert (app.out / "training" / "two" / "weights").is_dir()

    third = app.out / "training" / "third"
    with hold_level("train", [third]):
        begun = app.run("--run-name", "third")
        assert begun.code == 2
        assert f"{third}: there is a training already." in begun.text
    assert not any(map(is_held, app.out.rglob("*.lock")))


@pytest.mark.parametrize("level", ["train", "evaluate"])
def test_preparation_waits_for_participants(app, people, level):
    """The level participant has the same nodes in the same work folder."""
    own = TRAIN if level == "train" else (*PET, "--methods", "initial", "--n-pairs", "1")
    app = app._replace(data=people, options=own, level=level)
    labels = [folder.name.removeprefix("sub-") for folder in people.bids.glob("sub-*")]
    options = ("--prepare-only",) if level == "train" else ()
    with hold_participants([app.work], labels):
        process = app.start(*options)
        wait_for(process, WAITS)
        assert not list(app.work.glob("m2m_bids_wf"))
        process.kill()
        process.wait()
    # A run of others is not waited for.
    with locked(app.work / ".sub-other.lock"):
        refused = app.run("--clean-workdir", *options)
        assert refused.code == 2, refused.text
        assert "--clean-workdir: another run works in" in refused.text
