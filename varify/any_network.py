"""Predictions of any network with variational parts."""

from typing import Any

import torch
from torch import nn

from varify.network.parameters import is_variational
from varify.network.sharding import gathered
from varify.network.view import Views
from varify.prediction.gather import gather
from varify.prediction.sampling import Sampler
from varify.within import required_parts, sampling


@torch.no_grad()
def predict(
    network: nn.Module,
    *args: object,
    n_samples: int = 32,
    outputs: str = "logits",
    class_dim: int = -1,
    **kwargs: object,
) -> Any:
    """Outputs of `n_samples` draws of the variational parts of any network, such as a Bayesian head on a plain body.

    The network is in eval mode meanwhile, and what its forward sets is forgotten. A variational module is asked for
    its own `predict`, which takes more; other networks run once a draw.

    Args:
        network: a variational module, or any module with variational parts.
        args: of the network, as are `kwargs`.
        n_samples: number of draws.
        outputs: what the network returns, for the measures on classes; see `Prediction`.
        class_dim: the classes' dimension in one output.
        kwargs: of the network.

    Returns:
        As `VariationalModule.predict`: a `Prediction`, or the network's structure of them.

    Raises:
        ModelError: nothing in `network` is variational.
        ArgumentError: n_samples is no positive integer.
    """
    required_parts(network)
    if is_variational(network):
        own: Any = network
        return own.predict(*args, n_samples=n_samples, outputs=outputs, class_dim=class_dim, **kwargs)
    with gathered(network):
        sampler = Sampler(Views(network, {}, whole=True), {})
        found = sampler.outputs(args, kwargs, lambda n: [{}] * n, n_samples, False, lambda part, _: sampling(part))
    return gather(found.outputs, outputs, class_dim, found.vectorized)
