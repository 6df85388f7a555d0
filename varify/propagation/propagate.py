"""One call of a network with every posterior's mean and variance in the place of a draw."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from varify.errors import ArgumentError, one_of
from varify.network.sharding import gathered
from varify.prediction.classes import OUTPUTS
from varify.prediction.linearizing import mapped
from varify.propagation.prediction import GaussianPrediction
from varify.propagation.rules import Uncertain
from varify.propagation.tensors import UncertainTensor, run_network
from varify.weights.posterior import GaussianPosterior, cast
from varify.within import refuse_nested


def propagate(vnet: Any, *args: object, outputs: str = "logits", class_dim: int = -1, **kwargs: object) -> Any:
    """Mean and variance of each output, in eval mode, operation by operation in one pass and without draws.

    All intermediate tensors are taken for independent Gaussians (Wu et al. 2019, arXiv:1810.03958): exact for one
    linear map. What is neglected: covariances of a layer's outputs, which share its inputs' uncertainty; of positions
    and of layers that share weights; of a residual branch with what it is added to. Differentiable in mu and rho.

    Args:
        vnet: the variational module whose method this is.
        args: of the network, as are `kwargs`.
        outputs: what the network returns, as in `predict`.
        class_dim: the classes' dimension in one output.
        kwargs: of the network.

    Returns:
        A `GaussianPrediction`, whose mean and variance have the output's shape; for a network that returns a structure,
        that structure with one for each floating-point tensor.

    Raises:
        PropagationError: an operation has no rule; it says which, and where in the network.
        ArgumentError: unknown outputs; half precision; a variational module within.
    """
    one_of("outputs", outputs, OUTPUTS)
    refuse_nested(vnet, "propagate")
    with gathered(vnet):
        engine = vnet.engine
        theta = {name: UncertainTensor(w, owns=False) for name, w in weights_of(engine.posteriors.now()).items()}

        def call(network: nn.Module) -> Any:
            return run_network(network, args, kwargs)

        output = engine.isolated.run(call, theta, training=False, buffers={})

    def predicted(leaf: Tensor) -> Any:
        if isinstance(leaf, UncertainTensor):
            return GaussianPrediction(leaf.gaussian.mean, leaf.gaussian.var, outputs, class_dim)
        return (
            GaussianPrediction(leaf, torch.zeros_like(leaf), outputs, class_dim) if leaf.is_floating_point() else leaf
        )

    return mapped(predicted, output)


def weights_of(posteriors: Mapping[str, GaussianPosterior]) -> dict[str, Uncertain]:
    """Mean and variance of all weights by name, in the network's dtype."""
    _refuse_half(posteriors)
    return {name: _gaussian(q) for name, q in posteriors.items()}


def _gaussian(q: GaussianPosterior) -> Uncertain:
    return Uncertain(cast(q.mean, q.mu.dtype), cast(q.sigma.square(), q.mu.dtype))


def _refuse_half(posteriors: Mapping[str, GaussianPosterior]) -> None:
    kind = next((q.mu.device.type for q in posteriors.values()), "cpu")
    half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    if half or any(q.mu.dtype == torch.float16 for q in posteriors.values()):
        raise ArgumentError(
            "propagate in half precision: variances of weights underflow there; call it in single precision "
            "(vnet.float(), without autocast) or in bfloat16"
        )
