"""The outputs of many draws as predictions, in the structure of one output."""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from varify.prediction.prediction import Prediction


def gather(
    draws: Sequence[Any] | Tensor, outputs: str = "logits", class_dim: int = -1, vectorized: bool = False
) -> Any:
    """The `Prediction` of several outputs of one network, or of these stacked; of structured ones, leaf by leaf.

    A leaf that is no tensor is taken from the first draw. Of a nested tensor, each of its tensors is a leaf.
    """
    if isinstance(draws, Tensor):
        return Prediction(draws, outputs, class_dim, vectorized)
    if isinstance(draws[0], Tensor):
        return _gather_leaf(draws, outputs, class_dim, vectorized)
    leaves, spec = pytree.tree_flatten(draws[0], is_leaf=_is_packed)
    rows = [leaves, *(pytree.tree_leaves(draw, is_leaf=_is_packed) for draw in draws[1:])]
    gathered = [_gather_leaf(column, outputs, class_dim, vectorized) for column in zip(*rows, strict=True)]
    return pytree.tree_unflatten(gathered, spec)


def _is_packed(value: object) -> bool:
    return isinstance(value, PackedSequence)


def _gather_leaf(column: Sequence[Any], outputs: str, class_dim: int, vectorized: bool) -> Any:
    first = column[0]
    if isinstance(first, Tensor) and first.is_nested:
        return gather([one.unbind() for one in column], outputs, class_dim, vectorized)
    if isinstance(first, Tensor):
        return Prediction(torch.stack(list(column)), outputs, class_dim, vectorized)
    if isinstance(first, PackedSequence):  # its own constructor wants a tensor
        data = gather([one.data for one in column], outputs, class_dim, vectorized)
        return tuple.__new__(PackedSequence, (data, *first[1:]))
    if is_dataclass(first) and not isinstance(first, type):
        parts = {
            f.name: gather([getattr(one, f.name) for one in column], outputs, class_dim, vectorized)
            for f in fields(first)
            if f.init
        }
        return replace(first, **parts)
    return first
