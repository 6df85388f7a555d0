"""IVON: natural gradients for mu and rho, with the curvature that autograd gives through rho."""

import math
import warnings
from collections.abc import Callable, Container
from numbers import Real
from typing import Any

import torch
from torch import nn

from varify.errors import (
    ArgumentError,
    ModelError,
    PriorError,
    StructureError,
    VarifyWarning,
    positive_int,
    positive_number,
)
from varify.network.sharding import refuse_sharded
from varify.optim.gaussian_prior import moments
from varify.optim.newton import averaged, newton_steps
from varify.weights.posterior import GaussianPosterior
from varify.within import required_parts, variational_parts


class IVON(torch.optim.Optimizer):
    r"""Improved variational online Newton on a variational network (Shen et al. 2024, arXiv:2402.17641, algorithm 1).

    ```python
    optimizer = varify.optim.IVON(vnet, lr=0.3, num_data=len(train_set))
    optimizer.zero_grad()
    elbo(vnet, F.cross_entropy, x, y).nll.backward()  # nll, not loss
    optimizer.step()
    ```

    Only the negative log likelihood goes backward: the divergence to a Gaussian prior is in the step, in closed form.
    `F.cross_entropy(vnet(x), y).backward()` is the same step, without the time of the divergence that `elbo` reports.
    With $\lambda$ = num_data/beta, prior N(m₀, std²), $\delta = 1/(\lambda\,std^2)$ and h the curvature of the nll,

    - $\hat h = (\partial nll/\partial\sigma)/\sigma$, so that every estimator serves (with drawn weights it is the
      paper's $\hat g\,(\theta - \mu)/\sigma^2$);
    - $h \leftarrow h + (1-\beta_2)(\hat h - h) + \frac12 (1-\beta_2)^2 (\hat h - h)^2/(h + \delta)$;
    - $g \leftarrow \beta_1 g + (1-\beta_1)\,\partial nll/\partial\mu$;
    - $\mu \leftarrow \mu - lr\,(h_0 + \min(\delta, h_0))(g/(1-\beta_1^t) + \delta(\mu - m_0))/(h + \delta)$, where the
      paper has $h_0 + \delta$: that is the same while $\delta \le h_0$, and diverges where a prior is narrower;
    - $\sigma = 1/\sqrt{\lambda(h + \delta)}$, written into rho.

    h has no memory of its own: it is read off rho. So a sigma that is set from outside counts from the next step, and
    memory is 20 bytes a weight in single precision: mu, rho, their gradients, g. Adam takes 32. Another prior, or
    another `num_data` or `beta` in a parameter group, is in the next step.

    Where rho requires no gradient, h stays h₀ for the step of mu. Parameters that are not variational, and those of
    `add_param_group`, take a step of momentum, lr·g/(1 − betas[0]^t), without weight decay. Weights with a mask
    (padding, pruned) stay as they are. Parameters without a gradient are left alone, as in torch.

    Args:
        network: a variational module, or any module with variational parts, also within DDP.
        lr: rate; the first step of a weight is lr times its gradient, prior included. 0.3 serves some hundred to
            thousand steps; 0.1 wants more.
        num_data: size of the training set, the same as the `ELBO`'s: a `VarifyWarning` tells once where it is not.
        beta: weight of the KL, as in `ELBO`, whose own has no effect on the nll.
        betas: of the averages of gradient and curvature. The curvature is noisy: 1/(1 − betas[1]) is to be a fair
            share of all steps, but no less than a few thousand.
        hess_init: h₀, the curvature to start with. The first step sets sigma by it, to at most 1/√(num_data·h₀), and
            where that is too wide, training doesn't start: 1 serves a thousand data, 0.1 sixty thousand. None: what
            the network's sigma says (0 where sigma is above the prior's), as for a posterior that was trained already;
            then lr is the share of a Newton step.
        clip_radius: the most that a weight moves in a step, relative to the rate, lr·(h₀ + delta).

    Raises:
        ModelError: nothing in `network` is variational, or this is not a network.
        PriorError: a prior is not Gaussian.
        ArgumentError: an argument has a value that it can't have.
        StructureError: the parameters are in parts (FSDP2).
    """

    _warned = False

    def __init__(
        self,
        network: nn.Module,
        lr: float = 0.3,
        *,
        num_data: int,
        beta: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.9999),
        hess_init: float | None = 1.0,
        clip_radius: float = math.inf,
    ) -> None:
        if not isinstance(network, nn.Module):
            raise ModelError(
                f"IVON needs the network, to pair means and rho's, got a {type(network).__name__}: "
                "varify.optim.IVON(vnet, ...), without .parameters()"
            )
        required_parts(network)
        refuse_sharded(network, "IVON")
        defaults = {
            "lr": positive_number("lr", lr),
            "num_data": positive_int("num_data", num_data),
            "beta": positive_number("beta", beta),
            "betas": _decays(betas),
            "hess_init": None if hess_init is None else positive_number("hess_init", hess_init),
            "clip_radius": math.inf if clip_radius == math.inf else positive_number("clip_radius", clip_radius),
        }
        self._network = network
        posteriors = self._posteriors()
        paired = [tensor for _, q in posteriors for tensor in (q.mu, q.rho)]
        ids = {id(tensor) for tensor in paired}
        others = [p for p in network.parameters() if id(p) not in ids]
        for name, q in posteriors:
            _check(name, q, ids)
        super().__init__([{"params": params} for params in (paired, others) if params], defaults)
        self._count_kl_gradients()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_network": self._network}  # type: ignore[no-untyped-call]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch."""
        super().zero_grad(set_to_none)
        self._count_kl_gradients()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step by the gradients of the nll, checked before anything changes.

        Args:
            closure: computes them, and returns the loss.

        Raises:
            ArgumentError: the gradients have the divergence's in them, or a mean has one and its rho has none.
            PriorError: a prior was set that is not Gaussian.
            StructureError: parameters were replaced since the optimizer was made.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = {id(p): group for group in self.param_groups for p in group["params"]}
        posteriors = self._posteriors()
        self._refuse_kl_gradients()
        for name, q in posteriors:
            _check(name, q, groups)
        self._warn_of_num_data()
        moved = [q for _, q in posteriors if q.mu.grad is not None or q.rho.grad is not None]
        newton_steps((q, self.state[q.rho], groups[id(q.mu)]) for q in moved)
        for _, q in posteriors:
            del groups[id(q.mu)], groups[id(q.rho)]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and id(p) in groups:
                    state = self.state[p]
                    if not state:
                        state.update(step=0, momentum=torch.zeros_like(p))
                    p.sub_(group["lr"] * averaged(state, p.grad, group["betas"][0]))
        return loss

    def _posteriors(self) -> list[tuple[str, GaussianPosterior]]:
        return [item for part in variational_parts(self._network) for item in part.posteriors.items()]

    def _count_kl_gradients(self) -> None:
        for part in variational_parts(self._network):
            part.drawing.kl_gradients = 0

    def _refuse_kl_gradients(self) -> None:
        if any(part.drawing.kl_gradients for part in variational_parts(self._network)):
            raise ArgumentError(
                "the gradients have the divergence's in them, which IVON has in its step: zero_grad(), and go backward "
                "from the negative log likelihood alone, terms.nll.backward()"
            )

    def _warn_of_num_data(self) -> None:
        told = {part.drawing.num_data for part in variational_parts(self._network)} - {None}
        own = {group["num_data"] for group in self.param_groups}
        if self._warned or told <= own:
            return
        self._warned = True
        warnings.warn(
            f"num_data={', '.join(map(str, sorted(own)))} here, and {', '.join(map(str, sorted(told)))} in the "
            "objective: it is the size of the training set in both",
            VarifyWarning,
            stacklevel=5,  # the caller, beyond no_grad's wrapper and torch's own
        )


def _check(name: str, q: GaussianPosterior, known: Container[int]) -> None:
    if id(q.mu) not in known or id(q.rho) not in known:
        raise StructureError(f"{name} has another tensor than when the optimizer was made: make it afterwards")
    try:
        moments(q.prior)
    except PriorError as error:
        raise PriorError(f"{name}: {error}") from None
    if q.mu.grad is not None and q.rho.grad is None and q.rho.requires_grad:
        raise ArgumentError(
            f"{name} has a gradient for its mean and none for its rho, so no weight was drawn: train in train mode, "
            "vnet.train(), and call vnet, not vnet.module"
        )


def _decays(betas: object) -> tuple[float, float]:
    numbers = tuple(betas) if isinstance(betas, (tuple, list)) else ()
    if len(numbers) != 2 or not all(isinstance(b, Real) and 0 <= float(b) < 1 for b in numbers):
        raise ArgumentError(f"betas must be two numbers of at least 0 and below 1, got {betas!r}")
    return float(numbers[0]), float(numbers[1])
