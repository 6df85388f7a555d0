"""Description length: bits to transmit the weights and, given these, the labels.

Hinton & van Camp 1993; Honkela & Valpola 2004 (bits back); Graves 2011. The sum is the variational free energy.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from varify.analysis.batch import pair
from varify.analysis.splitting import Splitter
from varify.errors import ArgumentError, positive_int
from varify.module import VariationalModule
from varify.network.arguments import unpack
from varify.objective.elbo import Criterion, loss_of
from varify.predicting import outputs_of_draws
from varify.within import check_variational


@dataclass(frozen=True)
class DescriptionLength:
    """Bits of the weights under the prior, less those that the posterior's randomness gives back, and of the data.

    Attributes:
        weights: KL/ln 2 by parameter name, which has the module's name before it for a variational module within.
        data: of all labels given the inputs, expected under the posterior.
        num_data: number of data.
    """

    weights: dict[str, float]
    data: float
    num_data: int

    @property
    def model(self) -> float:
        """Bits of all weights."""
        return sum(self.weights.values())

    @property
    def total(self) -> float:
        """Bits of the weights and the data."""
        return self.model + self.data

    @property
    def total_bytes(self) -> float:
        """`total` in bytes."""
        return self.total / 8

    def __str__(self) -> str:
        rows = [*self.weights.items(), ("all weights", self.model), (f"{self.num_data:,} data", self.data)]
        rows.append(("total", self.total))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:{width}}  {bits:15,.1f} bits  {bits / 8:13,.1f} bytes" for name, bits in rows)


@torch.no_grad()
def description_length(
    vnet: VariationalModule, loader: Iterable[Any], criterion: Criterion, *, n_samples: int = 16, batched: object = None
) -> DescriptionLength:
    """The code length of weights and data.

    Args:
        vnet: run in eval mode.
        loader: of (inputs, targets), inputs as for `ELBO`, with each datum once. A batch has as many data as its inputs
            have entries in their first dimension.
        criterion: `(output, targets)` to the negative log likelihood of a datum, mean over the batch, nats. Where a
            datum has several labels, such as tokens, it must sum over these, or they count as one.
        n_samples: number of weight draws to estimate the expectation over the posterior.
        batched: as for `fit_sigma`; needed where inputs differ in length and running the network does not show which
            have an entry for each datum.

    Raises:
        ArgumentError: an empty loader, n_samples < 1, a criterion without a scalar, an unknown number of data.
    """
    check_variational(vnet, "varify.description_length")
    n_samples = positive_int("n_samples", n_samples)
    nats, num_data = 0.0, 0
    splitter = Splitter(vnet, loader, criterion, batched)
    for batch in loader:
        inputs, targets = pair(batch)
        args, kwargs = unpack(inputs, vnet)
        size = splitter.size(inputs, targets)
        outputs = outputs_of_draws(vnet, args, kwargs, n_samples, vectorize=False).outputs
        losses = [loss_of(criterion, output, targets) for output in outputs]
        nats += size * float(torch.stack(losses).mean())
        num_data += size
    if not num_data:
        raise ArgumentError("the loader is empty: there are no data to describe")
    weights = {name: kl / math.log(2) for name, kl in _divergences(vnet).items()}
    return DescriptionLength(weights, nats / math.log(2), num_data)


def _divergences(vnet: VariationalModule) -> dict[str, float]:
    """KL by parameter name, nats, including variational modules within the network."""
    nats = {name: float(kl) for name, kl in vnet.kl_divergence().items()}
    for path, part in vnet.module.named_modules():
        if isinstance(part, VariationalModule):
            nats |= {f"{path}.{name}": float(kl) for name, kl in part.kl_divergence().items()}
    return nats
