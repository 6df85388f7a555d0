"""Every measure of a prediction against a small case by hand, and its shapes."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

import varify
from tests.networks import CASES, DictOutput, seeded
from varify import Prediction
from varify.prediction import many

# two draws, one input, two classes: (0.5, 0.5) and (0.9, 0.1)
TWO = torch.tensor([[[0.5, 0.5]], [[0.9, 0.1]]], dtype=torch.float64)


def h(*p: float) -> float:
    return -sum(x * math.log(x) for x in p if x)


@pytest.mark.parametrize(
    "prediction",
    [
        Prediction(TWO, "probabilities"),
        Prediction(TWO.log() + 3.0),
        Prediction((TWO[..., 1] / TWO[..., 0]).log(), "binary_logits"),
        Prediction(TWO.log().unsqueeze(-1).expand(2, 1, 2, 5), class_dim=1),
    ],
    ids=["probabilities", "logits", "binary", "segmentation"],
)
def test_measures_on_classes_by_hand(prediction: Prediction) -> None:
    def each(x: Tensor) -> Tensor:
        assert torch.equal(x, x.flatten()[0].expand_as(x))
        return x.flatten()[0]

    p = prediction.probabilities()
    class_dim = prediction.class_dim
    assert each(p.select(class_dim, 0)).item() == pytest.approx(0.7)
    assert each(p.select(class_dim, 1)).item() == pytest.approx(0.3)
    assert each(prediction.entropy()).item() == pytest.approx(h(0.7, 0.3))
    information = h(0.7, 0.3) - (h(0.5, 0.5) + h(0.9, 0.1)) / 2
    assert each(prediction.mutual_information()).item() == pytest.approx(information)
    assert each(prediction.variation_ratio()).item() == 0.0


def test_votes_and_certainty() -> None:
    votes = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.7, 0.1], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8]])
    assert Prediction(votes, "probabilities", class_dim=0).variation_ratio().item() == pytest.approx(0.5)
    certain = Prediction(torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]]), "probabilities")
    assert certain.entropy().item() == 0.0
    assert certain.mutual_information().item() == 0.0


def test_moments_quantiles_and_intervals_equal_numpys() -> None:
    import numpy as np

    torch.manual_seed(0)
    prediction = Prediction(torch.randn(13, 4, 2, dtype=torch.float64))
    values = prediction.samples.numpy()
    torch.testing.assert_close(prediction.mean, torch.as_tensor(values.mean(0)))
    torch.testing.assert_close(prediction.std, torch.as_tensor(values.std(0)))
    for q in (0.0, 0.31, 1.0):
        torch.testing.assert_close(prediction.quantile(q), torch.as_tensor(np.quantile(values, q, axis=0)))
    low, high = prediction.interval(0.9)
    torch.testing.assert_close(low, torch.as_tensor(np.quantile(values, 0.05, axis=0)))
    torch.testing.assert_close(high, torch.as_tensor(np.quantile(values, 0.95, axis=0)))
    assert prediction.quantile(torch.tensor([0.1, 0.5, 0.9])).shape == (3, 4, 2)
    assert Prediction(values_of_one := prediction.samples[:1]).std.eq(0).all()
    assert values_of_one.shape[0] == 1


def test_a_prediction_moves_and_changes_its_type() -> None:
    prediction = Prediction(TWO, "probabilities", class_dim=1, vectorized=True)
    moved = prediction.to("cpu", dtype=torch.float32)
    assert moved == Prediction(TWO.float(), "probabilities", class_dim=1)
    assert moved.vectorized


def test_bad_questions() -> None:
    prediction = Prediction(TWO)
    for level in (0.0, 1.0, -0.1, 95):
        with pytest.raises(ValueError, match=rf"level must lie within \(0, 1\), got {level}"):
            prediction.interval(level)
    with pytest.raises(ValueError, match=r"q must lie within \[0, 1\], got 1\.5"):
        prediction.quantile(1.5)
    for samples in (torch.zeros(5, 4, 1), torch.zeros(5)):
        with pytest.raises(ValueError, match="for one logit of two classes say outputs='binary_logits'"):
            Prediction(samples).entropy()
    assert repr(prediction) == "Prediction(2 samples of shape (1, 2), outputs='logits')"
    with pytest.raises(ValueError, match=r"outputs must be one of .*, got 'logit'"):
        Prediction(TWO, "logit")


@pytest.mark.parametrize("name", ["mlp", "cnn", "lstm", "transformer", "untraceable", "tied"])
def test_a_prediction_is_a_loop_of_forwards_under_the_same_seed(name: str) -> None:
    vnet = varify.variationalize(seeded(CASES[name]).eval())
    args, kwargs = CASES[name].calls[0]
    torch.manual_seed(3)
    prediction = vnet.predict(*args, n_samples=100, **kwargs)
    torch.manual_seed(3)
    with vnet.sampling(), torch.no_grad():
        loop = torch.stack([vnet(*args, **kwargs) for _ in range(100)])
    torch.testing.assert_close(prediction.samples, loop)
    assert prediction.n_samples == 100
    assert not prediction.samples.requires_grad


def test_modes_are_eval_meanwhile_and_restored_even_after_an_exception() -> None:
    vnet = varify.variationalize(seeded(CASES["cnn"])).train()
    vnet.module.drop.eval()
    before = [m.training for m in vnet.modules()]
    statistics = vnet.module.bn1.running_mean.clone()
    vnet.predict(torch.randn(4, 1, 8, 8))
    with pytest.raises(RuntimeError):
        vnet.predict(torch.randn(4, 7, 8, 8))
    assert [m.training for m in vnet.modules()] == before
    assert torch.equal(vnet.module.bn1.running_mean, statistics)


def test_structured_outputs_are_predicted_leaf_by_leaf() -> None:
    vnet = varify.variationalize(DictOutput())
    predicted = vnet.predict({"x": torch.ones(4, 3)}, n_samples=5)
    assert type(predicted).__name__ == "OrderedDict"
    assert predicted["logits"].samples.shape == (5, 4, 2)
    assert predicted["extra"][0].mean.shape == (4, 2)
    assert predicted["extra"][1:] == (None, "a name")
    assert predicted["n"] == 3


@dataclasses.dataclass
class Output:
    logits: Tensor
    name: str
    hidden: tuple[Tensor, ...] = ()


def test_a_dataclass_is_predicted_field_by_field() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Output:
            y = self.fc(x)
            return Output(y, "a", (y.exp(),))

    vnet = varify.variationalize(Named())
    for vectorize in (True, False):
        predicted = vnet.predict(torch.ones(4, 3), n_samples=5, vectorize=vectorize)
        assert isinstance(predicted, Output)
        assert predicted.logits.samples.shape == predicted.hidden[0].samples.shape == (5, 4, 2)
        assert predicted.logits.std.min() > 0
        assert predicted.name == "a"


def test_a_bayesian_head_alone() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    vnet = varify.variationalize(network, where="1.*")
    assert vnet.predict(torch.ones(1, 3)).std.min() > 0


# --- covariances of classes, and regression


def test_covariances_of_kwon_by_hand() -> None:
    epistemic, aleatoric = Prediction(TWO, "probabilities").covariances()
    # p̄ = (.7, .3), deviations ∓(.2, −.2); aleatoric diagonal: mean of p(1 − p) = (.25 + .09)/2
    torch.testing.assert_close(epistemic[0], torch.tensor([[0.04, -0.04], [-0.04, 0.04]], dtype=torch.float64))
    torch.testing.assert_close(aleatoric[0], torch.tensor([[0.17, -0.17], [-0.17, 0.17]], dtype=torch.float64))
    together = torch.diag(torch.tensor([0.7, 0.3])) - torch.outer(*[torch.tensor([0.7, 0.3])] * 2)
    torch.testing.assert_close((epistemic + aleatoric)[0], together.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("normalization", ["softmax", "normalized"])
def test_covariances_equal_a_loop_and_add_up(normalization: str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(7, 5, 3, dtype=torch.float64)
    prediction = Prediction(logits)
    epistemic, aleatoric = prediction.covariances(normalization)
    for n in range(5):
        ps = []
        for s in range(7):
            raw = [
                math.exp(v) if normalization == "softmax" else math.log1p(math.exp(v)) for v in logits[s, n].tolist()
            ]
            ps.append(torch.tensor([v / sum(raw) for v in raw], dtype=torch.float64))
        mean = sum(ps) / 7
        torch.testing.assert_close(epistemic[n], sum(torch.outer(p - mean, p - mean) for p in ps) / 7)
        torch.testing.assert_close(aleatoric[n], sum(torch.diag(p) - torch.outer(p, p) for p in ps) / 7)
        torch.testing.assert_close(epistemic[n] + aleatoric[n], torch.diag(mean) - torch.outer(mean, mean))
    summed = prediction.covariances(normalization, summed=True)
    torch.testing.assert_close(summed[0], sum(epistemic))
    torch.testing.assert_close(summed[1], sum(aleatoric))
    with pytest.raises(ValueError, match=r"normalization must be one of .*, got 'sum'"):
        prediction.covariances("sum")
    with pytest.raises(ValueError, match="is for logits; the outputs are probabilities"):
        Prediction(TWO, "probabilities").covariances("normalized")


def test_regression_variances_and_intervals() -> None:
    import scipy.optimize
    import scipy.stats

    samples = torch.tensor([[[1.0, -2.0]], [[3.0, 0.0]]], dtype=torch.float64)  # mean and rho of two draws
    likelihood = varify.HeteroscedasticGaussianLikelihood(floor=0.1)
    prediction = Prediction(samples)
    sigmas = [0.1 + math.log1p(math.exp(-2.0)), 0.1 + math.log(2.0)]
    variances = prediction.variances(likelihood)
    assert variances.epistemic.item() == pytest.approx(1.0)
    assert variances.aleatoric.item() == pytest.approx((sigmas[0] ** 2 + sigmas[1] ** 2) / 2)
    torch.manual_seed(0)
    draws = torch.cat([m + s * torch.randn(500_000, dtype=torch.float64) for m, s in zip((1, 3), sigmas, strict=True)])
    # the standard error of a variance is below sqrt(2/n)·var, 0.14 %
    assert draws.var().item() == pytest.approx(variances.total.item(), rel=0.007)
    low, high = prediction.interval(0.8, likelihood)
    cdf = lambda y: sum(scipy.stats.norm(m, s).cdf(y) for m, s in zip((1, 3), sigmas, strict=True)) / 2  # noqa: E731
    for end, q in ((low, 0.1), (high, 0.9)):
        assert end.item() == pytest.approx(scipy.optimize.brentq(lambda y, q=q: cdf(y) - q, -10, 10), rel=1e-9)
    assert prediction.coverage(torch.tensor([[2.0]]), 0.8, likelihood).item() == 1.0
    assert prediction.coverage(torch.tensor([[20.0]]), 0.8, likelihood).item() == 0.0
    homoscedastic = Prediction(samples[..., :1]).variances(varify.GaussianLikelihood(sigma=0.5))
    assert homoscedastic.aleatoric.item() == pytest.approx(0.25)
    with pytest.raises(ValueError, match=r"the targets have shape \(3,\), the prediction \(1, 2\)"):
        prediction.coverage(torch.zeros(3))


def test_intervals_cover_what_they_say() -> None:
    torch.manual_seed(0)
    prediction = Prediction(torch.randn(4000, 2000, 1))
    covered = prediction.coverage(torch.randn(2000, 1), 0.9).item()
    assert covered == pytest.approx(0.9, abs=5 * (0.09 / 2000) ** 0.5)  # false alarm: 1 run in 1.7 million


# --- both ways of running many draws


@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer", "raw parameters", "dict output", "tied"])
def test_vectorized_draws_are_those_of_the_loop(name: str) -> None:
    vnet = varify.variationalize(seeded(CASES[name]).eval())
    args, kwargs = CASES[name].calls[0]
    both = []
    for vectorize in (True, False):
        torch.manual_seed(3)
        predicted = vnet.predict(*args, n_samples=20, vectorize=vectorize, **kwargs)
        both.append(
            [leaf.samples for leaf in torch.utils._pytree.tree_leaves(predicted) if isinstance(leaf, Prediction)]
        )
    assert both[0]
    for vectorized, looped in zip(*both, strict=True):
        torch.testing.assert_close(vectorized, looped)


def test_vectorising_runs_the_network_once_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    vnet = varify.variationalize(seeded(CASES["mlp"]))
    vnet.predict(torch.ones(4, 3), n_samples=2)  # the first one runs a draw by itself
    calls = []
    original = nn.Sequential.forward
    monkeypatch.setattr(nn.Sequential, "forward", lambda self, *a: calls.append(1) or original(self, *a))
    (cost,) = vnet.engine.sampler._costs.values()
    weights = sum(4 * p.numel() for p in vnet.module.parameters())
    monkeypatch.setattr(many, "CHUNK_BYTES", 8 * (weights + cost.peak))
    torch.manual_seed(0)
    samples = vnet.predict(torch.ones(4, 3), n_samples=20, vectorize=True).samples
    assert 3 <= len(calls) <= 5  # at most 8 draws each, and chunks of weights alone are longer
    torch.manual_seed(0)
    torch.testing.assert_close(vnet.predict(torch.ones(4, 3), n_samples=20, vectorize=False).samples, samples)


@pytest.mark.parametrize("name", ["lstm", "gru", "untraceable", "counting", "noisy"])
def test_what_can_not_be_vectorized_loops_with_the_same_draws(name: str) -> None:
    args, kwargs = CASES[name].calls[0]
    both = []
    for vectorize in (True, False):
        vnet = varify.variationalize(seeded(CASES[name]).eval())
        torch.manual_seed(3)
        both.append(vnet.predict(*args, n_samples=5, vectorize=vectorize, **kwargs).samples)
    torch.testing.assert_close(*both)


def test_two_threads_predict_at_once() -> None:
    from concurrent.futures import ThreadPoolExecutor

    vnet = varify.variationalize(seeded(CASES["lstm"]), init=varify.inits.Constant(1e-12)).eval()
    args, kwargs = CASES["lstm"].calls[0]
    expected = vnet(*args, **kwargs)
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(vnet.predict, *args, n_samples=20, **kwargs) for _ in range(12)]
        for prediction in found:
            torch.testing.assert_close(prediction.result().samples, expected.detach().expand(20, -1, -1))


def test_outputs_that_are_integers_have_moments_and_no_probabilities() -> None:
    samples = torch.randint(9, (6, 4, 3))
    p, same = varify.Prediction(samples), varify.Prediction(samples.double())
    assert torch.allclose(p.mean.double(), same.mean)
    assert torch.allclose(p.std.double(), same.std)
    assert torch.allclose(p.quantile(0.5).double(), same.quantile(0.5))
    for ask in (p.probabilities, lambda: p.nll(torch.zeros(4, dtype=torch.long))):
        with pytest.raises(varify.ArgumentError, match=r"outputs are torch.int64, no logits"):
            ask()
