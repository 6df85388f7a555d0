"""The divergence of many posteriors to Gaussian priors as one autograd function, its gradient written out."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from varify.priors.gaussian import Gaussian, is_gaussian
from varify.weights.fused import LARGE, is_ordinary, is_plain
from varify.weights.posterior import LEAST_RHO, GaussianPosterior

LEAST_SIGMA = math.exp(LEAST_RHO)
BLOCK = 2**16  # elements of a temporary, which so stays in the processor's cache


def total_kl(posteriors: Iterable[GaussianPosterior]) -> list[Tensor]:
    """Scalars `()` whose sum is that of KL(q‖prior) over all posteriors, nats, each on a device of theirs.

    The registered rule of a Gaussian prior says the same of each posterior by itself. Here large ones have an autograd
    node each, so that backward frees what it needs one by one, and the small ones of a device have one together, as
    one vector.
    """
    terms, small = [], dict[tuple[torch.device, torch.dtype], list[GaussianPosterior]]()
    plain = is_plain()
    for q in posteriors:
        if not (plain and _is_fused(q)):
            terms.append(q.kl_divergence())
        elif q.fixed is None and q.rho.numel() < LARGE:
            small.setdefault((q.rho.device, q.rho.dtype), []).append(q)
        else:
            terms.append(_kl([q]))
    return terms + [_kl(group) for group in small.values()]


def _is_fused(q: GaussianPosterior) -> bool:
    if type(q) is not GaussianPosterior or type(q.prior) is not Gaussian:
        return False
    mean, std = q.prior.mean, q.prior.std
    if any(isinstance(setting, Tensor) and setting.requires_grad for setting in (mean, std)):
        return False  # a prior that learns
    return std is not None and is_gaussian(q.prior) and q.rho.numel() > 0 and is_ordinary(q.mu, q.rho)


def _kl(group: Sequence[GaussianPosterior]) -> Tensor:
    tensors = [q.mu for q in group] + [q.rho for q in group]
    priors, sigmas = [q.prior for q in group], [q.known_sigma() for q in group]
    kl: Tensor = _GaussianKL.apply(priors, sigmas, group[0].fixed, *tensors)  # type: ignore[no-untyped-call]
    return kl


class _GaussianKL(torch.autograd.Function):
    """The sum over n posteriors: of n mu's, then n rho's; sigma = softplus(rho) without gradient.

    One posterior may have a mask: the weights that are not random count nothing.
    """

    @staticmethod
    def forward(
        ctx: Any, priors: list[Gaussian], sigmas: list[Tensor], fixed: Tensor | None, *tensors: Tensor
    ) -> Tensor:
        sigma = _flat(sigmas)
        free = None if fixed is None else fixed.reshape(-1) == 0
        ctx.priors = priors
        ctx.save_for_backward(*tensors, sigma, free)  # not the mask, into which somebody may write meanwhile
        return _value(*_of_each_weight(priors, tensors), _flat(tensors[len(priors) :]), sigma, free)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        n = len(ctx.priors)
        *tensors, sigma, free = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled():  # backward goes backward as well
            return None, None, None, *_differentiable(ctx.priors, free, tensors, needed, grad)
        mu, mean, std = _of_each_weight(ctx.priors, tensors)
        scale = grad / std**2
        to_mu = (mu - mean if isinstance(mean, Tensor) or mean else mu) * scale
        to_rho = _to_rho(_flat(tensors[n:]), sigma, scale, grad) if any(needed[n:]) else None
        if free is not None:
            to_mu = torch.where(free, to_mu, 0.0)
            to_rho = None if to_rho is None else torch.where(free, to_rho, 0.0)
        found = [*_apart(to_mu, tensors[:n]), *([None] * n if to_rho is None else _apart(to_rho, tensors[n:]))]
        return None, None, None, *(to if need else None for to, need in zip(found, needed, strict=True))


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """All elements as a vector; of one tensor, a view where there can be one."""
    flat = [tensor.reshape(-1) for tensor in tensors]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def _apart(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = flat.split([t.numel() for t in like])
    return [part.view(t.shape).to(t.dtype) for part, t in zip(parts, like, strict=True)]


def _of_each_weight(priors: list[Gaussian], tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor | float, Tensor | float]:
    """Vectors of mu and of the prior's mean and std; a number is that of all weights."""
    n = len(priors)
    mu = _flat(tensors[:n]).to(tensors[n].dtype)
    means, stds = [p.mean for p in priors], [p._known_std() for p in priors]
    return mu, _setting(means, tensors[n:]), _setting(stds, tensors[n:])


def _setting(values: Sequence[Tensor | float], like: Sequence[Tensor]) -> Tensor | float:
    first = like[0]
    if any(isinstance(value, Tensor) for value in values):
        return _flat([torch.as_tensor(v).to(first).expand(t.shape) for v, t in zip(values, like, strict=True)])
    if len(set(values)) == 1:
        return values[0]
    each = torch.tensor(values, dtype=first.dtype, device=first.device)
    sizes = [t.numel() for t in like]
    return each.repeat_interleave(torch.tensor(sizes, device=first.device), output_size=sum(sizes))


def _value(
    mu: Tensor, mean: Tensor | float, std: Tensor | float, rho: Tensor, sigma: Tensor, free: Tensor | None
) -> Tensor:
    # Σ log(s/sigma) + (sigma² + (mu − m)²)/2s² − ½, block by block
    underflows = _may_underflow(sigma)
    terms = []
    blocks = (_in_blocks(each, len(sigma)) for each in (sigma, mu, mean, std, free))
    for s, m, c, p, f in zip(*blocks, strict=True):
        ratio = (s.clamp_min(LEAST_SIGMA) if underflows else s) / p
        shift = m - c if isinstance(c, Tensor) or c else m
        if f is not None:  # ratio 1 and shift 0 of others make the term 0, whatever their mu and rho
            ratio, shift = torch.where(f, ratio, 1.0), torch.where(f, shift, 0.0)
        shift, scale = (shift / p, 1.0) if isinstance(p, Tensor) else (shift, p)
        squares = ratio.dot(ratio) + shift.dot(shift) / scale**2
        terms.append(0.5 * squares - ratio.log_().sum() - 0.5 * len(ratio))
    kl = terms[0] if len(terms) == 1 else torch.stack(terms).sum()
    if not underflows:
        return kl
    rest = rho.sub(LEAST_RHO).clamp_max_(0.0)
    return kl - (rest if free is None else torch.where(free, rest, 0.0)).sum()


def _in_blocks(value: Tensor | float | None, n: int) -> Sequence[Any]:
    blocks: Sequence[Any] = value.split(BLOCK) if isinstance(value, Tensor) else [value] * -(-n // BLOCK)
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
    priors: list[Gaussian], free: Tensor | None, tensors: Sequence[Tensor], needed: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """The gradients of all tensors, made by torch."""
    n = len(priors)
    terms = [
        GaussianPosterior(mu, rho, prior, None if free is None else ~free.view(mu.shape)).kl_divergence()
        for mu, rho, prior in zip(tensors[:n], tensors[n:], priors, strict=True)
    ]
    wanted = [tensor for tensor, need in zip(tensors, needed, strict=True) if need]
    kl = torch.stack(terms).sum()
    found = iter(torch.autograd.grad(kl, wanted, grad, create_graph=True, materialize_grads=True))  # of no weight, 0
    return [next(found) if need else None for need in needed]
