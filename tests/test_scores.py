"""Predictions against targets: each score against a library or a slow loop that shares no formula with it."""

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import sklearn.metrics
import torch
from torch import Tensor

import varify
from varify import Prediction

S, N, C = 6, 40, 3


def classifier(outputs: str) -> tuple[Prediction, Tensor, np.ndarray]:
    """A prediction, labels, and the predictive probabilities by numpy, `(N, C)`."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2 if outputs == "binary_logits" else C, N)
    if outputs == "binary_logits":
        z = 2 * rng.standard_normal((S, N))
        second = (1 / (1 + np.exp(-z))).mean(0)
        return Prediction(torch.tensor(z), outputs), torch.tensor(labels), np.stack([1 - second, second], -1)
    z = 2 * rng.standard_normal((S, N, C))
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    samples = torch.tensor(z if outputs == "logits" else p)
    return Prediction(samples, outputs), torch.tensor(labels), p.mean(0)


@pytest.mark.parametrize("outputs", ["logits", "probabilities", "binary_logits"])
def test_scores_of_classes_equal_those_of_libraries(outputs: str) -> None:
    torchmetrics = pytest.importorskip("torchmetrics.functional.classification")
    prediction, labels, p = classifier(outputs)
    classes = np.arange(p.shape[1])
    assert prediction.nll(labels).item() == pytest.approx(sklearn.metrics.log_loss(labels, p, labels=classes))
    assert prediction.accuracy(labels).item() == pytest.approx(sklearn.metrics.accuracy_score(labels, p.argmax(1)))
    brier = sum((p[n, c] - (int(labels[n]) == c)) ** 2 for n in range(N) for c in classes) / N
    assert prediction.brier(labels).item() == pytest.approx(brier)
    for n_bins in (15, 4):
        expected = torchmetrics.multiclass_calibration_error(torch.tensor(p), labels, len(classes), n_bins=n_bins)
        assert prediction.ece(labels, n_bins).item() == pytest.approx(expected.item(), abs=1e-6)
    log_p = prediction.log_prob(labels)
    assert log_p.shape == (N,)
    torch.testing.assert_close(log_p, torch.tensor(np.log(p[np.arange(N), labels])))


def test_labels_of_pixels_and_of_one_datum() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(S, 2, C, 4, 5, dtype=torch.float64), torch.randint(C, (2, 4, 5))
    pixels = Prediction(logits, class_dim=1)
    flat = Prediction(logits.movedim(2, -1).reshape(S, -1, C))
    assert pixels.log_prob(labels).shape == (2, 4, 5)
    for score in (Prediction.nll, Prediction.accuracy, Prediction.brier, Prediction.ece):
        torch.testing.assert_close(score(pixels, labels), score(flat, labels.flatten()))
    one = Prediction(logits[:, 0, :, 0, 0], class_dim=0)
    torch.testing.assert_close(one.log_prob(labels[0, 0, 0]), pixels.log_prob(labels)[0, 0, 0])
    # a single draw scores as the criterion it was trained by
    torch.testing.assert_close(
        Prediction(logits[:1], class_dim=1).nll(labels), torch.nn.functional.cross_entropy(logits[0], labels)
    )


def test_a_label_that_no_draw_thinks_possible_has_a_finite_nll() -> None:
    logits = torch.tensor([[[0.0, 200.0]], [[0.0, 300.0]]])
    found = Prediction(logits).nll(torch.tensor([0])).item()
    assert found == pytest.approx(200.0 + math.log(2), rel=1e-6)
    binary = Prediction(torch.tensor([[200.0], [300.0]]), "binary_logits")
    assert binary.nll(torch.tensor([0.0])).item() == pytest.approx(200.0 + math.log(2), rel=1e-6)


def test_confidence_of_one_and_no_label_at_all() -> None:
    sure = Prediction(torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]), "probabilities")
    assert sure.ece(torch.tensor([0, 1])).item() == pytest.approx(0.5)
    assert sure.ece(torch.tensor([0, 0])).item() == 0.0


def gaussians() -> tuple[Prediction, Tensor]:
    torch.manual_seed(1)
    return Prediction(torch.randn(S, 5, 2, dtype=torch.float64)), torch.randn(5, 2, dtype=torch.float64)


def test_log_density_of_a_datum_is_that_of_the_mixture_of_its_draws() -> None:
    prediction, y = gaussians()
    likelihood = varify.GaussianLikelihood(sigma=0.7).double()
    sigma = likelihood.sigma.item()
    expected = []
    for n in range(5):  # a datum's two targets share the draw
        p = [scipy.stats.multivariate_normal(m[n].numpy(), sigma**2 * np.eye(2)).pdf(y[n]) for m in prediction.samples]
        expected.append(math.log(sum(p) / S))
    found = prediction.log_prob(y, likelihood)
    assert found.tolist() == pytest.approx(expected)
    assert prediction.nll(y, likelihood).item() == pytest.approx(-sum(expected) / 5)
    assert not found.requires_grad
    single = Prediction(prediction.samples[:1])
    torch.testing.assert_close(single.nll(y, likelihood), likelihood(prediction.samples[0], y).detach())
    flat = Prediction(prediction.samples[..., 0])
    assert flat.log_prob(y[:, 0], likelihood).shape == (5,)


def crps_by_quadrature(cdf, y: float) -> float:
    below = scipy.integrate.quad(lambda x: cdf(x) ** 2, -12, y, limit=400)[0]
    return below + scipy.integrate.quad(lambda x: (1 - cdf(x)) ** 2, y, 12, limit=400)[0]


def test_crps_of_a_mixture_equals_quadrature() -> None:
    prediction, y = gaussians()
    likelihood = varify.GaussianLikelihood(sigma=0.7).double()
    sigma = likelihood.sigma.item()
    expected = []
    for i in np.ndindex(5, 2):
        means = prediction.samples[:, i[0], i[1]].numpy()
        expected.append(
            crps_by_quadrature(lambda x, means=means: scipy.stats.norm(means, sigma).cdf(x).mean(), y[i].item())
        )
    assert prediction.crps(y, likelihood).item() == pytest.approx(np.mean(expected), rel=1e-6)


def test_crps_of_the_draws_is_that_of_their_steps() -> None:
    prediction, y = gaussians()
    expected = []
    for i in np.ndindex(5, 2):
        draws, target = np.sort(prediction.samples[:, i[0], i[1]].numpy()), y[i].item()
        ends = np.sort([*draws, target])  # between them the distribution function is level
        heights = [((draws <= x).mean() - (target <= x)) ** 2 for x in ends[:-1]]
        expected.append(float(np.dot(heights, np.diff(ends))))
    assert prediction.crps(y).item() == pytest.approx(np.mean(expected))
    sure = Prediction(y.expand(3, 5, 2))
    assert sure.crps(y + 2).item() == pytest.approx(2.0)  # of a single value, the absolute error
    assert sure.crps(y).item() == 0.0


def test_half_precision_is_scored_in_single() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(S, N, C).bfloat16(), torch.randint(C, (N,))
    half, single = Prediction(logits), Prediction(logits.float())
    for score in (Prediction.nll, Prediction.accuracy, Prediction.brier, Prediction.ece):
        assert torch.equal(score(half, labels), score(single, labels))
    likelihood, y = varify.GaussianLikelihood(), torch.randn(N, C).double()
    assert torch.equal(half.nll(y, likelihood), single.nll(y, likelihood))


def test_wrong_targets_are_refused_with_the_way_out() -> None:
    prediction, likelihood = Prediction(torch.zeros(S, N, C)), varify.GaussianLikelihood()
    with pytest.raises(varify.ArgumentError, match=r"labels must lie within \[0, 3\), got -100 to 0.*samples\[:, keep"):
        prediction.nll(torch.tensor([-100] + [0] * (N - 1)))
    with pytest.raises(varify.ArgumentError, match=r"labels have shape \(40, 3\).*prediction has\s*\(40,\).*indicator"):
        prediction.brier(torch.zeros(N, C))
    with pytest.raises(varify.ArgumentError, match=r"no whole numbers.*likelihood=varify\.GaussianLikelihood"):
        prediction.log_prob(torch.full((N,), 0.5))
    with pytest.raises(varify.ArgumentError, match=r"targets have shape \(40,\), the prediction \(40, 3\)"):
        prediction.log_prob(torch.zeros(N), likelihood)
    with pytest.raises(varify.ArgumentError, match=r"targets have shape \(40,\), the prediction \(40, 3\)"):
        prediction.crps(torch.zeros(N))
    with pytest.raises(varify.ArgumentError, match="n_bins must be a positive integer, got 0"):
        prediction.ece(torch.zeros(N), 0)
    with pytest.raises(varify.ArgumentError, match="for one logit of two classes say outputs='binary_logits'"):
        Prediction(torch.zeros(S, N)).accuracy(torch.zeros(N))
