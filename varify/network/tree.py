"""A module tree that stores values under the dotted names of the network's parameters."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

HALF = (torch.float16, torch.bfloat16)


class Tree(nn.Module):
    """Parameters, buffers or modules at dotted names: `put_leaf("fc1.weight", p)` gives the key `fc1.weight`.

    Keeps single precision when a network is cast to half: sigma is small, and rho would lose the digits that tell small
    sigmas apart.
    """

    def put_leaf(self, name: str, leaf: Tensor | nn.Module) -> None:
        """Set or replace the leaf at `name`; a tensor that is no parameter becomes a buffer."""
        head, _, rest = name.partition(".")
        if rest:
            branch = self._modules.setdefault(head, type(self)())
            assert isinstance(branch, Tree)
            branch.put_leaf(rest, leaf)
            return
        # Written to torch's tables and not by setattr(): a layer may be named like a method of this class.
        parameters, buffers, modules = tables = _tables(self)
        right = parameters if isinstance(leaf, nn.Parameter) else buffers if isinstance(leaf, Tensor) else modules
        for table in tables:
            if table is not right:
                table.pop(head, None)
        right[head] = leaf

    @property
    def is_empty(self) -> bool:
        """Whether it has no leaf."""
        return not any(_tables(self))

    def clear(self) -> None:
        """Remove all leaves."""
        for table in _tables(self):
            table.clear()

    def leaf_at(self, name: str) -> Any:
        """The leaf at `name`, or None."""
        table, last = self.place_of(name)
        return table.get(last)

    def place_of(self, name: str) -> tuple[dict[str, Any], str]:
        """The table that has the leaf at `name`, and the leaf's key there; an empty table if there is no leaf."""
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
