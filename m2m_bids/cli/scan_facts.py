"""What the report says of one scan in words and tables, from its files in the output dataset."""

import csv
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from m2m_bids.bids.derivatives import NO_PVC_FIELD
from m2m_bids.bids.earlier import entities_of
from m2m_bids.bids.naming import (
    expected_anat_outputs,
    expected_outputs,
    figure_names,
    figures_of_scan,
    output_entities,
    parse_name,
    qc_file,
)
from m2m_bids.bids.query import Scan
from m2m_bids.bids.status import StatusRow
from m2m_bids.json_files import read_json
from m2m_bids.quality.limits import Definition, definitions, warnings_of
from m2m_bids.reports.fragments import Level, summary_html, table_html
from m2m_bids.reports.html import write_fragment
from m2m_bids.settings import Settings

TRACER_FIELDS = ("TracerName", "TracerRadionuclide")


def write_scan_fragments(
    scan: Scan, row: StatusRow, sidecar: Mapping[str, Any], settings: Settings
) -> None:
    """
    Write the words and the table of regions of a scan to where its report finds them.

    Parameters
    ----------
    scan : Scan
        A scan that was to be registered.
    row : StatusRow
        What became of it.
    sidecar : mapping
        Of its registered image; empty if there is none.
    settings : Settings
    """
    names = figures_of_scan(scan, settings.output_dir)
    folder = Path(names["figures_dir"])
    tables = _find_tables(scan, settings)
    numbers = read_quality(scan.name, settings.output_dir) if sidecar else {}
    message, level = _decision(row, sidecar, numbers.get("warnings", []))
    facts = {
        **_input_facts(scan),
        "Static image": sidecar.get("StaticReference"),
        f"{scan.linear.capitalize()} alignment": _linear_fact(sidecar),
        "Output spaces": _written_images(scan, settings),
        **_quantification_facts(scan, tables, settings),
    }
    known = {name: value for name, value in facts.items() if value}
    summary = summary_html(known, message=message, level=level)
    write_fragment(folder, f"{names['stem']}_desc-summary_{names['suffix']}", summary)
    statistics = [file for file in tables if file.stem.endswith("_stat")]
    for name, html in (
        ("regions", "".join(map(_regions_html, statistics))),
        ("quality", _quality_html(scan, numbers)),
    ):
        stem = f"{names['stem']}_desc-{name}_{names['suffix']}"
        if html:
            write_fragment(folder, stem, html)
        else:
            (folder / f"{stem}.html").unlink(missing_ok=True)


def read_quality(name: str, out_dir: Path) -> dict[str, Any]:
    """
    Read a scan's numbers for quality control, as far as they are numbers.

    Parameters
    ----------
    name : str
        Name of the scan.
    out_dir : Path
        Root of the output dataset.

    Returns
    -------
    dict
        Finite numbers by name, and ``warnings``, a list of str; of a damaged file what is left.
    """
    content = read_json(qc_file(name, out_dir))
    said = content.get("warnings")
    warnings = [text for text in said if isinstance(text, str)] if isinstance(said, list) else []
    numbers = {key: value for key, value in content.items() if _is_finite(value)}
    return {**numbers, "warnings": warnings}


def _is_finite(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) < sys.float_info.max


def write_t1w_fragment(scan: Scan, settings: Settings) -> None:
    """
    Write what a T1w reference was made of to where its report finds it.

    Parameters
    ----------
    scan : Scan
        A scan that is registered to it.
    settings : Settings
    """
    outputs = expected_anat_outputs(scan.t1w_entities, settings.output_dir)
    facts: dict[str, object] = {"File": str(scan.t1w)}
    for name, key in (("T1w", "preproc"), ("Brain mask", "mask"), ("Tissues", "dseg")):
        said = read_json(outputs[f"{key}_json"])
        if said:
            facts[name] = [*filter(None, [said.get("Description")]), *said.get("Sources", [])]
    names = figure_names(scan.t1w_entities, "T1w", settings.output_dir)
    folder = Path(names["figures_dir"])
    write_fragment(folder, f"{names['stem']}_desc-summary_T1w", summary_html(facts))


def _decision(
    row: StatusRow, sidecar: Mapping[str, Any], warnings: Sequence[str]
) -> tuple[str, Level]:
    """Say what became of a scan, and what asks for a look: that a step was used is no proof."""
    if row.status == "failed":
        reason = row.reason.removesuffix(".")
        return f"Failed: {reason}. Figures below, if any, are of an earlier run.", "danger"
    message, level = _result(row, sidecar)
    if warnings:
        return f"{message} To be looked at: {'; '.join(warnings)}.", "warning"
    return message, level


def _result(row: StatusRow, sidecar: Mapping[str, Any]) -> tuple[str, Level]:
    """Say which transform was used, and why."""
    if row.status == "rigid only":
        kind = sidecar.get("Transform", "rigid")
        return f"The deformable step was rejected, the result is {kind}: {row.reason}.", "warning"
    note = "" if row.reason == "n/a" else f" Note: {row.reason}."
    if sidecar.get("Transform") == "rigid":
        return f"Aligned rigidly, as was asked for.{note}", "info"
    if sidecar.get("Transform") == "affine":
        return f"Aligned affinely with the template, as was asked for.{note}", "info"
    return f"The deformable step passed the check and was used.{note}", "success"


def _input_facts(scan: Scan) -> dict[str, object]:
    """Name the files, and the tracer."""
    said = [str(scan.sidecar[name]) for name in TRACER_FIELDS if scan.sidecar.get(name)]
    return {
        "Files": [str(file) for file in scan.sources],
        "Choice of the T1w": scan.t1w_choice,
        "Tracer": said or scan.tracer,
        "Units": str(scan.sidecar.get("Units") or ""),
    }


def _linear_fact(sidecar: Mapping[str, Any]) -> str:
    """Say how the rigid alignment went, or the affine one to a template."""
    if "LinearScore" not in sidecar:
        return ""
    start = sidecar.get("LinearStart", "unknown")
    return f"mutual information {sidecar['LinearScore']:.3g} nats; best start: {start}"


def _written_images(scan: Scan, settings: Settings) -> list[str]:
    """List the registered images that are there, in every space, whichever run wrote them."""
    out_dir = settings.output_dir
    files = [expected_outputs(scan, out_dir, "rigid")[name] for name in ("preproc", "rigid")]
    own = parse_name(files[0])
    for file in sorted(files[0].parent.glob(f"*_space-*_desc-preproc_{own.suffix}.nii.gz")):
        entities = entities_of(file)
        placed = {key: entities[key] for key in ("space", "cohort", "res") if key in entities}
        if file not in files and entities == {**own.entities, **placed}:
            files.append(file)
    return [f"{_space_of(file)}: {file.relative_to(out_dir)}" for file in files if file.is_file()]


def _space_of(file: Path) -> str:
    """Name the space of an image, its grid, and the step that it is of, by its name."""
    entities = parse_name(file).entities
    grid = f":res-{entities['res']}" if "res" in entities else ""
    step = "" if entities["desc"] == "preproc" else f", {entities['desc']}"
    return f"{entities['space']}{grid}{step}"


def _find_tables(scan: Scan, settings: Settings) -> list[Path]:
    """Find the tables of regions of a scan, those without correction first."""
    folder = expected_outputs(scan, settings.output_dir, "rigid")["preproc"].parent
    own = output_entities(scan.entities)
    found = (
        file
        for end in ("stat", "tacs")
        for file in folder.glob(f"*_{end}.tsv")
        if output_entities(entities_of(file)) == own
    )
    return sorted(found, key=lambda file: ("_pvc-" in file.name, file.name))


def _quantification_facts(scan: Scan, tables: list[Path], settings: Settings) -> dict[str, object]:
    """Say what was measured, with what, and what could not be."""
    facts: dict[str, object] = {
        "Tables of regions": [str(file.relative_to(settings.output_dir)) for file in tables]
    }
    if not tables:
        return facts
    said = read_json(tables[0].with_suffix(".json"))
    facts["Regions"] = f"{said.get('Segmentation')}: {said.get('LabelFile')}"
    for name in ("SUV", "SUVR"):
        if reason := said.get(f"{name}NotComputed"):
            facts[name] = f"not computed: {reason}"
    if scan.modality == "pet":
        images = expected_outputs(scan, settings.output_dir, "rigid")["preproc_json"]
        for name, words in (("SUV", _suv_fact), ("SUVR", _suvr_fact)):
            file = images.with_name(images.name.replace("desc-preproc", f"desc-preproc{name}"))
            if file.is_file():
                facts[name] = words(read_json(file))
    corrections = {parse_name(file).entities.get("pvc") for file in tables} - {None}
    facts["Partial volume correction"] = sorted(corrections)
    if reason := said.get(NO_PVC_FIELD):
        facts["Partial volume correction"] = f"not computed: {reason}"
    return facts


def _suv_fact(said: Mapping[str, Any]) -> str:
    return (
        f"{said.get('BodyWeight')} {said.get('BodyWeightUnits')} ({said.get('BodyWeightSource')}),"
        f" {said.get('SUVInjectedRadioactivity')} Bq, decay: {said.get('SUVDecayConvention')}"
    )


def _suvr_fact(said: Mapping[str, Any]) -> str:
    means = ", ".join(f"{mean:.6g}" for mean in said.get("ReferenceRegionMean", []))
    return f"relative to {said.get('ReferenceRegion')}, whose mean is {means}"


def _regions_html(file: Path) -> str:
    """Show a table of regions, with units, and with SUV and SUVR where there are any."""
    with file.open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    if not rows:
        return ""
    corrected = parse_name(file).entities.get("pvc")
    heading = f"Corrected for partial volume effects ({corrected})" if corrected else "As measured"
    units = read_json(file.with_suffix(".json")).get("Units")
    names = _column_names(units if isinstance(units, str) else "")
    factors = _factors(file)
    shown = []
    for row in map(_with_numbers, rows):
        mean = row.get("mean")
        cells = {names.get(name, name): value for name, value in row.items()}
        for name, factor in factors.items():
            cells[f"mean {name}"] = mean * factor if isinstance(mean, int | float) else None
        shown.append(cells)
    table = table_html(shown, name=file.stem)
    return f'<p class="elem-caption">{escape(heading)}</p>{table}'


def _column_names(units: str) -> dict[str, str]:
    """Name the columns of a table of regions with their units."""
    named = {name: f"{name} ({units})" for name in ("mean", "median", "sd") if units}
    return {**named, "volume_mm3": "volume (mm³)", "n_voxels": "voxels"}


def _factors(statistics: Path) -> dict[str, float]:
    """
    Find the factors from means to SUV and SUVR, by the sidecars of the images of these.

    A scan whose frames have different ones has none for all of them.
    """
    entities, _, _ = parse_name(statistics)
    names = {"SUV": "SUVScaleFactor", "SUVR": "ReferenceRegionMean"}
    factors = {}
    for name, field in names.items():
        for file in sorted(statistics.parent.glob(f"*_desc-preproc{name}_pet.json")):
            other = entities_of(file)
            is_own = output_entities(other) == output_entities(entities)
            values = read_json(file).get(field)
            if not is_own or other.get("pvc") != entities.get("pvc") or "res" in other:
                continue
            if isinstance(values, list) and len(values) == 1 and _is_finite(values[0]):
                factors[name] = 1 / values[0] if name == "SUVR" else float(values[0])
    return factors


def _with_numbers(row: Mapping[str, str]) -> dict[str, object]:
    """Read the cells of a row; what is no number stays text, and n/a is left out."""
    cells: dict[str, object] = {}
    for name, text in row.items():
        try:
            cells[name] = int(text) if text.lstrip("-").isdigit() else float(text)
        except ValueError:
            cells[name] = None if text == "n/a" else text
    return cells


def _quality_html(scan: Scan, numbers: Mapping[str, Any]) -> str:
    """Show the numbers for quality control, those beyond their limits first."""
    beyond = warnings_of(numbers, is_same_person=not scan.template)
    rows = [
        {
            "number": definition.title,
            **_values(name, definition, numbers, scan.linear),
            "good": definition.good,
            "when to worry": definition.worry,
        }
        for name, definition in sorted(
            definitions().items(), key=lambda item: item[0] not in beyond
        )
        if isinstance(numbers.get(name), int | float)
    ]
    if not rows:
        return ""
    return table_html(rows, name=f"Numbers for quality control, {scan.name}", is_whole=True)


def _values(
    name: str, definition: Definition, numbers: Mapping[str, Any], linear: str
) -> dict[str, str | None]:
    """Write a number's values in the columns of what was measured."""
    columns = {"before": ("initial", "native"), linear: ("rigid",)}
    # What was rejected has numbers too, and is not the result.
    columns |= {"deformable step": ("deformable",), "result": ("used",)}
    values: dict[str, str | None] = dict.fromkeys(columns)
    for state in definition.states:
        is_alone = len(definition.states) == 1 or state == "used"
        value = numbers.get(name if is_alone else f"{name}_{state}")
        if isinstance(value, int | float):
            column = next(title for title, states in columns.items() if state in states)
            values[column] = definition.text(value)
    return values
