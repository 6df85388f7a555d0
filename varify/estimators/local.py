"""Local reparameterization: noise on the outputs instead of the weights.

Kingma, Salimans & Welling 2015, arXiv:1506.02557.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from varify.estimators.arguments import broadcast, lookups, mean_of, no_bias, renormalized, rows, rows_beside, scaled
from varify.estimators.rules import CONVOLUTIONS, LINEAR, TRANSPOSED, Op, rule
from varify.weights.fused import is_plain
from varify.weights.moments import Moments
from varify.weights.noise import normal_like


def _with_noise(mean: Tensor, var: Tensor) -> Tensor:
    eps = normal_like(mean)
    if is_plain():
        noisy: Tensor = _Noisy.apply(mean, var, eps)  # type: ignore[no-untyped-call]
        return noisy
    if not torch.is_grad_enabled() and torch.autograd.forward_ad._current_level < 0:  # in vmap: nothing in place of one
        return torch.addcmul(mean, var.clamp_min(0.0).sqrt_().to(mean.dtype), eps)
    # The square root has an infinite slope at 0, which an output has that no input or no sigma reaches: no noise there.
    std = torch.where(var > 0, var.clamp_min(_least(var)).sqrt(), 0.0)
    return mean + std.to(mean.dtype) * eps


class _Noisy(torch.autograd.Function):
    """mean + √var·eps; no gradient to a variance of 0, where the slope is infinite."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, var: Tensor, eps: Tensor) -> Tensor:
        ctx.save_for_backward(var, eps)
        return torch.addcmul(mean, var.clamp_min(0.0).sqrt_().to(mean.dtype), eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if not ctx.needs_input_grad[1]:
            return grad, None, None
        var, eps = ctx.saved_tensors
        least = _least(var)
        if torch.is_grad_enabled():  # backward goes backward as well
            slope = torch.where(var >= least, 0.5 * var.clamp_min(least).rsqrt(), 0.0)
            return grad, grad * eps * slope, None
        slope = (var * 4).rsqrt_()
        if not var.is_cpu or not var.numel() or not var.amin() >= least:
            slope.masked_fill_(var < least, 0.0)
        return grad, slope.mul_(eps).mul_(grad), None


def _least(var: Tensor) -> float:
    return torch.finfo(var.dtype).tiny


def _scale(like: Tensor, sigma: Tensor) -> Tensor | float:
    """The number to divide sigma by before squaring, so that the square does not underflow in half precision."""
    kind = like.device.type
    half = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype
    return sigma.detach().amax().clamp_min(torch.finfo(torch.float32).tiny) if half == torch.float16 else 1.0


@rule("local", *LINEAR, along=("bias",), uses=rows)
@rule("local", *CONVOLUTIONS, *TRANSPOSED, along=("bias",))
def local_affine(
    op: Op, input: Tensor, weight: Moments, bias: object = None, *settings: object, **named: object
) -> Tensor:
    """Mean = op(x, mu), variance = op(x², sigma²), the bias' variance added; one noise per output element.

    Exact for each output by itself; in convolutions and sequences the correlations between positions are lost.
    """
    mean = op(input, weight.mu, mean_of(bias), *settings, **named)
    scale = _scale(input, weight.sigma)
    bias_var = bias.var(scale) if isinstance(bias, Moments) else None
    var = op(input.square(), weight.var(scale), bias_var, *settings, **named)
    return _with_noise(mean, var.float() * scale**2 if isinstance(scale, Tensor) else var)


@rule("local", "matmul", "mm", of=("input", "other"), uses=rows_beside)
def local_matmul(op: Op, input: Any, other: Any) -> Tensor:
    """`x @ w` and `w @ x` with one noise per output element."""
    mean: Tensor = op(mean_of(input), mean_of(other))
    left, right = (p.var() if isinstance(p, Moments) else p.square() for p in (input, other))
    return _with_noise(mean, op(left, right))


@rule("local", "addmm", of=("mat2",), along=("input",), refuses=no_bias, uses=rows)
def local_addmm(op: Op, input: object, mat1: Tensor, mat2: Moments, **scales: object) -> Tensor:
    """`input + mat1 @ mat2`, the variance of a bias added; one noise per output element."""
    mean: Tensor = op(mean_of(input), mat1, mat2.mu)
    scale = _scale(mat1, mat2.sigma)
    var = mat1.square() @ mat2.var(scale)
    var = var + input.var(scale) if isinstance(input, Moments) else var
    return _with_noise(mean, var.float() * scale**2 if isinstance(scale, Tensor) else var)


@rule("local", F.bilinear, along=("bias",), uses=rows)
def local_bilinear(op: Op, input1: Tensor, input2: Tensor, weight: Moments, bias: object = None) -> Tensor:
    """x₁ᵀ w x₂, which is linear in w, so that its variance is the same form of the squares."""
    mean = op(input1, input2, weight.mu, mean_of(bias))
    bias_var = bias.var() if isinstance(bias, Moments) else None
    return _with_noise(mean, op(input1.square(), input2.square(), weight.var(), bias_var))


@rule("local", F.embedding, refuses=renormalized, uses=lookups)
def local_embedding(op: Op, input: Tensor, weight: Moments, **settings: object) -> Tensor:
    """Noise for the rows looked up only; a row that is looked up twice gets two noises."""
    mean: Tensor = op(input, weight.mu, **settings)
    sigma: Tensor = op(input, weight.sigma, **settings)
    return mean + (sigma * normal_like(sigma)).to(mean.dtype)


@rule("local", "add", of=("input", "other"), refuses=scaled, uses=broadcast)
def local_add(op: Op, input: Any, other: Any, **scales: Any) -> Tensor:
    """`x + w` with one noise per output element."""
    x, w = (other, input) if isinstance(input, Moments) else (input, other)
    mean: Tensor = x + w.mu
    return mean + w.sigma.to(mean.dtype) * normal_like(mean)


@rule("local", "mul", of=("input", "other"), uses=broadcast)
def local_mul(op: Op, input: Any, other: Any) -> Tensor:
    """`x * w` with one noise per output element."""
    x, w = (other, input) if isinstance(input, Moments) else (input, other)
    mean: Tensor = x * w.mu
    noise: Tensor = x * w.sigma.to(mean.dtype) * normal_like(mean)
    return mean + noise
