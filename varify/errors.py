"""Every error varify raises on its own account, and the wording they share."""

import math
import operator
import os
from collections.abc import Iterable
from numbers import Real
from types import TracebackType
from typing import Any

_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep


class VarifyError(Exception):
    """Parent of all errors below: `except varify.VarifyError` catches what varify itself refuses."""


class VarifyWarning(UserWarning):
    """Something that runs, and very likely isn't what was meant; `warnings.filterwarnings` tells it from others'."""


class ModelError(VarifyError, TypeError):
    """The object given is no network that can be made variational."""


class SelectionError(VarifyError, ValueError):
    """A `where` chose nothing, or something that does not exist."""


class PriorError(VarifyError, ValueError):
    """A prior, or one of its hyper-parameters, can't be used for the parameter it was given to."""


class InitError(VarifyError, ValueError):
    """An initialization can't be used."""


class EstimatorError(VarifyError, ValueError):
    """An estimator is unknown, or is unavailable for a parameter where it is needed (`strict=True`)."""


class PropagationError(VarifyError, RuntimeError):
    """Mean and variance can't be propagated through an operation."""


class StructureError(VarifyError, RuntimeError):
    """The network inside a variational one was rebuilt after the conversion."""


class ArgumentError(VarifyError, ValueError):
    """An argument has a value that it can't have."""


class UnknownNameError(VarifyError, KeyError):
    """No parameter of that name has a posterior."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError's own has quotes around it


class FileError(VarifyError, ValueError):
    """A file was not written by `varify.save`, or by a version that this one can't read."""


class MissingFileError(VarifyError, FileNotFoundError):
    """A file or folder is not there."""


class UnsavableError(VarifyError, TypeError):
    """Something in a variational module can't be written to a file."""


def positive_int(name: str, value: Any, error: type[VarifyError] = ArgumentError) -> int:
    """`value` as an int, if it is an integer of any library's and at least 1.

    Raises:
        ArgumentError: it is none, or `error`.
    """
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise error(f"{name} must be a positive integer, got {value!r}")
    return number


def nonnegative_int(name: str, value: Any, bits: int | None = None) -> int:
    """`value` as an int, if it is an integer of any library's, at least 0, and fits into so many bits.

    Raises:
        ArgumentError: it is none.
    """
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if number < 0:
        raise ArgumentError(f"{name} must be an integer of at least 0, got {value!r}")
    if bits is not None and number >= 2**bits:
        raise ArgumentError(f"{name} must be an integer from 0 to 2**{bits} - 1, got {value!r}")
    return number


def positive_number(name: str, value: object, error: type[VarifyError] = ArgumentError) -> float:
    """`value` as a float, if it is a finite number greater than 0.

    Raises:
        ArgumentError: it is none, or `error`.
    """
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not 0 < number < math.inf:
        raise error(f"{name} must be a positive number, got {value!r}")
    return number


def one_of(name: str, value: object, options: Iterable[object]) -> None:
    """Check an argument that has a few values.

    Raises:
        ArgumentError: `value` is none of them.
    """
    options = list(options)
    if value not in options:
        raise ArgumentError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")


def listed(names: Iterable[str], most: int = 4) -> str:
    """`a, b, c, ... (8 in all)`: enough names to recognize the model, never a screenful."""
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
