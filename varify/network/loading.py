"""Helpers for `load_state_dict`: a trial run without side effects, and ties that `assign=True` keeps."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from varify.errors import StructureError
from varify.network.copies import weightless_copy
from varify.network.parameters import slot_names


def try_loading(vnet: nn.Module, network: nn.Module, state_dict: Mapping[str, Any], strict: bool) -> None:
    """Load into a meta-device copy, so that a bad state dict raises before `vnet` is changed.

    torch copies tensor by tensor and raises at the end: a state dict that fails half-way would leave a mixture.

    Args:
        vnet: a variational module.
        network: the plain network in it.
        state_dict: as for `torch.nn.Module.load_state_dict`.
        strict: likewise.

    Raises:
        RuntimeError: what torch raises for it; a StructureError if it is a checkpoint of the plain network.
    """
    trial = weightless_copy(vnet)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "copying to a meta parameter is a no-op", which is the point
            nn.Module.load_state_dict(trial, state_dict, strict)
    except RuntimeError as error:
        if state_dict and set(state_dict) & set(network.state_dict()):
            raise StructureError(
                f"{error}\n\tThis looks like a checkpoint of the plain network. "
                "Load it as the means: vnet.module.load_state_dict(...)"
            ) from None
        raise


@contextmanager
def tied(network: nn.Module, assign: bool) -> Iterator[None]:
    """Context for `load_state_dict(assign=True)`, after which parameters that were tied are tied again.

    torch assigns by name, so each slot of a tied parameter gets its own tensor, and training would update one of them.

    Args:
        network: the module that loads.
        assign: whether it loads with `assign=True`; otherwise nothing is done.
    """
    if not assign:
        yield
        return
    first = slot_names(network)
    before = dict(network.named_parameters(remove_duplicate=False))
    yield
    now = dict(network.named_parameters(remove_duplicate=False))
    new = {first[slot]: now[slot] for slot in reversed(list(first)) if now[slot] is not before[slot]}
    for slot, name in first.items():
        if name in new and now[slot] is not new[name]:
            path, _, attr = slot.rpartition(".")
            setattr(dict(network.named_modules(remove_duplicate=False))[path], attr, new[name])
