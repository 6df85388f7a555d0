"""Squared derivatives of the loss by the weights, datum by datum: the diagonal of the Fisher or of Gauss-Newton."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jacrev, vjp

from varify.analysis.batch import Batch, output_of
from varify.errors import ArgumentError
from varify.module import VariationalModule
from varify.objective.elbo import Criterion, loss_of
from varify.prediction.vectorizing import vectorized, watched

Weights = dict[str, Tensor]
Squares = dict[str, Tensor]
CURVATURES = ("fisher", "ggn")
# Data are vectorized in chunks whose gradients take at most this many bytes.
CHUNK_BYTES = 2**26


class SquaresOfOne:
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


def sums_of_squares(squares_of: SquaresOfOne, means: Weights, batch: Batch) -> Iterator[Squares]:
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
