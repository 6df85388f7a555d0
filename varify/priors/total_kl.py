"""The divergence of many posteriors to Gaussian priors as one autograd function, its gradient written out."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from varify.priors.gaussian import Gaussian, is_gaussian
from varify.weights.fused import LARGE, is_ordinary, is_plain
from varify.weights.kl import kl_divergence
from varify.weights.posterior import LEAST_RHO, GaussianPosterior

LEAST_SIGMA = math.exp(LEAST_RHO)
BLOCK = 2**16  # elements of a temporary, which so stays in the processor's cache


def total_kl(posteriors: Iterable[GaussianPosterior]) -> list[Tensor]:
    """Scalars `()` whose sum is that of KL(q‖prior) over all posteriors, nats, each on a device of theirs.

    The registered rule of a Gaussian prior says the same of each posterior by itself. Here large ones have an autograd
    node each, so that backward frees what it needs one by one, and the small ones of a device have one together.
    """
    terms, small = [], dict[torch.device, list[GaussianPosterior]]()
    plain = is_plain()
    for q in posteriors:
        if not (plain and _is_fused(q)):
            terms.append(q.kl_divergence())
        elif q.rho.numel() < LARGE:
            small.setdefault(q.rho.device, []).append(q)
        else:
            terms.append(_kl([q]))
    return terms + [_kl(group) for group in small.values()]


def _is_fused(q: GaussianPosterior) -> bool:
    if type(q) is not GaussianPosterior or q.fixed is not None or type(q.prior) is not Gaussian:
        return False
    mean, std = q.prior.mean, q.prior.std
    settings = [setting for setting in (mean, std) if isinstance(setting, Tensor)]
    return std is not None and is_gaussian(q.prior) and q.rho.numel() > 0 and is_ordinary(q.mu, q.rho, *settings)


def _kl(group: Sequence[GaussianPosterior]) -> Tensor:
    tensors = [q.mu for q in group] + [q.rho for q in group]
    kl: Tensor = _GaussianKL.apply([q.prior for q in group], [q.known_sigma() for q in group], *tensors)  # type: ignore[no-untyped-call]
    return kl


class _GaussianKL(torch.autograd.Function):
    """The sum over n posteriors: of n mu's, then n rho's; sigma = softplus(rho) without gradient."""

    @staticmethod
    def forward(ctx: Any, priors: list[Gaussian], sigmas: list[Tensor], *tensors: Tensor) -> Tensor:
        n = len(priors)
        ctx.priors = priors
        ctx.save_for_backward(*tensors, *sigmas)
        terms = [_value(*each) for each in zip(priors, tensors[:n], tensors[n:], sigmas, strict=True)]
        return terms[0] if n == 1 else torch.stack(terms).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        n = len(ctx.priors)
        saved, needed = ctx.saved_tensors, ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():  # backward goes backward as well
            return None, None, *_differentiable(ctx.priors, saved[: 2 * n], needed, grad)
        to_mu: list[Tensor | None] = []
        to_rho: list[Tensor | None] = []
        for i, prior in enumerate(ctx.priors):
            mu, rho, sigma = saved[i], saved[n + i], saved[2 * n + i]
            scale = grad / prior._known_std() ** 2
            shift = mu.to(rho.dtype) - prior.mean if isinstance(prior.mean, Tensor) or prior.mean else mu
            to_mu.append((shift * scale).to(mu.dtype) if needed[i] else None)
            to_rho.append(_to_rho(rho, sigma, scale, grad) if needed[n + i] else None)
        return None, None, *to_mu, *to_rho


def _value(prior: Gaussian, mu: Tensor, rho: Tensor, sigma: Tensor) -> Tensor:
    # Σ log(s/sigma) + (sigma² + (mu − m)²)/2s² − ½, block by block
    std, mean = prior._known_std(), prior.mean
    parts: list[Any] = [sigma, mu.to(rho.dtype), std, mean]
    blocks = [_in_blocks(part, sigma) for part in parts]
    rest = rho.sub(LEAST_RHO).clamp_max_(0.0).sum() if _may_underflow(sigma) else 0.0
    least = LEAST_SIGMA if isinstance(rest, Tensor) else None
    terms = []
    for s, m, p, c in zip(*blocks, strict=True):
        ratio = (s if least is None else s.clamp_min(least)) / p
        shift = m - c if isinstance(c, Tensor) or c else m
        shift, scale = (shift / p, 1.0) if isinstance(p, Tensor) else (shift, p)
        squares = ratio.dot(ratio) + shift.dot(shift) / scale**2
        terms.append(0.5 * squares - ratio.log_().sum() - 0.5 * ratio.numel())
    return (terms[0] if len(terms) == 1 else torch.stack(terms).sum()) - rest


def _in_blocks(value: Tensor | float, like: Tensor) -> Sequence[Tensor | float]:
    if not isinstance(value, Tensor):
        return [value] * -(-like.numel() // BLOCK)
    blocks: Sequence[Tensor] = value.expand(like.shape).reshape(-1).split(BLOCK)
    return blocks


def _may_underflow(sigma: Tensor) -> bool:
    """Whether a sigma may be so small that its logarithm is wrong; off the CPU nobody waits for the answer."""
    return not sigma.is_cpu or bool(sigma.amin() < LEAST_SIGMA)


def _to_rho(rho: Tensor, sigma: Tensor, scale: Tensor, grad: Tensor) -> Tensor:
    """(sigma/s² − 1/sigma)·grad, times the slope of sigma in rho."""
    if _may_underflow(sigma):  # there the slope over sigma is 1
        rho, sigma = rho.clamp_min(LEAST_RHO), sigma.clamp_min(LEAST_SIGMA)
    to_sigma = (sigma * scale).addcdiv_(-grad, sigma)
    found: Tensor = torch.ops.aten.softplus_backward.grad_input(to_sigma, rho, 1.0, 20.0, grad_input=to_sigma)
    return found


def _differentiable(
    priors: list[Gaussian], tensors: Sequence[Tensor], needed: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """The gradients of all tensors, made by torch."""
    n = len(priors)
    terms = [
        kl_divergence(GaussianPosterior(mu, rho, prior), prior)
        for mu, rho, prior in zip(tensors[:n], tensors[n:], priors, strict=True)
    ]
    wanted = [tensor for tensor, need in zip(tensors, needed, strict=True) if need]
    found = iter(torch.autograd.grad(torch.stack(terms).sum(), wanted, grad, create_graph=True))
    return [next(found) if need else None for need in needed]
