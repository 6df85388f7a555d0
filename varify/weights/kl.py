"""KL(q‖p) by the pair of types: exact where a rule is registered, estimated elsewhere."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from varify.errors import PriorError
from varify.weights.prior import Prior

Rule = TypeVar("Rule", bound=Callable[[Any, Any], Tensor])
_RULES: dict[tuple[type, type], Callable[[Any, Any], Tensor]] = {}


class Posterior(Protocol):
    """What the rest of varify asks of a posterior over a parameter of shape `(*shape)`."""

    mu: Tensor
    prior: Prior

    def noise(self) -> Tensor:
        """Fresh randomness for one draw, without gradient."""

    def at(self, eps: Tensor) -> Tensor:
        """The draw `(*shape)` that belongs to `eps`; differentiable, in full precision."""

    def entropy(self) -> Tensor:
        """Scalar `()`, nats."""


def register_kl(posterior: type, prior: type) -> Callable[[Rule], Rule]:
    """Decorate an exact KL(q‖p): a function of a posterior and a prior of these types to a scalar `()`, nats."""

    def register(rule: Rule) -> Rule:
        _RULES[posterior, prior] = rule
        return rule

    return register


def kl_divergence(q: Posterior, p: Prior) -> Tensor:
    r"""$\mathrm{KL}(q \| p)$ summed over every scalar of one parameter; `()`, nats, differentiable.

    Exact by the rule of the nearest types, and by `estimated_kl` where there is none. A rule is for the density of its
    own prior type: a subclass that defines another `log_prob` needs another rule.
    """
    for posterior_type in type(q).__mro__:
        for prior_type in type(p).__mro__:
            # a subclass with a density of its own has no exact KL, unless it brings a rule
            if (posterior_type, prior_type) in _RULES and type(p).log_prob is getattr(prior_type, "log_prob", None):
                return _scalar(_RULES[posterior_type, prior_type](q, p), p)
    return estimated_kl(q, p)


def _scalar(kl: Tensor, p: Prior) -> Tensor:
    if kl.shape:
        raise PriorError(
            f"the KL rule of {type(p).__name__} must return a scalar, the divergence of the whole tensor, got shape "
            f"{tuple(kl.shape)}: add .sum()"
        )
    return kl


def estimated_kl(q: Posterior, p: Prior) -> Tensor:
    r"""The unbiased estimate $-\frac1S \sum_s \log p(w_s) - H(q)$, $w_s \sim q$, S = `p.n_mc_samples`.

    Blundell et al. 2015 (arXiv:1505.05424, eq. 2) with log q integrated out: the entropy is exact. The draws are its
    own, so that neither a forward's draw nor its gradient is touched.
    """
    log_p = torch.stack([p.log_density(q.at(q.noise())) for _ in range(p.n_mc_samples)])
    return -log_p.mean() - q.entropy()
