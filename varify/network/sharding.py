"""Sharded parameters (FSDP2): detected, gathered, or refused."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from varify.errors import StructureError


def whole(tensor: Tensor) -> Tensor:
    """The tensor, a `DTensor` gathered from all processes. Differentiable; each shard's gradient counts once."""
    gather: Any = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was applied to the module and its parameters are sharded right now."""
    return hasattr(module, "unshard") and any(hasattr(p, "full_tensor") for p in module.parameters())


def refuse_sharded(module: nn.Module, what: str) -> None:
    """Raise a StructureError if the parameters of `module` are sharded; `what`: the function that needs them whole."""
    if is_sharded(module):
        raise StructureError(
            f"{what} needs whole parameters, but these are sharded over processes (fully_shard): gather them by "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict, load them into a variational module that is "
            "not sharded, and call it on that"
        )


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Context in which the parameters of a module under `fully_shard` are gathered, as in its own forward."""
    fsdp: Any = module
    sharded = is_sharded(module)
    if sharded:
        fsdp.unshard()
    try:
        yield
    finally:
        if sharded:
            fsdp.reshard()
