"""Remove intermediate results that nothing needs any more."""

import logging
import shutil
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING

from m2m_bids.settings import Settings

if TYPE_CHECKING:
    from m2m_bids.bids.query import Scan
    from m2m_bids.bids.status import StatusRow

LOGGER = logging.getLogger("m2m_bids")


def purge_finished(
    settings: Settings,
    scans: "Sequence[Scan]",
    rows: "Sequence[StatusRow]",
    held: Container[str],
) -> None:
    """
    Remove the intermediate results of each held participant none of whose scans has failed.

    Those of the others stay, so that the same command, or another run that is at work on them,
    goes on from them; so do caches, and what else is in the work folder.

    Parameters
    ----------
    settings : Settings
    scans : sequence of Scan
        All scans of the run.
    rows : sequence of StatusRow
        What became of each, in the same order.
    held : container of str
        Labels of the participants that other runs are kept off.
    """
    from m2m_bids.workflows.base import WORKFLOW_NAME, single_subject_wf_name

    failed = {
        scan.subject for scan, row in zip(scans, rows, strict=True) if row.status == "failed"
    }
    for subject in dict.fromkeys(scan.subject for scan in scans):
        folder = settings.work_dir / WORKFLOW_NAME / single_subject_wf_name(subject)
        if subject in held and subject not in failed and folder.is_dir():
            shutil.rmtree(folder)
            LOGGER.info("removed %s", folder)
