"""fit_temperature against brute force, closed forms and what must not happen."""

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

import varify
from tests.networks import CASES, seeded
from varify.analysis.searching import last_within, minimum


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3))


def data(n: int = 24) -> tuple[Tensor, Tensor]:
    """Labels that the classifier's means get right mostly, and are too sure of."""
    generator = torch.Generator().manual_seed(1)
    x = 3 * torch.randn(n, 4, generator=generator)
    noise = torch.rand(n, 3, generator=generator).log().neg().log().neg()
    return x, (classifier().eval()(x) / 2 - noise).argmax(1)


def sharp() -> varify.VariationalModule:
    network = classifier()
    network[3].weight.data *= 6
    return varify.variationalize(network, init=varify.inits.Constant(1.0))


def by_hand(vnet: varify.VariationalModule, x: Tensor, y: Tensor, n_samples: int) -> Callable[[float], float]:
    """The predictive's NLL by a loop, with the noise that `fit_temperature` has when it is called now."""
    state = torch.random.get_rng_state()
    torch.random.manual_seed(int(torch.randint(2**62, ())))
    noise = [{n: torch.randn(q.rho.shape) for n, q in vnet.posteriors.items()} for _ in range(n_samples)]
    torch.random.set_rng_state(state)
    network = copy.deepcopy(vnet.module).eval()
    sigma = {n: torch.log1p(q.rho.exp()) for n, q in vnet.posteriors.items()}
    mu = {n: q.mu.detach() for n, q in vnet.posteriors.items()}

    @torch.no_grad()
    def nll(t: float) -> float:
        p = torch.zeros(len(x), 3, dtype=torch.float64)
        for eps in noise:
            theta = {n: mu[n] + math.sqrt(t) * sigma[n] * eps[n] for n in mu}
            p += functional_call(network, theta, (x,)).double().softmax(1) / n_samples
        return -p[range(len(x)), y].log().mean().item()

    return nll


GRID = torch.logspace(-3, 4, 1001).tolist()  # steps of 1.6 %


def test_the_nll_is_least_by_brute_force() -> None:
    vnet, (x, y) = sharp(), data()
    before = {n: q.sigma.detach() for n, q in vnet.posteriors.items()}
    torch.manual_seed(3)
    nll = by_hand(vnet, x, y, 6)
    t = varify.fit_temperature(vnet, DataLoader(TensorDataset(x, y), 7), F.cross_entropy, n_samples=6)
    best = min(GRID, key=nll)
    assert 1e-3 < best < 1e3
    assert t == pytest.approx(best, rel=0.03)
    assert nll(t) <= nll(best) + 1e-5
    assert nll(t) < nll(0.0)
    for name, q in vnet.posteriors.items():
        torch.testing.assert_close(q.sigma, math.sqrt(t) * before[name])


@pytest.mark.parametrize("tolerance", [0.01, 0.2])
def test_tfb_is_the_largest_within_the_tolerance_by_brute_force(tolerance: float) -> None:
    vnet, (x, y) = sharp(), data()
    torch.manual_seed(3)
    nll = by_hand(vnet, x, y, 6)
    t = varify.fit_temperature(vnet, [(x, y)], F.cross_entropy, n_samples=6, rule="tfb", tolerance=tolerance)
    limit = (1 + tolerance) * nll(0.0)
    assert t == pytest.approx(max(s for s in GRID if nll(s) <= limit), rel=0.03)
    assert nll(t) <= limit * (1 + 1e-5)


def test_of_a_linear_gaussian_model_it_is_the_closed_form() -> None:
    """y = w x + noise, w ~ N(m, t s²), is N(m x, noise² + t s² x²), by any draws of enough."""
    torch.manual_seed(0)
    network = nn.Linear(1, 1, bias=False).double()
    network.weight.data.fill_(0.5)
    vnet = varify.variationalize(network, init=varify.inits.Constant(0.3)).double()
    x = torch.randn(60, 1, dtype=torch.float64)
    y = 0.5 * x + 1.5 * x.abs() * torch.randn(60, 1, dtype=torch.float64) + torch.randn(60, 1, dtype=torch.float64)

    def nll(log_t: float) -> float:
        var = 1.0 + math.exp(log_t) * 0.09 * x.square()
        return (0.5 * ((y - 0.5 * x).square() / var + (2 * math.pi * var).log())).mean().item()

    best = math.exp(scipy.optimize.minimize_scalar(nll, bounds=(-8, 8), method="bounded").x)
    torch.manual_seed(0)
    likelihood = varify.GaussianLikelihood(sigma=1.0).double()
    t = varify.fit_temperature(vnet, [(x, y)], likelihood, n_samples=250, bounds=(1e-2, 1e3))
    assert nll(math.log(t)) - nll(math.log(best)) < 2e-3
    assert t == pytest.approx(best, rel=0.2)


def test_batches_iterators_and_draws_of_other_networks_give_the_same() -> None:
    x, y = data()
    found = []
    for loader in (
        [(x, y)],
        DataLoader(TensorDataset(x, y), 5),
        DataLoader(TensorDataset(x, y), 24, shuffle=True),
        iter([(x[:10], y[:10]), (x[10:10], y[10:10]), (x[10:], y[10:])]),
        [((x,), y)],
        [({"input": x}, y)],
    ):
        vnet = sharp().train()
        torch.manual_seed(3)
        found.append(varify.fit_temperature(vnet, loader, F.cross_entropy, n_samples=3))
        assert all(m.training for m in vnet.modules())
    assert found == pytest.approx([found[0]] * len(found), rel=1e-6)


class Slow(nn.Module):
    """Can't be vectorized over data: it looks at values; and counts in a buffer."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.network(x) if x.sum() > 0 else self.network(x).clone()


def test_what_can_not_be_vectorized_runs_datum_by_datum_and_forgets() -> None:
    x, y = data()
    found = []
    for network in (sharp().module, Slow(sharp().module)):
        vnet = varify.variationalize(network, init=varify.inits.Constant(1.0))
        torch.manual_seed(3)
        found.append(varify.fit_temperature(vnet, [(x, y)], F.cross_entropy, n_samples=3))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert vnet.module.calls == 0


@pytest.mark.parametrize("case", ["lstm", "transformer", "cnn", "tied"])
@pytest.mark.parametrize("linearized", [False, True])
def test_it_lowers_the_nll_on_any_network(case: str, linearized: bool) -> None:
    vnet = varify.variationalize(seeded(CASES[case]).eval(), init=varify.inits.Constant(0.5))
    (x,), _ = CASES[case].calls[0]
    output = vnet(x).detach()
    y = output + 0.3 * torch.randn_like(output)
    criterion = lambda o, t: (o - t).square().sum() / len(o) / 0.02  # noqa: E731  # of a noise of 0.1
    t = varify.fit_temperature(vnet, [(x, y)], criterion, n_samples=4, bounds=(1e-5, 1e2), linearized=linearized)
    assert 1e-5 < t < 1.0  # sigma was far too wide


def test_of_a_linear_network_the_expansion_has_the_same_temperature() -> None:
    x, y = data()
    found = []
    for linearized in (False, True):
        torch.manual_seed(0)
        network = nn.Linear(4, 3)
        network.load_state_dict({"weight": 3 * torch.ones(3, 4).tril(), "bias": torch.zeros(3)})
        vnet = varify.variationalize(network, init=varify.inits.Constant(0.5))
        found.append(varify.fit_temperature(vnet, [(x, y)], F.cross_entropy, n_samples=4, linearized=linearized))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_fixed_weights_stay_and_sigmas_that_underflow_are_scaled_too() -> None:
    network = nn.Sequential(nn.Embedding(5, 3, padding_idx=1), nn.Flatten(), nn.Linear(6, 3))
    vnet = varify.variationalize(network, init=varify.inits.Constant(0.5), learn_rho=False)
    with torch.no_grad():
        vnet.rho.get_parameter("2.bias")[0] = -200.0
    varify.prune(vnet, 0.3)
    before = {n: q.rho.detach().clone() for n, q in vnet.posteriors.items()}
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randint(5, (20, 2), generator=generator), torch.randint(3, (20,), generator=generator)
    t = varify.fit_temperature(vnet, [(x, y)], F.cross_entropy, n_samples=4, rule="tfb", tolerance=0.05)
    for name, q in vnet.posteriors.items():
        free = torch.ones_like(q.rho, dtype=torch.bool) if q.fixed is None else q.fixed == 0
        assert torch.equal(q.rho[~free], before[name][~free])
        assert not torch.equal(q.rho[free], before[name][free])
    bias = vnet.posteriors["2.bias"].rho
    assert bias[0].item() == pytest.approx(-200.0 + math.log(t) / 2, rel=1e-5)


def test_bounds_are_told_of() -> None:
    x, _ = data()
    vnet = sharp()
    labels = vnet.mean_model().eval()(x).argmax(1)
    with pytest.warns(
        varify.VarifyWarning, match=r"at its bound, 0.01: within these the means alone predict best"
    ) as told:
        assert varify.fit_temperature(vnet, [(x, labels)], F.cross_entropy, bounds=(0.01, 1)) == pytest.approx(0.01)
    assert told[0].filename == __file__
    vnet = sharp()
    with pytest.warns(
        varify.VarifyWarning, match=r"its bound, 0.1: within these the NLL rises by more than the tolerance nowhere"
    ):
        found = varify.fit_temperature(
            vnet, [(x, labels)], F.cross_entropy, rule="tfb", tolerance=1e9, bounds=(0.01, 0.1)
        )
    assert found == pytest.approx(0.1)
    with pytest.warns(varify.VarifyWarning, match=r"its bound, 1: .* rises by more than the tolerance anywhere"):
        varify.fit_temperature(sharp(), [(x, labels)], F.cross_entropy, rule="tfb", bounds=(1, 9))


def test_bad_input_changes_nothing() -> None:
    vnet, (x, y) = sharp().train(), data()
    before = copy.deepcopy(vnet.state_dict())
    good: dict[str, Any] = {"loader": [(x, y)], "criterion": F.cross_entropy}
    for options, told in (
        ({"loader": []}, "the loader is empty: there are no data to fit the temperature to"),
        ({"loader": iter([])}, "the loader is empty"),
        ({"n_samples": 0}, "n_samples must be a positive integer, got 0"),
        ({"rule": "map"}, "rule must be one of 'nll', 'tfb', got 'map'"),
        ({"tolerance": -0.1}, "tolerance must be a number of at least 0, got -0.1"),
        ({"tolerance": "1%"}, "tolerance must be a number of at least 0, got '1%'"),
        ({"bounds": 3.0}, r"bounds must be two numbers, \(least, greatest\), got 3.0"),
        ({"bounds": (0.0, 1.0)}, "bounds must be a positive number, got 0.0"),
        ({"bounds": (2.0, 1.0)}, r"bounds must be \(least, greatest\), got \(2.0, 1.0\)"),
        ({"criterion": lambda o, t: o}, r"must return a scalar, .*, got a tensor of shape \(1, 3\)"),
        ({"criterion": lambda o, t: o.sum() * math.nan}, "the criterion must be finite at some temperature, got nan"),
        ({"loader": [(x, 3)]}, "a batch of targets"),
    ):
        with pytest.raises(varify.ArgumentError, match=told):
            varify.fit_temperature(vnet, **{**good, **options})
    with pytest.raises(varify.ArgumentError, match="finite at some temperature, got nan"):
        varify.fit_temperature(vnet, [(x, y)], lambda o, t: o.sum() * math.nan, rule="tfb")
    with pytest.raises(varify.ModelError, match=r"vnet must be what varify.variationalize returns, got Sequential"):
        varify.fit_temperature(classifier(), **good)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        varify.fit_temperature(vnet, [(x[:, :3], y)], F.cross_entropy)
    nested = varify.variationalize(nn.Sequential(nn.Linear(4, 4), varify.variationalize(nn.Linear(4, 3))), where="0.*")
    with pytest.raises(varify.ArgumentError, match=r"varify.fit_temperature needs .* got one at '1'"):
        varify.fit_temperature(nested, **good)
    assert all(m.training for m in vnet.modules())
    for key, value in vnet.state_dict().items():
        assert torch.equal(value, before[key]) if isinstance(value, Tensor) else value == before[key]


def test_an_exception_halfway_leaves_all_as_it_was_but_one_random_number() -> None:
    vnet, (x, y) = sharp().train(), data()
    before = copy.deepcopy(vnet.state_dict())
    passes = []

    class Loader:
        def __iter__(self) -> Iterator[Any]:
            passes.append(1)
            if len(passes) == 9:
                raise KeyboardInterrupt
            yield x, y

    torch.manual_seed(0)
    torch.randint(2**62, ())
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        varify.fit_temperature(vnet, Loader(), F.cross_entropy)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(m.training for m in vnet.modules())
    for key, value in vnet.state_dict().items():
        assert torch.equal(value, before[key]) if isinstance(value, Tensor) else value == before[key]
    torch.manual_seed(0)
    varify.fit_temperature(vnet, [(x, y)], F.cross_entropy, n_samples=2)
    assert torch.equal(torch.random.get_rng_state(), state)


# --- the searches


@pytest.mark.parametrize("centre", [-9.0, -3.3, 0.0, 4.1, 9.2])
def test_searches_against_scipy(centre: float) -> None:
    calls = []

    def f(x: float) -> float:
        calls.append(x)
        return math.cosh((x - centre) / 3) + 0.1 * math.sin(x)

    fine = min((f(i / 1000), i / 1000) for i in range(-10000, 10001))[1]
    calls.clear()
    assert minimum(f, -10.0, 10.0, 1e-3) == pytest.approx(fine, abs=2e-3)
    assert len(calls) == len(set(calls)) <= 30
    limit = f(fine) + 1.0
    found = last_within(f, limit, -10.0, 10.0, 1e-4)
    edge = scipy.optimize.brentq(lambda x: f(x) - limit, fine, 20.0)
    assert found == pytest.approx(min(edge, 10.0), abs=2e-4)


def test_searches_at_their_ends() -> None:
    assert minimum(lambda x: x, -1.0, 5.0, 0.01) == -1.0
    assert minimum(lambda x: -x, -1.0, 5.0, 0.01) == 5.0
    assert minimum(lambda x: math.nan if x < 3 else x, 0.0, 5.0, 0.01) == pytest.approx(3.0, abs=0.02)
    assert last_within(lambda x: x, 9.0, -1.0, 5.0, 0.01) == 5.0
    assert last_within(lambda x: x, -2.0, -1.0, 5.0, 0.01) is None


@pytest.mark.parametrize("known", ["loader", "data set"])
def test_the_data_that_fit_sigma_had_are_told_of(known: str) -> None:
    x = torch.randn(12, 3)
    data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
    loader, other = (torch.utils.data.DataLoader(data, batch_size=n) for n in (4, 6))
    held_out = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x.flip(0), (x[:, 1] > 0).long()))
    vnet = varify.variationalize(torch.nn.Linear(3, 2))
    varify.fit_sigma(vnet, loader, F.cross_entropy, num_data=12)

    def told(used: object) -> list[str]:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            varify.fit_temperature(vnet, used, F.cross_entropy, n_samples=2)
        return [str(w.message) for w in seen if issubclass(w.category, varify.VarifyWarning)]

    assert not told(held_out)
    assert not told(list(loader))  # which nobody can know
    (message,) = told(loader if known == "loader" else other)
    assert "the data that fit_sigma had" in message
    varify.fit_sigma(vnet, list(loader), F.cross_entropy, num_data=12)
    assert not told(loader)
