"""Every error varify raises on its own account, and the wording they share."""

from collections.abc import Iterable


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
