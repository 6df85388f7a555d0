"""One step of one parameter, tensors alone: h + delta = 1/(count·sigma²) is read off rho and written there again."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from varify.optim.gaussian_prior import moments
from varify.weights.posterior import LEAST_RHO, GaussianPosterior, softplus_inverse


def newton_step(q: GaussianPosterior, state: dict[str, Any], group: dict[str, Any]) -> None:
    """Move mu and rho by their gradients; see `varify.optim.IVON`, whose words these are.

    Args:
        q: the posterior, with a gradient for mu, rho or both.
        state: empty at first; then `step`, `momentum`, and, once rho had a gradient, the `count` of data and the
            prior's `std` of the last step.
        group: the hyper-parameters.
    """
    count, hess_init, prior = group["num_data"] / group["beta"], group["hess_init"], moments(q.prior)
    delta = 1 / (count * prior.std**2)
    if not state:
        # like rho, which is in single precision where the network is half
        state.update(step=0, momentum=torch.zeros_like(q.rho))
    rate: Tensor | float = 1.0 if hess_init is None else hess_init + at_most(delta, hess_init)
    total: Tensor | float = 1.0 + delta if hess_init is None else hess_init + delta
    if q.rho.grad is not None:
        rho = q.rho.clamp_min(LEAST_RHO)  # below, the square of sigma underflows
        sigma, slope = F.softplus(rho), rho.sigmoid_()  # that of sigma in rho
        hess = q.rho.grad / (sigma * slope)
        total = sigma.square().mul_(count).reciprocal_()
        other = restarted(state, total, count, prior.std, hess_init)
        if other is not None:
            total, sigma = other, (count * other).rsqrt()
            slope = sigma.neg().expm1_().neg_()
            q.rho.copy_(kept(q, softplus_inverse(sigma), q.rho))
        change = hess.add_(delta).sub_(total).div_(total).mul_(1 - group["betas"][1])
        factor = change.square().mul_(0.5).add_(change).add_(1.0)  # at least ½, so that no variance is negative
        # The variance is divided by it as a change of rho: a factor of 1 + 1e-5 drowns in rounding where one goes
        # through softplus and back.
        smaller = factor.rsqrt().mul_(sigma)
        shift = smaller.neg().expm1_().neg_().div_(slope).log_().add_(smaller.sub_(sigma))
        q.rho.copy_(kept(q, q.rho + shift, q.rho))
        total = factor.mul_(total)
    if q.mu.grad is not None:
        direction = averaged(state, q.mu.grad, group["betas"][0])
        direction = (direction + delta * (q.mu.to(q.rho.dtype) - prior.mean)).div_(total)
        step = direction.clamp_(-group["clip_radius"], group["clip_radius"]).mul_(rate).mul_(group["lr"])
        q.mu.copy_(kept(q, q.mu - step, q.mu))


def restarted(
    state: dict[str, Any], total: Tensor, count: float, std: Tensor | float, hess_init: float | None
) -> Tensor | None:
    """H + delta where it is not `total`, which sigma says: at the start, for a new prior or count. Notes these."""
    former: Any = (state.get("count"), state.get("std"))
    state.update(count=count, std=std)
    delta = 1 / (count * std**2)
    if former[0] is None:
        hess = total - delta if hess_init is None else torch.full_like(total, hess_init)
    elif former[0] == count and same(former[1], std):
        return None
    else:
        hess = total * (count / former[0]) - 1 / (former[0] * former[1] ** 2)
    return hess.clamp_min_(0.0).add_(delta)


def same(former: Tensor | float, now: Tensor | float) -> bool:
    """Whether two standard deviations are one, without looking at their numbers where that can be told."""
    if isinstance(former, Tensor) and isinstance(now, Tensor):
        one = former.data_ptr() == now.data_ptr() and former.stride() == now.stride()
        return former.shape == now.shape and (one or bool((former == now).all()))
    return not isinstance(former, Tensor) and not isinstance(now, Tensor) and former == now


def at_most(value: Tensor | float, most: float) -> Tensor | float:
    """The lesser of two, elementwise."""
    return value.clamp(max=most) if isinstance(value, Tensor) else min(value, most)


def averaged(state: dict[str, Any], grad: Tensor, beta: float) -> Tensor:
    """The running mean of gradients with this one, its bias towards 0 taken out; counts the step."""
    state["step"] += 1
    momentum: Tensor = state["momentum"]
    momentum.mul_(beta).add_(grad, alpha=1 - beta)
    unbiased: Tensor = momentum / (1 - beta ** state["step"])
    return unbiased


def kept(q: GaussianPosterior, new: Tensor, old: Tensor) -> Tensor:
    """`new`, and `old` where a mask says that a weight is fixed."""
    return new if q.fixed is None else torch.where(q.fixed == 0, new, old)
