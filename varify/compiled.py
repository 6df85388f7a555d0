"""A forward as torch.compile sees it: it can follow neither a view nor the store, so weights are looked up anew."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.func import functional_call

from varify.errors import EstimatorError
from varify.network.sharding import whole
from varify.posteriors import Settings, Trees
from varify.weights.draw import Drawing, draw
from varify.weights.posterior import GaussianPosterior


def paired(network: nn.Module, trees: Trees, settings: Settings) -> dict[str, GaussianPosterior]:
    """The posteriors by name."""
    rho, prior, fixed = trees
    return {
        name: GaussianPosterior(
            whole(network.get_parameter(name)), whole(rho.leaf_at(name)), prior.leaf_at(name), fixed.leaf_at(name)
        )
        for name in settings.names
    }


def run_compiled(
    network: nn.Module,
    trees: Trees,
    settings: Settings,
    drawing: Drawing | None,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """A forward with drawn weights, whatever the estimator.

    Args:
        network: the user's.
        trees: beside it.
        settings: of the conversion.
        drawing: how weights are drawn; None: the network runs at its means.
        args: of the network, as are `kwargs`.
        kwargs: likewise.

    Raises:
        EstimatorError: an estimator was asked for with `strict=True`.
    """
    if settings.strict and settings.wants_estimators:
        raise EstimatorError("strict=True: under torch.compile weights are drawn, whatever the estimator")
    if drawing is not None:
        theta = draw(paired(network, trees, settings), drawing.noise)
    elif all(trees.fixed.leaf_at(name) is None for name in settings.names):  # by name, which torch.compile guards
        return network(*args, **kwargs)
    else:
        posteriors = paired(network, trees, settings)
        theta = {name: q.mean.to(q.mu.dtype) for name, q in posteriors.items() if q.fixed is not None}
    in_slots = {slot: theta[first] for slot, first in settings.slots.items() if first in theta}
    return functional_call(network, in_slots, args, dict(kwargs), tie_weights=False)
