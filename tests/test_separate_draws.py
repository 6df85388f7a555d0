"""Each input draws for itself: its samples have the distribution that joint draws give it."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import varify
from tests.networks import CASES, seeded
from varify.graph import separate

DRAWS = 100_000
QUANTILES = torch.tensor([0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99], dtype=torch.float64)


def noisy(network: nn.Module, sigma: float = 0.3, **options: object) -> varify.VariationalModule:
    return varify.variationalize(network, init=varify.inits.Constant(sigma), **options)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))


class Mixed(nn.Module):
    """A convolution and a weight used twice, which are drawn, between layers that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv, self.twice, self.last = (
            nn.Linear(3, 6),
            nn.Conv1d(1, 2, 3),
            nn.Linear(8, 8),
            nn.Linear(8, 2),
        )
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        size = len(x)
        y = self.conv(torch.tanh(self.first(x)).view(size, 1, 6)).view(size, 8)
        y = self.twice(torch.relu(self.twice(y)))
        return self.last(y) * self.scale


def joint_draws(vnet: varify.VariationalModule, x: Tensor) -> Tensor:
    """Samples of so many joint draws, their weights made here."""
    torch.manual_seed(1)
    weights = {
        name: (q.mu + F.softplus(q.rho) * torch.randn(DRAWS, *q.mu.shape)).detach()
        for name, q in vnet.posteriors.items()
    }
    run = torch.func.vmap(lambda theta: functional_call(vnet.module, theta, (x,)), chunk_size=20_000)
    return run(weights).double()


@pytest.mark.parametrize(("batch", "by_itself"), [(1, True), (1, False), (3, False)])
@pytest.mark.parametrize(("build", "n"), [(mlp, DRAWS), (Mixed, 10_000)])
def test_mean_variance_and_quantiles_are_those_of_joint_draws(build: type, n: int, batch: int, by_itself: bool) -> None:
    torch.manual_seed(0)
    vnet, x = noisy(build()), torch.randn(batch, 3)
    joint = joint_draws(vnet, x)
    torch.manual_seed(2)
    prediction = vnet.predict(x, n_samples=n) if by_itself else vnet.predict(x, n_samples=n, joint=False)
    assert prediction.vectorized
    samples, by_number = prediction.samples.double(), (1 / n + 1 / DRAWS) ** 0.5
    # Six standard errors: 9 numbers of at most 6 outputs in 6 cases pass them in 1 of 10 million choices of the seeds,
    # were they normal; the fourth moments, of a network's tails, are rough.
    away = joint - joint.mean(0)
    assert ((samples.mean(0) - joint.mean(0)).abs() < 6 * joint.std(0) * by_number).all()
    error = (away.pow(4).mean(0) - away.square().mean(0) ** 2).sqrt() * by_number
    assert ((samples.var(0) - joint.var(0)).abs() < 6 * error).all()
    for q in QUANTILES:
        below = (samples < joint.quantile(q, 0)).double().mean(0)
        assert ((below - q).abs() < 6 * (q * (1 - q)) ** 0.5 * by_number).all()


def test_only_what_an_example_uses_several_times_is_drawn() -> None:
    vnet = noisy(Mixed())
    vnet.predict(torch.randn(3, 3), joint=False)
    (served,) = vnet.engine.sampler._decisions.values()
    assert set(served) == {"first.weight", "first.bias", "last.weight", "last.bias", "scale"}


def test_inputs_draw_independently_and_outputs_of_one_input_jointly() -> None:
    vnet, x = noisy(mlp()), torch.randn(1, 3).expand(2, 3)
    joint, separate = (vnet.predict(x, n_samples=4000, seed=1, joint=way).samples for way in (True, False))
    assert torch.equal(joint[:, 0], joint[:, 1])
    correlation = torch.corrcoef(separate.flatten(1).T)  # input 0's two outputs, then input 1's
    limit = 5 * 4000**-0.5  # of each of 4 correlations: 1 false alarm in 400,000
    assert (correlation[:2, 2:].abs() < limit).all()
    expected = torch.corrcoef(joint[:, 0].T)[0, 1]
    for i in (0, 2):
        assert (correlation[i, i + 1] - expected).abs() < 2 * limit


@pytest.mark.parametrize("name", ["bias", "weights alone", "masked", "embedding"])
def test_one_layer_has_its_exact_moments(name: str) -> None:
    torch.manual_seed(0)
    if name == "embedding":
        vnet, x = (
            noisy(nn.Sequential(nn.Embedding(5, 4, padding_idx=0), nn.Flatten(0, 1))),
            torch.tensor([[1], [3], [0]]),
        )
        one_hot = F.one_hot(x[:, 0], 5).float()
        weight = vnet.posteriors["0.weight"]
        mean, var = one_hot @ weight.mean, one_hot @ weight.sigma.square()
    else:
        layer = nn.Linear(3, 4, bias=name == "bias")
        vnet, x = noisy(layer), torch.randn(5, 3)
        if name == "masked":
            varify.prune(vnet, fraction=0.5)
        weight = vnet.posteriors["weight"]
        mean, var = x @ weight.mean.T, x.square() @ weight.sigma.square().T
        if name == "bias":
            mean, var = mean + vnet.module.bias, var + vnet.posteriors["bias"].sigma.square()
    samples = vnet.predict(x, n_samples=50_000, seed=0, joint=False).samples
    # at most 20 means and 20 variances of 4 cases, five standard errors: 1 false alarm in 10,000
    assert ((samples.mean(0) - mean).abs() <= 5 * (var / 50_000).sqrt() + 1e-6).all()
    assert ((samples.var(0) - var).abs() <= 5 * var * (2 / 50_000) ** 0.5 + 1e-6).all()


def noise_of(call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, ...]]:
    """The shapes of noise that a call draws."""
    shapes: set[tuple[int, ...]] = set()
    randn_like = torch.randn_like
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda x, **k: shapes.add(tuple(x.shape)) or randn_like(x, **k))
        call()
    return shapes


def test_one_input_needs_no_weights_unless_asked_for_by_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    vnet, x = noisy(mlp()), torch.randn(2, 3)
    vnet.predict(x[:1])  # the first call is recorded with draws
    outputs, weights = {(1, 6), (1, 5), (1, 2)}, {(6, 3), (6,), (5, 6), (5,), (2, 5), (2,)}
    assert noise_of(lambda: vnet.predict(x[:1]), monkeypatch) == outputs
    for options in ({"seed": 1}, {"vectorize": True}, {"vectorize": False}, {"linearized": True}):
        assert noise_of(lambda options=options: vnet.predict(x[:1], **options), monkeypatch) == weights
    with vnet.fixed_draw():
        assert noise_of(lambda: vnet.predict(x[:1]), monkeypatch) == weights
        assert not vnet.predict(x[:1]).std.any()
    assert noise_of(lambda: vnet.predict(x), monkeypatch) == weights
    one, both = (vnet.predict(data, seed=1).samples for data in (x[:1], x))
    torch.testing.assert_close(one, both[:, :1])


def test_positions_of_one_input_see_one_weight() -> None:
    torch.manual_seed(0)
    vnet = noisy(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    samples = vnet.predict(torch.ones(1, 5, 3)).samples
    assert samples.std(0).min() > 0
    torch.testing.assert_close(samples, samples[:, :, :1].expand_as(samples))


def test_a_network_that_draws_most_weights_anyhow_is_recorded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    vnet = noisy(nn.Sequential(nn.Conv1d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 1)))
    recorded: list[int] = []
    decide = separate.exact_decisions
    monkeypatch.setattr(separate, "exact_decisions", lambda *a: recorded.append(1) or decide(*a))
    for length in (9, 10, 11):
        assert noise_of(lambda n=length: vnet.predict(torch.randn(1, 1, n)), monkeypatch) >= {(8, 1, 3), (1, 8)}
    assert len(recorded) == 1


@pytest.mark.parametrize("batch", [1, 4])
def test_a_first_call_draws_as_later_ones_do(batch: int) -> None:
    vnet, x, samples = noisy(mlp()), torch.randn(batch, 3), []
    for _ in range(2):
        torch.manual_seed(3)
        samples.append(vnet.predict(x, n_samples=4, joint=False).samples)
    assert torch.equal(*samples)


def test_an_argument_that_is_not_the_networks_is_refused_by_name() -> None:
    with pytest.raises(varify.ArgumentError, match="the number of draws is n_samples, got num_samples=3"):
        noisy(mlp()).predict(torch.ones(1, 3), num_samples=3)


COUNTS: list[int] = []


class Counting(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        COUNTS.append(1)
        return super().forward(x)


def test_a_deterministic_body_runs_once_and_no_weights_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    body = Counting(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    vnet, x = noisy(nn.Sequential(body, nn.Linear(4, 3)), where="1.*"), torch.randn(6, 1, 8, 8)
    vnet.predict(x, n_samples=2, joint=False)
    COUNTS.clear()
    shapes: list[tuple[int, ...]] = []
    randn_like = torch.randn_like
    monkeypatch.setattr(torch, "randn_like", lambda x, **k: shapes.append(tuple(x.shape)) or randn_like(x, **k))
    prediction = vnet.predict(x, n_samples=1000, joint=False)
    assert prediction.samples.shape == (1000, 6, 3)
    assert len(COUNTS) == 1
    assert shapes == [(6, 3)]  # noise on the outputs, in vmap; none of a weight's shape
    features = vnet.module[0].eval()(x)
    q, b = vnet.posteriors["1.weight"], vnet.posteriors["1.bias"]
    sigma = (features.square() @ q.sigma.square().T + b.sigma.square()).sqrt()
    # 18 numbers at six standard errors
    assert ((prediction.std / sigma - 1).abs() < 6 * (0.5 / 1000) ** 0.5).all()


@pytest.mark.parametrize("name", ["lstm", "untraceable", "tied", "noisy", "counting", "transformer", "dict output"])
def test_whatever_the_network_there_is_a_prediction(name: str) -> None:
    vnet = noisy(seeded(CASES[name]).eval(), 1e-6)
    args, kwargs = CASES[name].calls[0]
    separate, joint = (vnet.predict(*args, n_samples=3, seed=0, joint=way, **kwargs) for way in (False, True))
    leaves = [torch.utils._pytree.tree_leaves(p) for p in (separate, joint)]
    for one, other in zip(*leaves, strict=True):
        if isinstance(one, varify.Prediction) and name not in ("noisy", "counting"):
            torch.testing.assert_close(one.samples, other.samples, rtol=1e-3, atol=1e-3)
        elif isinstance(one, varify.Prediction):
            assert one.samples.shape == other.samples.shape


class ByData(nn.Module):
    """Uses its layer on two inputs where the data say so, which the first call does not."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return self.fc(y) if x.sum() > 0 else y


def test_a_use_that_was_not_foreseen_gets_joint_draws() -> None:
    vnet, x = noisy(ByData()), -torch.ones(4, 3)
    assert vnet.predict(x, joint=False, seed=0).samples.std(1).max() > 0  # equal inputs, drawn separately
    assert vnet.predict(-x, joint=False).samples.std(1).max() == 0  # jointly: the layer has two uses there
    again = vnet.predict(-x, joint=False, n_samples=4, seed=0).samples
    torch.testing.assert_close(again, vnet.predict(-x, n_samples=4, seed=0).samples)


class RowsByData(nn.Module):
    """Has each example twice in one operation where the data say so."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() < 0:
            return self.fc(x)
        once, again = self.fc(torch.cat([x, x])).chunk(2)
        return once + again


def test_an_example_with_more_rows_than_foreseen_sees_one_weight_at_all_of_them() -> None:
    vnet, x = noisy(RowsByData()), torch.ones(2, 3)
    assert vnet.predict(-x, joint=False).vectorized
    variance = vnet.predict(x, joint=False, n_samples=2000, seed=0).samples.var(0)
    # (2 w·x)²: 4·3·0.3²; two separate weights would have half of it. Six standard errors: 1 in 500 million
    assert ((variance / (12 * 0.3**2) - 1).abs() < 6 * (2 / 2000) ** 0.5).all()


def test_fixed_draws_and_the_linear_expansion_stay_joint() -> None:
    vnet, x = noisy(mlp()), torch.ones(4, 3)
    with vnet.fixed_draw():
        assert not vnet.predict(x, joint=False, n_samples=3).std.any()
    samples = vnet.predict(x, joint=False, linearized=True, n_samples=3).samples
    torch.testing.assert_close(samples[:, 0], samples[:, 1])
    assert vnet.predict(x, joint=False, n_samples=1).n_samples == 1


def test_gradients_of_separate_draws() -> None:
    vnet, x = noisy(mlp()), torch.randn(4, 3, requires_grad=True)
    prediction = vnet.predict(x, n_samples=5, joint=False, gradients=True)
    grads = torch.autograd.grad(prediction.samples.square().mean(), [x, *vnet.parameters()])
    assert all(grad.isfinite().all() and grad.any() for grad in grads)
