"""Likelihoods beyond the Gaussian: densities, moments, distribution functions and intervals against scipy's."""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from torch import Tensor, nn

import varify
from varify import Prediction

CUTS = [-1.0, 0.5, 2.0]


def ordinal() -> varify.OrdinalLikelihood:
    likelihood = varify.OrdinalLikelihood(4).double()
    with torch.no_grad():
        likelihood.first.fill_(CUTS[0])
        likelihood.gap_rho.copy_(torch.tensor([1.5, 1.5], dtype=torch.float64).expm1().log())
    return likelihood


def ordinal_by_scipy(f: float) -> Any:
    below = [scipy.special.expit(c - f) for c in CUTS]
    return scipy.stats.rv_discrete(values=(np.arange(4), np.diff([0.0, *below, 1.0])))


Case = tuple[Callable[[], nn.Module], Callable[[float], Any], bool]
CASES: dict[str, Case] = {
    "laplace": (lambda: varify.LaplaceLikelihood(0.7).double(), lambda f: scipy.stats.laplace(f, 0.7), False),
    "student": (lambda: varify.StudentTLikelihood(4, 0.7).double(), lambda f: scipy.stats.t(4, f, 0.7), False),
    "light": (lambda: varify.StudentTLikelihood(400, 0.7).double(), lambda f: scipy.stats.t(400, f, 0.7), False),
    "heavy": (lambda: varify.StudentTLikelihood(2.1, 0.7).double(), lambda f: scipy.stats.t(2.1, f, 0.7), False),
    "poisson": (lambda: varify.PoissonLikelihood().double(), lambda f: scipy.stats.poisson(math.exp(f)), True),
    "ordinal": (ordinal, ordinal_by_scipy, True),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Callable[[float], Any], Tensor, Tensor, bool]:
    make, reference, discrete = CASES[request.param]
    torch.manual_seed(0)
    output = torch.randn(6, 2, dtype=torch.float64)
    target = torch.randint(4, (6, 2)).double() if discrete else 3 * torch.randn(6, 2, dtype=torch.float64)
    return make(), reference, output, target, discrete


def test_density_moments_and_distribution_function_equal_scipys(case: Any) -> None:
    likelihood, reference, output, target, discrete = case
    log_p, (mean, var) = likelihood.log_prob(output, target), likelihood.moments(output)
    cdf = likelihood.cdf(output, target + 0.3)
    for i in np.ndindex(6, 2):
        q, y = reference(output[i].item()), target[i].item()
        assert log_p[i].item() == pytest.approx(float(q.logpmf(y) if discrete else q.logpdf(y)), rel=1e-6)
        assert (mean[i].item(), var[i].item()) == pytest.approx((float(q.mean()), float(q.var())), rel=1e-5)
        assert cdf[i].item() == pytest.approx(float(q.cdf(y + 0.3)), abs=2e-6)
    assert likelihood(output, target).item() == pytest.approx(-log_p.sum().item() / 6)


def test_a_prediction_scores_and_covers_with_it(case: Any) -> None:
    likelihood, reference, output, target, discrete = case
    prediction = Prediction(torch.stack([output, output + 0.4]))
    for n in range(6):
        draws = [[reference(prediction.samples[s, n, t].item()) for t in range(2)] for s in range(2)]
        y = target[n].tolist()
        densities = [math.prod((q.pmf if discrete else q.pdf)(v) for q, v in zip(d, y, strict=True)) for d in draws]
        found = prediction.log_prob(target, likelihood)[n].item()
        assert found == pytest.approx(math.log(sum(densities) / 2), rel=1e-6)
    low, high = prediction.interval(0.8, likelihood)
    for i in np.ndindex(6, 2):
        q = [reference(prediction.samples[(s, *i)].item()) for s in range(2)]
        for end, level in ((low[i].item(), 0.1), (high[i].item(), 0.9)):
            if discrete:  # the least whole number of at least that probability
                assert (q[0].cdf(end) + q[1].cdf(end)) / 2 >= level - 1e-9
                assert (q[0].cdf(end - 1) + q[1].cdf(end - 1)) / 2 < level
            else:
                assert (q[0].cdf(end) + q[1].cdf(end)) / 2 == pytest.approx(level, abs=4e-6)
    variances = prediction.variances(likelihood)
    q = [reference(prediction.samples[s, 0, 0].item()) for s in range(2)]
    assert variances.aleatoric[0, 0].item() == pytest.approx(float(q[0].var() + q[1].var()) / 2, rel=1e-5)


@pytest.mark.parametrize("spread", [0.3, 8.0])  # of the draws beside the noise
def test_crps_is_the_integral_of_the_squared_error_of_the_distribution_function(case: Any, spread: float) -> None:
    likelihood, reference, output, target, discrete = case
    spread = min(spread, 1.5) if discrete else spread  # of log rates
    prediction = Prediction(output[:2, 0] + spread * torch.randn(3, 2, dtype=torch.float64))
    targets = target[:2, 0].clone()
    targets[0] = 3.0 if discrete else 40.0  # far from all draws
    for i, y in enumerate(targets.tolist()):
        # beyond y, where there is a step, and before it; closest at it, and out to where no tail is left
        away = np.arange(2000.0) if discrete else 0.05 * np.sinh(np.linspace(0, 12, 5001))
        parts = [reference(draw) for draw in prediction.samples[:, i].tolist()]
        beyond, before = (sum(np.asarray(q.cdf(x)) for q in parts) / 3 for x in (y + away, y - away))
        if discrete:
            expected = ((beyond - 1) ** 2).sum() + (before[1:] ** 2).sum()
        else:
            expected = scipy.integrate.trapezoid((beyond - 1) ** 2 + before**2, away)
        found = Prediction(prediction.samples[:, i : i + 1]).crps(targets[i : i + 1], likelihood).item()
        assert found == pytest.approx(float(expected), rel=1e-4)


def test_crps_of_counts_of_many_values_and_of_none() -> None:
    likelihood = varify.PoissonLikelihood().double()
    draws = torch.tensor([[16.0], [16.2]], dtype=torch.float64)  # counts of about ten million
    found = Prediction(draws).crps(torch.tensor([1.0e7]), likelihood).item()
    # beside the distance of the draws the noise is nothing: E|X − y| − ½E|X − X'| of two points
    a, b = draws.exp().flatten().tolist()
    expected = (abs(a - 1e7) + abs(b - 1e7)) / 2 - abs(a - b) / 4
    assert found == pytest.approx(expected, rel=2e-3)
    assert Prediction(draws[:, :0]).crps(torch.zeros(0), likelihood).isnan()  # as of any mean of nothing


def test_gradients_are_those_of_finite_differences(case: Any) -> None:
    likelihood, _, output, target, _ = case
    parameters = [p for p in likelihood.parameters() if p.numel()]

    def loss(output: Tensor, *_: Tensor) -> Tensor:
        return likelihood(output, target)

    assert torch.autograd.gradcheck(loss, (output.requires_grad_(), *parameters))


def test_a_scale_is_learned_beside_outliers() -> None:
    torch.manual_seed(0)
    noise = torch.from_numpy(scipy.stats.t(4, 0, 0.5).rvs((4000, 1), random_state=0)).float()
    likelihood = varify.StudentTLikelihood(4, scale=3.0)
    optimizer = torch.optim.LBFGS(likelihood.parameters(), line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        nll = likelihood(torch.zeros_like(noise), noise)
        nll.backward()
        return nll

    for _ in range(20):
        optimizer.step(closure)
    fitted = scipy.stats.t.fit(noise.double().numpy(), f0=4, floc=0)[2]
    assert likelihood.scale.item() == pytest.approx(fitted, rel=1e-3)


def test_ordered_classes_are_learned_and_measured() -> None:
    torch.manual_seed(0)
    x = torch.randn(600, 1)
    y = torch.bucketize(
        2 * x + torch.from_numpy(np.random.default_rng(0).logistic(size=(600, 1))).float(), torch.tensor(CUTS)
    )
    likelihood, net = varify.OrdinalLikelihood(4), nn.Linear(1, 1)
    assert likelihood.probabilities(torch.zeros(1)).tolist() == [pytest.approx([0.25] * 4)]
    vnet = varify.variationalize(net)
    elbo = varify.ELBO(num_data=600)
    optimizer = torch.optim.Adam(varify.parameter_groups(nn.ModuleList([vnet, likelihood]), lr=0.05))
    for _ in range(200):
        optimizer.zero_grad()
        elbo(vnet, likelihood, x, y).loss.backward()
        optimizer.step()
    assert vnet.module.weight.item() == pytest.approx(2.0, abs=0.5)  # over five standard errors of so many data
    prediction = vnet.predict(x)
    true = [ordinal_by_scipy(2 * a).pmf(b) for a, b in zip(x.flatten().tolist(), y.flatten().tolist(), strict=True)]
    # of the distribution that the labels are of; a fit to so many data is above or below by a percent
    assert prediction.nll(y, likelihood).item() == pytest.approx(-np.log(true).mean(), rel=0.05)
    with pytest.raises(varify.ArgumentError, match=r"targets must be classes, whole numbers within \[0, 4\)"):
        prediction.nll(y + 1, likelihood)
    classes = Prediction(likelihood.probabilities(prediction.samples).detach(), "probabilities")
    assert classes.nll(y).item() == pytest.approx(prediction.nll(y, likelihood).item(), rel=1e-5)


def test_far_from_a_cutpoint_nothing_cancels() -> None:
    likelihood = ordinal()
    output = torch.tensor([60.0, -60.0], dtype=torch.float64)
    log_p = likelihood.log_prob(output, torch.tensor([1, 2]))
    # e^(c − f)'s difference to the first order: sigmoid(x) is e^x far below 0
    assert log_p[0].item() == pytest.approx(math.log(math.exp(CUTS[1]) - math.exp(CUTS[0])) - 60, rel=1e-9)
    assert log_p[1].item() == pytest.approx(math.log(math.exp(-CUTS[1]) - math.exp(-CUTS[2])) - 60, rel=1e-9)


def test_what_can_not_be_is_refused() -> None:
    zeros = torch.zeros(5, 1)
    with pytest.raises(varify.ArgumentError, match="targets must be counts: whole numbers of at least 0"):
        varify.PoissonLikelihood()(zeros, zeros + 0.5)
    with pytest.raises(varify.ArgumentError, match=r"targets must be classes, whole numbers within \[0, 3\)"):
        varify.OrdinalLikelihood(3)(zeros, zeros + 3)
    with pytest.raises(varify.ArgumentError, match="n_classes must be at least 2, got 1"):
        varify.OrdinalLikelihood(1)
    with pytest.raises(varify.ArgumentError, match="df must be greater than 2, got 2: with fewer"):
        varify.StudentTLikelihood(2)
    with pytest.raises(varify.ArgumentError, match="scale must be a positive number, got 0"):
        varify.LaplaceLikelihood(0)
    for likelihood in (varify.PoissonLikelihood(), varify.LaplaceLikelihood(), varify.OrdinalLikelihood(3)):
        with pytest.raises(varify.ArgumentError, match=r"the mean has shape \(5, 1\), the target \(5,\)"):
            likelihood(zeros, torch.zeros(5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-4, 1e-3])
def test_outputs_in_half_precision_lose_nothing_of_the_noise(scale: float, dtype: torch.dtype) -> None:
    output = torch.zeros(1000, 1, dtype=dtype)
    target = scale * (0.5 + torch.randn(1000, 1, dtype=torch.float64))
    for likelihood, reference in (
        (varify.GaussianLikelihood(scale), scipy.stats.norm),
        (varify.LaplaceLikelihood(scale), scipy.stats.laplace),
        (varify.StudentTLikelihood(4.0, scale), functools.partial(scipy.stats.t, 4)),
    ):
        found = likelihood(output, target.float())
        assert found.item() == pytest.approx(-reference(0, scale).logpdf(target.numpy()).mean(), rel=1e-4)
        (gradient,) = torch.autograd.grad(found, likelihood.rho)
        rho, step = math.log(math.expm1(scale)), 1e-4
        nlls = [-reference(0, math.log1p(math.exp(rho + by))).logpdf(target.numpy()).mean() for by in (-step, step)]
        assert gradient.item() == pytest.approx((nlls[1] - nlls[0]) / (2 * step), rel=1e-2, abs=1e-3)
        assert likelihood.moments(output)[1][0].item() == pytest.approx(reference(0, scale).var(), rel=1e-4)
        assert likelihood.log_prob(output, target.float()).isfinite().all()


def test_a_head_of_two_outputs_in_half_precision_and_without_a_sigma_of_its_own() -> None:
    head = varify.HeteroscedasticGaussianLikelihood(1e-4)
    output = torch.tensor([[0.0, -9.0]] * 2, dtype=torch.float16)
    target = torch.tensor([[1e-4], [-3e-4]])
    sigma = 1e-4 + math.log1p(math.exp(-9.0))
    expected = -scipy.stats.norm(0, sigma).logpdf(target.numpy()).mean()
    assert head(output, target).item() == pytest.approx(expected, rel=1e-4)
    with pytest.raises(varify.ArgumentError, match="each target has a sigma of its own"):
        _ = head.sigma
