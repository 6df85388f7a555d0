"""Description length: what it takes to send the weights and, with them, the labels.

Hinton & van Camp 1993; Honkela & Valpola 2004 (bits back); Graves 2011. The sum is the variational free energy.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from varify.module import VariationalModule
from varify.objective import Criterion, batch_size, scalar, unpack


@dataclass(frozen=True)
class DescriptionLength:
    """Bits to send the weights under the prior, getting those of the posterior's randomness back, and the data.

    Attributes:
        weights: KL/ln 2 by parameter name.
        data: of all labels given the inputs, expected under the posterior.
        num_data: how many.
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
    vnet: VariationalModule, loader: Iterable[Any], criterion: Criterion, *, n_samples: int = 16
) -> DescriptionLength:
    """The code length of weights and data.

    Args:
        vnet: in eval mode meanwhile.
        loader: of (inputs, targets), inputs as for `ELBO`: each datum once.
        criterion: `(output, targets)` to the mean negative log likelihood of a batch, nats.
        n_samples: draws of the weights that the expectation over the posterior is estimated with.

    Raises:
        ValueError: an empty loader, n_samples < 1, a criterion without a scalar.
    """
    if isinstance(n_samples, bool) or not isinstance(n_samples, int) or n_samples < 1:
        raise ValueError(f"n_samples={n_samples!r}: a whole number of draws, at least 1, is needed")
    nats, num_data = 0.0, 0
    with vnet.in_eval(), vnet.sampling():
        for inputs, targets in loader:
            args, kwargs = unpack(inputs)
            size = batch_size(targets, args, kwargs) or 1
            losses = [scalar(criterion(vnet(*args, **kwargs), targets)) for _ in range(n_samples)]
            nats += size * float(torch.stack(losses).mean())
            num_data += size
    if not num_data:
        raise ValueError("the loader is empty: there are no data to describe")
    weights = {name: float(kl) / math.log(2) for name, kl in vnet.kl_divergence().items()}
    return DescriptionLength(weights, nats / math.log(2), num_data)
