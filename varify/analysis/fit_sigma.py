"""Fit the sigmas of a trained network to the curvature of its loss: the diagonal Laplace approximation."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from varify.analysis import data_of_sigmas
from varify.analysis.batch import Batch
from varify.analysis.splitting import Batches
from varify.analysis.squares import CURVATURES, Squares, SquaresOfOne, sums_of_squares
from varify.analysis.tfb import harmless_temperature
from varify.errors import ArgumentError, PriorError, listed, one_of, positive_int, positive_number
from varify.module import VariationalModule
from varify.objective.elbo import Criterion
from varify.weights.posterior import GaussianPosterior, softplus_inverse
from varify.within import check_variational, means_of

# The default temperature is found on the first of the data, at most so many.
ANCHORS = 128


def fit_sigma(
    vnet: VariationalModule,
    loader: Iterable[Any],
    criterion: Criterion,
    *,
    num_data: int,
    curvature: str = "fisher",
    temperature: float | None = None,
    batched: object = None,
) -> None:
    r"""Set each sigma from the curvature of the loss at the means: a trained network becomes Bayesian without training.

    $1/\sigma^2 = N F + 1/\mathrm{var}_p$, with N = num_data, F the mean over the data of the diagonal of the
    empirical Fisher, $(\partial \mathrm{nll}_n/\partial w)^2$, or of the generalized Gauss-Newton matrix, and
    var_p the prior's variance: the diagonal Laplace approximation (MacKay 1992; Daxberger et al. 2021,
    arXiv:2106.14806). The means stay. One pass over the data, in eval mode.

    At temperature 1, the Laplace approximation itself, this is too wide for drawn weights of a network with many of
    them, whose predictions get worse than those of the means. So by default the temperature is the largest, at most 1,
    at which the NLL of drawn weights' predictions on the first data of the loader is at most 1 % or 0.005 nats above
    that of the means (after the rule of Shi et al. 2024, arXiv:2412.05723): 1 where the data determine the weights, and
    far less where they don't. These data know the network, so it is cautious; `fit_temperature` finds a better one on
    held-out data. For `vnet.predict(..., linearized=True)`, of whose linear network this is the posterior, take
    `temperature=1`.

    Args:
        vnet: changed in place. Masks of fixed weights stay.
        loader: of (inputs, targets), inputs as for `ELBO`.
        criterion: `(output, targets)` to a mean over the batch.
        num_data: size of the training set; the loader may have fewer data, as a sample of it.
        curvature: "fisher" takes one backward pass per datum; "ggn" one per output, and needs a network with one
            output tensor and a criterion that is convex in it.
        temperature: multiplies all variances; 1 for the Laplace approximation, None for the largest that does no harm.
        batched: which tensors have an entry for each datum in their first dimension: booleans in the structure of
            (inputs, targets), where one may stand for a whole part, such as `((True, False), True)` for
            `((x, mask), y)`. By default it is found by running the network on single data. Flattened targets have
            several adjacent entries for each datum.

    Raises:
        ArgumentError: an empty loader, more data than num_data, a criterion without a scalar or without finite
            derivatives, or, where the temperature is to be found, not finite at the means of the first data, an unknown
            curvature, a batch that isn't the first dimension, or tensors of which it is ambiguous whether they have an
            entry for each datum.
        PriorError: a prior has no variance.

    Warns:
        VarifyWarning: no temperature from 1e-6 on does no harm.
    """
    check_variational(vnet, "varify.fit_sigma")
    num_data = positive_int("num_data", num_data)
    if temperature is not None:
        temperature = positive_number("temperature", temperature)
    one_of("curvature", curvature, CURVATURES)
    posteriors = dict(vnet.posteriors)
    prior_var = {name: _prior_std(name, q).square() for name, q in posteriors.items()}
    squares, seen, first = _curvature(vnet, Batches(vnet, loader, criterion, batched), criterion, num_data, curvature)
    bad = [name for name, square in squares.items() if not square.isfinite().all()]
    if bad:
        raise ArgumentError(
            f"the loss's derivatives by {listed(bad)} are not finite: look for NaN in the loader's data"
        )
    with torch.no_grad():
        rhos = {}
        for name, q in posteriors.items():
            precision = num_data / seen * squares[name].to(q.rho.dtype) + 1 / prior_var[name]
            rhos[name] = softplus_inverse((temperature or 1.0) ** 0.5 * precision.rsqrt())
        fitted = {name: GaussianPosterior(q.mu, rhos[name], q.prior, q.fixed) for name, q in posteriors.items()}
        if temperature is None and (t := harmless_temperature(vnet, fitted, first, criterion)) != 1:
            fitted = {name: q.tempered(t) for name, q in fitted.items()}
        for name, q in posteriors.items():
            q.rho.copy_(fitted[name].rho)
    data_of_sigmas.remember(vnet, loader)


def _prior_std(name: str, q: GaussianPosterior) -> Tensor:
    std = q.prior.stddev()
    if std is None:
        raise PriorError(f"the prior of {name}, {q.prior!r}, has no variance; set one that has, such as a Gaussian")
    return torch.as_tensor(std, dtype=q.rho.dtype, device=q.rho.device).expand(q.rho.shape)


def _curvature(
    vnet: VariationalModule, batches: Batches, criterion: Criterion, num_data: int, curvature: str
) -> tuple[Squares, int, list[Batch]]:
    """The sum of squares over the data, by parameter, the number of data, and the first of them."""
    means = means_of(vnet)
    total = {n: torch.zeros_like(mu, dtype=torch.promote_types(mu.dtype, torch.float32)) for n, mu in means.items()}
    seen, squares_of = 0, SquaresOfOne(vnet, criterion, curvature)
    first: list[Batch] = []
    for batch in batches:
        if seen < ANCHORS:
            first.append(batch.first(ANCHORS - seen))
        seen += batch.size
        if seen > num_data:
            raise ArgumentError(f"num_data={num_data}, but the loader gave {seen} data already")
        for square in sums_of_squares(squares_of, means, batch):
            for name in total:
                total[name] += square[name]
    if not seen:
        raise ArgumentError("the loader is empty: there are no data to fit sigma to")
    return total, seen, first
