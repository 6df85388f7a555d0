"""Fit the sigmas of a trained network to the curvature of its loss: the diagonal Laplace approximation."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jacrev, vjp

from varify.analysis import data_of_sigmas
from varify.analysis.batch import Batch, output_of
from varify.analysis.splitting import Splitter
from varify.errors import ArgumentError, PriorError, listed, one_of, positive_int, positive_number
from varify.module import VariationalModule
from varify.objective.elbo import Criterion, loss_of
from varify.prediction.vectorizing import vectorized, watched
from varify.weights.posterior import GaussianPosterior, softplus_inverse
from varify.within import check_variational, means_of

Weights = dict[str, Tensor]
Squares = dict[str, Tensor]
CURVATURES = ("fisher", "ggn")
# Data are vectorized in chunks whose gradients take at most this many bytes.
CHUNK_BYTES = 2**26


def fit_sigma(
    vnet: VariationalModule,
    loader: Iterable[Any],
    criterion: Criterion,
    *,
    num_data: int,
    curvature: str = "fisher",
    temperature: float = 1.0,
    batched: object = None,
) -> None:
    r"""Set each sigma from the curvature of the loss at the means: a trained network becomes Bayesian without training.

    $1/\sigma^2 = N F + 1/\mathrm{var}_p$, with N = num_data, F the mean over the data of the diagonal of the
    empirical Fisher, $(\partial \mathrm{nll}_n/\partial w)^2$, or of the generalized Gauss-Newton matrix, and
    var_p the prior's variance: the diagonal Laplace approximation (MacKay 1992; Daxberger et al. 2021,
    arXiv:2106.14806). The means stay. One pass over the data, in eval mode.

    At temperature 1 this is too wide for drawn weights of a network with many of them, whose predictions get worse than
    those of the means. Two ways out: `vnet.predict(..., linearized=True)`, of whose linear network it is the posterior,
    and `fit_temperature` on held-out data.

    Args:
        vnet: changed in place. Masks of fixed weights stay.
        loader: of (inputs, targets), inputs as for `ELBO`.
        criterion: `(output, targets)` to a mean over the batch.
        num_data: size of the training set; the loader may have fewer data, as a sample of it.
        curvature: "fisher" takes one backward pass per datum; "ggn" one per output, and needs a network with one
            output tensor and a criterion that is convex in it.
        temperature: multiplies all variances; below 1 the posterior is colder. `fit_temperature` finds it.
        batched: which tensors have an entry for each datum in their first dimension: booleans in the structure of
            (inputs, targets), where one may stand for a whole part, such as `((True, False), True)` for
            `((x, mask), y)`. By default it is found by running the network on single data. Flattened targets have
            several adjacent entries for each datum.

    Raises:
        ArgumentError: an empty loader, more data than num_data, a criterion without a scalar or without finite
            derivatives, an unknown curvature, a batch that isn't the first dimension, or tensors of which it
            is ambiguous whether they have an entry for each datum.
        PriorError: a prior has no variance.
    """
    check_variational(vnet, "varify.fit_sigma")
    num_data = positive_int("num_data", num_data)
    temperature = positive_number("temperature", temperature)
    one_of("curvature", curvature, CURVATURES)
    posteriors = dict(vnet.posteriors)
    prior_var = {name: _prior_std(name, q).square() for name, q in posteriors.items()}
    splitter = Splitter(vnet, loader, criterion, batched)
    squares, seen = _curvature(vnet, loader, criterion, num_data, curvature, splitter)
    bad = [name for name, square in squares.items() if not square.isfinite().all()]
    if bad:
        raise ArgumentError(
            f"the loss's derivatives by {listed(bad)} are not finite: look for NaN in the loader's data"
        )
    with torch.no_grad():
        for name, q in posteriors.items():
            precision = num_data / seen * squares[name].to(q.rho.dtype) + 1 / prior_var[name]
            q.rho.copy_(softplus_inverse((temperature / precision).sqrt()))
    data_of_sigmas.remember(vnet, loader)


def _prior_std(name: str, q: GaussianPosterior) -> Tensor:
    std = q.prior.stddev()
    if std is None:
        raise PriorError(f"the prior of {name}, {q.prior!r}, has no variance; set one that has, such as a Gaussian")
    return torch.as_tensor(std, dtype=q.rho.dtype, device=q.rho.device).expand(q.rho.shape)


def _curvature(
    vnet: VariationalModule,
    loader: Iterable[Any],
    criterion: Criterion,
    num_data: int,
    curvature: str,
    splitter: Splitter,
) -> tuple[Squares, int]:
    """The sum of squares over the data, by parameter, and the number of data."""
    means = means_of(vnet)
    total = {n: torch.zeros_like(mu, dtype=torch.promote_types(mu.dtype, torch.float32)) for n, mu in means.items()}
    seen, squares_of = 0, _Squares(vnet, criterion, curvature)
    for inputs, targets in loader:
        batch = splitter.split(inputs, targets)
        if not batch.size:
            continue
        seen += batch.size
        if seen > num_data:
            raise ArgumentError(f"num_data={num_data}, but the loader gave {seen} data already")
        for square in _over_data(squares_of, means, batch):
            for name in total:
                total[name] += square[name]
    if not seen:
        raise ArgumentError("the loader is empty: there are no data to fit sigma to")
    return total, seen


class _Squares:
    """Squared derivatives by parameter, from weights and a batch of one datum: (args, kwargs, targets)."""

    def __init__(self, vnet: VariationalModule, criterion: Criterion, curvature: str) -> None:
        self._engine, self._criterion = vnet.engine, criterion
        self._fisher = curvature == "fisher"
        self._keeps: bool | None = None

    def keeps(self, theta: Weights, one: object) -> bool:
        """Whether the network stores tensors of a call, by a hook for example; those of a transform are invalid."""
        if self._keeps is None:
            _, self._keeps = watched(lambda theta: self._output(theta, one), theta)
        return self._keeps

    @torch.no_grad()  # beyond the transform's own: deterministic parameters learn, and sums would keep every graph
    def transformed(self, theta: Weights, one: object) -> Squares:
        """The squares by torch.func, which can be vectorized."""
        if self._fisher:
            gradients = grad(lambda w: self._loss(self._output(w, one), one))(theta)
            return {name: g.square() for name, g in gradients.items()}
        output, pull_back = vjp(lambda w: self._output(w, one), theta)  # type: ignore[misc]
        (columns,) = torch.func.vmap(pull_back)(self._roots(output, one))
        return {name: c.square().sum(0) for name, c in columns.items()}

    @torch.enable_grad()
    def alone(self, theta: Weights, one: object) -> Squares:
        """The squares by torch.autograd, which works for every network that trains."""
        leaves = {name: t.detach().requires_grad_() for name, t in theta.items()}
        output = self._output(leaves, one)
        value = self._loss(output, one) if self._fisher else output
        squares = {name: torch.zeros_like(t) for name, t in theta.items()}
        roots = torch.ones((1,)).to(value) if self._fisher else self._roots(output, one)
        for root in roots if value.requires_grad else ():
            gradients = torch.autograd.grad(
                value, list(leaves.values()), root, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            squares = {name: squares[name] + g.square() for name, g in zip(leaves, gradients, strict=True)}
        return squares

    def _output(self, theta: Weights, one: Any) -> Any:
        args, kwargs, _ = one
        views = self._engine.isolated
        return views.run(lambda network: output_of(network, args, kwargs), theta, training=False, buffers={})

    def _loss(self, output: Any, one: Any) -> Tensor:
        return loss_of(self._criterion, output, one[2])

    def _roots(self, output: object, one: object) -> Tensor:
        """The columns of L, with H = L Lᵀ the Hessian of the loss, so that diag(Jᵀ H J) sums squares of Jᵀ L's rows."""
        if not isinstance(output, Tensor):
            kind = type(output).__name__
            raise ArgumentError(f"curvature='ggn' needs a network with one output tensor, got a {kind}; take 'fisher'")
        second = jacrev(jacrev(lambda y: self._loss(y, one)))(output.detach())
        size = output.numel()
        # eigh has no half precision
        wide = second.reshape(size, size).to(torch.promote_types(output.dtype, torch.float32))
        values, vectors = torch.linalg.eigh(wide)
        roots: Tensor = (vectors * values.clamp_min(0).sqrt()).T.reshape(-1, *output.shape).to(output.dtype)
        return roots


def _over_data(squares_of: _Squares, means: Weights, batch: Batch) -> Iterator[Squares]:
    """Sums of squares over parts of the batch: vectorized where the operations allow it, else datum by datum."""
    if batch.size == 1 or squares_of.keeps(means, batch.datum(0)):
        for i in range(batch.size):
            yield squares_of.alone(means, batch.datum(i))
        return
    columns, dims = batch.columns(), [0 if n else None for n in batch.entries]

    def of_row(*row: object) -> Squares:
        return squares_of.transformed(means, batch.of(row))

    chunk = max(1, CHUNK_BYTES // max(1, sum(4 * mu.numel() for mu in means.values())))
    for start in range(0, batch.size, chunk):
        rows = [x[start : start + chunk] if dim == 0 else x for x, dim in zip(columns, dims, strict=True)]
        try:
            squares = vectorized(of_row, tuple(dims))(*rows)
            yield {name: square.sum(0) for name, square in squares.items()}
        except Exception:  # no batching rule, or an error of the user's, which is raised again below
            for i in range(start, min(start + chunk, batch.size)):
                yield squares_of.alone(means, batch.datum(i))
