"""Read Nipype plugin files."""

from pathlib import Path
from typing import Any

_KEYS = {"plugin", "plugin_args"}
# Of values that are not what their tag says, keys that are no keys, and deep nesting.
_YAML_ERRORS = (ValueError, TypeError, LookupError, AttributeError, RecursionError)


def read_plugin_file(file: Path) -> dict[str, Any]:
    """
    Read a Nipype plugin file.

    Returns
    -------
    dict
        ``plugin`` and ``plugin_args``, to pass to Nipype's ``Workflow.run``.

    Raises
    ------
    ValueError
        If the file cannot be read, is not YAML, or does not hold these two.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, *_YAML_ERRORS, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--use-plugin {file}: cannot be read as YAML ({reason})") from error
    if not isinstance(content, dict) or not isinstance(content.get("plugin"), str):
        raise ValueError(f"--use-plugin {file}: expected 'plugin: NAME' and 'plugin_args:' in it")
    if unknown := sorted(map(str, set(content) - _KEYS)):
        raise ValueError(f"--use-plugin {file}: unknown keys {unknown}, expected plugin_args")
    arguments = content.get("plugin_args") or {}
    if not isinstance(arguments, dict):
        raise ValueError(f"--use-plugin {file}: plugin_args must be a table, found {arguments!r}")
    return {"plugin": content["plugin"], "plugin_args": arguments}
