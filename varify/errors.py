"""Every error varify raises on its own account, and the wording they share."""

import os
from collections.abc import Iterable
from types import TracebackType

_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep


class VarifyError(Exception):
    """Parent of all errors below: `except varify.VarifyError` catches what varify itself refuses."""


class ModelError(VarifyError, TypeError):
    """The object given is no network that can be made variational."""


class SelectionError(VarifyError, ValueError):
    """A `where` chose nothing, or something that does not exist."""


class PriorError(VarifyError, ValueError):
    """A prior, or one of its hyper-parameters, can't be used for the parameter it was given to."""


class InitError(VarifyError, ValueError):
    """An initialisation can't be used."""


class EstimatorError(VarifyError, ValueError):
    """An estimator is unknown, or can't be had for a parameter where it must (`strict=True`)."""


class StructureError(VarifyError, RuntimeError):
    """The network inside a variational one was rebuilt after the conversion."""


def listed(names: Iterable[str], most: int = 4) -> str:
    """`a, b, c, ... (8 in all)`: enough names to recognise the model, never a screenful."""
    names = list(names)
    if len(names) <= most:
        return ", ".join(names) or "none"
    return f"{', '.join(names[:most])}, ... ({len(names)} in all)"


def at_users_line(error: Exception) -> Exception:
    """The error as the user's code raised it: without the frames of varify's that are below the user's."""
    frames = []
    entry = error.__traceback__
    while entry is not None:
        frames.append(entry)
        entry = entry.tb_next
    ours = [entry.tb_frame.f_code.co_filename.startswith(_PACKAGE) for entry in frames]
    entered = ours.index(False) if False in ours else len(ours)
    for i, entry in enumerate(frames):
        if entry.tb_frame.f_code.co_name == "handle_torch_function":  # by which torch asks, from a function that is
            ours[i - 1] = ours[i] = True  # then run as the user called it
    kept: TracebackType | None = None
    for i in reversed(range(len(frames))):
        if not ours[i] or i < entered:
            kept = TracebackType(kept, frames[i].tb_frame, frames[i].tb_lasti, frames[i].tb_lineno)
    return error.with_traceback(kept)
