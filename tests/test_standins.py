"""Stand-ins and views against the ways in which a network's own code can surprise them."""

import copy
import functools
import gc
import io
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import varify
from varify import inits
from varify.estimators.rules import has_rule

ESTIMATORS = ("local", "flipout", "auto")


def seeded(seed: int = 0) -> None:
    torch.manual_seed(seed)


def reported(vnet: varify.VariationalModule) -> dict[str, str]:
    return {row.names[0]: row.estimator for row in vnet.summary().rows}


def served(vnet: varify.VariationalModule) -> set[str]:
    """The parameters that were not drawn."""
    return {name for name, estimator in reported(vnet).items() if estimator in ("local", "flipout")}


def gradients(vnet: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in vnet.named_parameters() if p.grad is not None}
    vnet.zero_grad()
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda m, n=name: f"{n}: {m}")


# --- checkpoints


class Blocks(nn.Module):
    """Blocks of a layer, maybe the same twice, each in a checkpoint or not."""

    def __init__(self, shared: bool = False, dropout: float = 0.3, **options: Any) -> None:
        super().__init__()
        first = nn.Linear(6, 6)
        self.layers = nn.ModuleList([first, first if shared else nn.Linear(6, 6)])
        self.norm, self.drop, self.head = nn.LayerNorm(6), nn.Dropout(dropout), nn.Linear(6, 2)
        self.options, self.checkpoints = options, False

    def block(self, layer: nn.Module, x: Tensor) -> Tensor:
        return self.norm(torch.tanh(self.drop(layer(x))))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.checkpoints:
                x = checkpoint(self.block, layer, x, use_reentrant=False, **self.options)
            else:
                x = self.block(layer, x)
        return self.head(self.drop(x))


def both_ways(
    vnet: varify.VariationalModule, step: Callable[[], Any]
) -> Iterator[tuple[Any, dict[str, Tensor], Tensor]]:
    """Outcome, gradients and the random numbers that follow, without checkpoints and with them."""
    for checkpoints in (False, True):
        vnet.module.checkpoints = checkpoints
        seeded(3)
        outcome = step()
        after = torch.rand(3)
        yield outcome, gradients(vnet), after


@pytest.mark.parametrize("estimator", ["weights", *ESTIMATORS])
@pytest.mark.parametrize("shared", [False, True], ids=["once", "shared"])
@pytest.mark.parametrize("preserve", [True, False], ids=["preserve", "as it is"])
@pytest.mark.parametrize("dim", [2, 3])
def test_recomputing_is_no_second_use(estimator: str, shared: bool, preserve: bool, dim: int) -> None:
    seeded()
    dropout = 0.3 if preserve else 0.0  # dropout's own numbers are torch's matter
    vnet = varify.variationalize(Blocks(shared, dropout, preserve_rng_state=preserve), estimator=estimator)
    x = torch.randn(4, 5, 6) if dim == 3 else torch.randn(4, 6)
    vnet(x)

    def step() -> Tensor:
        output = vnet(x)
        output.square().sum().backward()
        return output.detach()

    (output, grads, after), (again, checkpointed, after_again) = both_ways(vnet, step)
    torch.testing.assert_close(again, output)
    assert_same(checkpointed, grads)
    assert torch.equal(after, after_again)
    if estimator in ("flipout", "auto"):
        assert served(vnet) >= {"layers.0.weight", "layers.0.bias", "head.weight"}


@pytest.mark.parametrize("estimator", ["weights", *ESTIMATORS])
@pytest.mark.parametrize("shared", [False, True], ids=["once", "shared"])
def test_two_forwards_before_one_backward_recompute_each_with_its_own_noise(estimator: str, shared: bool) -> None:
    seeded()
    vnet = varify.variationalize(Blocks(shared), estimator=estimator)
    x = torch.randn(4, 5, 6)
    vnet(x)

    def step() -> Tensor:
        outputs = torch.stack([vnet(x), vnet(x), vnet(2 * x)])
        outputs.square().sum().backward()
        return outputs.detach()

    (outputs, grads, _), (again, checkpointed, _) = both_ways(vnet, step)
    assert not torch.equal(outputs[0], outputs[1])
    torch.testing.assert_close(again, outputs)
    assert_same(checkpointed, grads)


class Late(Blocks):
    """From the second call on its layers' weights also meet an operation without a rule, first or last."""

    def __init__(self, first: bool, **options: Any) -> None:
        super().__init__(**options)
        self.is_first, self.late = first, False

    def block(self, layer: nn.Linear, x: Tensor) -> Tensor:
        weight = layer.weight.sinh() if self.late and self.is_first else layer.weight
        x = super().block(nn.Identity(), F.linear(x, weight, layer.bias))
        return x * layer.weight.sinh().sum() if self.late and not self.is_first else x


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("first", [True, False])
def test_a_weight_drawn_late_within_a_checkpoint(estimator: str, first: bool) -> None:
    found = []
    for checkpoints in (False, True):
        seeded()
        vnet = varify.variationalize(Late(first), estimator=estimator)
        x = torch.randn(4, 6)
        vnet(x)
        vnet.module.late, vnet.module.checkpoints = True, checkpoints
        output = vnet(x)
        output.square().sum().backward()
        found.append((output.detach(), gradients(vnet)))
        assert "sinh" in reported(vnet)["layers.0.weight"]
    torch.testing.assert_close(found[0][0], found[1][0])
    assert_same(found[0][1], found[1][1])


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("checkpoints", [False, True])
def test_an_attempt_leaves_no_frames(estimator: str, checkpoints: bool) -> None:
    """Torch before 2.13 keeps a checkpoint open that an error has left, as long as its frame lives."""
    locals_: list[weakref.ref[Any]] = []
    alive: list[int] = []

    class Left(Late):
        def forward(self, x: Tensor) -> Tensor:
            alive.append(sum(one() is not None for one in locals_))
            return super().forward(x)

        def block(self, layer: nn.Linear, x: Tensor) -> Tensor:
            local = threading.Event()
            locals_.append(weakref.ref(local))
            return super().block(layer, x)

    seeded()
    vnet = varify.variationalize(Left(False), estimator=estimator)
    vnet(torch.randn(4, 6))
    vnet.module.late, vnet.module.checkpoints = True, checkpoints
    gc.collect()
    alive.clear()
    gc.disable()
    try:
        vnet(torch.randn(4, 6))
    finally:
        gc.enable()
    assert alive == [0, 0, 0]  # one for each weight that is drawn late, and the last
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


class TiedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mix, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.checkpoints = False

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.mix(self.embedding(x)))
        return checkpoint(self.head, x, use_reentrant=False) if self.checkpoints else self.head(x)


def test_the_second_of_two_uses_alone_is_recomputed() -> None:
    seeded()
    vnet = varify.variationalize(TiedHead(), estimator="flipout", strict=True, init=inits.Constant(0.3))
    x = torch.tensor([[1, 2, 1], [0, 1, 2]])

    def step() -> Tensor:
        output = vnet(x)
        seen: list[Tensor] = []
        output.register_hook(seen.append)
        (output.sin() * torch.arange(7)).sum().backward()
        return output.detach()

    vnet(x)
    (output, grads, _), (again, checkpointed, _) = both_ways(vnet, step)
    torch.testing.assert_close(again, output)
    assert_same(checkpointed, grads)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_reentrant_checkpoint_turned_on_after_the_first_call_loses_no_gradient(estimator: str) -> None:
    class Reentrant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head, self.checkpoints = nn.Linear(3, 3), nn.Linear(3, 2), False

        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(self.fc, x, use_reentrant=True) if self.checkpoints else self.fc(x))

    seeded()
    vnet = varify.variationalize(Reentrant(), estimator=estimator)
    x = torch.randn(4, 3, requires_grad=True)
    vnet(x)
    vnet.module.checkpoints = True
    for _ in range(2):
        vnet(x).square().sum().backward()
        grads = gradients(vnet)
        assert grads.keys() == {name for name, _ in vnet.named_parameters()}
        assert all(grad.abs().sum() > 0 for grad in grads.values())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_call_as_a_whole_in_a_checkpoint(estimator: str) -> None:
    found = []
    for checkpoints in (False, True):
        seeded()
        vnet = varify.variationalize(
            nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.2), nn.Linear(5, 2)), estimator=estimator
        )
        x = torch.randn(4, 3)
        for _ in range(2):  # the first is recorded
            seeded(2)
            output = checkpoint(vnet, x, use_reentrant=False) if checkpoints else vnet(x)
            output.square().sum().backward()
            found.append((output.detach(), gradients(vnet)))
    _, planned, *checkpointed = found
    for output, grads in checkpointed:
        torch.testing.assert_close(output, planned[0])
        assert_same(grads, planned[1])


# --- weights drawn late


class Odd(nn.Module):
    """Uses its weights in operations without a rule, on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(500)), nn.Parameter(torch.zeros(500))
        self.drop, self.asks = nn.Dropout(0.5), "as foreseen"

    def forward(self, x: Tensor) -> Any:
        a = b = x
        if self.asks == "as foreseen":
            a, b = x + self.a, x + self.b
        elif self.asks == "otherwise":
            a, b = self.a.sinh(), self.b.sinh()
        return a, b, self.drop(torch.ones(50))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_weights_drawn_late_are_independent_and_shift_no_random_number(estimator: str) -> None:
    dropped = []
    for late in (False, True):
        seeded()
        vnet = varify.variationalize(Odd(), estimator=estimator, init=inits.Constant(1.0))
        assert not has_rule(torch.sinh)
        x = torch.zeros(2, 500)
        vnet(x)
        vnet.module.asks = "otherwise" if late else "not at all"
        seeded(1)
        a, b, drop = vnet(x)
        dropped.append(drop)
        if late:
            correlation = torch.corrcoef(torch.stack([a.asinh(), b.asinh()]))[0, 1]
            assert correlation.abs() < 0.25  # 5 standard errors of 500 pairs
            assert 0.8 < a.detach().asinh().std() < 1.2
    assert torch.equal(dropped[0], dropped[1])


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return 2 * x @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return 2 * grad @ weight, 2 * grad.T @ x


def in_torchscript(function: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(function)


def _twice(x: Tensor, weight: Tensor) -> Tensor:
    return 2 * x @ weight.t()


_scripted = in_torchscript(_twice)


def scripted(x: Tensor, weight: Tensor) -> Tensor:
    return _scripted(x, weight)


def by_vmap(x: Tensor, weight: Tensor) -> Tensor:
    return torch.func.vmap(lambda row: 2 * x @ row, out_dims=1)(weight)


def by_grad(x: Tensor, weight: Tensor) -> Tensor:
    return torch.func.grad(lambda w: (x @ w.T).square().sum() / 2)(weight).sum(0) * x


class By(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.head, self.function = nn.Parameter(torch.randn(4, 3)), nn.Linear(4, 2), function
        self.odd = True

    def forward(self, x: Tensor) -> Any:
        y = self.function(x, self.weight) if self.odd else 2 * F.linear(x, self.weight)
        return y, self.head(y[:, :1].expand(-1, 4))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("function", [Double.apply, scripted, by_vmap], ids=["autograd", "script", "vmap"])
@pytest.mark.parametrize("from_the_first", [True, False])
def test_functions_that_torch_functions_do_not_see_get_a_drawn_weight(
    estimator: str, function: Any, from_the_first: bool
) -> None:
    seeded()
    vnet = varify.variationalize(By(function), estimator=estimator, init=inits.Constant(0.5))
    x = torch.randn(3, 3)
    vnet.module.odd = from_the_first
    vnet(x)
    vnet.module.odd = True
    for _ in range(2):
        y, output = vnet(x)
        # y is linear in one weight for all rows: x⁺y/2 is that weight
        weight = torch.linalg.solve(x, y.detach()).mT / 2
        torch.testing.assert_close(2 * x @ weight.T, y.detach())
        grad = torch.randn(y.shape)
        (y * grad).sum().backward()
        found = gradients(vnet)
        expected = 2 * grad.T @ x
        torch.testing.assert_close(found["module.weight"], expected)
        eps = (weight - vnet.module.weight.detach()) / 0.5
        sigma_slope = 1 - torch.exp(-vnet.posteriors["weight"].sigma.detach())
        torch.testing.assert_close(found["rho.weight"], expected * eps * sigma_slope, rtol=1e-3, atol=1e-3)
        assert output.shape == (3, 2)
    assert reported(vnet)["weight"].startswith("weights (")
    assert {"head.weight", "head.bias"} <= served(vnet)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_transform_within_forward(estimator: str) -> None:
    seeded()
    vnet = varify.variationalize(By(by_grad), estimator=estimator, init=inits.Constant(0.5))
    x = torch.randn(3, 3)
    for _ in range(3):
        vnet(x)[0].sum().backward()
        grads = gradients(vnet)
        assert grads["module.weight"].abs().sum() > 0
        assert grads["rho.weight"].abs().sum() > 0
    assert reported(vnet)["weight"].startswith("weights (")


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("from_the_first", [True, False])
def test_a_use_where_gradients_are_off(estimator: str, from_the_first: bool) -> None:
    class Target(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.on = nn.Linear(3, 3), from_the_first

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            target = x
            if self.on:
                with torch.no_grad():
                    target = self.fc(x)
            return target, self.fc(x)

    seeded()
    vnet = varify.variationalize(Target(), estimator=estimator)
    x = torch.randn(4, 3)
    vnet(x)
    vnet.module.on = True
    for _ in range(2):
        target, output = vnet(x)
        assert not target.requires_grad
        torch.testing.assert_close(target, output)  # one draw
        output.square().sum().backward()
        grads = gradients(vnet)
        assert len(grads) == 4
        assert all(grad.abs().sum() > 0 for grad in grads.values())


class Damped(torch.autograd.Function):
    """Of a view of its argument, with a tenth of the gradient."""

    how: Callable[[Tensor], Tensor]

    @staticmethod
    def forward(ctx: Any, weight: Tensor, how: Any) -> Tensor:
        return how(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * 0.1, None


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("how", [lambda w: w, lambda w: w.view(w.shape), lambda w: w.contiguous()])
@pytest.mark.parametrize("from_the_first", [True, False])
def test_a_view_that_an_autograd_function_makes_has_that_functions_gradient(
    estimator: str, how: Any, from_the_first: bool
) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.on = nn.Parameter(torch.randn(2, 3)), from_the_first

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, Damped.apply(self.weight, how) if self.on else self.weight)

    seeded()
    vnet = varify.variationalize(Network(), estimator=estimator)
    x = torch.randn(4, 3)
    vnet(x)
    vnet.module.on = True
    for _ in range(2):
        vnet(x).sum().backward()
        torch.testing.assert_close(gradients(vnet)["module.weight"], 0.1 * x.sum(0).expand(2, 3))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_code_that_catches_everything_does_not_catch_a_second_use(estimator: str) -> None:
    class Catches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.on = nn.Linear(3, 3), False

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            if self.on:
                try:
                    y = y * self.fc.weight.sinh().sum()
                except:  # noqa: E722
                    y = y * 0
            return y

    seeded()
    vnet = varify.variationalize(Catches(), estimator=estimator)
    vnet(torch.randn(4, 3))
    vnet.module.on = True
    assert vnet(torch.randn(4, 3)).abs().min() > 0


class Whisper(nn.Module):
    """As Whisper's layers do: weights follow the input's type and device."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.conv = nn.Linear(3, 4), nn.Conv1d(2, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.conv.weight.to(x.device).to(x.dtype), self.conv.bias.to(x.dtype)
        x = F.conv1d(x, weight, bias).mean(2)[:, :3]
        return F.linear(x, self.fc.weight.to(x.dtype).to(x.device), self.fc.bias.to(device=x.device, dtype=x.dtype))


@pytest.mark.parametrize("estimator", ["flipout", "auto"])
def test_weights_that_follow_the_inputs_type_and_device(estimator: str) -> None:
    seeded()
    vnet = varify.variationalize(Whisper(), estimator=estimator, strict=True)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for _ in range(3):
            output = vnet(torch.randn(4, 2, 3, dtype=dtype))
            assert output.dtype == dtype
            output.sum().backward()
    assert len(served(vnet)) == 4


# --- uses that change from call to call


class Experts(nn.Module):
    """The data picks an expert; a counter and a running mean are written on the way."""

    count: Tensor
    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.experts = nn.Linear(3, 3), nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
        self.norm, self.drop = nn.BatchNorm1d(3), nn.Dropout(0.5)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("last", torch.zeros(3))
        self.again, self.steps, self.late_count = False, 0, False
        self.history: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.history.append(self.steps)
        self.count += 1
        x = self.norm(self.first(x))
        self.last = x.detach().amax(0)
        which = int(x.detach().abs().sum() * 100) % 3
        x = self.drop(self.experts[which](x))
        return self.first(x.sin()) if self.again else x


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_call_that_is_made_again_leaves_the_traces_of_one(estimator: str) -> None:
    seeded()
    vnet = varify.variationalize(Experts(), estimator=estimator)
    x = torch.randn(8, 3)
    calls = 0

    def count(module: nn.Module, inputs: Any) -> None:
        nonlocal calls
        calls += 1

    vnet.module.experts[0].register_forward_pre_hook(count)
    vnet.module.experts[1].register_forward_pre_hook(count)
    vnet.module.experts[2].register_forward_pre_hook(count)
    for i in range(1, 12):
        vnet.module.again = i > 4
        vnet(x).square().sum().backward()
        assert vnet.module.count == i
        assert vnet.module.norm.num_batches_tracked == i
        assert vnet.module.steps == i
        assert "last" in vnet.module._buffers
        assert vnet.module.last.max() > 0
    # each weight changes its plan once at most
    before = calls
    for _ in range(10):
        vnet(x)
    assert calls == before + 10
    assert vnet.module.history == list(range(1, 22))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_buffer_that_only_the_repeated_call_writes_is_written_once(estimator: str) -> None:
    class Later(nn.Module):
        count: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.fc, self.again = nn.Linear(3, 3), False
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            if self.again:
                self.count += 1
            x = self.fc(x)
            return x * self.fc.weight.sinh().sum() if self.again else x

    seeded()
    vnet = varify.variationalize(Later(), estimator=estimator)
    vnet(torch.randn(4, 3))
    vnet.module.again = True
    vnet(torch.randn(4, 3))
    assert vnet.module.count == 1


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_call_that_is_made_again_has_the_random_numbers_of_one(estimator: str) -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.drop, self.again = nn.Linear(3, 3, bias=False), nn.Dropout(0.5), False

        def forward(self, x: Tensor) -> Any:
            before = self.drop(torch.ones(30))
            x = self.fc(x)
            return before, x * self.fc.weight.sinh().sum() if self.again else x

    masks = []
    for again in (False, True):
        seeded()
        vnet = varify.variationalize(Again(), estimator=estimator)
        x = torch.randn(4, 3)
        vnet(x)
        vnet.module.again = again
        seeded(1)
        masks.append(vnet(x)[0])
    seeded(1)  # not those of the plan before, since a weight is drawn now, but those of a whole call
    assert torch.equal(vnet(x)[0], masks[1])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_layers_dropped_at_random(estimator: str) -> None:
    class LayerDrop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.calls = nn.ModuleList(nn.Linear(3, 3) for _ in range(6)), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            for layer in self.layers:
                if torch.rand([]) > 0.5:
                    x = torch.tanh(layer(x))
            return x

    seeded()
    vnet = varify.variationalize(LayerDrop(), estimator=estimator)
    x = torch.randn(4, 3)
    for i in range(1, 60):
        output = vnet(x)
        if output.requires_grad:
            output.sum().backward()
        assert vnet.module.calls == i
    assert all(
        "weights (" in reported(vnet)[f"layers.{i}.weight"] or f"layers.{i}.weight" in served(vnet) for i in range(6)
    )


# --- identity


@pytest.mark.parametrize("estimator", ["weights", *ESTIMATORS])
def test_dicts_keyed_by_module(estimator: str) -> None:
    seeded()
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    vnet = varify.variationalize(network, estimator=estimator)
    names = {module: name for name, module in vnet.module.named_modules()}
    by_name: dict[str, Tensor] = {}
    by_module: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        by_name[names[module]] = output
        by_module[module] = output
        assert isinstance(module, (nn.Linear, nn.Tanh))
        assert module in names

    for part in vnet.module:
        part.register_forward_hook(keep)
    for i in range(6):
        if i == 3:
            vnet.eval()
        output = vnet(torch.randn(5, 3))
        assert by_name["2"] is output
        assert by_module[vnet.module[2]] is output
        assert by_module[vnet.module[0]].shape == (5, 4)
        assert len(by_module) == len(by_name) == 3
    vnet.predict(torch.randn(5, 3), n_samples=3)
    assert len(by_module) == 3


FEATURES: dict[nn.Module, Tensor] = {}


def keep_globally(module: nn.Module, inputs: Any, output: Tensor) -> None:
    FEATURES[module] = output


@pytest.mark.parametrize("estimator", ["weights", *ESTIMATORS])
def test_a_global_dict_keyed_by_module_has_each_once(estimator: str) -> None:
    seeded()
    FEATURES.clear()
    vnet = varify.variationalize(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), estimator=estimator)
    for part in vnet.module:
        part.register_forward_hook(keep_globally)
    for _ in range(4):
        output = vnet(torch.randn(4, 3))
        assert FEATURES[vnet.module[1]] is output
        assert len(FEATURES) == 2
    FEATURES.clear()


class Caching(nn.Module):
    made: list[int]
    cache: dict[int, Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.positions = Positions()
        self.positions.cache_clear()

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x) + self.positions.encoding(x.shape[1])
        if id(self) not in CACHE:
            MADE.append(id(self))
            CACHE[id(self)] = torch.arange(4.0)
        return x + CACHE[id(self)]


MADE: list[int] = []
CACHE: dict[int, Tensor] = {}


class Positions(nn.Module):
    computed = 0

    @functools.lru_cache  # noqa: B019
    def encoding(self, length: int) -> Tensor:
        Positions.computed += 1
        return torch.arange(float(length))

    def cache_clear(self) -> None:
        type(self).encoding.cache_clear()


@pytest.mark.parametrize("estimator", ["weights", *ESTIMATORS])
def test_caches_by_identity_are_filled_once(estimator: str) -> None:
    seeded()
    vnet = varify.variationalize(Caching(), estimator=estimator)
    MADE.clear()
    CACHE.clear()
    Positions.computed = 0
    for i in range(8):
        output = vnet(torch.randn(3, 4))
        if i % 2:
            output.sum().backward()
    assert len(MADE) <= 2
    assert Positions.computed == 1


# --- TorchScript


@pytest.mark.parametrize("estimator", ["weights", *ESTIMATORS])
def test_a_part_in_torchscript(estimator: str) -> None:
    seeded()
    part = in_torchscript(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)))
    vnet = varify.variationalize(nn.Sequential(nn.Linear(3, 3), part, nn.Linear(3, 2)), estimator=estimator)
    x = torch.randn(6, 3)
    for _ in range(3):
        vnet(x).sum().backward()
        assert len(gradients(vnet)) == 4 * 2 + 2
    assert vnet.module[1].training
    vnet.eval()
    assert not vnet.module[1].training
    assert torch.equal(vnet(x), vnet(x))
    with vnet.sampling():
        assert not torch.equal(vnet(x), vnet(x))
    vnet.train()
    prediction = vnet.predict(x, n_samples=4)
    assert prediction.samples.shape == (4, 6, 2)
    assert vnet.module[1].training
    for _ in range(2):
        vnet(x).sum().backward()
    if estimator != "weights":
        assert served(vnet) == {"0.weight", "0.bias", "2.weight", "2.bias"}
        torch.testing.assert_close(vnet.functional()({n: q.mu for n, q in vnet.posteriors.items()}, x).shape, (6, 2))


def test_a_part_in_torchscript_predicts_in_eval_mode() -> None:
    seeded()
    part = in_torchscript(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)))
    vnet = varify.variationalize(nn.Sequential(part, nn.Linear(3, 2)), where="1.*", init=inits.Constant(1e-6))
    x = torch.randn(6, 3)
    assert vnet.module[0].training
    samples = vnet.predict(x, n_samples=4).samples
    torch.testing.assert_close(samples[0], samples[1], atol=1e-3, rtol=1e-3)


# --- parametrizations


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("estimator", ["weights", *ESTIMATORS])
@pytest.mark.parametrize("kind", ["old weight", "new weight", "spectral", "old spectral", "orthogonal"])
def test_normalized_weights(estimator: str, kind: str) -> None:
    seeded()
    wrap: Any = {
        "old weight": nn.utils.weight_norm,
        "new weight": parametrizations.weight_norm,
        "spectral": parametrizations.spectral_norm,
        "old spectral": nn.utils.spectral_norm,
        "orthogonal": parametrizations.orthogonal,
    }[kind]
    vnet = varify.variationalize(nn.Sequential(wrap(nn.Linear(3, 3)), nn.Tanh(), nn.Linear(3, 2)), estimator=estimator)
    x = torch.randn(4, 3)
    outputs = []
    for _ in range(4):
        output = vnet(x)
        output.square().sum().backward()
        outputs.append(output.detach())
        grads = gradients(vnet)
        assert len(grads) == len(list(vnet.parameters()))
    assert not torch.equal(outputs[-1], outputs[-2])
    with torch.no_grad(), parametrize.cached():
        assert not torch.equal(vnet(x), vnet(x))
    vnet.eval()
    torch.testing.assert_close(vnet(x), vnet.module(x))
    copy.deepcopy(vnet)(x)
    assert vnet.predict(x, n_samples=3).samples.shape == (3, 4, 2)


# --- threads and calls within calls


@pytest.mark.parametrize("estimator", ["weights", "auto"])
def test_threads_that_train_and_predict_concurrently(estimator: str) -> None:
    class Stateful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.last = nn.Linear(3, 3), nn.Linear(3, 3), None
            self.parts = [self.a, self.b]

        def forward(self, x: Tensor, name: str) -> Any:
            self.last = name
            for part in self.parts:
                x = torch.tanh(part(x))
            assert self.last == name
            return x

    seeded()
    vnet = varify.variationalize(Stateful(), estimator=estimator)
    x = torch.randn(4, 3)
    vnet(x, "first")
    outputs: list[Tensor] = []
    errors: list[BaseException] = []

    def work(i: int) -> None:
        try:
            for j in range(15):
                if i % 2:
                    assert vnet.predict(x, f"{i} {j}", n_samples=2).samples.shape == (2, 4, 3)
                else:
                    output = vnet(x, f"{i} {j}")
                    outputs.append(output.detach())
                    output.sum().backward()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len({tuple(output.flatten().tolist()) for output in outputs}) == 30
    assert vnet.module.parts == [vnet.module.a, vnet.module.b]
    assert all(isinstance(p, nn.Parameter) for p in vnet.module.parameters())
    assert vnet.module.last.split()[0] in ("0", "2")
    assert vnet.module.training


@pytest.mark.parametrize("estimator", ["weights", *ESTIMATORS])
def test_a_network_that_calls_itself(estimator: str) -> None:
    class Recursive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.calls = nn.Linear(3, 3), 0

        def forward(self, x: Tensor, depth: int = 2) -> Tensor:
            self.calls += 1
            x = torch.tanh(self.fc(x))
            return self(x, depth - 1) if depth else x

    seeded()
    vnet = varify.variationalize(Recursive(), estimator=estimator)
    for i in range(1, 4):
        vnet(torch.randn(4, 3)).sum().backward()
        assert len(gradients(vnet)) == 4
        assert vnet.module.calls == 3 * i


@pytest.mark.parametrize("estimator", ["weights", *ESTIMATORS])
def test_a_call_of_the_whole_within_a_hook_has_its_own_draw(estimator: str) -> None:
    seeded()
    network = nn.Sequential(nn.Linear(1, 1, bias=False))
    vnet = varify.variationalize(network, init=inits.Constant(1.0), estimator=estimator)
    with torch.no_grad():
        vnet.module[0].weight.zero_()
    inner: list[Tensor] = []
    busy: list[bool] = []
    x = torch.ones(2, 1)

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if not busy:
            busy.append(True)
            inner.append(vnet(x)[0])
            busy.pop()

    vnet.module[0].register_forward_hook(hook)
    outer = [vnet(x)[0] for _ in range(600)]
    a, b = torch.stack(outer).detach().flatten(), torch.stack(inner).detach().flatten()
    # 5 standard errors of 600 normal numbers
    assert a.var() == pytest.approx(1.0, abs=0.3)
    assert b.var() == pytest.approx(1.0, abs=0.3)
    assert torch.corrcoef(torch.stack([a, b]))[0, 1].abs() < 0.21
    torch.stack(inner).sum().backward()
    assert vnet.rho.leaf_at("0.weight").grad.abs().sum() > 0


# --- first calls elsewhere


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("where", ["no_grad", "inference", "vmap", "grad"])
def test_a_first_call_elsewhere_spoils_nothing(estimator: str, where: str) -> None:
    seeded()
    vnet = varify.variationalize(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), estimator=estimator)
    x = torch.randn(5, 3)
    if where == "no_grad":
        with torch.no_grad():
            vnet(x)
    elif where == "inference":
        with torch.inference_mode():
            vnet(x)
    elif where == "vmap":
        torch.func.vmap(vnet, randomness="different")(x[None])
    else:
        torch.func.grad(lambda x: vnet(x).sum())(x)
    for _ in range(3):
        vnet(x).sum().backward()
        assert len(gradients(vnet)) == 8
    assert len(served(vnet)) == 4


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")  # dynamo's
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_strict_in_a_first_call_elsewhere(estimator: str) -> None:
    def make() -> varify.VariationalModule:
        return varify.variationalize(nn.Linear(3, 2), estimator=estimator, strict=True)

    x = torch.randn(5, 3)
    with pytest.raises(varify.EstimatorError, match="strict=True"):
        torch.func.vmap(make(), randomness="different")(x[None])
    with torch.no_grad():
        make()(x)
    vnet = make()  # dynamo leaves the call to Python where it would raise
    torch.compile(vnet, backend="eager")(x)
    assert served(vnet) == {"weight", "bias"}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_strict_raises_before_the_state_moves(estimator: str) -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.norm, self.steps = nn.Parameter(torch.ones(3)), nn.BatchNorm1d(3), 0

        def forward(self, x: Tensor) -> Tensor:
            self.steps += 1
            return self.norm(x) / self.scale

    vnet = varify.variationalize(Step(), estimator=estimator, strict=True)
    for _ in range(2):
        with pytest.raises(varify.EstimatorError, match=r"scale: .* div"):
            vnet(torch.randn(4, 3))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_error_in_the_recorded_call_is_the_users_own(estimator: str) -> None:
    class Raises(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.fails = nn.Linear(3, 3), True

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc(x)
            if self.fails:
                raise KeyError("mine")
            return self.fc(x)

    seeded()
    vnet = varify.variationalize(Raises(), estimator=estimator)
    x = torch.randn(4, 3)
    for _ in range(2):
        with pytest.raises(KeyError, match="mine") as caught:
            vnet(x)
        last = caught.traceback[-1]
        assert last.name == "forward"
        assert str(last.path) == __file__
    assert "from the first training call on" in reported(vnet)["fc.weight"]
    vnet.module.fails = False
    for fails in (False, False, True, False):
        vnet.module.fails = fails
        if fails:
            with pytest.raises(KeyError, match="mine"):
                vnet(x)
        else:
            vnet(x).sum().backward()
            assert len(gradients(vnet)) == 4
    assert torch._C._len_torch_function_stack() == 0


# --- torch's other ways of running a module


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_double_backward(estimator: str) -> None:
    seeded()
    network = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 1, bias=False))
    vnet = varify.variationalize(network, estimator=estimator)
    x = torch.randn(4, 3)
    x[0] = 0.0
    vnet(x)
    with torch.no_grad():
        vnet.module[0].bias.fill_(-20.0)  # nothing comes through: variance 0
    for shift in (0.0, 20.0):
        with torch.no_grad():
            vnet.module[0].bias.add_(shift)
        x.requires_grad_()
        (slope,) = torch.autograd.grad(vnet(x).sum(), x, create_graph=True)
        (slope.square().sum() + vnet(x).sum()).backward()
        assert all(grad.isfinite().all() for grad in gradients(vnet).values())


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("planned", [False, True])
def test_per_sample_gradients(estimator: str, planned: bool) -> None:
    seeded()
    vnet = varify.variationalize(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), estimator=estimator)
    x, y = torch.randn(5, 3), torch.randn(5, 2)
    if planned:
        vnet(x), vnet(x[:1])
    parameters = dict(vnet.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return (torch.func.functional_call(vnet, parameters, (x[None],))[0] - y).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0), randomness="different")(parameters, x, y)
    assert grads.keys() == parameters.keys()
    assert all(grad.shape == (5, *parameters[name].shape) for name, grad in grads.items())
    assert all(grad.abs().sum() > 0 for grad in grads.values())
    assert not torch.equal(grads["rho.2.bias"][0], grads["rho.2.bias"][1])
    for _ in range(2):
        vnet(x).sum().backward()
        assert len(gradients(vnet)) == 8
    assert all(isinstance(p, nn.Parameter) for p in vnet.parameters())


@pytest.mark.parametrize("estimator", ["weights", *ESTIMATORS])
def test_per_sample_gradients_with_separate_noises(estimator: str) -> None:
    """One weight, input 1: the gradient of the output by rho is the sample's own noise."""
    seeded()
    vnet = varify.variationalize(nn.Linear(1, 1, bias=False), estimator=estimator, init=inits.Constant(1.0))
    x = torch.ones(500, 1)
    vnet(x), vnet(x[:1])
    parameters = dict(vnet.named_parameters())

    def output(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(vnet, parameters, (x[None],)).sum()

    grads = torch.func.vmap(torch.func.grad(output), in_dims=(None, 0), randomness="different")(parameters, x)
    eps = grads["rho.weight"].detach().flatten() / (1 - torch.exp(torch.tensor(-1.0)))
    assert eps.var() == pytest.approx(1.0, abs=0.32)  # 5 standard errors
    assert eps.mean() == pytest.approx(0.0, abs=0.23)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_autocast_and_a_gradient_scaler(estimator: str) -> None:
    seeded()
    vnet = varify.variationalize(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), estimator=estimator)
    x = torch.randn(5, 3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(vnet.parameters(), 0.01)
    for i in range(5):
        with torch.autocast("cpu", torch.bfloat16, enabled=i != 2):
            output = vnet(x)
        assert output.dtype == (torch.float32 if i == 2 else torch.bfloat16)
        scaler.scale(output.float().square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert all(p.isfinite().all() for p in vnet.parameters())
        gradients(vnet)
    assert len(served(vnet)) == 4


def _with_a_compiled_part(network: Any) -> nn.Module:
    network.fc = torch.compile(network.fc, backend="eager")
    return network


@pytest.mark.filterwarnings("ignore")  # dynamo's own
@pytest.mark.parametrize("estimator", ["weights", *ESTIMATORS])
@pytest.mark.parametrize("what", ["function", "module", "wrapped", "method"])
def test_a_compiled_part(estimator: str, what: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda x, weight, bias: torch.tanh(F.linear(x, weight, bias)), backend="eager")

    class Compiled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.part(x))

        def part(self, x: Tensor) -> Tensor:
            return torch.tanh(self.fc(x)) if what != "function" else compiled(x, self.fc.weight, self.fc.bias)

    seeded()
    vnet = varify.variationalize(Compiled(), estimator=estimator)
    if what == "module":
        vnet.module.fc.compile(backend="eager")
    elif what == "wrapped":
        vnet = varify.variationalize(_with_a_compiled_part(Compiled()), estimator=estimator)
    elif what == "method":
        vnet.module.part = torch.compile(vnet.module.part, backend="eager")
    x = torch.randn(4, 3)
    outputs = []
    for _ in range(4):
        output = vnet(x)
        output.square().sum().backward()
        outputs.append(output.detach())
        grads = gradients(vnet)
        assert len(grads) == 8
        assert all(grad.abs().sum() > 0 for grad in grads.values())
    assert all(not torch.equal(outputs[-1], other) for other in outputs[:-1])
    vnet.eval()
    torch.testing.assert_close(vnet(x), vnet.module(x))
    assert vnet.predict(x, n_samples=3).samples.std(0).min() > 0


# --- attributes


class Helper:
    def __init__(self, owner: nn.Module) -> None:
        self.owner, self.seen, self.latest = owner, [], None

    def note(self, x: Tensor) -> None:
        self.seen.append(x.shape)
        self.latest = self.owner.fc


class Mutable(nn.Module):
    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head, self.step = nn.Linear(3, 3), nn.Linear(3, 2), 0
        self.helper, self.log, self.gone = Helper(self), [], "here"

    def forward(self, x: Tensor) -> Tensor:
        self.step += 1
        self.helper.note(x)
        self.log.append(self.step)
        self.last = self.fc
        if hasattr(self, "gone"):
            del self.gone
        if "mask" not in self._buffers:
            self.register_buffer("mask", torch.ones(3))
        self.kept, self.weight = [self.fc, self.step], self.fc.weight
        return self.head(self.last(x) * self.mask)


@pytest.mark.parametrize("estimator", ["weights", *ESTIMATORS])
def test_attributes_set_in_forward_are_set_in_the_network(estimator: str) -> None:
    seeded()
    vnet = varify.variationalize(Mutable(), estimator=estimator)
    network = vnet.module
    x = torch.randn(4, 3)
    for i in range(1, 6):
        vnet(x).sum().backward()
        assert network.step == i
        assert network.log == list(range(1, i + 1))
        assert len(network.helper.seen) == i
        assert network.helper.owner is network
        assert network.helper.latest is network.fc
        assert network.last is network.fc
        assert network.kept[0] is network.fc
        assert network.kept[1] == i
        assert network.weight is network.fc.weight
        assert not hasattr(network, "gone")
        assert "mask" in network._buffers
        assert len(gradients(vnet)) == 8
    vnet.predict(x, n_samples=2)
    assert network.step == 5
    if estimator != "weights":
        assert len(served(vnet)) == 4
    for other in (copy.deepcopy(vnet), pickle.loads(pickle.dumps(vnet))):
        other(x).sum().backward()
        assert other.module.step == 6
        assert network.step == 5
        assert other.module.last is other.module.fc


@pytest.mark.parametrize("estimator", ["weights", *ESTIMATORS])
def test_a_state_dict_taken_in_forward_or_with_a_graph_alive(estimator: str) -> None:
    seeded()
    vnet = varify.variationalize(
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), estimator=estimator
    )
    taken: list[dict[str, Any]] = []
    vnet.module[2].register_forward_hook(lambda *_: taken.append(vnet.state_dict()))
    x = torch.randn(4, 3)
    for _ in range(3):
        output = vnet(x)
        assert {name for name, p in vnet.named_parameters() if isinstance(p, nn.Parameter)} == set(
            dict(vnet.named_parameters())
        )
        state = vnet.state_dict()
        torch.save(state, io.BytesIO())
        copy.deepcopy(vnet)
        output.sum().backward()
        assert taken[-1].keys() == state.keys()
        torch.testing.assert_close(taken[-1]["module.0.weight"], state["module.0.weight"])


# --- memory


def tensors_alive() -> int:
    gc.collect()
    return sum(isinstance(one, Tensor) for one in gc.get_objects())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("estimator", ["weights", *ESTIMATORS])
@pytest.mark.parametrize("checkpoints", [False, True])
def test_many_calls_keep_nothing(estimator: str, checkpoints: bool) -> None:
    seeded()
    vnet = varify.variationalize(Blocks(), estimator=estimator)
    vnet.module.checkpoints = checkpoints
    x = torch.randn(4, 6)

    def step() -> None:
        vnet(x).sum().backward()
        vnet.zero_grad()

    for _ in range(5):
        step()
    before = tensors_alive()
    for _ in range(100):
        step()
    assert tensors_alive() <= before


@pytest.mark.parametrize("estimator", ["weights", *ESTIMATORS])
@pytest.mark.parametrize("shared", [False, True])
def test_no_draw_outlives_backward(estimator: str, shared: bool) -> None:
    seeded()
    vnet = varify.variationalize(Blocks(shared), estimator=estimator)
    x = torch.randn(4, 6)
    vnet(x)
    seen: list[weakref.ref[Any]] = []

    def keep(module: nn.Linear, inputs: Any, output: Tensor) -> None:
        seen.append(weakref.ref(module.weight))
        seen.append(weakref.ref(output))

    vnet.module.layers[0].register_forward_hook(keep)
    gc.disable()
    try:
        for _ in range(3):
            vnet(x).sum().backward()
            assert seen
            assert all(ref() is None for ref in seen)
    finally:
        gc.enable()


# --- the record is run again


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("how", ["in place", "data", "in data"])
def test_frozen_parameters_that_forward_writes_are_written_once(estimator: str, how: str) -> None:
    class Momentum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.slow = nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False)

        @torch.no_grad()
        def update(self) -> None:
            for p in self.slow.parameters():
                if how == "in place":
                    p.mul_(0.5)
                elif how == "data":
                    p.data = p.data * 0.5
                else:
                    p.data.mul_(0.5)

        def forward(self, x: Tensor) -> Tensor:
            self.update()
            return self.fc(x) + self.slow(x)

    seeded()
    vnet = varify.variationalize(Momentum(), estimator=estimator)
    before = vnet.module.slow.weight.clone()
    for i in range(1, 4):
        vnet(torch.randn(4, 3))
        torch.testing.assert_close(vnet.module.slow.weight.detach(), before * 0.5**i)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_lengths_that_data_decide(estimator: str) -> None:
    class Select(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.fc = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            chosen = x[:, 0] > 0
            rows = x[chosen].view(int(chosen.sum()), 3)
            output = self.first(x)
            output[chosen] = self.fc(rows)
            return output

    vnet = varify.variationalize(Select(), estimator=estimator)
    for _ in range(4):
        seeded()
        x = torch.randn(6, 3)
        x[1] = torch.tensor([-0.01, 10.0, 10.0])  # positive when it is changed
        vnet(x).sum().backward()
        assert len(gradients(vnet)) == 8


# --- outputs' distributions


class Attends(nn.Module):
    def __init__(self, own: bool, **options: Any) -> None:
        super().__init__()
        self.own, self.attention = own, nn.MultiheadAttention(4, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        other = x if self.own else x.flip(1)[:, :2].sin()
        kdim, vdim = self.attention.kdim, self.attention.vdim
        key, value = other.repeat(1, 1, 2)[..., :kdim], other.repeat(1, 1, 2)[..., -vdim:]
        return self.attention(x, key, value, need_weights=False)[0]


class Translates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        options: dict[str, Any] = {"dropout": 0.0, "batch_first": True}
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 4, **options), 1)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 4, **options), 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(x[:, :2].cos(), self.encoder(x))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mix = nn.Embedding(5, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x[..., 0].abs() * 10).long() % 5
        return self.mix(self.embedding(tokens)) @ self.embedding.weight.T


class Convolves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.again, self.head = nn.Conv1d(4, 4, 2), nn.Conv1d(4, 4, 2, groups=2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(F.relu(self.conv(x.mT))).mT)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "self-attention": lambda: Attends(True),
    "cross-attention": lambda: Attends(False),
    "kdim and vdim": lambda: Attends(False, kdim=5, vdim=6),
    "bias_kv": lambda: Attends(True, add_bias_kv=True),
    "encoder and decoder": Translates,
    "tied": Tied,
    "convolutions": Convolves,
    "shared": lambda: nn.Sequential(layer := nn.Linear(4, 4), nn.Tanh(), layer),
}
ROUNDS, COPIES, LIMIT = 120, 24, 5.0


def rounds(call: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """Means and second moments of an example's outputs, one row for each round."""
    seconds, firsts = [], []
    for _ in range(ROUNDS):
        outputs = call().flatten(1).double()
        firsts.append(outputs.mean(0))
        seconds.append((outputs.T @ outputs / len(outputs)).flatten())
    return torch.stack(firsts), torch.stack(seconds)


@pytest.mark.parametrize(
    ("name", "estimator"),
    [*((name, "flipout") for name in NETWORKS), ("self-attention", "auto"), ("convolutions", "auto")],
)
@torch.no_grad()
def test_an_examples_outputs_have_the_joint_moments_of_drawn_weights(name: str, estimator: str) -> None:
    """Means and covariances of one example's outputs within 5 standard errors.

    A round's copies of the example share the size of a flipped noise, so a round is one observation. With 120 rounds
    each, some 100 moments give a false alarm with a chance of about 1e-4 to 1e-3, at seeds that are fixed.
    """
    seeded()
    network = NETWORKS[name]()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    vnet = varify.variationalize(network, estimator=estimator, init=inits.Constant(0.3))
    one = torch.randn(1, 3, 4)
    x = torch.cat([one.expand(COPIES, -1, -1), torch.randn(2, 3, 4)])
    with torch.enable_grad():
        vnet(torch.randn(COPIES + 2, 3, 4))
    samples = iter(vnet.predict(one, n_samples=ROUNDS * COPIES, vectorize=True).samples.split(COPIES))
    found, drawn = rounds(lambda: vnet(x)[:COPIES]), rounds(lambda: next(samples))
    for a, b in zip(found, drawn, strict=True):
        error = ((a.var(0) + b.var(0)) / ROUNDS).sqrt().clamp_min(1e-9)
        assert ((a.mean(0) - b.mean(0)) / error).abs().max() < LIMIT
    assert len(served(vnet)) >= len(vnet.posteriors) / 2, reported(vnet)


def test_a_weight_and_another_view_of_it_in_one_operation_meet_one_draw() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, 3))
            self.own = False

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight, self.weight[0] if self.own else None)

    torch.manual_seed(0)
    vnet = varify.variationalize(Biased(), estimator="local", init=varify.inits.Constant(1.0))
    x = torch.cat([torch.zeros(1, 3), torch.eye(3)])
    vnet(x)
    vnet.module.own = True
    for _ in range(3):  # of w = 0 + noise, the first row is the bias, and the others are a column of w beside it
        rows = vnet(x).detach()
        weight = (rows[1:] - rows[0]).T
        torch.testing.assert_close(weight[0], rows[0])
