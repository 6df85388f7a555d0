"""The negative log likelihood of what all draws predict together, at any scale of the posteriors' variances."""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from varify.analysis.batch import Batch, output_of
from varify.errors import ArgumentError
from varify.module import VariationalModule
from varify.objective.elbo import Criterion, loss_of
from varify.posteriors import cuda_devices
from varify.prediction.linearizing import Linearized
from varify.prediction.vectorizing import vectorized, watched
from varify.weights.draw import draw, seeded
from varify.weights.posterior import GaussianPosterior
from varify.within import means_of


class PredictiveNLL:
    """The NLL of the predictive, mean over the data, nats, as a function of the temperature; 0 is that of the means.

    Args:
        vnet: without variational modules within.
        posteriors: at temperature 1, by name: those of vnet, or others for it.
        batches: makes the data, which are traversed for each temperature. It is called once, with the noise kept, for a
            loader may draw a number of its own.
        criterion: see `fit_temperature`, as are `n_samples` and `linearized`.
        n_samples: likewise.
        linearized: likewise.
    """

    def __init__(
        self,
        vnet: VariationalModule,
        posteriors: Mapping[str, GaussianPosterior],
        batches: Callable[[], Iterable[Batch]],
        criterion: Criterion,
        n_samples: int,
        linearized: bool,
    ) -> None:
        self._seed, self._devices = int(torch.randint(2**62, ())), cuda_devices(vnet.posteriors)
        self._vnet, self._posteriors, self._criterion, self._n_samples = vnet, posteriors, criterion, n_samples
        self._means = means_of(vnet)
        self._linearized = linearized
        with self.kept_noise():
            self._batches = batches()
        self._vectorizes: bool | None = None

    def kept_noise(self) -> AbstractContextManager[None]:
        """Within, torch's random numbers are the same every time; afterwards, its generators are as they were."""
        return seeded(self._seed, self._devices)

    def __call__(self, t: float) -> float:
        """The NLL with t times the variances.

        Raises:
            ArgumentError: an empty loader, a criterion without a scalar, or data that can't be told apart.
        """
        posteriors = {name: q.tempered(t) for name, q in self._posteriors.items()} if t else {}
        if isinstance(self._batches, list):  # in memory, so that a draw serves all
            groups: Iterable[list[Batch]] = [self._batches] if self._batches else []
        else:
            groups = ([batch] for batch in self._batches)
        total, seen = 0.0, 0
        for group in groups:
            with self.kept_noise():
                thetas = (draw(posteriors) for _ in range(self._n_samples)) if t else [self._means]
                nlls = torch.stack([torch.cat([self._of_data(theta, batch) for batch in group]) for theta in thetas])
            # a mean of probabilities near 1 needs the digits for its logarithm
            log_p = torch.logsumexp(-nlls.double(), 0) - math.log(len(nlls))
            total -= float(log_p.sum())
            seen += nlls.shape[1]
        if not seen:
            raise ArgumentError("the loader is empty: there are no data to fit the temperature to")
        return total / seen

    def _of_data(self, theta: dict[str, Tensor], batch: Batch) -> Tensor:
        """Nll of each datum, `(size,)`: vectorized where the operations allow it, else one datum at a time."""
        if self._vectorizes is None:
            _, keeps = watched(lambda theta: self._of_one(theta, batch.datum(0)), theta)
            self._vectorizes = not keeps
        if self._vectorizes and batch.size > 1:
            dims = tuple(0 if n else None for n in batch.entries)
            try:
                found: Tensor = vectorized(lambda *row: self._of_one(theta, batch.of(row)), dims)(*batch.columns())
                return found
            except Exception:  # no batching rule; an error of the user's own comes again below
                self._vectorizes = False
        return torch.stack([self._of_one(theta, batch.datum(i)) for i in range(batch.size)])

    def _of_one(self, theta: dict[str, Tensor], one: Any) -> Tensor:
        args, kwargs, targets = one
        views = self._vnet.engine.isolated

        def run(theta: dict[str, Tensor]) -> Any:
            return views.run(lambda network: output_of(network, args, kwargs), theta, training=False, buffers={})

        output = Linearized(run, self._means)(theta) if self._linearized else run(theta)
        return loss_of(self._criterion, output, targets)
