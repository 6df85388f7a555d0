"""Networks run the user's own code, in training, in eval and in predictions: what it does is done, and no more."""

import contextlib
import copy
import functools
import gc
import linecache
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import varify

ESTIMATORS = ["weights", "local", "flipout", "auto"]
CERTAIN = varify.inits.Constant(1e-9)  # sigma: each draw is the mean, to the last digits
Build = Callable[[], nn.Module]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def is_dead(tensor: Tensor) -> bool:
    """Whether it belongs to a transform of torch.func, which is over."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def spread(f: Callable[[], Tensor], n: int = 60) -> float:
    """The largest standard deviation of an output."""
    with torch.no_grad():
        return torch.stack([f() for _ in range(n)]).std(0).max().item()


class Layer(nn.Module):
    """One linear layer, for subclasses to do something with."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)


# --- caches outside of the network


def of_lru_cache() -> Build:
    @functools.lru_cache
    def table(n: int) -> Tensor:
        return torch.arange(n).float()

    class Net(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + table(4)

    return Net


def of_the_class() -> Build:
    class Net(Layer):
        tables: dict[int, Tensor] = {}  # noqa: RUF012  # shared on purpose

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + self.tables.setdefault(4, torch.arange(4).float())

    return Net


def of_a_default_argument() -> Build:
    class Net(Layer):
        def forward(self, x: Tensor, tables: dict[int, Tensor] = {}) -> Tensor:  # noqa: B006  # shared on purpose
            if 4 not in tables:
                tables[4] = torch.arange(4).float()
            return self.fc(x) + tables[4]

    return Net


@pytest.mark.parametrize("way", [of_lru_cache, of_the_class, of_a_default_argument])
@pytest.mark.parametrize("first", ["train", "auto", "predict", "graph"])
def test_a_cache_that_the_first_call_fills_serves_everybody(way: Callable[[], Build], first: str) -> None:
    build = way()
    net, x = build(), torch.randn(2, 3)
    vnet = varify.variationalize(net, init=CERTAIN, estimator="auto" if first == "auto" else "weights")
    if first == "predict":
        vnet.predict(x, n_samples=3)
    elif first == "graph":
        vnet.graph(x)
    else:
        vnet(x)
    expected = F.linear(x, net.fc.weight, net.fc.bias) + torch.arange(4)
    for f in (vnet.eval(), vnet.train(), net, varify.variationalize(net, init=CERTAIN)):
        assert type(f(x)) is Tensor
        torch.testing.assert_close(f(x), expected)
    torch.testing.assert_close(vnet.predict(x, n_samples=3).mean, expected.detach())
    assert type(build()(x)) is Tensor


# --- what forward sets, and what it appends to


class MovingAverage(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ema", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        self.ema = 0.9 * self.ema + 0.1 * h.detach().mean(0)
        return h


class LastFeatures(Layer):
    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        with torch.no_grad():
            self.last = {"h": [h.tanh()]}
        return h


def predict(vnet: varify.VariationalModule) -> None:
    vnet.predict(torch.randn(5, 3), n_samples=4)


def predict_vectorized(vnet: varify.VariationalModule) -> None:
    vnet.predict(torch.randn(5, 3), n_samples=4, vectorize=True)


def fit_sigma(vnet: varify.VariationalModule, curvature: str = "fisher") -> None:
    data = [(torch.randn(5, 3), torch.randn(5, 4))]
    varify.fit_sigma(vnet, data, F.mse_loss, num_data=5, curvature=curvature)


def fit_by_ggn(vnet: varify.VariationalModule) -> None:
    fit_sigma(vnet, "ggn")


def describe(vnet: varify.VariationalModule) -> None:
    varify.description_length(vnet, [(torch.randn(5, 3), torch.randn(5, 4))], F.mse_loss, n_samples=4)


WAYS = [predict, predict_vectorized, fit_sigma, fit_by_ggn, describe]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("build", [MovingAverage, LastFeatures])
def test_what_forward_sets_leaves_a_network_that_runs_and_can_be_saved(
    build: Build, way: Callable[[Any], None], tmp_path: Path
) -> None:
    vnet = varify.variationalize(build())
    vnet(torch.randn(5, 3))
    before = copy.deepcopy(vnet.state_dict())
    last = getattr(vnet.module, "last", None)
    way(vnet)
    if build is MovingAverage:
        assert not is_dead(vnet.module.ema)
        assert torch.equal(vnet.module.ema, before["module.ema"])
    else:
        assert vnet.module.last is last
    vnet.eval()(torch.randn(5, 3))
    varify.save(vnet, tmp_path / "net.safetensors")
    torch.save(vnet.state_dict(), tmp_path / "net.pt")
    copy.deepcopy(vnet)
    vnet.mean_model()(torch.randn(5, 3))


@pytest.mark.parametrize("vectorize", [None, True, False])
def test_a_hook_that_keeps_features_runs_once_a_draw(vectorize: bool | None) -> None:
    features: list[Tensor] = []
    vnet = varify.variationalize(nn.Sequential(nn.Linear(3, 4), nn.Tanh()))
    vnet.module[0].register_forward_hook(lambda module, inputs, output: features.append(output))
    predicted = vnet.predict(torch.randn(5, 3), n_samples=4, vectorize=vectorize)
    assert [is_dead(one) for one in features] == [False] * 4
    torch.testing.assert_close(torch.stack(features).tanh(), predicted.samples)


SEEN: list[Tensor] = []


class Keeping(Layer):
    """Keeps its features in three places."""

    def __init__(self, inner: bool) -> None:
        super().__init__()
        self.history: list[Tensor] = []
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        kept = h * 2 if self.inner else h
        self.history.append(kept)
        SEEN.append(kept)
        return h


@pytest.mark.parametrize("vectorize", [None, True, False])
@pytest.mark.parametrize("inner", [True, False], ids=["another tensor", "the output itself"])
def test_lists_get_one_usable_tensor_a_draw(inner: bool, vectorize: bool | None) -> None:
    SEEN.clear()
    vnet = varify.variationalize(Keeping(inner))
    for n in (4, 8):
        vnet.predict(torch.randn(5, 3), n_samples=4, vectorize=vectorize)
        for kept in (SEEN, vnet.module.history):
            assert [is_dead(one) for one in kept] == [False] * n
            assert torch.stack(kept).isfinite().all()


@pytest.mark.parametrize("way", [fit_sigma, fit_by_ggn, describe])
@pytest.mark.parametrize("inner", [True, False], ids=["another tensor", "the output itself"])
def test_lists_get_usable_tensors_alone(inner: bool, way: Callable[[Any], None]) -> None:
    SEEN.clear()
    net = Keeping(inner)
    vnet, same = varify.variationalize(net), varify.variationalize(nn.Sequential(copy.deepcopy(net.fc)))
    features: list[Tensor] = []
    vnet.module.fc.register_forward_hook(lambda module, inputs, output: features.append(output))
    torch.manual_seed(1)
    way(vnet)
    for kept in (SEEN, vnet.module.history, features):
        assert kept
        assert not any(map(is_dead, kept))
        assert all((one + 1).isfinite().all() for one in kept)
    torch.manual_seed(1)
    way(same)
    for mine, other in zip(vnet.posteriors.values(), same.posteriors.values(), strict=True):
        torch.testing.assert_close(mine.sigma, other.sigma)


LOG: list[Tensor] = []


class Collector:
    def __init__(self) -> None:
        self.losses: list[Tensor] = []


class WithSideEffects(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.collector = Collector()
        self.history: dict[str, list[Tensor]] = {"h": []}

    def forward(self, x: Tensor, aux_losses: list[Tensor], cache: dict[str, Tensor]) -> Tensor:
        h = self.fc(x)
        loss = h.pow(2).mean()
        aux_losses.append(loss)
        cache["h"] = h
        self.collector.losses.append(loss)
        self.history["h"].append(h)
        LOG.append(h)
        return h


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("training", [True, False])
def test_what_forward_appends_is_there(training: bool, estimator: str) -> None:
    LOG.clear()
    vnet = varify.variationalize(WithSideEffects(), estimator=estimator).train(training)
    aux: list[Tensor] = []
    cache: dict[str, Tensor] = {}
    for _ in range(3):
        output = vnet(torch.randn(2, 3), aux, cache)
    lists = [aux, vnet.module.collector.losses, vnet.module.history["h"], LOG]
    assert [len(one) for one in lists] == [3] * 4
    assert cache["h"] is output
    assert vnet.module.history["h"][-1] is LOG[-1] is output
    aux[-1].backward()
    torch.testing.assert_close(vnet.module.fc.bias.grad, 2 * output.detach().sum(0) / output.numel())


# --- what forward asks for


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(1, 2)
        causal = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
        return scores.masked_fill(causal, torch.finfo(scores.dtype).min).softmax(-1) @ x.to(scores.dtype)


class ByType(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.q(x)
        return h * 2 if h.dtype == torch.float32 else h * 3


class ToItsType(nn.Module):
    """As RMSNorm does it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.gain = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.q(x)
        wide = h.float()
        return self.gain.to(h.dtype) * (wide * wide.square().mean(-1, keepdim=True).rsqrt()).to(h.dtype)


class PartlyInHalf(nn.Module):
    """Autocast on for one layer and off for the other, whatever it is around."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            h = self.q(x)
            h = h * 2 if h.dtype == torch.float32 else h * 3
        with torch.autocast("cpu", enabled=False):
            h = self.k(h.float())
            return h * 2 if h.dtype == torch.float32 else h * 3


@pytest.mark.parametrize("estimator", ["weights", "auto"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None], ids=str)
@pytest.mark.parametrize("build", [Attention, ByType, ToItsType, PartlyInHalf])
def test_autocast_is_the_networks_own(build: Build, dtype: torch.dtype | None, estimator: str) -> None:
    net, x = build(), torch.randn(2, 5, 4)
    vnet = varify.variationalize(net, init=CERTAIN, estimator=estimator)
    with torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext():
        expected = net(x)
        outputs = [vnet(x), vnet(x), vnet.eval()(x)]
        outputs += [vnet.predict(x, n_samples=3, vectorize=v).samples[-1] for v in (None, True, False)]
    rounding = 4 * torch.finfo(dtype or torch.bfloat16).eps
    for output in outputs:
        assert output.dtype == expected.dtype
        torch.testing.assert_close(output, expected, rtol=rounding, atol=rounding * expected.abs().max().item())


def test_after_autocast_predictions_are_vectorized_again() -> None:
    vnet, x = varify.variationalize(ByType()), torch.randn(2, 5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert not vnet.predict(x, n_samples=3).vectorized
    assert vnet.predict(x, n_samples=3).vectorized


def test_fit_sigma_under_autocast_takes_the_branch_of_the_network() -> None:
    net, data = ByType(), [(torch.randn(6, 4), torch.randn(6, 4))]
    vnet = varify.variationalize(net)
    with torch.autocast("cpu", torch.bfloat16):
        varify.fit_sigma(vnet, data, lambda y, t: F.mse_loss(y.float(), t), num_data=6)
    exact = varify.variationalize(nn.Sequential(copy.deepcopy(net.q)))
    varify.fit_sigma(exact, data, lambda y, t: F.mse_loss(3 * y, t), num_data=6)
    for mine, other in zip(vnet.posteriors.values(), exact.posteriors.values(), strict=True):
        torch.testing.assert_close(mine.sigma, other.sigma, rtol=0.1, atol=0.0)


class OnDevice(Layer):
    @property
    def device(self) -> torch.device:  # as Hugging Face and Lightning have it
        return next(self.parameters()).device

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if self.device.type == "cpu" else 2 * self.fc(x)


class OnDeviceOfBuffers(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("one", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        known = {*self._parameters.values(), *self.fc.state_dict().values(), *self.buffers()}
        return self.fc(x) * (1 if not any(t.is_meta for t in known) else 2)


class IfTrainable(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * (1 if any(p.requires_grad for p in self.parameters()) else 5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("build", [OnDevice, OnDeviceOfBuffers])
def test_parameters_are_on_their_device(build: Build, estimator: str) -> None:
    net, x = build(), torch.randn(2, 3)
    vnet = varify.variationalize(net, init=CERTAIN, estimator=estimator)
    for f in (vnet, vnet, vnet.eval(), lambda x: vnet.predict(x, n_samples=3).mean):
        torch.testing.assert_close(f(x), net(x))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_parameters_require_gradients_as_the_networks_do(estimator: str) -> None:
    net, x = IfTrainable(), torch.randn(2, 3)
    vnet = varify.variationalize(net, init=CERTAIN, estimator=estimator)
    for _ in range(2):
        for around in (contextlib.nullcontext, torch.no_grad, torch.inference_mode):
            with around():
                torch.testing.assert_close(vnet.train()(x), net(x))
                torch.testing.assert_close(vnet.eval()(x), net(x))
                for vectorize in (None, True, False):
                    samples = vnet.predict(x, n_samples=3, vectorize=vectorize).samples
                    torch.testing.assert_close(samples, net(x).expand_as(samples))
                    assert not samples.requires_grad
        vnet.requires_grad_(False)
        net.requires_grad_(False)


class ByGradMode(Layer):
    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        return h if torch.is_grad_enabled() else h.softmax(-1)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("first", [True, False])
def test_forward_knows_whether_gradients_are_on(first: bool, around: Any, estimator: str) -> None:
    net, x = ByGradMode(), torch.randn(2, 3)
    vnet = varify.variationalize(net, init=CERTAIN, estimator=estimator)
    if first:
        torch.testing.assert_close(vnet(x), net(x))
    with around():
        torch.testing.assert_close(vnet(x).sum(1), torch.ones(2))
        torch.testing.assert_close(vnet.predict(x, n_samples=2).samples.sum(2), torch.ones(2, 2))
    torch.testing.assert_close(vnet.predict(x, n_samples=2).mean, net(x).softmax(-1).detach())
    torch.testing.assert_close(vnet(x), net(x))


class OtherUseWithoutGradients(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if torch.is_grad_enabled() else x @ self.fc.weight.T.exp() + self.fc.bias.exp()


@pytest.mark.parametrize("strict", [True, False])
def test_a_validation_without_gradients_leaves_estimators_alone(strict: bool) -> None:
    vnet = varify.variationalize(OtherUseWithoutGradients(), estimator="local", strict=strict)
    x = torch.zeros(200, 3)
    for _ in range(3):
        with torch.no_grad():
            vnet(x)
        output = vnet(x)
    # the bias has a noise of its own in each row; a drawn one has the same in all
    assert output.std(0).min() > 0


# --- custom random generators

NUMPY, PYTHON = np.random.default_rng(0), random.Random(0)


class Augment:
    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def __call__(self, h: Tensor) -> Tensor:
        return h * 0 + self.rng.random()


class ByNumpys(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * 0 + NUMPY.random()


class ByPythons(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * 0 + PYTHON.random()


class ByAHelpers(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.augment = Augment()

    def forward(self, x: Tensor) -> Tensor:
        return self.augment(self.fc(x))


class ByTheGlobalOnes(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * 0 + (random.random() + np.random.rand()) / 2


@pytest.mark.parametrize("build", [ByNumpys, ByPythons, ByAHelpers, ByTheGlobalOnes])
def test_every_forward_and_every_draw_has_its_own_random_number(build: Build) -> None:
    x = torch.randn(2, 3)
    for estimator in ("weights", "auto"):
        vnet = varify.variationalize(build(), estimator=estimator)
        found = [vnet(x)[0, 0].item() for _ in range(6)]
        for vectorize in (None, True, False, None):
            found += vnet.predict(x, n_samples=4, vectorize=vectorize).samples[:, 0, 0].tolist()
        assert len(set(found)) == len(found) == 22


def test_predictions_are_vectorized_where_nothing_prevents_it() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    vnet, x = varify.variationalize(net), torch.randn(5, 3)
    for _ in range(2):
        assert vnet.predict(x, n_samples=4).vectorized
    assert vnet.predict(x, n_samples=1).n_samples == 1
    assert vnet.predict(x, n_samples=4).vectorized


# --- attributes that change


class Changing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4, bias=False)
        self.register_buffer("mask", None)
        self.config = {"head": {"scale": 1.0}}
        self.table = [[1.0]]
        self.act = torch.relu
        self.temperature = np.float32(1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.fc(x)) * self.config["head"]["scale"] * self.table[0][0] / float(self.temperature)
        return h if self.mask is None else h * self.mask


def set_scale(net: Any) -> None:
    net.config["head"]["scale"] = 3.0


def set_item(net: Any) -> None:
    net.table[0][0] = 3.0


def set_mask(net: Any) -> None:
    net.mask = torch.tensor([1.0, 0.0, 2.0, 0.0])


def set_function(net: Any) -> None:
    net.act = torch.tanh


def set_temperature(net: Any) -> None:
    net.temperature = np.float32(3)


def set_bias(net: Any) -> None:
    net.fc.bias = nn.Parameter(torch.full((4,), 100.0))


def take_bias(net: Any) -> None:
    net.fc.bias = None


CHANGES = [set_scale, set_item, set_mask, set_function, set_temperature, set_bias]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("change", CHANGES)
def test_changed_attributes_are_seen(change: Callable[[Any], None], estimator: str) -> None:
    vnet, x = varify.variationalize(Changing(), init=CERTAIN, estimator=estimator), torch.randn(2, 3)
    changes = [change, take_bias] if change is set_bias else [change]
    for following in (*changes, None):
        for f in (vnet, vnet, lambda x: vnet.predict(x, n_samples=3).mean):
            torch.testing.assert_close(f(x), vnet.module(x))
        if following:
            before = vnet.module(x)
            following(vnet.module)
            assert not torch.equal(vnet.module(x), before)


class Annealed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)])
        self.temperature = 1.0

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.body(x) * scale / self.temperature


def by_attribute(vnet: Any, step: int) -> Tensor:
    vnet.module.temperature = 1 + 0.01 * step
    return vnet(torch.randn(2, 8))


def by_argument(vnet: Any, step: int) -> Tensor:
    return vnet(torch.randn(2, 8), 1 + 0.01 * step)


def by_length(vnet: Any, step: int) -> Tensor:
    return vnet(torch.randn(2, 1 + step, 8))


def by_batch(vnet: Any, step: int) -> Tensor:
    return vnet(torch.randn(2 + step, 8))


@pytest.mark.parametrize("estimator", ["local", "flipout", "auto"])
@pytest.mark.parametrize("way", [by_attribute, by_argument, by_length, by_batch])
def test_the_estimator_stays_however_often_a_value_changes(way: Callable[[Any, int], Tensor], estimator: str) -> None:
    vnet = varify.variationalize(Annealed(), estimator=estimator, strict=True)
    for step in range(140):
        way(vnet, step)
    rows = str(vnet.summary()).splitlines()
    assert sum("local" in row or "flipout" in row for row in rows) == 6
    assert len(vnet.engine.plans) == 1
    assert all(
        decision.estimator != "weights" for plan in vnet.engine.plans.values() for decision in plan.decisions.values()
    )


# --- parameters that forward writes into


class Codebook(nn.Module):
    """Vector quantization, whose codes follow the data without gradients, in one of the ways people write that."""

    def __init__(self, write: Callable[[nn.Parameter, Tensor], Any]) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(3, 2), nn.Linear(2, 3)
        self.codes = nn.Parameter(torch.randn(5, 2), requires_grad=False)
        self.write = write
        self.noise = torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        z = self.encode(x)
        nearest = torch.cdist(z, self.codes).argmin(1)
        quantized = self.codes[nearest]
        if self.training:
            self.write(self.codes, F.one_hot(nearest, 5).float().T @ z.detach())
        return self.decode(z + (quantized - z).detach()) + torch.rand(1, generator=self.noise)


def write_data(codes: nn.Parameter, means: Tensor) -> None:
    codes.data.mul_(0.9).add_(means, alpha=0.1)


def write_in_place(codes: nn.Parameter, means: Tensor) -> None:
    with torch.no_grad():
        codes.copy_(0.9 * codes + 0.1 * means)


def set_data(codes: nn.Parameter, means: Tensor) -> None:
    codes.data = 0.9 * codes.data + 0.1 * means


def write_many(codes: nn.Parameter, means: Tensor) -> None:
    torch._foreach_lerp_([codes.data], [means], 0.1)
    torch.add(codes.detach(), means, alpha=0.1, out=codes.data)


def write_rows(codes: nn.Parameter, means: Tensor) -> None:
    codes.data[1:] += means[1:]
    codes.detach()[0] = means[0]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("write", [write_data, write_in_place, set_data, write_many, write_rows])
def test_what_forward_writes_into_a_parameter_is_written_once(write: Any, estimator: str) -> None:
    net, x = Codebook(write), torch.randn(6, 3)
    vnet = varify.variationalize(net, init=CERTAIN, estimator=estimator)
    vnet.module.noise, net.noise = (torch.Generator().manual_seed(1) for _ in range(2))
    for _ in range(3):
        torch.testing.assert_close(vnet(x), net(x))
        torch.testing.assert_close(vnet.module.codes, net.codes)


class MakesALayer(Layer):
    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "extra"):
            self.extra = nn.Linear(4, 4)
        return self.extra(self.fc(x))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_layer_made_in_forward_is_made_once(estimator: str) -> None:
    vnet, x = varify.variationalize(MakesALayer(), init=CERTAIN, estimator=estimator), torch.randn(2, 3)
    first = vnet(x)
    for _ in range(2):
        torch.testing.assert_close(vnet(x), first)
        torch.testing.assert_close(vnet.module(x), first)


# --- variational modules within variational ones


def nested(estimator: str = "weights") -> varify.VariationalModule:
    """Only the inner one is uncertain."""
    inner = varify.variationalize(nn.Linear(3, 3), init=varify.inits.Constant(0.5), estimator=estimator)
    around = nn.Sequential(inner, nn.Linear(3, 1))
    return varify.variationalize(around, init=varify.inits.Constant(1e-6), estimator=estimator)


def nested_twice() -> varify.VariationalModule:
    return varify.variationalize(nn.Sequential(nested(), nn.Linear(1, 1)), init=varify.inits.Constant(1e-6))


NESTED = [nested, nested_twice]


@pytest.mark.parametrize("build", NESTED)
def test_predictions_and_sampling_draw_the_weights_of_modules_within(build: Callable[[], Any]) -> None:
    vnet, x = build(), torch.randn(5, 3)
    expected = spread(lambda: vnet(x), 400)
    assert expected > 0.05
    for _ in range(2):
        # standard deviations of 400 draws have an error of 3.5 %
        assert vnet.predict(x, n_samples=400).std.max().item() == pytest.approx(expected, rel=0.25)
        vnet.eval()
        assert spread(lambda: vnet(x)) == 0
        with vnet.sampling():
            assert spread(lambda: vnet(x), 400) == pytest.approx(expected, rel=0.25)
        vnet.train()


@pytest.mark.parametrize("build", NESTED)
@pytest.mark.parametrize("predicted_before", [True, False])
def test_a_fixed_draw_is_one_for_modules_within(build: Callable[[], Any], predicted_before: bool) -> None:
    vnet, x = build(), torch.randn(5, 3)
    if predicted_before:
        vnet.predict(x, n_samples=2)
    found = []
    for _ in range(2):
        with vnet.fixed_draw():
            predicted = vnet.predict(x, n_samples=3)
            found.append(vnet(x))
            assert torch.equal(vnet(x), found[-1])
            torch.testing.assert_close(predicted.samples, found[-1].detach().expand(3, 5, 1))
    assert not torch.allclose(*found, atol=1e-3)


@pytest.mark.parametrize("build", NESTED)
def test_the_importance_weighted_bound_counts_modules_within(build: Callable[[], Any]) -> None:
    vnet, x, y = build(), torch.randn(5, 3), torch.zeros(5, 1)
    objective = varify.ELBO(num_data=5, bound="importance_weighted")
    with torch.no_grad():
        kls = torch.stack([objective(vnet, F.mse_loss, x, y).kl for _ in range(400)])
    assert abs(kls.mean() - vnet.prior_loss()) < 5 * kls.std() / 400**0.5  # false alarm: 1 run in 1.7 million


def test_the_importance_weighted_bound_weighs_the_draws_that_it_ran() -> None:
    """A network that returns its weights, so that the ratio of each draw is known from its output."""

    class Weights(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.w + 0 * x

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.v = (
                varify.variationalize(Weights(), init=varify.inits.Constant(0.3)),
                nn.Parameter(torch.ones(4)),
            )

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.inner(x), self.v])

    vnet = varify.variationalize(Around(), init=varify.inits.Constant(0.2))
    drawn: list[Tensor] = []
    objective = varify.ELBO(num_data=1, bound="importance_weighted", n_samples=1)
    terms = objective(vnet, lambda output, _: drawn.append(output) or output.sum() * 0, torch.zeros(4), torch.zeros(1))
    inner = vnet.module.inner
    expected = torch.zeros(())
    for w, q in zip(drawn[0], (inner.posteriors["w"], vnet.posteriors["v"]), strict=True):
        expected = expected + torch.distributions.Normal(q.mean, q.sigma).log_prob(w).sum() - q.prior.log_prob(w)
    torch.testing.assert_close(terms.kl, expected)


@pytest.mark.parametrize("build", NESTED)
def test_the_description_length_counts_modules_within(build: Callable[[], Any]) -> None:
    vnet = build()
    data = [(torch.randn(5, 3), torch.zeros(5, 1))]
    length = varify.description_length(vnet, data, F.mse_loss)
    assert length.model == pytest.approx(vnet.prior_loss().item() / np.log(2))
    parts = [m for m in vnet.modules() if isinstance(m, varify.VariationalModule)]
    assert len(length.weights) == sum(len(part.posteriors) for part in parts)
    if build is nested:
        assert set(length.weights) == {"1.weight", "1.bias", "0.weight", "0.bias"}


@pytest.mark.parametrize("build", NESTED)
def test_ordinary_copies_have_no_variational_module_within(build: Callable[[], Any]) -> None:
    vnet, x = build(), torch.randn(5, 3)
    for made in (vnet.mean_model(), vnet.sample_model()):
        assert not any(isinstance(module, varify.VariationalModule) for module in made.modules())
        assert type(made) is nn.Sequential
        made.train()
        assert torch.equal(made(x), made(x))
    torch.testing.assert_close(vnet.mean_model()(x), vnet.eval()(x))
    assert spread(lambda: vnet.sample_model()(x)) > 0.05
    with vnet.fixed_draw(), vnet.sampling():
        torch.testing.assert_close(vnet.sample_model()(x), vnet(x))


# --- pruned weights


def pruned() -> tuple[varify.VariationalModule, Tensor]:
    vnet = varify.variationalize(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    varify.prune(vnet, 0.5)
    return vnet, vnet.posteriors["0.weight"].fixed == 2


@pytest.mark.parametrize("training", [True, False], ids=["drawn", "at the means"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_pruned_weights_stay_at_zero(momentum: float, training: bool) -> None:
    x = torch.randn(8, 3)
    vnet, gone = pruned()
    vnet.train(training)
    optimizer = torch.optim.SGD(vnet.parameters(), 0.1, momentum=momentum)
    for step in range(6):
        if momentum and step == 3:  # momentum of the time before moves what is pruned now
            varify.prune(vnet, 0.8)
            gone = vnet.posteriors["0.weight"].fixed == 2
        optimizer.zero_grad()
        (vnet(x) - 1).pow(2).sum().backward()
        optimizer.step()
        assert vnet.posteriors["0.weight"].mean[gone].eq(0).all()
    if not momentum:
        assert vnet.module.state_dict()["0.weight"][gone].eq(0).all()
    if not training:
        kept = vnet.module[0].weight.masked_fill(gone, 0.0)
        hidden = F.linear(x, kept, vnet.posteriors["0.bias"].mean).tanh()
        torch.testing.assert_close(
            vnet(x), F.linear(hidden, *(vnet.posteriors[f"2.{n}"].mean for n in ("weight", "bias")))
        )


@pytest.mark.parametrize("between", ["state_dict", "train", "eval", "predict", "deepcopy"])
@pytest.mark.parametrize("training", [True, False])
def test_a_pruned_network_may_be_looked_at_between_forward_and_backward(training: bool, between: str) -> None:
    vnet, _ = pruned()
    vnet.train(training)
    x = torch.randn(4, 3, requires_grad=True)
    output = vnet(x).sum()
    if between == "deepcopy":
        copy.deepcopy(vnet)
    elif between == "predict":
        vnet.predict(x.detach(), n_samples=2)
    else:
        getattr(vnet, between)()
    output.backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("how", ["prune", "set_prior"])
def test_averages_of_weights_go_on_after_a_change(how: str) -> None:
    vnet = varify.variationalize(nn.Linear(3, 2))
    average = AveragedModel(vnet)
    average.update_parameters(vnet)
    first = vnet.module.weight.detach().clone()
    if how == "prune":
        varify.prune(vnet, 0.5)
    else:
        vnet.set_prior("gaussian", std=torch.full((2, 3), 0.1), where="weight")
    with torch.no_grad():
        vnet.module.weight.add_(1.0)
    average.update_parameters(vnet)
    torch.testing.assert_close(average.module.module.weight.detach(), (first + vnet.module.weight.detach()) / 2)
    average(torch.randn(4, 3))


# --- the dimension that counts examples


@pytest.mark.parametrize("estimator", ["auto", "flipout"])
def test_batch_dim_names_the_dimension_of_examples(estimator: str) -> None:
    z = torch.randn(4)
    for batch_dim, shape in ((0, (2, 3, 4)), (1, (3, 2, 4))):  # two examples of three positions
        vnet = varify.variationalize(
            nn.Linear(4, 1, bias=False), estimator=estimator, init=varify.inits.Constant(0.5), batch_dim=batch_dim
        )
        draws = torch.stack([vnet(z.expand(shape)).detach().movedim(batch_dim, 0).flatten() for _ in range(3000)])
        correlations = torch.corrcoef(draws.T)
        torch.testing.assert_close(correlations[:3, :3], torch.ones(3, 3))
        assert correlations[:3, 3:].abs().max() < 0.1  # 5.5 standard errors


class Encoder(nn.Module):
    """A transformer that takes what torch takes by default, `(length, batch, features)`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=False)
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x))


@pytest.mark.parametrize("estimator", ["auto", "flipout"])
def test_batch_dim_holds_for_every_layer_of_a_transformer(estimator: str) -> None:
    vnet = varify.variationalize(Encoder(), estimator=estimator, init=varify.inits.Constant(0.3), batch_dim=1)
    x = torch.randn(1, 2, 4).expand(3, 2, 4)  # all positions of an example are equal, and so are their outputs
    draws = torch.stack([vnet(x).detach().squeeze(-1) for _ in range(500)])
    torch.testing.assert_close(draws, draws[:, :1].expand_as(draws), rtol=1e-3, atol=1e-4)
    assert torch.corrcoef(draws[:, 0].T)[0, 1].abs() < 0.95
    assert draws.std(0).min() > 0
    assert "flipout" in str(vnet.summary())


# --- memory checks, and other tensors than dense ones


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_usual_memory_check_finds_no_odd_objects(estimator: str) -> None:
    vnet, x = varify.variationalize(nn.Linear(3, 4), estimator=estimator), torch.randn(2, 3)
    for _ in range(2):
        vnet(x).sum().backward()
    vnet.predict(x)
    for alive in (True, False):
        if not alive:
            del vnet
        gc.collect()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tensors = [one for one in gc.get_objects() if torch.is_tensor(one)]
            assert all(isinstance(one.shape, tuple) for one in tensors if not one.is_nested)


@contextlib.contextmanager
def _beta_features() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors(layout: torch.layout, estimator: str) -> None:
    net, parts = nn.Linear(4, 4), [torch.randn(2, 4), torch.randn(3, 4)]
    with _beta_features():
        x = torch.nested.nested_tensor(parts, layout=layout)
        vnet = varify.variationalize(net, init=CERTAIN, estimator=estimator)
        vnet(torch.randn(2, 3, 4))  # of as many dimensions
        for _ in range(2):
            outputs = vnet(x).unbind()
            for output, part in zip(outputs, parts, strict=True):
                torch.testing.assert_close(output, net(part))
        sum(output.sum() for output in outputs).backward()
        assert all(p.grad is not None for p in vnet.parameters())
        for vectorize in (None, True):
            predicted = vnet.predict(x, n_samples=5, vectorize=vectorize)
            assert len(predicted) == 2
            for one, part in zip(predicted, parts, strict=True):
                assert one.samples.shape == (5, *part.shape)
                torch.testing.assert_close(one.mean, net(part).detach())


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("sparse", [Tensor.to_sparse, Tensor.to_sparse_csr])
def test_sparse_inputs(sparse: Callable[[Tensor], Tensor], estimator: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x @ self.fc.weight.t() + self.fc.bias)

    dense = torch.randn(5, 4).relu()
    with _beta_features():
        x = sparse(dense)
        net = Net()
        vnet = varify.variationalize(net, init=CERTAIN, estimator=estimator)
        vnet(dense)
        for _ in range(2):
            torch.testing.assert_close(vnet(x), net(dense))
        vnet(x).sum().backward()
        torch.testing.assert_close(vnet.predict(x, n_samples=3).mean, net(dense).detach())


# --- names, types, keywords


class Scaled(Layer):
    def forward(self, x: Tensor, m: Tensor | None = None, s: float = 1.0) -> Tensor:
        return self.fc(x) * (1 if m is None else m) * s


def test_functional_takes_keywords_in_any_order() -> None:
    vnet, x, m = varify.variationalize(Scaled()), torch.randn(4, 3), torch.randn(4, 4)
    theta = {name: q.rsample() for name, q in vnet.posteriors.items()}
    f = vnet.functional(x=x, m=m)
    expected = F.linear(x, theta["fc.weight"], theta["fc.bias"]) * m
    for output in (f(theta, m=m, x=x), f(theta, x=x, m=m), f(theta, x, m), f(theta, x, m=m), f(theta, x, s=1.0, m=m)):
        torch.testing.assert_close(output, expected)
    torch.testing.assert_close(f(theta, x, s=2.0), 2 * F.linear(x, theta["fc.weight"], theta["fc.bias"]))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.o = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.o.weight = self.e.weight
        self.body = nn.Linear(3, 3)
        self.again = self.body

    def forward(self, i: Tensor) -> Tensor:
        return self.o(self.again(self.body(self.e(i))))


@pytest.mark.parametrize("where", ["o.weight", "e.weight", "o.*", ["e.weight", "o.weight"]])
def test_a_tied_weight_has_its_prior_by_any_of_its_names(where: Any) -> None:
    vnet = varify.variationalize(Tied())
    vnet.set_prior("gaussian", std=0.1, where=where)
    for name in ("e.weight", "o.weight"):
        assert "0.1" in repr(vnet.posteriors[name].prior)
    assert "0.1)" not in repr(vnet.posteriors["body.weight"].prior)


def test_assigning_a_state_keeps_what_is_tied() -> None:
    vnet, other, i = varify.variationalize(Tied()), varify.variationalize(Tied()), torch.arange(4)
    vnet(i)
    state = copy.deepcopy(other.state_dict())
    vnet.load_state_dict(state, assign=True)
    assert vnet.module.o.weight is vnet.module.e.weight
    assert isinstance(vnet.module.e.weight, nn.Parameter)
    assert vnet.module.e.weight.data_ptr() in (state["module.e.weight"].data_ptr(), state["module.o.weight"].data_ptr())
    torch.testing.assert_close(vnet.eval()(i), other.eval()(i))
    torch.testing.assert_close(vnet.prior_loss(), other.prior_loss())
    vnet.train()(i).sum().backward()
    assert vnet.module.o.weight.grad is not None
    assert len(vnet.posteriors) == 3
    vnet.predict(i)


def test_assigning_a_part_of_a_state_keeps_what_is_tied() -> None:
    inner = varify.variationalize(Tied())
    vnet, i = varify.variationalize(nn.Sequential(inner, nn.Linear(5, 2))), torch.arange(4)
    vnet(i)
    state = copy.deepcopy(vnet.state_dict())
    name = "module.0.module.e.weight"
    del state[name]
    state["module.0.module.o.weight"] = torch.ones(5, 3)
    assert vnet.load_state_dict(state, strict=False, assign=True).missing_keys == [name]
    within = vnet.module[0].module
    assert within.o.weight is within.e.weight
    assert within.e.weight.eq(1).all()
    vnet(i).sum().backward()


def test_an_estimated_divergence_in_a_fixed_draw_leaves_other_generators_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    vnet = varify.variationalize(nn.Linear(3, 2), prior=varify.priors.ScaleMixture(1.0, 0.1, 0.5))
    with vnet.fixed_draw():
        state = torch.get_rng_state()
        first = vnet.prior_loss()
        second = vnet.prior_loss()
    assert first == second
    assert seeded == []
    torch.rand(3)  # the processor's goes on as if nothing had been
    after = torch.get_rng_state()
    assert not torch.equal(state, after)
    assert vnet.prior_loss() != vnet.prior_loss()


class Cast(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.to(self.fc.weight.dtype))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("whole", [True, False])
def test_a_network_may_change_its_type_after_a_call(whole: bool, estimator: str) -> None:
    vnet, x = varify.variationalize(Cast(), estimator=estimator), torch.randn(2, 3)
    vnet(x)
    vnet.predict(x)
    (vnet if whole else vnet.module).double()
    assert vnet(x).dtype == vnet(x).dtype == vnet.eval()(x).dtype == torch.float64
    assert vnet.predict(x).mean.dtype == torch.float64
    vnet.train()(x).sum().backward()
    assert all(p.grad.dtype == p.dtype for p in vnet.parameters())


def test_a_conversion_leaves_nothing_in_the_cache_of_source_lines() -> None:
    def convert_and_call() -> None:
        for estimator in ESTIMATORS:
            vnet, x = varify.variationalize(Layered(), estimator=estimator), torch.randn(2, 3)
            vnet(x)
            vnet(x)
            vnet.predict(x)
            vnet.summary(x)

    class Layered(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    convert_and_call()
    gc.collect()
    before = len(linecache.cache)
    for _ in range(5):
        convert_and_call()
    gc.collect()
    assert len(linecache.cache) == before


def test_a_parameter_renamed_and_an_attribute_moved_are_followed() -> None:
    class Moving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.shift = nn.Linear(3, 2), nn.Parameter(torch.zeros(2), requires_grad=False)
            self.first = self.kept = "kept"

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if hasattr(self, "first"):
                value = self.first
                del self.first
                self.second = value
            shift = self.shift if "shift" in self._parameters else self.other
            return self.fc(x) + shift

    vnet = varify.variationalize(Moving(), where="fc.*")
    vnet(torch.ones(1, 3))
    assert vnet.module.second == "kept"
    assert not hasattr(vnet.module, "first")
    vnet.module.other = vnet.module.shift
    del vnet.module.shift
    assert vnet(torch.ones(1, 3)).shape == (1, 2)
