"""Stand-ins for parameters of which each example uses an element once, where local reparameterization is exact."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from varify.estimators.rules import Rule
from varify.graph.examples import count_of
from varify.graph.planning import Decision, is_once
from varify.graph.plans import Plan, in_transform, record
from varify.graph.recording import placeholders
from varify.graph.standins import EstimatedParameter
from varify.network.view import Views
from varify.posteriors import Posteriors, cuda_devices
from varify.weights.moments import Examples
from varify.weights.posterior import GaussianPosterior


class UsedOnce(EstimatedParameter):
    """One that has no use in which local reparameterization isn't exact, as data may have it in a later call."""

    def _rule_for(self, rule: Rule, operation: object, arguments: dict[str, Any], examples: Examples) -> Rule:
        if not is_once(rule, arguments, examples):
            raise self.unforeseen_as("an example uses its elements several times")
        return rule


def exact_decisions(
    posteriors: Posteriors, views: Views, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Decision]:
    """The parameters that local reparameterization serves exactly in a call in eval mode, which is recorded.

    Args:
        posteriors: of the network.
        views: of it, such that what forward sets is forgotten.
        args: of the call, as are `kwargs`.
        kwargs: likewise.
    """
    if in_transform():  # of torch.func, where the values of tensors are not known
        return {}
    inputs = placeholders(args, kwargs)

    def recorded(network: nn.Module) -> Any:
        return record(network, lambda network: network(*args, **kwargs), inputs, posteriors.slots)

    with torch.random.fork_rng(cuda_devices(posteriors)):
        _, new = views.run(recorded, posteriors.draw(), training=False, buffers={})
    plan = Plan(new, dict.fromkeys(posteriors, "auto"), posteriors.settings.batch_dim)
    local = {name: d for name, d in plan.decisions.items() if d.estimator == "local" and d.uses}
    return {name: replace(decision, automatic=False) for name, decision in local.items()}


def number_of_examples(args: tuple[Any, ...], kwargs: Mapping[str, Any], batch_dim: int) -> int | None:
    """See `count_of`."""
    return count_of(placeholders(args, kwargs), batch_dim)


class KnownSigma(GaussianPosterior):
    """A posterior with a sigma that is there already, `(*shape)`: that of all draws, or 0 for certain ones."""

    __slots__ = ("_known",)

    def __init__(self, q: GaussianPosterior, sigma: Tensor) -> None:
        super().__init__(q.mu, q.rho, q.prior, q.fixed)
        self._known = sigma

    @property
    def sigma(self) -> Tensor:
        """As given."""
        return self._known
