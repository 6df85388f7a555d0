"""Which rows of each operation belong to one example, found by replaying a record with one example changed."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from varify.graph.recording import is_dense
from varify.weights.moments import Examples

_DROPOUTS = frozenset({"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"})
_BATCH_NORMS = (nn.functional.batch_norm, torch.batch_norm)


def count_of(inputs: Mapping[str, Tensor], batch_dim: int) -> int | None:
    """The number of examples in a call: the size of `batch_dim` in the first tensor that has it; None if none has."""
    return next((t.shape[batch_dim] for t in inputs.values() if is_dense(t) and t.dim() > batch_dim), None)


@torch.no_grad()
def find_examples(
    graph: fx.Graph,
    attributes: Mapping[str, Any],
    inputs: Mapping[str, Tensor],
    nodes: list[fx.Node],
    batch_dim: int,
) -> dict[fx.Node, Examples | None]:
    """The examples of operations in a record; None where rows depend on several examples.

    The record is replayed twice with the same random numbers, the second time with one example changed: the rows that
    differ are that example's. In both, batch normalization uses the statistics of the first replay and dropout drops
    nothing, so that a row depends on its own example alone.

    Args:
        graph: of `Recording`.
        attributes: values of the get_attr nodes, by name.
        inputs: by placeholder.
        nodes: the operations.
        batch_dim: the dimension of the inputs that counts examples.
    """
    count = count_of(inputs, batch_dim)
    if count is None:
        return dict.fromkeys(nodes)
    if count == 1:
        return dict.fromkeys(nodes, Examples())
    # Not 0: where an example has several rows, row 0 is example 0's whether its rows are adjacent or `count` apart.
    # Row 1 tells: it is example 0's in the first order and example 1's in the second.
    which = 1
    try:
        changed = _with_one_changed(inputs, batch_dim, count, which)
        statistics: dict[fx.Node, tuple[Tensor, Tensor]] = {}
        before, after = (_Rows(graph, attributes, set(nodes), statistics).rows(x) for x in (inputs, changed))
    except Exception:  # inputs that cannot be changed, or an operation that cannot be replayed: no fault of the user's
        return dict.fromkeys(nodes)
    return {node: _of_rows(before.get(node), after.get(node), count, which) for node in nodes}


def _with_one_changed(inputs: Mapping[str, Tensor], batch_dim: int, count: int, which: int) -> dict[str, Tensor]:
    changed = {}
    generator = torch.Generator().manual_seed(0)
    for name, tensor in inputs.items():
        if not is_dense(tensor) or tensor.dim() <= batch_dim or tensor.shape[batch_dim] != count or not tensor.numel():
            changed[name] = tensor
            continue
        new = tensor.detach().clone()
        part = new.select(batch_dim, which)
        if new.is_floating_point() or new.is_complex():
            noise = torch.rand(part.shape, generator=generator).to(part) + 0.5
            part.add_(noise * new.abs().mean().clamp_min(1e-3))
        else:  # by other values of the same tensor, since only these are known to be valid, as indices into a table are
            values = new.flatten()
            other = values[torch.randint(len(values), part.shape, generator=generator).to(values.device)]
            part.copy_(
                torch.where(other == part, values.max() + values.min() - part, other)
                if part.dtype != torch.bool
                else other
            )
        changed[name] = new
    return changed


class _Rows(fx.Interpreter):
    """Replays a record on copies of its tensors and saves the outputs of some operations."""

    def __init__(
        self,
        graph: fx.Graph,
        attributes: Mapping[str, Any],
        nodes: set[fx.Node],
        statistics: dict[fx.Node, tuple[Tensor, Tensor]],
    ) -> None:
        super().__init__(nn.Module(), graph=graph)
        self._statistics, self._node = statistics, next(iter(graph.nodes))
        self._attributes = {name: _copied(value) for name, value in attributes.items()}
        self._nodes = nodes
        self._outputs: dict[fx.Node, Tensor] = {}

    def rows(self, inputs: Mapping[str, Tensor]) -> dict[fx.Node, Tensor]:
        """Outputs by operation, of those that the replay reaches."""
        devices = {t.device.index for t in inputs.values() if t.is_cuda}
        with torch.random.fork_rng(sorted(devices)), contextlib.suppress(Exception):
            torch.manual_seed(0)
            # It may fail half-way, since lengths in the record were decided by the recorded data.
            self.run(*(t.clone() for t in inputs.values()))
        return self._outputs

    def fetch_attr(self, target: str) -> Any:
        return self._attributes[target]

    def call_function(self, target: Callable[..., Any] | str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if getattr(target, "__name__", "") in _DROPOUTS:  # a row that is dropped would not show a change
            return args[0] if args else kwargs["input"]
        if target in _BATCH_NORMS:
            return self._normalized(target, args, kwargs)
        if getattr(target, "__name__", "") == "set_ambience":
            args = (False, *args[1:])  # no gradients are needed
        return super().call_function(target, args, kwargs)

    def _normalized(self, target: Callable[..., Any] | str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Batch normalization by the statistics of the first replay; with its own, each row would depend on all."""
        names = ["input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"]
        if target is torch.batch_norm:
            names = ["input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"]
        arguments = dict(zip(names, args, strict=False)) | kwargs
        x = arguments["input"]
        if not arguments.get("training", False):
            return nn.functional.batch_norm(**{name: value for name, value in arguments.items() if name in names})
        if self._node not in self._statistics:
            rows = x.detach().float().movedim(1, 0).flatten(1)
            self._statistics[self._node] = rows.mean(1).to(x.dtype), rows.var(1, correction=0).to(x.dtype)
        return nn.functional.batch_norm(
            x,
            *self._statistics[self._node],
            arguments.get("weight"),
            arguments.get("bias"),
            eps=arguments.get("eps", 1e-5),
        )

    def run_node(self, n: fx.Node) -> Any:
        """Run a node and save its output if it is one of `nodes`."""
        self._node = n
        result = super().run_node(n)
        if n in self._nodes and isinstance(result, Tensor):
            self._outputs[n] = result.detach().clone()
        return result


def _copied(value: object) -> Any:
    """A copy of what the replay may write into: a tensor, or the state of a random generator."""
    if isinstance(value, torch.Generator):
        return value.clone_state()
    return value.detach().clone() if isinstance(value, Tensor) else value


def _of_rows(before: Tensor | None, after: Tensor | None, count: int, which: int) -> Examples | None:
    """The examples of an operation, from its outputs before and after example `which` was changed."""
    if before is None or after is None or not is_dense(before) or before.shape != after.shape:
        return None
    differs = ~torch.isclose(before, after, rtol=0.0, atol=0.0, equal_nan=True)
    if not differs.any():
        return Examples(count)
    per_dim = (_along(differs, dim, count, which) for dim in range(before.dim()))
    return next((examples for examples in per_dim if examples is not None), None)


def _along(differs: Tensor, dim: int, count: int, which: int) -> Examples | None:
    """The examples if `dim` counts them, that is if only rows of example `which` differ along it; else None."""
    size = differs.shape[dim]
    if size % count:
        return None
    rows = differs.movedim(dim, 0).reshape(size, -1).any(1).nonzero().flatten()
    if (rows // (size // count) == which).all():
        return Examples(count, dim)
    if (rows % count == which).all():
        return Examples(count, dim, minor=True)
    return None
