"""Draws in which each example has weights of its own, with no weights drawn where local reparameterization is exact."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from varify.graph.planning import Decision
from varify.graph.standins import Unforeseen
from varify.graph.used_once import KnownSigma, UsedOnce, exact_decisions, number_of_examples
from varify.network.signature import call_signature, copied
from varify.network.view import Views
from varify.posteriors import Posteriors
from varify.prediction.many import Draws
from varify.prediction.sampling import MOST_SHAPES, Sampler, StandIns, check_arguments, shapes_of
from varify.prediction.vectorizing import Stack
from varify.weights.draw import draw

Within = Callable[[nn.Module, dict[str, Any]], AbstractContextManager[None]]


class SeparateSampler(Sampler):
    """A sampler that also makes draws in which each example has its own.

    Within `vmap`, parameters whose elements each example uses once are stand-ins: their operation gives its mean and
    variance, which are computed once for all draws if its input depends on none, and noise for each draw. The user's
    own code runs as for one draw. Other parameters are drawn, once a draw.

    Args:
        posteriors: of the network.
        views: see `Sampler`.
    """

    def __init__(self, posteriors: Posteriors, views: Views) -> None:
        super().__init__(views, posteriors.slots)
        self._posteriors = posteriors
        # by signature and shapes, the decisions for parameters that have stand-ins
        self._decisions: dict[Any, dict[str, Decision]] = {}
        # signatures of calls with one example in which most weights are drawn anyhow
        self._drawn: set[Any] = set()

    def outputs_of_one(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], n_samples: int, vectorize: bool | None, within: Within
    ) -> Draws | None:
        """As `outputs`, for a call with one example, without most weights; None where that can't be.

        A weight that a call uses once gives its output the same distribution, drawn or not. With one example that is
        what the decisions ask for, so that there is nothing which joint draws would have and these have not.
        """
        signature = call_signature(args, kwargs)
        if signature in self._drawn or number_of_examples(args, kwargs, self._posteriors.settings.batch_dim) != 1:
            return None
        served = self._decided(args, kwargs)
        if 2 * self._bytes_without(set(served)) > self._bytes_without(set()):
            self._drawn.add(signature)  # whatever the shapes, each of which would be recorded
            return None
        return self.separate_outputs(args, kwargs, n_samples, vectorize, within)

    def _decided(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Decision]:
        key = call_signature(args, kwargs), shapes_of(args, kwargs)
        if key not in self._decisions:
            check_arguments(self._views.network, args, kwargs)  # whose errors come before the network's
            if len(self._decisions) >= MOST_SHAPES:
                self._decisions.clear()
            self._decisions[key] = exact_decisions(self._posteriors, self._views, *copied(args, kwargs))
        return self._decisions[key]

    def separate_outputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], n_samples: int, vectorize: bool | None, within: Within
    ) -> Draws | None:
        """As `outputs`, but each example draws for itself; None where joint draws are needed, or no slower."""
        decisions = self._decided(args, kwargs)
        if not decisions:
            return None
        posteriors = self._posteriors.now()
        rest = {name: q for name, q in posteriors.items() if name not in decisions}
        count = number_of_examples(args, kwargs, self._posteriors.settings.batch_dim)
        estimated: list[UsedOnce] = []
        sigmas = {name: posteriors[name].sigma for name in decisions}  # not within vmap, a time for each chunk

        def stand_ins(certain: bool) -> dict[str, Any]:
            qs = {n: KnownSigma(posteriors[n], torch.zeros_like(s) if certain else s) for n, s in sigmas.items()}
            estimated[:] = [UsedOnce(name, q, decisions[name], count) for name, q in qs.items()]
            return {parameter.name: parameter.stand_in() for parameter in estimated}

        @contextmanager
        def watched(network: nn.Module, theta: dict[str, Any]) -> Iterator[None]:
            try:
                with within(network, theta):
                    yield
            finally:
                over = list(estimated)
                estimated.clear()  # tensors of a call that stay would look like the network's doing
                for parameter in over:
                    parameter.over = True
                    if parameter.unforeseen or parameter.late:
                        raise Unforeseen(parameter.name, parameter.unforeseen or parameter.late)

        def take(number: int) -> list[dict[str, Any]] | Stack:
            return [draw(rest) for _ in range(number)] if rest else Stack({}, number)

        try:
            return self.outputs(
                args, kwargs, take, n_samples, vectorize, watched, stand_ins=StandIns(stand_ins, set(decisions))
            )
        except Unforeseen:
            decisions.clear()
            return None
