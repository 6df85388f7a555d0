"""Posteriors and priors from data or from the means alone, without gradient descent."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jacrev, vjp

from varify.analysis.batch import Batch
from varify.analysis.splitting import Splitter
from varify.errors import ArgumentError, PriorError, one_of, positive_int, positive_number
from varify.module import VariationalModule
from varify.objective.elbo import Criterion, scalar
from varify.prediction.vectorizing import vectorized, watched
from varify.weights.posterior import GaussianPosterior, softplus_inverse

Weights = dict[str, Tensor]
Squares = dict[str, Tensor]
CURVATURES = ("fisher", "ggn")
# Gradients of as many data at once as fit in this much memory.
BYTES_AT_ONCE = 2**26


def fit_sigma(
    vnet: VariationalModule,
    loader: Iterable[Any],
    criterion: Criterion,
    *,
    num_data: int,
    curvature: str = "fisher",
    temperature: float = 1.0,
    batched: Any = None,
) -> None:
    r"""Set each sigma from the curvature of the loss at the means: a checkpoint becomes a Bayesian network untrained.

    $1/\sigma^2 = N F + 1/\mathrm{var}_p$, with N = num_data, F the mean over the data of the diagonal of the
    empirical Fisher, $(\partial \mathrm{nll}_n/\partial w)^2$, or of the generalised Gauss-Newton matrix, and
    var_p the prior's variance: the diagonal Laplace approximation (MacKay 1992; Daxberger et al. 2021,
    arXiv:2106.14806). The means stay. One pass over the data, in eval mode.

    Args:
        vnet: its parameters with a mask of fixed weights keep that.
        loader: of (inputs, targets), inputs as for `ELBO`.
        criterion: `(output, targets)` to a mean over the batch.
        num_data: size of the training set; the loader may give fewer data, which then stand for all.
        curvature: "fisher" takes one backward pass per datum; "ggn" one per output, and needs a network with one
            output tensor and a criterion that is convex in it.
        temperature: multiplies all variances; below 1 the posterior is colder.
        batched: which tensors have an entry for each datum in their first dimension: booleans in the structure of
            (inputs, targets), one for a whole part if it is alike, such as `((True, False), True)` for
            `((x, mask), y)`. Found out by default, by running the network on single data. Flattened targets have
            several entries for each datum, one after another.

    Raises:
        ArgumentError: an empty loader, more data than num_data, a criterion without a scalar, an unknown curvature, or
            tensors of which it is unknown whether they have an entry for each datum.
        PriorError: a prior has no variance.
    """
    num_data = positive_int("num_data", num_data)
    temperature = positive_number("temperature", temperature)
    one_of("curvature", curvature, CURVATURES)
    posteriors = dict(vnet.posteriors)
    prior_var = {name: _prior_std(name, q).square() for name, q in posteriors.items()}
    splitter = Splitter(vnet, loader, criterion, batched)
    squares, seen = _curvature(vnet, loader, criterion, num_data, curvature, splitter)
    with torch.no_grad():
        for name, q in posteriors.items():
            precision = num_data / seen * squares[name].to(q.rho.dtype) + 1 / prior_var[name]
            q.rho.copy_(softplus_inverse((temperature / precision).sqrt()))


def _prior_std(name: str, q: GaussianPosterior) -> Tensor:
    std = q.prior.weight_std()
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
    """Sum over the data of the squares, by parameter, and how many data there were."""
    # not mu itself, which momentum may have moved where a weight is pruned
    means = {name: q.mean.detach().to(q.mu.dtype) for name, q in vnet.posteriors.items()}
    total = {n: torch.zeros_like(mu, dtype=torch.promote_types(mu.dtype, torch.float32)) for n, mu in means.items()}
    seen, of_one = 0, _OfOne(vnet, criterion, curvature)
    for inputs, targets in loader:
        batch = splitter.split(inputs, targets)
        if not batch.size:
            continue
        seen += batch.size
        if seen > num_data:
            raise ArgumentError(f"num_data={num_data}, but the loader gave {seen} data already")
        for square in _over_data(of_one, means, batch):
            for name in total:
                total[name] += square[name]
    if not seen:
        raise ArgumentError("the loader is empty: there are no data to fit sigma to")
    return total, seen


class _OfOne:
    """From weights and a batch of one, (args, kwargs, targets), to the squares by parameter."""

    def __init__(self, vnet: VariationalModule, criterion: Criterion, curvature: str) -> None:
        self._engine, self._criterion = vnet.engine, criterion
        self._fisher = curvature == "fisher"
        self._keeps: bool | None = None

    def keeps(self, theta: Weights, one: Any) -> bool:
        """Whether the network keeps tensors of a call, in a list or by a hook; those of a transform are of no use."""
        if self._keeps is None:
            _, self._keeps = watched(lambda theta: self._output(theta, one), theta)
        return self._keeps

    def transformed(self, theta: Weights, one: Any) -> Squares:
        """By torch.func, such that it can be vectorized."""
        if self._fisher:
            gradients = grad(lambda w: self._loss(self._output(w, one), one))(theta)
            return {name: g.square() for name, g in gradients.items()}
        found, pull_back = vjp(lambda w: self._output(w, one), theta)  # type: ignore[misc]
        (columns,) = torch.func.vmap(pull_back)(self._roots(found, one))
        return {name: c.square().sum(0) for name, c in columns.items()}

    @torch.enable_grad()
    def alone(self, theta: Weights, one: Any) -> Squares:
        """The same by torch.autograd, which takes every network that trains."""
        leaves = {name: t.detach().requires_grad_() for name, t in theta.items()}
        found = self._output(leaves, one)
        found = self._loss(found, one) if self._fisher else found
        squares = {name: torch.zeros_like(t) for name, t in theta.items()}
        roots = torch.ones((1,)).to(found) if self._fisher else self._roots(found, one)
        for root in roots if found.requires_grad else ():
            gradients = torch.autograd.grad(
                found, list(leaves.values()), root, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            squares = {name: squares[name] + g.square() for name, g in zip(leaves, gradients, strict=True)}
        return squares

    def _output(self, theta: Weights, one: Any) -> Any:
        args, kwargs, _ = one
        return self._engine.call_with(theta, args, kwargs, training=False)

    def _loss(self, found: Any, one: Any) -> Tensor:
        return scalar(self._criterion(found, one[2]))

    def _roots(self, found: Any, one: Any) -> Tensor:
        """The columns of L, with H = L Lᵀ the Hessian of the loss, so that diag(Jᵀ H J) sums squares of Jᵀ L's rows."""
        if not isinstance(found, Tensor):
            raise ArgumentError(f"curvature='ggn' needs a network with one output tensor, not a {type(found).__name__}")
        second = jacrev(jacrev(lambda y: self._loss(y, one)))(found.detach())
        values, vectors = torch.linalg.eigh(second.reshape(found.numel(), found.numel()))
        roots: Tensor = (vectors * values.clamp_min(0).sqrt()).T.reshape(-1, *found.shape)
        return roots


def _over_data(of_one: _OfOne, means: Weights, batch: Batch) -> Iterator[Squares]:
    """Sums over parts of the batch: vectorized where the operations allow it, else one datum at a time."""
    if batch.size == 1 or of_one.keeps(means, batch.datum(0)):
        for i in range(batch.size):
            yield of_one.alone(means, batch.datum(i))
        return
    columns, dims = batch.columns(), [0 if n else None for n in batch.entries]

    def of_row(*row: Any) -> Squares:
        return of_one.transformed(means, batch.of(row))

    chunk = max(1, BYTES_AT_ONCE // max(1, sum(4 * mu.numel() for mu in means.values())))
    for start in range(0, batch.size, chunk):
        rows = [x[start : start + chunk] if dim == 0 else x for x, dim in zip(columns, dims, strict=True)]
        try:
            squares = vectorized(of_row, tuple(dims))(*rows)
            yield {name: square.sum(0) for name, square in squares.items()}
        except Exception:  # no batching rule; an error of the user's own comes again below
            for i in range(start, min(start + chunk, batch.size)):
                yield of_one.alone(means, batch.datum(i))
