"""Runs the user's network with drawn weights, or with stand-ins for those that an estimator serves."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.fx import GraphModule

from varify.errors import ArgumentError, EstimatorError, listed
from varify.graph.examples import count_of
from varify.graph.plans import Plan, Record, in_transform, record, run_planned
from varify.graph.recording import placeholders
from varify.graph.reruns import hidden_from_checkpoints, may_run_again
from varify.graph.rewriting import refuse
from varify.graph.separate import SeparateSampler
from varify.network.signature import call_signature, copied
from varify.network.view import Views
from varify.posteriors import Posteriors, cuda_devices

Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]
__all__ = ["Engine", "GraphModule", "code_of"]


class Engine:
    """The views of one network and the plans of its calls. Valid as long as the posteriors fit the network.

    Attributes:
        posteriors: of the network.
        views: for ordinary calls: what forward sets is written back to the network.
        isolated: for calls without side effects: what forward sets is dropped.
        plans: of calls with estimators, by call signature.
        sampler: for calls with many draws.
    """

    def __init__(self, posteriors: Posteriors) -> None:
        self.posteriors = posteriors
        self.views = Views(posteriors.network, posteriors.slots, whole=False)
        self.isolated = Views(posteriors.network, posteriors.slots, whole=True)
        self.plans: dict[Any, Plan] = {}
        self.sampler = SeparateSampler(posteriors, self.isolated)

    def __reduce__(self) -> Any:
        return _none, ()  # a cache: a copied or unpickled module makes a new engine

    def run(self, theta: Mapping[str, Any], args: Args, kwargs: Kwargs) -> Any:
        """Run a call with the weights `theta`, by name; a parameter that is missing keeps its live value."""
        return self.views.run(lambda network: network(*args, **kwargs), theta)

    @_disable_dynamo  # which would follow varify's own code; imported at the first call, as by an optimizer
    def estimate(self, args: Args, kwargs: Kwargs) -> Any:
        """Run a training call with estimators: the first of a signature is recorded, later ones follow its plan."""
        inputs = placeholders(args, kwargs)
        count = count_of(inputs, self.posteriors.settings.batch_dim)
        # Batches of one and calls without gradients have plans of their own: from one example nothing can be learned
        # about which rows belong to which, and forward may branch on whether gradients are on.
        signature = (call_signature(args, kwargs), count == 1, torch.is_grad_enabled())

        def recorded() -> Any:
            return self._recorded(signature, inputs, args, kwargs)

        if signature not in self.plans:
            return recorded()
        call = _call(args, kwargs)
        return run_planned(self.plans[signature], self.views, self.posteriors.now(), count, call, recorded)

    def _recorded(self, signature: object, inputs: dict[str, Tensor], args: Args, kwargs: Kwargs) -> Any:
        """Run a call with drawn weights and record it, which gives the plan for later calls."""
        settings = self.posteriors.settings
        if in_transform():  # of torch.func, where the values of tensors are not known
            if settings.strict:
                raise EstimatorError(
                    "strict=True: the first call must be outside of torch.func's transforms, to be recorded; "
                    "call the module once on data before"
                )
            return self.run(self.posteriors.draw(), args, kwargs)
        # The call is recorded without side effects and then run by its plan: a checkpoint around it would run it again
        # in backward, by its plan, and must find what forward saved; and strict=True must raise before buffers change.
        if may_run_again() or settings.strict:
            with hidden_from_checkpoints():
                _, plan = self.plan_of(args, kwargs, before=self.plans.get(signature))
            refuse(plan.decisions, settings.strict and torch.is_grad_enabled())
            self.plans[signature] = plan
            return self.estimate(args, kwargs)
        call, slots = _call(args, kwargs), self.posteriors.slots
        output, new = self.views.run(lambda network: record(network, call, inputs, slots), self.posteriors.draw())
        self.plans[signature] = Plan(new, settings.estimators, settings.batch_dim, self.plans.get(signature))
        return output

    def plan_of(
        self, args: Args, kwargs: Kwargs, *, estimates: bool = True, before: Plan | None = None
    ) -> tuple[Record, Plan]:
        """Record a call without side effects, random numbers included.

        Args:
            args: of the call, as are `kwargs`.
            kwargs: likewise.
            estimates: whether to use the estimators; otherwise all weights are drawn.
            before: an earlier plan of such calls, whose corrections the new plan keeps.

        Returns:
            The record and its plan.
        """
        posteriors, settings = self.posteriors.now(), self.posteriors.settings
        args, kwargs = copied(args, kwargs)
        inputs, call = placeholders(args, kwargs), _call(args, kwargs)
        with torch.random.fork_rng(cuda_devices(posteriors)):
            _, new = self.isolated.run(
                lambda network: record(network, call, inputs, self.posteriors.slots), self.posteriors.draw(), buffers={}
            )
        estimators = settings.estimators if estimates else dict.fromkeys(settings.estimators, "weights")
        return new, Plan(new, estimators, settings.batch_dim, before)

    def graph(self, args: Args, kwargs: Kwargs, *, estimates: bool) -> GraphModule:
        """See `VariationalModule.graph`."""
        if not args and not kwargs:
            raise ArgumentError("inputs of the network are needed, such as a batch: the call with them is recorded")
        new, plan = self.plan_of(args, kwargs, estimates=estimates)
        module = new.module(plan.decisions, self.posteriors.now(), self.posteriors.network)
        module.meta["decided"] = plan.decided
        return module

    def call_with(self, theta: Mapping[str, Any], args: Args, kwargs: Kwargs, training: bool | None) -> Any:
        """Run a call with these weights; see `VariationalModule.functional`.

        Args:
            theta: a weight for every name in the posteriors.
            args: of the network, as are `kwargs`.
            kwargs: likewise.
            training: the training flag of all modules; None: their own.
        """
        missing = sorted(self.posteriors.slots.keys() - theta.keys())
        if missing:
            raise ArgumentError(
                f"theta lacks {listed(missing)}: a weight for every name in vnet.posteriors is "
                "needed, such as {name: q.rsample() for name, q in vnet.posteriors.items()}"
            )
        return self.isolated.run(_call(args, kwargs), theta, training)


def _none() -> None:
    return None


def code_of(module: GraphModule) -> str:
    """The Python code of a graph from `Engine.graph`, preceded by the decisions that depended on data."""
    decided = [f"# data decided: {line}" for line in module.meta["decided"]]
    return "\n".join([*decided, str(module.code).strip(), ""])


def _call(args: Args, kwargs: Kwargs) -> Callable[[nn.Module], Any]:
    return lambda network: network(*args, **kwargs)
