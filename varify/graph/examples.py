"""Who is an example: which rows of each operation belong to one, found by running a record with one changed."""

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from varify.graph.recording import is_dense
from varify.weights.moments import Examples

_DROPOUTS = frozenset({"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"})
_BATCH_NORMS = (nn.functional.batch_norm, torch.batch_norm)


def count_of(inputs: Mapping[str, Tensor], batch_dim: int) -> int | None:
    """Number of examples of a call: the size of `batch_dim` of the first tensor that has it; None if none has."""
    return next((t.shape[batch_dim] for t in inputs.values() if is_dense(t) and t.dim() > batch_dim), None)


@torch.no_grad()
def find_examples(
    graph: fx.Graph,
    attributes: Mapping[str, Any],
    inputs: Mapping[str, Tensor],
    nodes: list[fx.Node],
    batch_dim: int,
) -> dict[fx.Node, Examples | None]:
    """The examples of each of `nodes`, operations of a record; None where rows depend on several.

    The record runs twice with the same random numbers, the second time with one example changed. Batch normalization
    takes the statistics of the first run in both, and dropout drops nothing: rows depend on their example alone then.

    Args:
        graph: of `Recording`.
        attributes: by name, what its get_attr nodes stand for.
        inputs: by placeholder.
        nodes: those asked for.
        batch_dim: the dimension of the inputs that counts examples.
    """
    count = count_of(inputs, batch_dim)
    if count is None:
        return dict.fromkeys(nodes)
    if count == 1:
        return dict.fromkeys(nodes, Examples())
    which = 1  # not 0, whose rows come first however the others follow
    try:
        changed = _with_one_changed(inputs, batch_dim, count, which)
        statistics: dict[fx.Node, tuple[Tensor, Tensor]] = {}
        before, after = (_Rows(graph, attributes, set(nodes), statistics).rows(x) for x in (inputs, changed))
    except Exception:  # of a type that can't be changed, or with an operation that can't run twice: the call itself ran
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
        else:  # others of its own values, since only these are known to be allowed
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
    """Runs a record on copies of what it holds, and keeps the outputs of some operations."""

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
        self._kept: dict[fx.Node, Tensor] = {}

    def rows(self, inputs: Mapping[str, Tensor]) -> dict[fx.Node, Tensor]:
        """Outputs by operation, of those that it comes to."""
        devices = {t.device.index for t in inputs.values() if t.is_cuda}
        with torch.random.fork_rng(sorted(devices)), contextlib.suppress(Exception):
            torch.manual_seed(0)
            self.run(*(t.clone() for t in inputs.values()))  # may end early: data decided of lengths in the record
        return self._kept

    def fetch_attr(self, target: str) -> Any:
        return self._attributes[target]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if getattr(target, "__name__", "") in _DROPOUTS:  # which would hide rows
            return args[0] if args else kwargs["input"]
        if target in _BATCH_NORMS:
            return self._normalized(target, args, kwargs)
        if getattr(target, "__name__", "") == "set_ambience":
            args = (False, *args[1:])
        return super().call_function(target, args, kwargs)

    def _normalized(self, target: Any, args: Any, kwargs: Any) -> Tensor:
        """Batch normalization by the statistics of the first run, else each row would depend on all."""
        names = ["input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"]
        if target is torch.batch_norm:
            names = ["input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"]
        given = dict(zip(names, args, strict=False)) | kwargs
        x = given["input"]
        if not given.get("training", False):
            return nn.functional.batch_norm(**{name: value for name, value in given.items() if name in names})
        if self._node not in self._statistics:
            rows = x.detach().float().movedim(1, 0).flatten(1)
            self._statistics[self._node] = rows.mean(1).to(x.dtype), rows.var(1, correction=0).to(x.dtype)
        return nn.functional.batch_norm(
            x, *self._statistics[self._node], given.get("weight"), given.get("bias"), eps=given.get("eps", 1e-5)
        )

    def run_node(self, n: fx.Node) -> Any:
        """Run it, and keep its output if it is asked for."""
        self._node = n
        result = super().run_node(n)
        if n in self._nodes and isinstance(result, Tensor):
            self._kept[n] = result.detach().clone()
        return result


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return value.clone_state()
    return value.detach().clone() if isinstance(value, Tensor) else value  # which the record may write into


def _of_rows(before: Tensor | None, after: Tensor | None, count: int, which: int) -> Examples | None:
    """From an operation's output before and after one example changed."""
    if before is None or after is None or not is_dense(before) or before.shape != after.shape:
        return None
    differs = ~torch.isclose(before, after, rtol=0.0, atol=0.0, equal_nan=True)
    if not differs.any():
        return Examples(count)
    found = [made for dim in range(before.dim()) if (made := _along(differs, dim, count, which)) is not None]
    return found[0] if found else None


def _along(differs: Tensor, dim: int, count: int, which: int) -> Examples | None:
    size = differs.shape[dim]
    if size % count:
        return None
    rows = differs.movedim(dim, 0).flatten(1).any(1).nonzero().flatten()
    if (rows // (size // count) == which).all():
        return Examples(count, dim)
    if (rows % count == which).all():
        return Examples(count, dim, minor=True)
    return None
