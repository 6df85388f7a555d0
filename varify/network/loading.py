"""Loading a state dict all or nothing, with tied parameters still tied."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from varify.errors import StructureError
from varify.network.copies import weightless_copy
from varify.network.parameters import slot_names


def try_loading(vnet: nn.Module, network: nn.Module, state_dict: Mapping[str, Any], strict: bool) -> None:
    """Raise what torch raises when `vnet` loads this; nothing of it changes.

    Args:
        vnet: a variational module.
        network: the plain one in it.
        state_dict: as for torch, as is `strict`.
        strict: likewise.
    """
    trial = weightless_copy(vnet)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that copying to the meta device does nothing, which is the point
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
    """Within, `load_state_dict(assign=True)` may give each slot of a tied parameter a tensor of its own; undone after.

    Args:
        network: that loads.
        assign: whether it does so by assigning.
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
