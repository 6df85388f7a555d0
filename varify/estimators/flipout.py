"""Flipout: a separate perturbation for each example, by random signs.

Wen, Vicol, Ba, Tran & Grosse 2018, arXiv:1803.04386.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from varify.estimators.arguments import mean_of, no_bias, renormalized, scaled
from varify.estimators.rules import CONVOLUTIONS, LINEAR, TRANSPOSED, Op, rule
from varify.weights.moments import Moments


@rule("flipout", *LINEAR, *CONVOLUTIONS, *TRANSPOSED, along=("bias",))
def flipout_affine(
    op: Op, input: Tensor, weight: Moments, bias: object = None, *settings: object, **named: object
) -> Tensor:
    """op(x, mu) + s·op(r·x, delta): one delta = sigma·eps a call, with signs r and s for each example."""
    channels = -1 if op in LINEAR else 1 - weight.mu.dim()
    outer, inner = (1, 0) if op in TRANSPOSED else (0, 1)
    if weight.examples.dim is None and not weight.is_kept:  # all rows share one draw, which one operation serves
        return op(input, weight.drawn(), bias.drawn() if isinstance(bias, Moments) else bias, *settings, **named)
    mean: Tensor = op(input, weight.mu, mean_of(bias), *settings, **named)
    delta = bias.perturbation() if isinstance(bias, Moments) else None
    flipped = input * weight.flip(input, inner, channels)
    perturbed: Tensor = op(flipped, weight.perturbation(), delta, *settings, **named)
    return _added(mean, perturbed, weight.flip(perturbed, outer, channels))


def _added(mean: Tensor, perturbed: Tensor, signs: Tensor | float) -> Tensor:
    return torch.addcmul(mean, perturbed, signs) if isinstance(signs, Tensor) else mean + perturbed


def _not_a_matrix_on_the_right(arguments: dict[str, Any]) -> str | None:
    shape = getattr(arguments.get("other"), "shape", ())
    return None if len(shape) == 2 else "flipout takes x @ w with a matrix w alone"


@rule("flipout", "matmul", "mm", of=("other",), refuses=_not_a_matrix_on_the_right)
def flipout_matmul(op: Op, input: Any, other: Moments) -> Tensor:
    """`x @ w + s·((r·x) @ delta)`."""
    mean: Tensor = op(input, other.mu)
    perturbed: Tensor = op(input * other.flip(input, 0, -1), other.perturbation())
    return _added(mean, perturbed, other.flip(perturbed, 1, -1))


@rule("flipout", "addmm", of=("mat2",), along=("input",), refuses=no_bias)
def flipout_addmm(op: Op, input: object, mat1: Tensor, mat2: Moments, **scales: object) -> Tensor:
    """`input + mat1 @ mat2`, as `x @ w`; a bias is perturbed with the signs of the outputs."""
    mean: Tensor = op(mean_of(input), mat1, mat2.mu)
    flipped, delta = mat1 * mat2.flip(mat1, 0, -1), mat2.perturbation()
    perturbed: Tensor = op(input.perturbation(), flipped, delta) if isinstance(input, Moments) else flipped @ delta
    return _added(mean, perturbed, mat2.flip(perturbed, 1, -1))


@rule("flipout", F.bilinear, along=("bias",))
def flipout_bilinear(op: Op, input1: Tensor, input2: Tensor, weight: Moments, bias: object = None) -> Tensor:
    """Signs for each example on both inputs and the output."""
    mean: Tensor = op(input1, input2, weight.mu, mean_of(bias))
    delta = bias.perturbation() if isinstance(bias, Moments) else None
    flipped = [x * weight.flip(x, axis, -1) for axis, x in ((1, input1), (2, input2))]
    perturbed: Tensor = op(*flipped, weight.perturbation(), delta)
    return mean + perturbed * weight.flip(perturbed, 0, -1)


@rule("flipout", F.embedding, refuses=renormalized)
def flipout_embedding(op: Op, input: Tensor, weight: Moments, **settings: object) -> Tensor:
    """Signs for each example on the embedding's dimensions: a row that it looks up twice has one noise."""
    mean: Tensor = op(input, weight.mu, **settings)
    perturbed: Tensor = op(input, weight.perturbation(), **settings)
    perturbed = perturbed * weight.flip(perturbed, 1, -1)
    if weight.is_kept and weight.examples.dim is not None:  # other uses may sum over rows, each with its own sign
        perturbed = perturbed * _signs_of_rows(input, weight).unsqueeze(-1)
    return mean + perturbed


def _signs_of_rows(input: Tensor, weight: Moments) -> Tensor:
    """The sign of each row looked up, in the example that looks it up; in the shape of `input`."""
    number = torch.arange(weight.examples.number, device=input.device).unsqueeze(-1)
    example = weight.examples.spread(number, input.unsqueeze(-1), -1).squeeze(-1)
    signs: Tensor = weight.signs(0)[example, input]
    return signs


@rule("flipout", "add", of=("input", "other"), refuses=scaled)
def flipout_add(op: Op, input: Any, other: Any, **scales: Any) -> Tensor:
    """`x + w`, with signs for each example along the last dimension of w."""
    x, w = (other, input) if isinstance(input, Moments) else (input, other)
    mean: Tensor = x + w.mu
    return mean + w.perturbation() * _flip_last(w, mean)


@rule("flipout", "mul", of=("input", "other"))
def flipout_mul(op: Op, input: Any, other: Any) -> Tensor:
    """`x * w`, with signs for each example along the last dimension of w."""
    x, w = (other, input) if isinstance(input, Moments) else (input, other)
    mean: Tensor = x * w.mu
    noise: Tensor = x * (w.perturbation() * _flip_last(w, mean))
    return mean + noise


def _flip_last(w: Moments, like: Tensor) -> Tensor | float:
    return w.flip(like, max(0, w.mu.dim() - 1), -1)
