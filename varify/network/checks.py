"""Checks on a model before it is converted."""

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from varify.errors import ModelError, listed
from varify.network.parameters import is_variational


def check_model(model: object) -> None:
    """Raise for a model that cannot be converted.

    Raises:
        ModelError: it is no module, variational already, TorchScript, wrapped, compiled or lazy; the message says what
            to pass instead.
    """
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        hint = f": pass an instance, {model.__name__}(...)" if isinstance(model, type) else ""
        raise ModelError(f"model must be an nn.Module, got {model if isinstance(model, type) else name}{hint}")
    if is_variational(model):
        raise ModelError("the model is variational already; convert its .module, or .mean_model(), to start over")
    if isinstance(model, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        raise ModelError(f"{name} is compiled TorchScript; convert the Python module that it was made from")
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    if isinstance(model, wrappers):
        raise ModelError(f"the model is wrapped in {name}; convert model.module and wrap the result (in DDP)")
    if hasattr(model, "_orig_mod"):
        raise ModelError("the model is compiled; convert model._orig_mod and torch.compile the result")
    lazy = [n for n, p in (*model.named_parameters(), *model.named_buffers()) if is_lazy(p)]
    if lazy:
        raise ModelError(
            f"{listed(lazy)} of a lazy module have no shape yet; call the model once on data, then convert"
        )
