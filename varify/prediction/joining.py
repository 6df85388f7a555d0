"""The results of many batches as one."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from varify.errors import ArgumentError
from varify.prediction.prediction import Prediction


def join(batches: Sequence[Any], dim: int = 0) -> Any:
    """One structure of the results of several batches: tensors and `Prediction`s are concatenated along the data.

    A leaf that is neither is taken from the first batch.

    Args:
        batches: of each its result; all have one structure.
        dim: the dimension of a tensor, or of one output of a `Prediction`, that counts data.

    Raises:
        ArgumentError: there are no batches; they differ in structure, or in shape beside `dim`; a scalar.
    """
    if not batches:
        raise ArgumentError("the loader is empty: there are no data to predict")
    leaves, spec = pytree.tree_flatten(batches[0])
    rows = [leaves]
    for number, batch in enumerate(batches[1:], 1):
        others, other = pytree.tree_flatten(batch)
        if other != spec or [type(leaf) for leaf in others] != [type(leaf) for leaf in leaves]:
            raise ArgumentError(
                f"batches must give one structure, to be joined, but batch {number} gave {_told(batch)} and batch 0 "
                f"{_told(batches[0])}"
            )
        rows.append(others)
    return pytree.tree_unflatten([_joined(column, dim) for column in zip(*rows, strict=True)], spec)


def _joined(column: Sequence[Any], dim: int) -> Any:
    first = column[0]
    if isinstance(first, Prediction):
        return replace(first, samples=_concatenated([one.samples for one in column], dim if dim < 0 else dim + 1, 1))
    if isinstance(first, Tensor):
        return _concatenated(column, dim, 0)
    if is_dataclass(first) and not isinstance(first, type):
        parts = {f.name: join([getattr(one, f.name) for one in column], dim) for f in fields(first) if f.init}
        return replace(first, **parts)
    return first


def _concatenated(tensors: Sequence[Tensor], dim: int, before: int) -> Tensor:
    """Tensors along `dim`, of which the first `before` dimensions are not the data's."""
    shapes = [tuple(tensor.shape[before:]) for tensor in tensors]
    if not shapes[0]:
        raise ArgumentError(
            "a scalar for a whole batch can't be joined with others: keep=... is to return tensors with an entry for "
            "each datum, such as lambda prediction: prediction.entropy()"
        )
    try:
        return torch.cat(list(tensors), dim)
    except (RuntimeError, IndexError) as error:
        other = next((i for i, shape in enumerate(shapes) if len(shape) != len(shapes[0])), None)
        other = other or next(i for i, shape in enumerate(shapes) if shape != shapes[0] or i == len(shapes) - 1)
        raise ArgumentError(
            f"batches of shapes {shapes[0]} (batch 0) and {shapes[other]} (batch {other}) can't be joined along "
            f"dimension {dim} ({error}); dim=... says which one counts data, and keep=... what to keep of a batch"
        ) from None


def _told(result: object) -> str:
    structure = pytree.tree_map(lambda leaf: type(leaf).__name__, result)
    return str(structure)[:200]


def with_progress(loader: Iterable[Any], progress: bool | None) -> Iterable[Any]:
    """The loader, with a bar of tqdm's.

    Args:
        loader: of batches.
        progress: whether to show it; None: on a terminal, if tqdm is installed.
    """
    if progress is False or (progress is None and not sys.stderr.isatty()):
        return loader
    try:
        from tqdm import tqdm
    except ImportError as error:
        if progress:
            raise ImportError("progress=True needs tqdm: pip install tqdm") from error
        return loader
    bar: Iterable[Any] = tqdm(loader, unit="batch")
    return bar
