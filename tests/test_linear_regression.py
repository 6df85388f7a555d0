"""Training against linear algebra: the mean-field posterior of Bayesian linear regression is known exactly.

With a linear model, Gaussian noise and a Gaussian prior the true posterior is N(m, P⁻¹), and the best factorized
Gaussian has mean m and variances 1/diag(P) (Bishop 2006, section 10.1.2).
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import varify
from varify import inits, priors

NOISE = 2.0
ROWS = 8  # outputs of the layer, with the same targets: posteriors that are trained side by side
STEPS = 1000


class Problem(NamedTuple):
    x: Tensor  # (16, 3)
    y: Tensor  # (16, 1)


def problem() -> Problem:
    # sigma comes out of order 1: there a wrong KL or a wrong gradient shows
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 3, generator=generator, dtype=torch.float64)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64)
    return Problem(x, y + NOISE * torch.randn(16, 1, generator=generator, dtype=torch.float64))


def by_linear_algebra(prior_mean: Tensor, prior_std: Tensor) -> tuple[Tensor, Tensor]:
    """Means `(ROWS, 3)` and standard deviations `(3,)`; the prior's mean is `(3,)`, or of each row."""
    x, y = problem()
    precision = x.T @ x / NOISE**2 + torch.diag(prior_std**-2)
    mean = torch.linalg.solve(precision, x.T @ y / NOISE**2 + (prior_mean.expand(ROWS, 3) / prior_std**2).T)
    return mean.T, precision.diag().rsqrt()


def train(vnet: varify.VariationalModule, loss: Callable[[], Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """mu and sigma, `(ROWS, 3)`, averaged over the last half of a training by single draws with a falling step."""
    x, y = problem()
    free_energy = loss or (lambda: ((vnet(x) - y) ** 2).sum() / (2 * NOISE**2) + vnet.prior_loss())
    optimizer = torch.optim.Adam(vnet.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS, eta_min=1e-3)
    mus, sigmas = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        free_energy().backward()
        optimizer.step()
        schedule.step()
        if step >= STEPS // 2:
            q = vnet.posteriors["weight"]
            mus.append(q.mu.detach().clone())
            sigmas.append(q.sigma.detach())
    return torch.stack(mus).mean(0), torch.stack(sigmas).mean(0)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, ROWS, bias=False).double()


INITS: dict[str, Callable[[], inits.Init]] = {
    "relative": inits.Relative,
    "constant": lambda: inits.Constant(0.3),
    "zero_mean": inits.ZeroMean,
    "BayesianCNN": inits.Normal,
    "BLiTZ": lambda: inits.Normal(mu=(0.0, 0.1), rho=(-7.0, 0.1)),
    "moped": lambda: inits.Moped(0.5),
}


@pytest.mark.parametrize("init", INITS.values(), ids=INITS.keys())
def test_every_initialization_finds_the_posterior(init: Callable[[], inits.Init]) -> None:
    vnet = varify.variationalize(network(), prior=priors.Gaussian(std=1.0), init=init())
    assert_close(train(vnet), by_linear_algebra(torch.zeros(3), torch.ones(3)))


PRIORS = {
    "default": (priors.Gaussian(), torch.zeros(3), torch.full((3,), 3**-0.5)),
    "mean and std": (
        priors.Gaussian(torch.tensor([1.0, 0.0, -1.0]), torch.tensor([0.5, 1.0, 2.0])),
        torch.tensor([1.0, 0.0, -1.0]),
        torch.tensor([0.5, 1.0, 2.0]),
    ),
    "centered": (priors.Gaussian(std=0.5, centered=True), network().weight.detach(), torch.full((3,), 0.5)),
    "a torch distribution": (torch.distributions.Normal(0.5, 0.7), torch.full((3,), 0.5), torch.full((3,), 0.7)),
    # two components of one scale are that Gaussian, and take the estimated KL
    "mixture": (priors.ScaleMixture(0.8, 0.8, 0.3, n_mc_samples=3), torch.zeros(3), torch.full((3,), 0.8)),
}


@pytest.mark.parametrize(("prior", "mean", "std"), PRIORS.values(), ids=PRIORS.keys())
def test_every_prior_with_a_closed_answer_finds_it(prior: object, mean: Tensor, std: Tensor) -> None:
    vnet = varify.variationalize(network(), prior=prior)
    assert_close(train(vnet), by_linear_algebra(mean.double(), std.double()))


def assert_close(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    # Averages over 500 late steps and all rows scatter by about 1 % between seeds; planted bugs (KL as mean, KL
    # reversed, sigma for variance, exp for softplus, detached sigma) move them by 15 % or more.
    torch.testing.assert_close(found[0].mean(0), expected[0].mean(0), rtol=0.04, atol=0.04)
    torch.testing.assert_close(found[1].mean(0), expected[1], rtol=0.04, atol=0.0)


@pytest.mark.parametrize("estimator", ["local", "flipout", "auto"])
def test_every_estimator_finds_the_posterior(estimator: str) -> None:
    vnet = varify.variationalize(network(), prior=priors.Gaussian(std=1.0), estimator=estimator, strict=True)
    assert_close(train(vnet), by_linear_algebra(torch.zeros(3), torch.ones(3)))


@pytest.mark.parametrize("n_samples", [1, 3])
def test_the_objective_finds_the_posterior(n_samples: int) -> None:
    """The same with ELBO and a likelihood: the loss per datum, and no word of a division by the user."""
    x, y = problem()
    vnet = varify.variationalize(network(), prior=priors.Gaussian(std=1.0))
    likelihood = varify.GaussianLikelihood(sigma=NOISE, learn=False)
    elbo = varify.ELBO(num_data=16, n_samples=n_samples, beta=1.0)

    found = train(vnet, loss=lambda: 16 * elbo(vnet, likelihood, x, y.expand(-1, ROWS)).loss)
    assert_close(found, by_linear_algebra(torch.zeros(3), torch.ones(3)))
    assert elbo.step == STEPS


def test_learn_mu_and_learn_rho() -> None:
    expected_mu, expected_sigma = by_linear_algebra(torch.zeros(3), torch.ones(3))
    only_rho = varify.variationalize(network(), prior=priors.Gaussian(std=1.0), learn_mu=False)
    mu, sigma = train(only_rho)
    assert torch.equal(mu, network().weight)
    assert_close((expected_mu, sigma), (expected_mu, expected_sigma))
    only_mu = varify.variationalize(
        network(), prior=priors.Gaussian(std=1.0), init=inits.Constant(0.2), learn_rho=False
    )
    mu, sigma = train(only_mu)
    torch.testing.assert_close(sigma, torch.full_like(sigma, 0.2))
    assert_close((mu, expected_sigma.expand(ROWS, 3)), (expected_mu, expected_sigma))
