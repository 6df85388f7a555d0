"""Operations that move elements, choose among them or repeat them: they do the same to the variances as to the means.

Elements that are repeated are taken for independent afterwards.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from varify.propagation.rules import Op, Operand, Uncertain, mean_of, refuse_unless, rule, with_var

_N: Any = torch._C._nn  # where torch has what `F` hands on

_METHODS = (
    *("view", "view_as", "reshape_as", "expand", "expand_as", "repeat", "contiguous", "clone", "detach", "to", "float"),
    *("double", "bfloat16", "type_as", "cpu", "cuda", "__getitem__", "unfold"),
)
_FUNCTIONS = (
    *(torch.reshape, torch.flatten, torch.unflatten, torch.squeeze, torch.unsqueeze, torch.ravel),
    *(torch.transpose, torch.permute, torch.movedim, torch.moveaxis, torch.swapaxes, torch.swapdims, torch.t),
    *(torch.flip, torch.roll, torch.select, torch.narrow, torch.index_select, torch.gather, torch.take_along_dim),
    *(torch.broadcast_to, torch.repeat_interleave, torch.tile, torch.rot90, torch.tril, torch.triu, torch.diagonal),
    *(torch.pixel_shuffle, torch.pixel_unshuffle, torch.channel_shuffle),
)


@rule(*_METHODS, *_FUNCTIONS, "get T", "get mT")
def moved(op: Op, input: Uncertain, *settings: object, **named: object) -> Uncertain:
    """The same of means and variances."""
    others = (*settings, *named.values())
    refuse_unless(isinstance(input, Uncertain), "its positions are uncertain")
    refuse_unless(not any(isinstance(a, Uncertain) for a in others), "its positions are uncertain")
    mean, var = op(input.mean, *settings, **named), op(input.var, *settings, **named)
    refuse_unless(mean.is_floating_point(), "it rounds")
    refuse_unless(mean.dtype != torch.float16, "variances underflow in half precision")
    return Uncertain(mean, var)


@rule(torch.chunk, torch.split, "split", torch.tensor_split, torch.unbind, torch.split_with_sizes)
def parts(op: Op, input: Uncertain, *settings: object, **named: object) -> tuple[Uncertain, ...]:
    """Each part by itself."""
    means, variances = op(input.mean, *settings, **named), op(input.var, *settings, **named)
    return tuple(Uncertain(mean, var) for mean, var in zip(means, variances, strict=True))


@rule(torch.cat, torch.concat, torch.concatenate, torch.stack, torch.hstack, torch.vstack)
def joined(op: Op, tensors: Sequence[Operand], *settings: object, **named: object) -> Uncertain:
    """Several tensors as one; what is not random has variance 0."""
    found = [with_var(t) for t in tensors]
    return Uncertain(op([x.mean for x in found], *settings, **named), op([x.var for x in found], *settings, **named))


@rule(_N.pad)
def pad(op: Op, input: Uncertain, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Uncertain:
    """A constant around has variance 0; reflected and replicated elements have their own."""
    return Uncertain(op(input.mean, pad, mode, value), op(input.var, pad, mode, None))


@rule(torch.masked_fill)
def masked_fill(op: Op, input: Uncertain, mask: Tensor, value: object) -> Uncertain:
    """What is filled in is not random."""
    refuse_unless(not isinstance(value, Uncertain), "what it fills in is uncertain; torch.where takes that")
    return Uncertain(op(input.mean, mask, value), op(input.var, mask, 0.0))


@rule(torch.where)
def where(op: Op, condition: object, input: object, other: object) -> Uncertain:
    """A choice by what is not random."""
    refuse_unless(not isinstance(condition, Uncertain), "its condition is uncertain")
    one, two = (a.var if isinstance(a, Uncertain) else torch.zeros(()) for a in (input, other))
    mean: Tensor = op(condition, mean_of(input), mean_of(other))
    return Uncertain(mean, op(condition, one.to(mean), two.to(mean)))


@rule(torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like, torch.rand_like, torch.randn_like)
@rule("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor")
def made_alike(op: Op, input: Uncertain, *settings: object, **named: object) -> Any:
    """A new tensor of the same kind, which is not random."""
    return op(input.mean, *settings, **named)


@rule(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
def dropout(op: Op, input: Uncertain, p: float = 0.5, training: bool | None = None, inplace: bool = False) -> Uncertain:
    """Nothing, in eval mode."""
    by_default = op in (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
    drops = by_default if training is None else training
    refuse_unless(not drops or p == 0, "it drops at random, being called with training=True whatever the mode")
    return input


@rule(_N.upsample_nearest1d, _N.upsample_nearest2d, _N.upsample_nearest3d)
def repeated(op: Op, input: Uncertain, *settings: object) -> Uncertain:
    """Each element repeated."""
    return Uncertain(op(input.mean, *settings), op(input.var, *settings))
