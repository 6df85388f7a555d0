"""The settings in a file of `varify.save`, checked: anybody may have written it."""

import json
from collections.abc import Mapping
from typing import Any

from varify.errors import StructureError, listed

SETTINGS: dict[str, tuple[type, type | None]] = {  # of each, its type and that of what it holds
    "network": (str, None),
    "parameters": (list, str),
    "skipped": (dict, str),
    "requires_grad": (dict, bool),
    "versions": (dict, dict),
    "strict": (bool, None),
    "extra": (dict, None),
    "same": (dict, str),
}


def read_settings(path: object, metadata: Mapping[str, str], tensors: set[str]) -> dict[str, Any]:
    """The settings in a file, checked.

    Raises:
        StructureError: they are none that `save` writes.
    """
    try:
        settings = json.loads(metadata["settings"])
    except (KeyError, ValueError, RecursionError) as error:
        raise damaged(path, f"its settings can't be read ({type(error).__name__}: {error})") from None
    if not isinstance(settings, dict):
        raise damaged(path, f"its settings are a {type(settings).__name__}")
    for name, (kind, inner) in SETTINGS.items():
        value = settings.get(name)
        if not isinstance(value, kind):
            raise damaged(path, f"its setting {name!r} is {str(value)[:99]!r}, no {kind.__name__}")
        for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            if inner is not None and not isinstance(part, inner):
                raise damaged(path, f"its setting {name!r} has {str(part)[:99]!r}, no {inner.__name__}")
    odd = [name for name in settings["parameters"] if f"module.{name}" not in tensors | set(settings["same"])]
    if odd or not settings["parameters"]:
        raise damaged(path, f"its setting 'parameters' has {listed(odd)} without a tensor module.<name>")
    if settings.get("only") not in (None, "variational", "trained"):
        raise damaged(path, f"its setting 'only' is {str(settings['only'])[:99]!r}")
    lost = [name for name, first in settings["same"].items() if first not in tensors or name in tensors]
    twice = [name for name in settings["extra"] if name in tensors or name in settings["same"]]
    if lost or twice:
        raise damaged(path, f"its settings 'same' and 'extra' have {listed(lost + twice)}, which don't fit its tensors")
    for module, written in settings["versions"].items():
        if not isinstance(written.get("version"), (int, type(None))):
            raise damaged(path, f"its setting 'versions' has {str(written)[:99]} for {module!r}")
    return settings


def damaged(path: object, why: str) -> StructureError:
    """The error to raise."""
    return StructureError(f"{path} is damaged, or not of varify.save: {why}")
