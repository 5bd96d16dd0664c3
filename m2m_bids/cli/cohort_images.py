"""Mean images of the level ``group``: which images are averaged, and what they are written as."""

import contextlib
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from m2m_bids.bids.derivatives import file_uri, image_sidecar, write_json
from m2m_bids.bids.earlier import registered_sidecar
from m2m_bids.bids.naming import parse_name, qc_file
from m2m_bids.bids.request import MADE_FROM_FIELD, TEMPLATE_TRANSFORMS, differences, made_from
from m2m_bids.bids.spaces import T1W
from m2m_bids.quality.averages import Average, average_images
from m2m_bids.reports.group import AveragePicture
from m2m_bids.settings import Settings
from m2m_bids.spatial.images import save_image

LOGGER = logging.getLogger("m2m_bids")
SUFFIXES = {"pet": "pet", "fa": "dwimap"}
UNKNOWN_TRACER = "tracer unknown"


class Cohort(NamedTuple):
    """
    Images that are averaged together.

    Parameters
    ----------
    modality, tracer : str
        The tracer's label is empty where there is none.
    is_at_template : bool
        Whether the scans were registered to a template, for lack of a T1w.
    space : str
        As in file names: the template's name, with its cohort and resolution.
    """

    modality: str
    tracer: str
    is_at_template: bool
    space: str

    @property
    def title(self) -> str:
        """Kind of the scans, and space."""
        route = ", registered to it without a T1w" if self.is_at_template else ""
        tracer = f" {self.tracer or UNKNOWN_TRACER}" if self.modality == "pet" else ""
        return f"{self.modality.upper()}{tracer} in {self.space}{route}"

    def stem(self, statistic: str) -> str:
        """Name a file without its ending; no two cohorts have one name."""
        tracer = f"trc-{self.tracer}_" if self.tracer else ""
        parameter = "param-FA_" if self.modality == "fa" else ""
        desc = f"{statistic}{'Template' if self.is_at_template else ''}"
        return f"{tracer}space-{self.space}_{parameter}desc-{desc}_{SUFFIXES[self.modality]}"


def average_scans(
    scans: Sequence[Mapping[str, Any]], settings: Settings, folder: Path
) -> Iterator[AveragePicture]:
    """
    Average the images in each template's space, and write mean and standard deviation.

    An image that cannot be used is left out and named; nothing that images hold ends the level.

    Parameters
    ----------
    scans : sequence of mapping
        Of each ``scan``, ``entities`` (of its name, None of a scan without images), ``modality``,
        ``tracer`` (a label, may be empty), ``target``.
    settings : Settings
    folder : Path
        Where to write.

    Yields
    ------
    AveragePicture
        Of each cohort of which there is an image.
    """
    for cohort, files in sorted(find_images(scans, settings.output_dir).items()):
        try:
            average = average_images(files, cohort.modality)
            if average.mean is not None:
                _save(average, cohort, files, settings, folder)
        except Exception as error:
            LOGGER.warning("no mean image of %s: %s", cohort.title, error)
            LOGGER.debug("", exc_info=True)
            average = Average(None, None, 0, [f"all images: {error}"])
        for reason in average.left_out:
            LOGGER.warning("left out of the mean image: %s", reason)
        yield AveragePicture(
            cohort.title, cohort.modality, average.mean, average.sd, _note(average, cohort),
            average.left_out,
        )  # fmt: skip


def _note(average: Average, cohort: Cohort) -> str:
    images = "1 image" if average.n == 1 else f"{average.n} images"
    if average.mean is None:
        return f"{images}; a mean takes two."
    scaled = ", each divided by its mean in the brain" if cohort.modality == "pet" else ""
    return f"{images}{scaled}."


def find_images(scans: Sequence[Mapping[str, Any]], output_dir: Path) -> dict[Cohort, list[Path]]:
    """
    Find registered images in templates' spaces.

    Of a dynamic scan that is the static image, which is beside the frames. One of an earlier
    registration, in a space that is no longer asked for, is left out and named in the log.

    Parameters
    ----------
    scans : sequence of mapping
        As in `average_scans`.
    output_dir : Path

    Returns
    -------
    dict of Cohort to list of Path
    """
    images: dict[Cohort, list[Path]] = defaultdict(list)
    for scan in scans:
        if scan["entities"] is None:
            continue
        modality = scan["modality"]
        folder = qc_file(scan["scan"], output_dir).parent
        for file in sorted(folder.glob(f"*_space-*_desc-preproc_{SUFFIXES[modality]}.nii.gz")):
            space = _space_of(file, scan["entities"])
            if space is None:
                continue
            if _is_of_another_registration(file, scan["scan"], output_dir):
                LOGGER.warning(
                    "%s: left out of mean images: it is of another registration than the image on"
                    " the grid of the scan's target; run the level 'participant' with this space,"
                    " or remove it",
                    file,
                )
                continue
            cohort = Cohort(modality, scan["tracer"], scan["target"] != T1W, space)
            static = file.with_name(file.name.replace("_desc-preproc_pet.", "_petref."))
            images[cohort].append(static if static.is_file() else file)
    return images


def _is_of_another_registration(file: Path, scan: str, output_dir: Path) -> bool:
    """Tell images of an earlier registration, as far as their sidecars say."""
    there = made_from(file.with_name(file.name.removesuffix(".nii.gz") + ".json"))
    there.pop(TEMPLATE_TRANSFORMS, None)
    registered = registered_sidecar(scan, output_dir).get(MADE_FROM_FIELD, {})
    return bool(there) and bool(differences(there, registered))


def remove_averages(folder: Path) -> None:
    """Remove mean images of an earlier run, of which some may no longer be made."""
    for kind in ("mean", "sd", "meanTemplate", "sdTemplate"):
        for file in folder.glob(f"*desc-{kind}_*"):
            file.unlink()
    with contextlib.suppress(OSError):  # not there, or not empty
        folder.rmdir()


def _space_of(file: Path, entities: Mapping[str, str]) -> str | None:
    """Say which template's space an image of a scan is in, with cohort and resolution; or None."""
    try:
        own = parse_name(file).entities
    except ValueError:
        return None
    space = own.pop("space")
    parts = [f"{key}-{own.pop(key)}" for key in ("cohort", "res") if key in own]
    is_of_scan = {**own, "desc": None} == {**entities, "desc": None}
    return "_".join([space, *parts]) if is_of_scan and space != T1W else None


def _save(
    average: Average, cohort: Cohort, files: Sequence[Path], settings: Settings, folder: Path
) -> None:
    """Write both images and their sidecars."""
    sources = [file_uri(file, settings.output_dir, settings.datasets) for file in files]
    for name, title, image in (
        ("mean", "Mean", average.mean),
        ("sd", "Standard deviation", average.sd),
    ):
        stem = cohort.stem(name)
        save_image(image, folder / f"{stem}.nii.gz")
        scaled = ", each divided by its mean in the brain" if cohort.modality == "pet" else ""
        content = image_sidecar(sources, description=f"{title} of {average.n} images{scaled}.")
        write_json(folder / f"{stem}.json", {**content, "LeftOut": average.left_out})
