"""Variational networks in the training of other libraries: Lightning, and Hugging Face's transformers.

Each library is imported when its class is asked for.
"""

from importlib import import_module
from typing import Any

__all__ = ["VariationalLightningModule", "VariationalTrainer"]
_NEEDS = {
    "VariationalLightningModule": ("varify.integrations.with_lightning", "lightning"),
    "VariationalTrainer": ("varify.integrations.with_transformers", "transformers accelerate"),
}


def __getattr__(name: str) -> Any:
    if name not in _NEEDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; there are {', '.join(__all__)}")
    module, packages = _NEEDS[name]
    try:
        return getattr(import_module(module), name)
    except ImportError as error:
        raise ImportError(f"varify.integrations.{name} needs: pip install {packages} ({error})") from error
