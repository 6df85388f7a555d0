"""Steps of many parameters, tensors alone: h + delta = 1/(num_data·sigma²) is read off rho and written there again."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from varify.optim.gaussian_prior import moments
from varify.weights.fused import LARGE
from varify.weights.posterior import LEAST_RHO, GaussianPosterior, cast, softplus_inverse

BLOCK = 2**16  # elements at a time, which stay in the processor's cache through all passes


class Settings(NamedTuple):
    """The hyper-parameters of a step, whose words are those of `varify.optim.IVON`.

    Attributes:
        num_data: of the training set, over beta.
        mean: of the prior; a number, or a tensor that broadcasts to the parameter, as is `std`.
        std: likewise.
        lr: rate.
        betas: of the averages of gradient and curvature.
        hess_init: h₀, or None.
        clip_radius: infinite for none.
        step: number of gradients in the momentum.
    """

    num_data: float
    mean: Tensor | float
    std: Tensor | float
    lr: float
    betas: tuple[float, float]
    hess_init: float | None
    clip_radius: float
    step: int

    @property
    def delta(self) -> Tensor | float:
        """The prior's curvature over `num_data`."""
        return 1 / (self.num_data * self.std**2)

    @property
    def are_numbers(self) -> bool:
        """Whether no tensor is among them."""
        return not isinstance(self.mean, Tensor) and not isinstance(self.std, Tensor)


class Weights(NamedTuple):
    """What a step moves, mu, rho and momentum, and by what; each `(*shape)`. What is None takes no part."""

    mu: Tensor
    rho: Tensor
    momentum: Tensor
    mu_grad: Tensor | None
    rho_grad: Tensor | None
    fixed: Tensor | None


def newton_steps(posteriors: Iterable[tuple[GaussianPosterior, dict[str, Any], dict[str, Any]]]) -> None:
    """Move mu and rho by their gradients; see `varify.optim.IVON`.

    Args:
        posteriors: each with a gradient for mu, rho or both; its state, empty at first, then `step`, `momentum`, and,
            once rho had a gradient, the `count` of data and the prior's `std` of the last step; and its group.
    """
    small: dict[Any, list[Weights]] = {}
    for q, state, group in posteriors:
        weights, settings = _prepared(q, state, group)
        kind = *(t is None for t in weights), q.mu.dtype, q.rho.dtype, q.rho.device
        if settings.are_numbers and q.rho.numel() < LARGE:
            small.setdefault((settings, kind), []).append(weights)
        else:
            for block in _blocks(weights) if settings.are_numbers else [weights]:
                _step(block, settings)
    for (settings, _), several in small.items():
        _step_together(several, settings)


def _prepared(q: GaussianPosterior, state: dict[str, Any], group: dict[str, Any]) -> tuple[Weights, Settings]:
    if not state:
        # like rho, which is in single precision where the network is half
        state.update(step=0, momentum=torch.zeros_like(q.rho))
    state["step"] += q.mu.grad is not None
    prior, count, hess_init = moments(q.prior), group["num_data"] / group["beta"], group["hess_init"]
    rho_grad = q.rho.grad
    if rho_grad is not None:
        rho_grad = _restarted(q, rho_grad, state, count, prior.std, hess_init)
    settings = Settings(count, *prior, group["lr"], group["betas"], hess_init, group["clip_radius"], state["step"])
    return Weights(q.mu, q.rho, state["momentum"], q.mu.grad, rho_grad, q.fixed), settings


def _restarted(
    q: GaussianPosterior,
    rho_grad: Tensor,
    state: dict[str, Any],
    count: float,
    std: Tensor | float,
    hess_init: float | None,
) -> Tensor:
    """The gradient of rho, which is set where it doesn't say h + delta: at the start, for a new prior or count."""
    former: Any = (state.get("count"), state.get("std"))
    state.update(count=count, std=std)
    if former[0] == count and same(former[1], std):
        return rho_grad
    rho = q.rho.clamp_min(LEAST_RHO)  # below, the square of sigma underflows
    sigma, delta = F.softplus(rho), 1 / (count * std**2)
    total = 1 / (count * sigma.square())
    if former[0] is None:
        hess = total - delta if hess_init is None else torch.full_like(total, hess_init)
    else:
        hess = total * (count / former[0]) - 1 / (former[0] * former[1] ** 2)
    new_sigma = (count * (hess.clamp_min_(0.0) + delta)).rsqrt()
    new = softplus_inverse(new_sigma)
    q.rho.copy_(new if q.fixed is None else torch.where(q.fixed == 0, new, q.rho))
    # the gradient by sigma, over sigma, is that of the draws: at the sigma of before
    found: Tensor = rho_grad * (new_sigma * new.sigmoid()) / (sigma * rho.sigmoid())
    return found


def same(former: Tensor | float, now: Tensor | float) -> bool:
    """Whether two standard deviations are one, without looking at their numbers where that can be told."""
    if isinstance(former, Tensor) and isinstance(now, Tensor):
        one = former.data_ptr() == now.data_ptr() and former.stride() == now.stride()
        return former.shape == now.shape and (one or bool((former == now).all()))
    return not isinstance(former, Tensor) and not isinstance(now, Tensor) and former == now


def _blocks(weights: Weights) -> Iterator[Weights]:
    """Weights of one parameter, some at a time."""
    if not all(t is None or t.is_contiguous() for t in weights):
        yield weights
        return
    n = -(-weights.rho.numel() // BLOCK)
    columns = [[None] * n if t is None else t.view(-1).split(BLOCK) for t in weights]
    for block in zip(*columns, strict=True):
        yield Weights(*block)


def _step_together(several: Sequence[Weights], settings: Settings) -> None:
    """The step of small parameters as one vector: what they cost is the number of operations."""
    if len(several) == 1:
        return _step(several[0], settings)
    columns = list(zip(*several, strict=True))
    whole = Weights(*(None if c[0] is None else torch.cat([t.reshape(-1) for t in c]) for c in columns))  # type: ignore[arg-type]
    _step(whole, settings)
    sizes = [w.rho.numel() for w in several]
    for parts, new in zip(columns[:3], whole[:3], strict=True):
        torch._foreach_copy_(parts, [n.view(t.shape) for n, t in zip(new.split(sizes), parts, strict=True)])


def _step(w: Weights, s: Settings) -> None:
    held = None if w.fixed is None else w.fixed != 0
    delta, share = s.delta, 1 - s.betas[1]
    rate = 1.0 if s.hess_init is None else s.hess_init + at_most(delta, s.hess_init)
    # over h + delta, which is h₀ + delta where rho has no gradient
    scale: Tensor | float = 1 / ((1.0 if s.hess_init is None else s.hess_init) + delta)
    if w.rho_grad is not None:
        rho = w.rho.clamp_min(LEAST_RHO)
        sigma, slope = F.softplus(rho), rho.sigmoid_()  # that of sigma in rho
        # (ĥ + delta)/(h + delta) − 1, times the share; (h + delta)·num_data is 1/sigma²
        change = (sigma * (share / s.std**2)).mul_(sigma)
        change.addcmul_(sigma / slope, w.rho_grad, value=s.num_data * share).sub_(share)
        # The variance is divided by 1 + c + c²/2, at least ½.
        more = change.addcmul_(change, change, value=0.5).add_(1.0).rsqrt_().sub_(1.0).mul_(sigma)
        scale = sigma.add_(more).square_().mul_(s.num_data)
        # As a change of rho: a factor of 1 + 1e-5 drowns in rounding where one goes through softplus and back.
        shift = more.expm1_().div_(slope).log1p_()
        w.rho.add_(shift if held is None else shift.masked_fill_(held, 0.0))
    if w.mu_grad is not None:
        w.momentum.mul_(s.betas[0]).add_(w.mu_grad, alpha=1 - s.betas[0])
        bias = 1 - s.betas[0] ** s.step
        direction = (cast(w.mu, w.rho.dtype) - s.mean).mul_(delta).add_(w.momentum, alpha=1 / bias).mul_(scale)
        if s.clip_radius != math.inf:
            direction.clamp_(-s.clip_radius, s.clip_radius)
        direction.mul_(rate * s.lr)
        w.mu.sub_(direction if held is None else direction.masked_fill_(held, 0.0))


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
