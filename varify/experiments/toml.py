"""Settings as a TOML file: read strictly, written flat."""

import json
import sys
from pathlib import Path
from typing import Any

from varify.experiments.errors import SettingsError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Table = dict[str, Any]


def read(path: Path) -> Table:
    """The file's keys and values.

    Raises:
        SettingsError: it can't be read, or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise SettingsError(f"{path} can't be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is no TOML: {error}") from error


def written(values: Table) -> str:
    """Flat values, and tables of these after them; what is None is left out."""
    lines = [
        f"{key} = {_value(value)}" for key, value in values.items() if value is not None and type(value) is not dict
    ]
    for name, table in values.items():
        if isinstance(table, dict):
            lines += ["", f"[{name}]", written(table).rstrip()]
    return "\n".join(lines) + "\n"


def _value(value: str | float | list[str]) -> str:
    # JSON's strings, numbers, booleans and lists of these are TOML's too
    return json.dumps(value, ensure_ascii=False)
