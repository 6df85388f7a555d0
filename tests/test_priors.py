"""Priors and their divergences against quadrature, a million draws, and PyVarInf's formulas written out again."""

import math

import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from torch import Tensor, nn
from torch import distributions as td

import varify
from varify import GaussianPosterior, priors
from varify.priors import registry
from varify.state import read_extra_state

CONJUGATE = {"mu_0": 0.1, "kappa_0": 3.0, "alpha_0": 0.5, "beta_0": 0.7}
KNOWN_MEAN = {"mean": 0.2, "alpha_0": 1.5, "beta_0": 0.3}
MIXTURE = {"sigma_1": 1.0, "sigma_2": 0.1, "pi": 0.3}


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def posterior(mu: Tensor, sigma: Tensor, prior: priors.Prior) -> GaussianPosterior:
    rho = torch.log(torch.expm1(sigma))
    return GaussianPosterior(mu.requires_grad_(), rho.requires_grad_(), prior)


def kl_by_quadrature(mu: float, sigma: float, log_p: object) -> float:
    """Of one weight; the integrand uses scipy's normal density and nothing of varify's."""
    q = scipy.stats.norm(mu, sigma)
    integrand = lambda w: q.pdf(w) * (q.logpdf(w) - log_p(w))  # noqa: E731
    return scipy.integrate.quad(integrand, mu - 12 * sigma, mu + 12 * sigma, epsabs=1e-12, limit=500)[0]


def mixture_log_density(w: float) -> float:
    return math.log(0.3 * scipy.stats.norm(0, 1.0).pdf(w) + 0.7 * scipy.stats.norm(0, 0.1).pdf(w))


@pytest.mark.parametrize(
    ("prior", "log_p"),
    [
        (priors.Gaussian(mean=0.2, std=0.7), scipy.stats.norm(0.2, 0.7).logpdf),
        (priors.as_prior(td.Laplace(0.1, 0.5)), scipy.stats.laplace(0.1, 0.5).logpdf),
        (priors.as_prior(td.Normal(0.0, 2.0)), scipy.stats.norm(0, 2).logpdf),
    ],
)
def test_exact_divergences_equal_quadrature(prior: priors.Prior, log_p: object) -> None:
    mu, sigma = f64(0.3, -1.2, 0.0), f64(0.5, 0.1, 2.0)
    expected = sum(kl_by_quadrature(m, s, log_p) for m, s in zip(mu.tolist(), sigma.tolist(), strict=True))
    found = posterior(mu, sigma, prior).kl_divergence()
    assert found.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("prior", "log_p"),
    [
        (priors.ScaleMixture(**MIXTURE, n_mc_samples=5), mixture_log_density),
        (priors.as_prior(td.StudentT(3.0, 0.0, 0.5), n_mc_samples=5), scipy.stats.t(3, 0, 0.5).logpdf),
        (
            priors.as_prior(
                td.MixtureSameFamily(
                    td.Categorical(torch.tensor([0.3, 0.7])), td.Normal(torch.zeros(2), f64(1.0, 0.1))
                ),
                n_mc_samples=5,
            ),
            mixture_log_density,
        ),
    ],
)
def test_estimated_divergences_are_unbiased(prior: priors.Prior, log_p: object) -> None:
    torch.manual_seed(0)
    mu, sigma = f64(0.3, -0.4), f64(0.5, 0.1)
    expected = sum(kl_by_quadrature(m, s, log_p) for m, s in zip(mu.tolist(), sigma.tolist(), strict=True))
    q = posterior(mu, sigma, prior)
    estimates = torch.stack([q.kl_divergence().detach() for _ in range(1000)])
    standard_error = estimates.std() / 1000**0.5
    assert abs(estimates.mean() - expected) < 5 * standard_error  # false alarm: 1 run in 1.7 million


def test_known_mean_marginal_equals_quadrature_over_the_variance() -> None:
    w = f64(0.5, -0.3, 1.1)
    prior, variance = priors.ConjugateKnownMean(**KNOWN_MEAN), scipy.stats.invgamma(1.5, scale=0.3)
    density = lambda v: variance.pdf(v) * math.prod(scipy.stats.norm(0.2, v**0.5).pdf(x) for x in w.tolist())  # noqa: E731
    expected = math.log(scipy.integrate.quad(density, 0, math.inf, epsabs=1e-14)[0])
    assert prior.log_prob(w).item() == pytest.approx(expected, rel=1e-6)


def test_conjugate_marginal_equals_quadrature_over_mean_and_variance() -> None:
    w = f64(0.5, -0.3, 1.1)

    def normal(x: float, mean: float, var: float) -> float:
        return math.exp(-((x - mean) ** 2) / (2 * var)) / math.sqrt(2 * math.pi * var)

    def density(m: float, log_v: float) -> float:
        v = math.exp(log_v)
        inverse_gamma = 0.7**0.5 / math.gamma(0.5) * v**-1.5 * math.exp(-0.7 / v)
        return math.prod(normal(x, m, v) for x in w.tolist()) * normal(m, 0.1, v / 3.0) * inverse_gamma * v

    expected = math.log(scipy.integrate.dblquad(density, -8, 12, -12, 12, epsabs=1e-10)[0])
    assert priors.Conjugate(**CONJUGATE).log_prob(w).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "hyperparameters"),
    [("conjugate", CONJUGATE), ("conjugate_known_mean", KNOWN_MEAN), ("mixtgauss", MIXTURE)],
)
def test_divergence_of_a_tensor_equals_a_million_draws(kind: str, hyperparameters: dict) -> None:
    torch.manual_seed(0)
    mu, sigma = torch.randn(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64) + 0.1
    prior = priors.as_prior(kind, **hyperparameters, n_mc_samples=50)
    draws = mu + sigma * torch.randn(1_000_000, 6, dtype=torch.float64)
    log_q = td.Normal(mu, sigma).log_prob(draws).sum(1)
    log_p = torch.vmap(prior.log_prob)(draws)
    reference = log_q - log_p
    estimates = torch.stack([posterior(mu, sigma, prior).kl_divergence().detach() for _ in range(20)])
    standard_error = (reference.var() / 1_000_000 + estimates.var() / 20).sqrt()
    # 5 standard errors, the estimates' from 20 runs (Student's t, 19 degrees): false alarm 1 in 10,000
    assert abs(estimates.mean() - reference.mean()) < 5 * standard_error


# --- PyVarInf's formulas, one scalar after the other where they are sums


def pyvarinf(kind: str, mu: Tensor, rho: Tensor, eps: Tensor) -> float:
    """Its prior loss of one parameter tensor, with bias std 0.01; eps has one row a Monte Carlo sample."""
    sigma = torch.log(1 + torch.exp(rho.double()))
    mu, eps, n = mu.double(), eps.double(), mu.numel()
    std = 1 / math.sqrt(mu[0].numel()) if mu.dim() > 1 else 0.01
    if kind == "gaussian":
        terms = -torch.log(sigma / std) + (sigma**2 + mu**2) / (2 * std**2) - 0.5
        return sum(terms.flatten().tolist())
    entropy = sum(math.log(s) for s in sigma.flatten().tolist()) + 0.5 * n * (1 + math.log(2 * math.pi))
    log_priors = []
    for e in eps:
        w = (mu + sigma * e).flatten().tolist()
        mean = sum(w) / n
        if kind == "mixtgauss":
            dense = [0.3 * math.exp(-(x**2) / 2) / 1.0 + 0.7 * math.exp(-(x**2) / (2 * 0.1**2)) / 0.1 for x in w]
            log_priors.append(sum(map(math.log, dense)) - n / 2 * math.log(2 * math.pi))
            continue
        if kind == "conjugate":
            alpha, beta = CONJUGATE["alpha_0"], CONJUGATE["beta_0"]
            kappa_n = 3.0 + n
            beta_n = beta + sum((x - mean) ** 2 for x in w) / 2 + (mean - 0.1) ** 2 * 3.0 * n / (2 * kappa_n)
            rest = 0.5 * math.log(3.0 / kappa_n)
        else:
            alpha, beta = KNOWN_MEAN["alpha_0"], KNOWN_MEAN["beta_0"]
            beta_n, rest = beta + sum((x - 0.2) ** 2 for x in w) / 2, 0.0
        alpha_n = alpha + n / 2
        gamma = scipy.special.gammaln(alpha_n) - scipy.special.gammaln(alpha)
        log_priors.append(
            -alpha_n * math.log(beta_n) + alpha * math.log(beta) + gamma + rest - n / 2 * math.log(2 * math.pi)
        )
    return -sum(log_priors) / len(log_priors) - entropy


@pytest.mark.parametrize(
    ("kind", "hyperparameters"),
    [
        ("gaussian", {"bias_std": 0.01}),
        ("conjugate", {**CONJUGATE, "n_mc_samples": 3}),
        ("conjugate_known_mean", {**KNOWN_MEAN, "n_mc_samples": 2}),
        ("mixtgauss", {**MIXTURE, "n_mc_samples": 2}),
    ],
)
def test_prior_loss_is_pyvarinfs(kind: str, hyperparameters: dict) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    vnet = varify.variationalize(network, init=varify.inits.Normal())
    vnet.set_prior(kind, **hyperparameters)
    torch.manual_seed(1)
    found = vnet.prior_loss().item()
    torch.manual_seed(1)  # the same noise: for each parameter in turn, one tensor a sample
    expected = 0.0
    for q in vnet.posteriors.values():
        eps = torch.stack(
            [torch.randn(q.rho.shape) for _ in range(hyperparameters.get("n_mc_samples", 0))] or [q.mu * 0]
        )
        expected += pyvarinf(kind, q.mu.detach(), q.rho.detach(), eps)
    assert found == pytest.approx(expected, rel=1e-5)


def test_default_gaussian_uses_fan_in_and_gives_a_bias_that_of_its_layer() -> None:
    network = nn.ModuleDict(
        {
            "fc": nn.Linear(4, 3),
            "conv": nn.Conv2d(3, 6, 5, groups=3),
            "up": nn.ConvTranspose2d(6, 2, 3),
            "words": nn.Embedding(10, 7),
            "rnn": nn.LSTM(3, 5),
        }
    )
    network.register_parameter("alone", nn.Parameter(torch.zeros(3)))
    stds = {name: q.prior.std for name, q in varify.variationalize(network, prior="gaussian").posteriors.items()}
    expected = {
        **{"fc.weight": 4, "fc.bias": 4, "conv.weight": 25, "conv.bias": 25, "up.weight": 18, "up.bias": 18},
        **{"words.weight": 7, "rnn.weight_ih_l0": 3, "rnn.bias_ih_l0": 3, "rnn.weight_hh_l0": 5, "rnn.bias_hh_l0": 5},
        "alone": 1,
    }
    assert stds == {name: pytest.approx(fan_in**-0.5) for name, fan_in in expected.items()}


def test_no_floor_takes_the_mixtures_gradient_from_large_weights() -> None:
    w = f64(30.0).requires_grad_()
    priors.ScaleMixture(sigma_1=0.2, sigma_2=0.02, pi=0.5).log_prob(w).backward()
    assert w.grad.item() == pytest.approx(-30 / 0.2**2)


def test_centered_prior_has_the_weights_for_means_and_travels() -> None:
    network = nn.Linear(3, 2)
    vnet = varify.variationalize(
        network, prior=priors.Gaussian(std=0.5, centered=True), init=varify.inits.Constant(0.5)
    )
    assert vnet.prior_loss().item() == pytest.approx(0.0, abs=1e-5)
    vnet.module.weight.data.add_(1.0)
    assert vnet.prior_loss().item() == pytest.approx(6 * 1.0 / (2 * 0.25), rel=1e-5)
    assert torch.equal(vnet.state_dict()["prior.weight.mean"], network.weight)
    other = varify.variationalize(nn.Linear(3, 2))
    other.load_state_dict(vnet.state_dict())
    assert other.prior_loss().item() == vnet.prior_loss().item()


def test_a_prior_of_ones_own_is_one_decorated_class() -> None:
    @varify.priors.register("cauchy")
    class Cauchy(varify.priors.Prior):
        def __init__(self, scale: float, n_mc_samples: int = 1) -> None:
            super().__init__(n_mc_samples)
            self.keep_positive(scale=scale)

        def log_prob(self, w: Tensor) -> Tensor:
            return td.Cauchy(0.0, self.scale).log_prob(w).sum()

    try:
        torch.manual_seed(0)
        vnet = varify.variationalize(nn.Linear(3, 2), prior=Cauchy(scale=0.5))
        written = read_extra_state(vnet.get_extra_state())["priors"]["bias"]
        assert written == {
            "kind": "cauchy",
            "scale": 0.5,
            "n_mc_samples": 1,
        }
        other = varify.variationalize(nn.Linear(3, 2))
        other.load_state_dict(vnet.state_dict())
        assert repr(other.posteriors["weight"].prior) == "Cauchy(scale=0.5)"
        other.set_prior("cauchy", scale=2.0, n_mc_samples=5_000)
        mu, sigma = (x.detach().double() for x in (other.module.bias, other.posteriors["bias"].sigma))
        expected = sum(
            kl_by_quadrature(m, s, scipy.stats.cauchy(0, 2.0).logpdf)
            for m, s in zip(mu.tolist(), sigma.tolist(), strict=True)
        )
        assert other.kl_divergence()["bias"].item() == pytest.approx(expected, rel=3e-2)
    finally:
        del registry._BY_NAME["cauchy"]


@pytest.mark.parametrize(
    "prior",
    [
        priors.Gaussian(std=torch.tensor([[0.1], [0.2]])),
        priors.as_prior(td.Laplace(torch.tensor([0.0, 0.1, 0.2]), 0.5)),
        priors.as_prior(
            td.MixtureSameFamily(td.Categorical(torch.tensor([0.3, 0.7])), td.Normal(torch.zeros(2), torch.ones(2)))
        ),
        *(
            priors.as_prior(k, **h)
            for k, h in (("conjugate", CONJUGATE), ("conjugate_known_mean", KNOWN_MEAN), ("mixtgauss", MIXTURE))
        ),
    ],
)
def test_every_prior_travels_in_the_state_dict(prior: priors.Prior) -> None:
    vnet = varify.variationalize(nn.Linear(3, 2), prior={"weight": prior})
    other = varify.variationalize(nn.Linear(3, 2))
    other.load_state_dict(vnet.state_dict())
    for network in (vnet, other):
        torch.manual_seed(0)
        network.loss = network.prior_loss().item()
    assert other.loss == vnet.loss
    assert repr(other.posteriors["weight"].prior) == repr(vnet.posteriors["weight"].prior)
    assert other.double().prior_loss().dtype == torch.float64


def test_a_distribution_is_shown_with_the_digits_that_it_was_given() -> None:
    shown = repr(priors.as_prior(td.Laplace(0.0, 0.1)))  # 0.1 is 0.10000000149011612 in single precision
    assert shown == "Factorized(Laplace(loc: 0.0, scale: 0.1))"


def test_a_name_can_not_be_taken_from_a_built_in_prior() -> None:
    with pytest.raises(varify.PriorError, match=r"the name 'gaussian' is taken by varify\.priors\.gaussian\.Gaussian"):

        @varify.priors.register("gaussian")
        class Other(varify.priors.Prior):
            pass

    assert registry._BY_NAME["gaussian"] is priors.Gaussian


BAD = [
    ({"prior": priors.Gaussian}, r"is a class: pass an instance, Gaussian\("),
    ({"prior": "gauss"}, "unknown prior 'gauss'"),
    ({"prior": 3}, "a name"),
    ({"prior": "mixtgauss", **MIXTURE, "sigma_3": 1.0}, "unexpected keyword argument 'sigma_3'"),
    ({"prior": "mixtgauss", **MIXTURE, "pi": 0.0}, r"pi must lie within \(0, 1\), got 0.0"),
    ({"prior": "mixtgauss", **MIXTURE, "pi": 1}, "within"),
    ({"prior": "mixtgauss", **MIXTURE, "sigma_2": 0.0}, "sigma_2 must be positive, got 0.0"),
    ({"prior": "mixtgauss", **MIXTURE, "sigma_2": float("nan")}, "sigma_2"),
    ({"prior": "mixtgauss", **MIXTURE, "n_mc_samples": 0}, "n_mc_samples must be a positive integer, got 0"),
    ({"prior": "mixtgauss", **MIXTURE, "n_mc_samples": 1.5}, "n_mc_samples must be a positive integer, got 1.5"),
    ({"prior": "conjugate", **CONJUGATE, "kappa_0": -1.0}, "kappa_0"),
    ({"prior": "conjugate", **CONJUGATE, "beta_0": "a"}, "beta_0 must be a number or a tensor, got 'a'"),
    ({"prior": "conjugate", **CONJUGATE, "mu_0": torch.zeros(3)}, "mu_0 has shape"),
    ({"prior": "conjugate_known_mean", "alpha": 1.0}, "unexpected keyword argument 'alpha'; it takes mean: object = 0"),
    ({"prior": "gaussian", "std": -1.0}, "std must be positive, got -1.0"),
    ({"prior": "gaussian", "std": torch.ones(5)}, r"weight: std has shape \(5,\); the parameter has \(2, 3\)"),
    ({"prior": "gaussian", "mean": torch.ones(4, 2, 3)}, "mean has shape"),
    ({"prior": "gaussian", "mean": 1.0, "centered": True}, "exclude each other"),
    ({"prior": priors.Gaussian(), "std": 1.0}, "hyper-parameters already"),
    ({"prior": td.Uniform(-1.0, 1.0)}, "may be any real number"),
    ({"prior": td.HalfNormal(1.0)}, "may be any real number"),
    ({"prior": td.MultivariateNormal(torch.zeros(2), torch.eye(2))}, "of vectors"),
    ({"prior": td.Normal(torch.zeros(7), 1.0)}, "batch shape"),
    (
        {"prior": td.TransformedDistribution(td.Normal(0.0, 1.0), [td.AffineTransform(0.0, 2.0)])},
        "write a varify.priors",
    ),
]


@pytest.mark.parametrize(("arguments", "told"), BAD, ids=[told for _, told in BAD])
def test_bad_priors_are_refused_when_set_and_the_former_stays(arguments: dict, told: str) -> None:
    vnet = varify.variationalize(nn.Linear(3, 2))
    before = vnet.summary().rows
    with pytest.raises(varify.PriorError, match=told):
        vnet.set_prior(**arguments)
    assert vnet.summary().rows == before


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        ("mixtgauss", {"sigma_1": 0.2, "sigma_2": 0.02, "pi": 0.5}),
        ("conjugate", {"mu_0": 0.0, "kappa_0": 3.0, "alpha_0": 0.5, "beta_0": 0.5}),
        ("conjugate_known_mean", {"mean": 0.0, "alpha_0": 0.5, "beta_0": 0.5}),
    ],
)
def test_a_name_alone_has_the_numbers_of_pyvarinfs_experiment(kind: str, numbers: dict[str, float]) -> None:
    from varify.experiments.spelling import parsed_prior

    vnet = varify.variationalize(nn.Linear(3, 2), prior=kind)
    for prior in (vnet.posteriors["weight"].prior, parsed_prior(kind)):
        settings = prior.settings()
        assert {name: settings[name] for name in numbers} == numbers
    assert vnet.prior_loss().isfinite()


def test_set_prior_takes_a_glob() -> None:
    vnet = varify.variationalize(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    vnet.set_prior("mixtgauss", **MIXTURE, where="1.*")
    kinds = {name: q.prior.kind for name, q in vnet.posteriors.items()}
    assert kinds == {"0.weight": "gaussian", "0.bias": "gaussian", "1.weight": "mixtgauss", "1.bias": "mixtgauss"}
    with pytest.raises(varify.SelectionError, match=r"where='fc9\*' matches no parameter; there are 0.weight, 0.bias"):
        vnet.set_prior("gaussian", where="fc9*")
