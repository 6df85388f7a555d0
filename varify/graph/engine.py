"""Runs the user's network with other weights: draws of them, or stand-ins where an estimator's plan says so."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from varify.errors import ArgumentError, EstimatorError, listed
from varify.graph.examples import count_of
from varify.graph.plans import Plan, Record, in_transform, record, run_planned
from varify.graph.recording import placeholders
from varify.graph.reruns import kept_by_no_checkpoint, may_run_again
from varify.graph.rewriting import refuse
from varify.network.signature import call_signature
from varify.network.view import Views
from varify.posteriors import Posteriors, cuda_devices
from varify.prediction.sampling import Sampler

__all__ = ["Engine", "GraphModule", "code_of"]


class Engine:
    """One network's views, and the plans of its calls; holds as long as the posteriors do.

    Attributes:
        posteriors: of the network.
        views: to run it as itself: what forward sets is set in the network.
        apart: likewise, but what forward sets is forgotten.
        plans: of calls with estimators, by call signature.
        sampler: runs it with many draws.
    """

    def __init__(self, posteriors: Posteriors) -> None:
        self.posteriors = posteriors
        self.views = Views(posteriors.network, posteriors.slots, whole=False)
        self.apart = Views(posteriors.network, posteriors.slots, whole=True)
        self.plans: dict[Any, Plan] = {}
        self.sampler = Sampler(self.apart, posteriors.slots)

    def __reduce__(self) -> Any:
        return _found_out_again, ()  # no part of a copy or a pickled module

    def run(self, theta: Mapping[str, Any], args: Any, kwargs: Any) -> Any:
        """A call with the weights `theta`, by name; of a name that is missing, with the parameter."""
        return self.views.run(lambda network: network(*args, **kwargs), theta)

    def estimate(self, args: Any, kwargs: Any) -> Any:
        """A training call with estimators: the first of its signature is recorded, later ones follow its plan."""
        inputs = placeholders(args, kwargs)
        count = count_of(inputs, self.posteriors.settings.batch_dim)
        # without gradients a forward may take another branch
        signature = (call_signature(args, kwargs), count == 1, torch.is_grad_enabled())

        def recorded() -> Any:
            return self._recorded(signature, inputs, args, kwargs)

        if signature not in self.plans:
            return recorded()
        call = _call(args, kwargs)
        return run_planned(self.plans[signature], self.views, self.posteriors.now(), count, call, recorded)

    def _recorded(self, signature: Any, inputs: dict[str, Tensor], args: Any, kwargs: Any) -> Any:
        """A call with drawn weights that is recorded, and so planned for those that follow."""
        settings = self.posteriors.settings
        if in_transform():  # of torch.func, where values can't be looked at
            if settings.strict:
                raise EstimatorError("strict=True: call the module once outside of torch.func's transforms first")
            return self.run(self.posteriors.draw(), args, kwargs)
        if may_run_again() or settings.strict:  # strict may refuse, and then nothing is to have happened
            with kept_by_no_checkpoint():
                _, plan = self.plan_of(args, kwargs, before=self.plans.get(signature))
            refuse(plan.decisions, settings.strict and torch.is_grad_enabled())
            self.plans[signature] = plan
            return self.estimate(args, kwargs)
        call, slots = _call(args, kwargs), self.posteriors.slots
        output, found = self.views.run(lambda network: record(network, call, inputs, slots), self.posteriors.draw())
        self.plans[signature] = Plan(found, settings.estimators, settings.batch_dim, self.plans.get(signature))
        return output

    def plan_of(
        self, args: Any, kwargs: Mapping[str, Any], *, estimates: bool = True, before: Plan | None = None
    ) -> tuple[Record, Plan]:
        """A call recorded that leaves nothing behind, and its plan.

        Args:
            args: of the call, as are `kwargs`.
            kwargs: likewise.
            estimates: whether estimators take part; else weights are drawn.
            before: an earlier plan of such calls, whose knowledge this one takes over.
        """
        posteriors, settings = self.posteriors.now(), self.posteriors.settings
        inputs, call = placeholders(args, kwargs), _call(args, kwargs)
        with torch.random.fork_rng(cuda_devices(posteriors)):
            _, found = self.apart.run(
                lambda network: record(network, call, inputs, self.posteriors.slots), self.posteriors.draw(), buffers={}
            )
        estimators = settings.estimators if estimates else dict.fromkeys(settings.estimators, "weights")
        return found, Plan(found, estimators, settings.batch_dim, before)

    def graph(self, args: Any, kwargs: Mapping[str, Any], *, estimates: bool) -> GraphModule:
        """See `VariationalModule.graph`."""
        if not args and not kwargs:
            raise ArgumentError("inputs of the network are needed, such as a batch: the call with them is recorded")
        found, plan = self.plan_of(args, kwargs, estimates=estimates)
        module = found.module(plan.decisions, self.posteriors.now(), self.posteriors.network)
        module.meta["decided"] = plan.decided
        return module

    def call_with(self, theta: Mapping[str, Any], args: Any, kwargs: Mapping[str, Any], training: bool | None) -> Any:
        """A call with these weights; see `VariationalModule.functional`.

        Args:
            theta: a weight for every name in the posteriors.
            args: of the network, as are `kwargs`.
            kwargs: likewise.
            training: the mode of all parts; None: that of the moment.
        """
        lacking = sorted(self.posteriors.slots.keys() - theta.keys())
        if lacking:
            raise ArgumentError(
                f"theta lacks {listed(lacking)}: a weight for every name in vnet.posteriors is "
                "needed, such as {name: q.rsample() for name, q in vnet.posteriors.items()}"
            )
        return self.apart.run(_call(args, kwargs), theta, training)


def _found_out_again() -> None:
    return None


def code_of(module: GraphModule) -> str:
    """The code of what `Engine.graph` gave, as Python, with what data decided before it."""
    decided = [f"# data decided: {line}" for line in module.meta["decided"]]
    return "\n".join([*decided, str(module.code).strip(), ""])


def _call(args: Any, kwargs: Mapping[str, Any]) -> Callable[[nn.Module], Any]:
    return lambda network: network(*args, **kwargs)
