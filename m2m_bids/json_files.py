"""Read JSON that anyone may have written."""

import json
import math
from pathlib import Path
from typing import Any


def read_json_object(file: Path) -> dict[str, Any]:
    """
    Read a JSON object; numbers that are not finite, which JSON does not have, are null.

    Raises
    ------
    ValueError
        If the file cannot be read or holds anything else; the message names it.
    """
    try:
        content = json.loads(
            file.read_text(encoding="utf-8-sig"),
            parse_float=_finite,
            parse_int=lambda text: int(text) if len(text) < 20 else _finite(text),
            parse_constant=lambda _: None,
        )
        # Half a pair of UTF-16, escaped, is a string that cannot be written.
        json.dumps(content, ensure_ascii=False).encode("utf-8")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; empty where there is none."""
    try:
        return read_json_object(file)
    except ValueError:
        return {}


def _finite(text: str) -> float | None:
    """Read a number; None where it is too large for one."""
    number = float(text)
    return number if math.isfinite(number) else None
