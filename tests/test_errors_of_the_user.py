"""A forward that raises: the user's own exception, from the user's own line, and a network that is as it was."""

import copy
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import varify


class Network(nn.Module):
    """Seen by torch.fx but for its recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn, self.rnn, self.out = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.GRU(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        hidden = self.bn(self.fc(x))
        hidden = self.rnn(hidden)[0]
        hidden = hidden if extra is None else hidden + extra  # the sum
        return self.out(hidden)


class Refuses(nn.Module):
    """Raises an error of its own, from code that torch.fx can follow, and from code that it can't."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor, limit: float = 1.0) -> Tensor:
        y = self.fc(x)
        if limit < 0:
            raise KeyError("a limit below zero")
        if x.max() > 100:
            raise ZeroDivisionError("an input above 100") from KeyError("a reason")
        return y


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(5, 3), nn.Linear(3, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(F.relu(self.table(tokens)))  # the lookup


BAD: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], tuple[Any, ...], dict[str, Any], str]] = {
    "a wrong width": (Network, (torch.randn(5, 3),), (torch.randn(5, 2),), {}, "self.bn(self.fc(x))"),
    "a wrong dtype": (Network, (torch.randn(5, 3),), (torch.randn(5, 3).double(),), {}, "self.bn(self.fc(x))"),
    "too many dimensions": (Network, (torch.randn(5, 3),), (torch.randn(5, 5, 3),), {}, "self.bn(self.fc(x))"),
    "shapes that don't fit": (
        Network,
        (torch.randn(5, 3), torch.randn(5, 4)),
        (torch.randn(5, 3), torch.randn(4, 4)),
        {},
        "# the sum",
    ),
    "an argument too many": (Network, (torch.randn(5, 3),), (torch.randn(5, 3), None, 3), {}, ""),
    "an unknown keyword": (Network, (torch.randn(5, 3),), (torch.randn(5, 3),), {"nope": 1}, ""),
    "no tensor": (Network, (torch.randn(5, 3),), ("text",), {}, "self.bn(self.fc(x))"),
    "its own error": (Refuses, (torch.randn(5, 3),), (torch.randn(5, 3),), {"limit": -1.0}, "raise KeyError"),
    "an error by value": (Refuses, (torch.randn(5, 3),), (torch.full((5, 3), 200.0),), {}, "raise ZeroDivisionError"),
    "an index out of range": (Lookup, (torch.arange(5),), (torch.arange(6),), {}, "# the lookup"),
}


def call(vnet: varify.VariationalModule, way: str, args: Any, kwargs: Any) -> None:
    if way == "predict":
        vnet.predict(*args, n_samples=2, **kwargs)
    elif way == "sampling":
        with vnet.sampling():
            vnet(*args, **kwargs)
    else:
        vnet(*args, **kwargs)


@pytest.mark.parametrize("used", [False, True], ids=["first call", "later call"])
@pytest.mark.parametrize("way", ["train", "sampling", "eval", "predict"])
@pytest.mark.parametrize(("make", "good", "bad", "kwargs", "line"), BAD.values(), ids=BAD.keys())
def test_the_users_own_exception(make: Any, good: Any, bad: Any, kwargs: Any, line: str, way: str, used: bool) -> None:
    torch.manual_seed(0)
    network = make().train(way == "train")
    vnet = varify.variationalize(network)
    if used:  # a program exists; it moved BatchNorm's statistics
        vnet(*good)
        network(*good)
    before = copy.deepcopy(vnet.state_dict())
    buffers = dict(network.named_buffers())
    parameters = dict(vnet.named_parameters())
    modes = [m.training for m in vnet.modules()]
    with pytest.raises(Exception) as expected:  # noqa: PT011  # whatever the network raises
        network(*bad, **kwargs)
    with pytest.raises(type(expected.value)) as found:
        call(vnet, way, bad, kwargs)
    assert str(found.value) == str(expected.value)
    own = [(f.lineno, f.name) for f in traceback.extract_tb(expected.value.__traceback__)][1:]
    assert [(f.lineno, f.name) for f in traceback.extract_tb(found.value.__traceback__)][-len(own) or 99 :] == own
    assert line in "".join(traceback.format_exception(found.value))
    assert type(found.value.__cause__) is type(expected.value.__cause__)
    assert dict(vnet.named_parameters()).keys() == parameters.keys()
    assert all(p is parameters[name] for name, p in vnet.named_parameters())
    for name, value in vnet.state_dict().items():
        counted = "num_batches" in name  # moves up to the error, as in the original; the others depend on the draw
        if counted and not (used is False and way == "train"):
            assert value == buffers[name.removeprefix("module.")], name
        elif isinstance(value, Tensor) and "running" not in name:
            assert torch.equal(value, before[name]) or counted, name
    assert [m.training for m in vnet.modules()] == modes
    assert vnet(*good).isfinite().all()
    assert vnet.predict(*good, n_samples=2).samples.std(0).any()
    assert {name: p.grad for name, p in vnet.named_parameters()} == dict.fromkeys(parameters)


@pytest.mark.parametrize("estimator", ["local", "flipout"])
def test_with_an_estimator_as_well(estimator: str) -> None:
    vnet = varify.variationalize(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), estimator=estimator)
    vnet(torch.randn(5, 3))
    with pytest.raises(RuntimeError, match="cannot be multiplied") as found:
        vnet(torch.randn(5, 2))
    told = "".join(traceback.format_exception(found.value))
    assert "torch/nn/modules/linear.py" in told
    assert "<varify program" not in told
    assert vnet(torch.randn(5, 3)).shape == (5, 2)


class Picky(nn.Module):
    """Torch.fx follows it; whether it fails depends on the draw."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2)
        with torch.no_grad():
            self.fc.weight.copy_(torch.eye(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.cholesky(self.bn(self.fc(x)) * 0 + self.fc.weight)  # the root


def test_an_error_that_depends_on_the_draw() -> None:
    vnet = varify.variationalize(Picky(), init=varify.inits.Constant(1e-3))
    x = torch.randn(2, 2)
    vnet(x)
    count = vnet.module.bn.num_batches_tracked.clone()
    noise = {"fc.weight": torch.diag(torch.tensor([-2000.0, 0.0]))}  # a draw with a negative eigenvalue
    with vnet.fixed_draw(noise):
        for run in (lambda: vnet(x), lambda: vnet.predict(x, n_samples=1, vectorize=False)):
            with pytest.raises(torch.linalg.LinAlgError) as found:
                run()
            told = "".join(traceback.format_exception(found.value))
            assert "# the root" in told
    assert vnet.module.bn.num_batches_tracked == count + 1
    assert vnet(x).isfinite().all()
