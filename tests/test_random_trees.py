"""Random trees of modules, which nobody thought of, equal themselves when they are made variational."""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.zoo.checks import Record, examine_as
from tests.zoo.entries import Entry, floats
from varify import variationalize

D = 4  # every module maps (batch, D) to (batch, D), and takes an optional scale


class Part(nn.Module):
    """Some parts, and what is done with them: `kind` names a way in `WAYS`."""

    def __init__(self, kind: str, *parts: nn.Module) -> None:
        super().__init__()
        self.kind, self.parts = kind, nn.ModuleList(parts)
        self.raw = nn.Parameter(floats(D, D) / D) if kind == "raw" else None
        self.register_buffer("seen", torch.zeros(D))

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        return WAYS[self.kind](self, x, scale)


def _in_turn(m: Any, x: Tensor, scale: float | None) -> Tensor:
    for part in m.parts:
        x = part(x, scale=scale)
    return x


def _sum(m: Any, x: Tensor, scale: float | None) -> Tensor:
    return x + sum(part(x) for part in m.parts)


def _twice(m: Any, x: Tensor, scale: float | None) -> Tensor:
    return m.parts[0](torch.tanh(m.parts[0](x, scale)), scale=scale)


def _scaled(m: Any, x: Tensor, scale: float | None) -> Tensor:
    y = m.parts[-1](x, scale)
    return y if scale is None else y * scale


def _by_value(m: Any, x: Tensor, scale: float | None) -> Tensor:
    return m.parts[0 if x.sum() > 0 else -1](x, scale)


def _by_length(m: Any, x: Tensor, scale: float | None) -> Tensor:
    return m.parts[len(x) % len(m.parts)](x, scale)


def _checkpointed(m: Any, x: Tensor, scale: float | None) -> Tensor:
    return checkpoint(m.parts[0], x, scale, use_reentrant=False)


def _partly_without_gradient(m: Any, x: Tensor, scale: float | None) -> Tensor:
    with torch.no_grad():
        shift = m.parts[0](x, scale)
    return m.parts[-1](x, scale) + shift


def _counting(m: Any, x: Tensor, scale: float | None) -> Tensor:
    m.seen += x.detach().mean(0)
    return m.parts[0](x, scale) + m.seen


def _raw(m: Any, x: Tensor, scale: float | None) -> Tensor:
    return F.dropout(x @ m.raw, 0.2, m.training) + F.linear(x, m.raw)


def _in_a_dict(m: Any, x: Tensor, scale: float | None) -> Tensor:
    kept = {str(i): part(x, scale) for i, part in enumerate(m.parts)}
    return torch.stack(list(kept.values())).mean(0)


WAYS = {
    "in turn": _in_turn,
    "sum": _sum,
    "twice": _twice,
    "scaled": _scaled,
    "by value": _by_value,
    "by length": _by_length,
    "checkpointed": _checkpointed,
    "partly without gradient": _partly_without_gradient,
    "counting": _counting,
    "raw": _raw,
    "in a dict": _in_a_dict,
}


class Layer(nn.Module):
    """A layer of torch's between the shapes of this test."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layer = kind, LAYERS[kind]()

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        if self.kind in ("gru", "lstm"):
            return self.layer(x)[0]
        if self.kind == "attention":
            return self.layer(x, x, x, need_weights=False)[0]
        if self.kind == "convolution":
            return self.layer(x.unsqueeze(1)).mean(1)
        if self.kind == "bilinear":
            return self.layer(x, x)
        if self.kind == "embedding":
            return self.layer(x.argmax(1)) + x
        return self.layer(x)


LAYERS = {
    "linear": lambda: nn.Linear(D, D),
    "linear without bias": lambda: nn.Linear(D, D, bias=False),
    "bilinear": lambda: nn.Bilinear(D, D, D),
    "layer norm": lambda: nn.LayerNorm(D),
    "batch norm": lambda: nn.BatchNorm1d(D),
    "prelu": lambda: nn.PReLU(D),
    "tanh": nn.Tanh,
    "dropout": lambda: nn.Dropout(0.3),
    "inplace": lambda: nn.Sequential(nn.Linear(D, D), nn.ReLU(inplace=True), nn.Linear(D, D)),
    "gru": lambda: nn.GRU(D, D),
    "lstm": lambda: nn.LSTM(D, D),
    "attention": lambda: nn.MultiheadAttention(D, 2),
    "convolution": lambda: nn.Conv1d(1, 2, 3, padding=1),
    "embedding": lambda: nn.Embedding(D, D),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(D, D)),
}
TREES = st.recursive(
    st.sampled_from(sorted(LAYERS)),
    lambda parts: st.tuples(st.sampled_from(sorted(WAYS)), st.lists(parts, min_size=1, max_size=3)),
    max_leaves=7,
)


def build(tree: Any, shared: dict[int, nn.Module], choices: st.DataObject) -> nn.Module:
    """The tree's modules; now and then one that is there already, or one tied to it, takes a place."""
    if shared and choices.draw(st.integers(0, 5)) == 0:
        return shared[choices.draw(st.sampled_from(sorted(shared)))]
    if isinstance(tree, str):
        module: nn.Module = Layer(tree)
        tied = [m for m in shared.values() if isinstance(m, Layer) and m.kind == tree == "linear"]
        if tied and choices.draw(st.booleans()):
            module.layer.weight = tied[0].layer.weight  # type: ignore[union-attr]
    else:
        module = Part(tree[0], *(build(part, shared, choices) for part in tree[1]))
        if choices.draw(st.integers(0, 7)) == 0:
            module.register_forward_hook(_half)
    shared[len(shared)] = module
    return module


def _half(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output / 2


@settings(max_examples=60, deadline=None, derandomize=True)
@given(TREES, st.sampled_from([None, 0.5, 2]), st.integers(2, 3), st.data())
def test_a_random_tree_is_itself(tree: Any, scale: float | None, batch: int, choices: st.DataObject) -> None:
    torch.manual_seed(0)
    network = Part("in turn", Layer("linear"), build(tree, {}, choices))
    record = Record("tree")
    entry = Entry(lambda: network, lambda: ((floats(batch, D),), {} if scale is None else {"scale": scale}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        examine_as(record, entry, network, variationalize(network, estimator="weights"))
    assert not record.failures
