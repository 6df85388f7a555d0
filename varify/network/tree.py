"""Things kept beside the network's parameters, under the same dotted names."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

HALF = (torch.float16, torch.bfloat16)


class Tree(nn.Module):
    """Parameters, buffers or modules at dotted names: `put_leaf("fc1.weight", p)` gives the key `fc1.weight`.

    Stays in single precision when a network is made half: sigma is a small number whose logarithm matters.
    """

    def put_leaf(self, name: str, leaf: Tensor | nn.Module) -> None:
        """Set the leaf at `name`, in place of one that is there; a tensor that is no parameter becomes a buffer."""
        head, _, rest = name.partition(".")
        if rest:
            branch = self._modules.setdefault(head, type(self)())
            assert isinstance(branch, Tree)
            branch.put_leaf(rest, leaf)
            return
        # Into torch's tables and not by setattr(): a network's layer may be called like a method of this class.
        parameters, buffers, modules = tables = _tables(self)
        right = parameters if isinstance(leaf, nn.Parameter) else buffers if isinstance(leaf, Tensor) else modules
        for table in tables:
            if table is not right:
                table.pop(head, None)
        right[head] = leaf

    @property
    def is_empty(self) -> bool:
        """Whether nothing was ever put in."""
        return not any(_tables(self))

    def clear(self) -> None:
        """Take all leaves out."""
        for table in _tables(self):
            table.clear()

    def leaf_at(self, name: str) -> Any:
        """The leaf at `name`, or None."""
        table, last = self.place_of(name)
        return table.get(last)

    def place_of(self, name: str) -> tuple[dict[str, Any], str]:
        """The table that has the leaf at `name`, or an empty one, and its key there."""
        branch: nn.Module | None = self
        *path, last = name.split(".")
        for part in path:
            branch = branch._modules.get(part) if branch is not None else None
        tables = () if branch is None else _tables(branch)
        return next((table for table in tables if last in table), {}), last

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Tree":
        super()._apply(lambda tensor: _apply_but_halving(fn, tensor), recurse)
        return self


def _tables(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    return module._parameters, module._buffers, module._modules


def _apply_but_halving(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    changed = fn(tensor)
    if changed.dtype in HALF and tensor.dtype not in HALF:
        return tensor.to(changed.device)  # not changed.float(): that would have lost the digits already
    return changed
