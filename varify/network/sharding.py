"""Parameters of which each process holds a part (FSDP2), seen whole."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from varify.errors import StructureError


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all parts of a `DTensor` together; differentiable, each part counting once."""
    gather: Any = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` took the module, and it has its parameters in parts at the moment."""
    return hasattr(module, "unshard") and any(hasattr(p, "full_tensor") for p in module.parameters())


def refuse_sharded(module: nn.Module, what: str) -> None:
    """Raise a StructureError if `module` has its parameters in parts: `what` needs them whole, and in one place."""
    if is_sharded(module):
        raise StructureError(
            f"{what} needs the whole parameters, and each process has a part (fully_shard): gather them by "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict, load them into a variational module that is "
            "not sharded, and call it on that"
        )


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Within, a module that `fully_shard` took has its parameters whole, as it has them in its own forward."""
    fsdp: Any = module
    sharded = is_sharded(module)
    if sharded:
        fsdp.unshard()
    try:
        yield
    finally:
        if sharded:
            fsdp.reshard()
