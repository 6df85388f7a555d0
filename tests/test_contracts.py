"""Every built-in prior, initialization and rule keeps its contract, and the contracts catch what breaks them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributions as td

import varify
from varify import inits, priors
from varify.estimators import rules
from varify.priors import registry
from varify.testing import InitContract, PriorContract, RuleContract
from varify.weights import kl

# --- priors


class TestGaussian(PriorContract):
    def make(self) -> Any:
        return priors.Gaussian(mean=0.2, std=0.7)

    def log_density(self, w: np.ndarray) -> Any:
        return scipy.stats.norm(0.2, 0.7).logpdf(w)


class TestGaussianByName(PriorContract):
    def make(self) -> Any:
        return "gaussian"

    def log_density(self, w: np.ndarray) -> Any:
        return scipy.stats.norm(0, 4**-0.5).logpdf(w)  # of a fan-in of 4


class TestGaussianOfTensors(PriorContract):
    mean, std = torch.tensor([0.0, 1.0, -1.0, 0.3]), torch.tensor([[0.01], [0.2], [3.0]])

    def make(self) -> Any:
        return priors.Gaussian(self.mean, self.std)

    def log_density(self, w: np.ndarray) -> Any:
        return scipy.stats.norm(self.mean.double().numpy(), self.std.double().numpy()).logpdf(w)


class TestGaussianAroundTheWeights(PriorContract):
    def make(self) -> Any:
        return priors.Gaussian(std=0.05, centered=True)


class TestGaussianOfABias(PriorContract):
    shape = (5,)

    def make(self) -> Any:
        return priors.Gaussian(bias_std=0.01)

    def log_density(self, w: np.ndarray) -> Any:
        return scipy.stats.norm(0, 0.01).logpdf(w)


class TestScaleMixture(PriorContract):
    def make(self) -> Any:
        return priors.ScaleMixture(sigma_1=1.0, sigma_2=0.002, pi=0.25)

    def log_density(self, w: np.ndarray) -> Any:
        parts = [np.log(p) + scipy.stats.norm(0, s).logpdf(w) for p, s in ((0.25, 1.0), (0.75, 0.002))]
        return scipy.special.logsumexp(parts, axis=0)


class TestScaleMixtureOfTensors(PriorContract):
    def make(self) -> Any:
        return priors.ScaleMixture(torch.tensor([1.0, 0.5, 2.0, 0.1]), 0.1, torch.tensor([[0.1], [0.5], [0.9]]), 3)

    def log_density(self, w: np.ndarray) -> Any:
        first, second = scipy.stats.norm(0, [1.0, 0.5, 2.0, 0.1]).logpdf(w), scipy.stats.norm(0, 0.1).logpdf(w)
        pi = np.array([[0.1], [0.5], [0.9]])
        return np.logaddexp(np.log(pi) + first, np.log1p(-pi) + second)


class TestConjugate(PriorContract):
    def make(self) -> Any:
        return priors.Conjugate(mu_0=0.1, kappa_0=3.0, alpha_0=1.5, beta_0=0.7, n_mc_samples=2)

    def log_density(self, w: np.ndarray) -> Any:
        # given the weights so far, the next one has a Student's t distribution (Murphy 2007, section 3.5)
        mu, kappa, alpha, beta, total = 0.1, 3.0, 1.5, 0.7, 0.0
        for x in w.flatten():
            total += scipy.stats.t(2 * alpha, mu, (beta * (kappa + 1) / (alpha * kappa)) ** 0.5).logpdf(x)
            beta += kappa * (x - mu) ** 2 / (2 * (kappa + 1))
            mu, kappa, alpha = (kappa * mu + x) / (kappa + 1), kappa + 1, alpha + 0.5
        return total


class TestConjugateKnownMean(PriorContract):
    def make(self) -> Any:
        return priors.ConjugateKnownMean(mean=0.2, alpha_0=1.5, beta_0=0.3)

    def log_density(self, w: np.ndarray) -> Any:
        # all weights at once have a multivariate t distribution
        return scipy.stats.multivariate_t(np.full(w.size, 0.2), 0.2 * np.eye(w.size), df=3).logpdf(w.flatten())


class TestConjugateKnownMeanOfATensor(PriorContract):
    def make(self) -> Any:
        return priors.ConjugateKnownMean(mean=torch.tensor([0.0, 1.0, -1.0, 0.3]), alpha_0=0.5, beta_0=0.3)


class TestNormal(PriorContract):
    def make(self) -> Any:
        return td.Normal(0.0, 2.0)

    def log_density(self, w: np.ndarray) -> Any:
        return scipy.stats.norm(0, 2).logpdf(w)


class TestLaplace(PriorContract):
    def make(self) -> Any:
        return td.Laplace(torch.tensor([0.0, 0.1, -0.2, 1.0]), 0.5)

    def log_density(self, w: np.ndarray) -> Any:
        return scipy.stats.laplace([0.0, 0.1, -0.2, 1.0], 0.5).logpdf(w)


class TestStudentT(PriorContract):
    def make(self) -> Any:
        return td.StudentT(3.0, 0.0, 0.5)

    def log_density(self, w: np.ndarray) -> Any:
        return scipy.stats.t(3, 0, 0.5).logpdf(w)


class TestCauchy(PriorContract):
    def make(self) -> Any:
        return priors.as_prior(td.Cauchy(0.0, 0.5), n_mc_samples=2)

    def log_density(self, w: np.ndarray) -> Any:
        return scipy.stats.cauchy(0, 0.5).logpdf(w)


class TestMixtureOfDistributions(PriorContract):
    def make(self) -> Any:
        return td.MixtureSameFamily(
            td.Categorical(torch.tensor([0.3, 0.5, 0.2])),
            td.Normal(torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([0.05, 0.05, 0.2])),
        )

    def log_density(self, w: np.ndarray) -> Any:
        means, stds = (-1.0, 0.0, 1.0), (0.05, 0.05, 0.2)
        parts = [
            np.log(p) + scipy.stats.norm(m, s).logpdf(w) for p, m, s in zip((0.3, 0.5, 0.2), means, stds, strict=True)
        ]
        return scipy.special.logsumexp(parts, axis=0)


class TestMixtureOfDistributionsOfTensors(PriorContract):
    def make(self) -> Any:
        return td.MixtureSameFamily(
            td.Categorical(torch.tensor([[0.3, 0.7], [0.5, 0.5], [0.9, 0.1], [0.2, 0.8]])),
            td.Laplace(torch.tensor([[0.0, 1.0]] * 4), torch.tensor([[0.5, 0.1]] * 4)),
        )

    def log_density(self, w: np.ndarray) -> Any:
        first, second = scipy.stats.laplace(0, 0.5).logpdf(w), scipy.stats.laplace(1, 0.1).logpdf(w)
        pi = np.array([0.3, 0.5, 0.9, 0.2])
        return np.logaddexp(np.log(pi) + first, np.log1p(-pi) + second)


def test_every_prior_that_has_a_name_has_a_contract() -> None:
    made = {
        type(priors.as_prior(contract().make())) for contract in PriorContract.__subclasses__() if of_here(contract)
    }
    built_in = {kind for kind in registry._BY_NAME.values() if kind.__module__.startswith("varify.")}
    assert built_in <= made


def of_here(contract: type) -> bool:
    return contract.__module__ == __name__ and contract.__name__.startswith("Test")


# --- initializations


class TestInits(InitContract):
    @pytest.fixture(
        autouse=True, params=[name for name, kind in inits._BY_NAME.items() if "varify." in kind.__module__]
    )
    def _name(self, request: pytest.FixtureRequest) -> None:
        self.name = request.param

    def make(self) -> Any:
        return self.name


class TestInitsOfOtherSettings(InitContract):
    made = (inits.Relative(2.0), inits.Constant(1e-3), inits.Normal((1.0, 0.0), (-7.0, 0.1)), inits.Moped(0.5))

    @pytest.fixture(autouse=True, params=made, ids=lambda init: type(init).__name__)
    def _init(self, request: pytest.FixtureRequest) -> None:
        self.init = request.param

    def make(self) -> Any:
        return self.init


# --- rules


def w(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def x(*shape: int) -> Tensor:
    return torch.randn(shape)


# By operation, examples of its arguments. The first dimension counts examples, but where None stands for it.
CASES: dict[Any, list[Callable[[], Sequence[Any]]]] = {
    F.linear: [
        lambda: (x(4, 3), w(2, 3), w(2)),
        lambda: (x(4, 3), w(2, 3)),
        lambda: (x(4, 3), w(2, 3), x(2)),
        lambda: (x(2, 3, 3), w(2, 3), w(2)),
    ],
    torch.conv1d: [lambda: (x(2, 2, 6), w(3, 2, 3), w(3), 2, 1)],
    torch.conv2d: [lambda: (x(2, 2, 3, 3), w(4, 1, 2, 2), w(4), 1, 0, 1, 2)],
    torch.conv3d: [lambda: (x(2, 1, 2, 3, 2), w(2, 1, 2, 2, 2), w(2))],
    torch.conv_transpose1d: [lambda: (x(2, 2, 3), w(2, 2, 3), w(2), 2)],
    torch.conv_transpose2d: [lambda: (x(2, 2, 2, 2), w(2, 2, 2, 2), w(4), 1, 0, 0, 2)],
    torch.conv_transpose3d: [lambda: (x(2, 1, 1, 2, 1), w(1, 2, 2, 2, 2), w(2))],
    "matmul": [lambda: (x(4, 3), w(3, 2)), lambda: (x(2, 3, 3), w(3, 2))],
    "mm": [lambda: (x(4, 3), w(3, 2))],
    "addmm": [lambda: (w(2), x(4, 3), w(3, 2)), lambda: (x(2), x(4, 3), w(3, 2))],
    F.bilinear: [lambda: (x(4, 3), x(4, 2), w(2, 3, 2), w(2))],
    F.embedding: [lambda: (torch.tensor([[1, 2, 1], [3, 1, 4]]), w(5, 2))],
    "add": [lambda: (x(4, 3), w(3)), lambda: (w(2, 3), x(4, 2, 3))],
    "mul": [lambda: (x(4, 3), w(3)), lambda: (w(2, 3), x(4, 2, 3))],
}
RULES = [(estimator, operation) for estimator, operation in rules._RULES if estimator in rules.NAMES]


def case_ids(value: Any) -> str:
    estimator, operation, number = value
    return f"{estimator}-{getattr(operation, '__name__', operation)}-{number}"


class TestRules(RuleContract):
    @pytest.fixture(
        autouse=True,
        params=[(e, operation, i) for e, operation in RULES for i in range(len(CASES.get(operation, [])))],
        ids=case_ids,
    )
    def _case(self, request: pytest.FixtureRequest) -> None:
        self.estimator, self.operation, self.number = request.param

    def arguments(self) -> Sequence[Any]:
        return CASES[self.operation][self.number]()


class TestAMatrixOnTheLeft(RuleContract):
    estimator, operation, example_dim = "local", torch.matmul, None

    def arguments(self) -> Sequence[Any]:
        return w(3, 2), x(2, 4)


class TestAVector(RuleContract):
    estimator, operation, example_dim = "flipout", F.linear, None

    def arguments(self) -> Sequence[Any]:
        return x(3), w(2, 3), w(2)


def test_every_rule_has_a_case() -> None:
    assert {operation for _, operation in RULES} == set(CASES)


# --- the contracts catch what breaks them


class Broken(priors.Prior):
    """A Laplace prior, as yet without a fault."""

    def __init__(self, scale: Any = 0.4) -> None:
        super().__init__()
        self.keep_positive(scale=scale)

    def log_prob(self, w: Tensor) -> Tensor:
        return (-w.abs() / self.scale - torch.as_tensor(2 * self.scale).log()).sum()


class Unsummed(Broken):
    def log_prob(self, w: Tensor) -> Tensor:
        return -w.abs() / self.scale


class WithoutItsConstant(Broken):
    def log_prob(self, w: Tensor) -> Tensor:
        return -(w.abs() / self.scale).sum()


class InBits(Broken):
    def log_prob(self, w: Tensor) -> Tensor:
        return super().log_prob(w) / np.log(2)


class Detached(Broken):
    def log_prob(self, w: Tensor) -> Tensor:
        return super().log_prob(w.detach() + 0 * w)


class InfinitelySteepAtZero(Broken):
    def log_prob(self, w: Tensor) -> Tensor:
        return super().log_prob(w.square().sqrt())


class Writing(Broken):
    def log_prob(self, w: Tensor) -> Tensor:
        return super().log_prob(w.detach().clone().copy_(w.mul_(2)))


class OfStorage(Broken):
    def log_prob(self, w: Tensor) -> Tensor:
        return super().log_prob(w * torch.arange(w.numel()).as_strided(w.shape, w.stride()))


class Shared(Broken):
    def for_parameter(self, w: Tensor, fan_in: int) -> priors.Prior:
        return self


class Loose(Broken):
    def __init__(self, scale: Any = 0.4) -> None:
        super().__init__(scale)
        self.center = torch.zeros(3, 4)

    def log_prob(self, w: Tensor) -> Tensor:
        return super().log_prob(w - self.center)


class Forgetful(Broken):
    def __init__(self, width: float = 0.4) -> None:
        super().__init__(width)


class OfOtherSettings(Broken):
    def settings(self) -> dict[str, Any]:
        return {"scale": 1.0}


class Unpicklable(Broken):
    def __init__(self, scale: Any = 0.4) -> None:
        super().__init__(scale)
        self.function = lambda w: w


class PickingOthers(Broken):
    def __init__(self, scale: Any = None) -> None:
        super().__init__(torch.rand(3, 4) + 0.1 if scale is None else scale)

    def at(self, chosen: Tensor) -> priors.Prior:
        return super().at(chosen.flip(0)) if not chosen.all() else super().at(chosen)


class OfVariance(Broken):
    def stddev(self) -> Any:
        return 2 * self.scale**2


class OfAWrongShape(Broken):
    def stddev(self) -> Any:
        return torch.ones(7)


class OfNoDeviation(Broken):
    def stddev(self) -> Any:
        return float("nan")


class OfAWrongKL(Broken):
    pass


class OfAKLWithoutGradient(Broken):
    pass


PRIORS: list[tuple[type[priors.Prior], str, str]] = [
    (Unsummed, "test_log_prob_is_a_finite_scalar", r"shape \(3, 4\).*add \.sum\(\)"),
    (Writing, "test_log_prob_is_a_finite_scalar", "wrote into w"),
    (
        WithoutItsConstant,
        "test_the_density_of_one_weight_is_normalized",
        r"integrates to 0\.8\d*, not 1.* with its constant",
    ),
    (InBits, "test_the_density_of_one_weight_is_normalized", "must be in nats"),
    (OfVariance, "test_the_density_of_one_weight_is_normalized", "is it a variance"),
    (Detached, "test_log_prob_is_differentiable", "not that of finite differences"),
    (InfinitelySteepAtZero, "test_log_prob_is_differentiable", "mind 0"),
    (OfStorage, "test_log_prob_does_not_depend_on_layout", "not storage"),
    (Shared, "test_each_parameter_has_a_copy", "which copies"),
    (Loose, "test_each_parameter_has_a_copy", r"\['center'\] would not move or be saved"),
    (Forgetful, "test_it_is_saved_and_loaded", r"keeps each argument under its name: self\.keep"),
    (OfOtherSettings, "test_it_is_saved_and_loaded", "log_prob differs when the prior is loaded"),
    (Unpicklable, "test_it_is_copied_and_pickled", "at the top of a module"),
    (PickingOthers, "test_it_is_a_prior_of_some_weights", "must pick the hyper-parameters of the chosen"),
    (OfAWrongShape, "test_weight_std_is_positive_or_none", "broadcast to the parameter"),
    (OfNoDeviation, "test_weight_std_is_positive_or_none", "return None if there is none"),
    (OfAWrongKL, "test_kl_divergence_is_that_of_draws", "the KL is .* over draws"),
    (OfAKLWithoutGradient, "test_gradients_of_the_kl_are_right", "does its rule detach"),
]


@pytest.fixture
def wrong_divergences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kl, "_RULES", dict(kl._RULES))
    right = kl.kl_divergence
    laplace = lambda q, p: right(q, priors.as_prior(td.Laplace(0.0, p.scale)))  # noqa: E731
    varify.register_kl(varify.GaussianPosterior, OfAWrongKL)(lambda q, p: 0.9 * laplace(q, p))
    detached = lambda q: varify.GaussianPosterior(q.mu, q.rho.detach() + 0 * q.rho, q.prior)  # noqa: E731
    varify.register_kl(varify.GaussianPosterior, OfAKLWithoutGradient)(lambda q, p: laplace(detached(q), p))


@pytest.mark.usefixtures("wrong_divergences")
@pytest.mark.parametrize(("kind", "test", "told"), PRIORS, ids=[kind.__name__ for kind, _, _ in PRIORS])
def test_a_broken_prior_is_told(kind: type[priors.Prior], test: str, told: str) -> None:
    class Contract(PriorContract):
        def make(self) -> Any:
            return kind()

    with pytest.raises(AssertionError, match=rf"(?s){told}"):
        getattr(Contract(), test)()


def test_a_wrong_reference_is_told() -> None:
    class Contract(PriorContract):
        def make(self) -> Any:
            return Broken()

        def log_density(self, w: np.ndarray) -> Any:
            return scipy.stats.laplace(0, 0.41).logpdf(w)

    with pytest.raises(AssertionError, match="not the reference's at weights of scale"):
        Contract().test_log_prob_is_the_reference()


@pytest.mark.usefixtures("wrong_divergences")
def test_the_prior_that_the_broken_ones_are_made_of_is_not_broken() -> None:
    class Contract(PriorContract):
        def make(self) -> Any:
            return Broken()

    for name in (name for name in dir(Contract) if name.startswith("test_") and "reference" not in name):
        getattr(Contract(), name)()


class WritingIntoTheWeight(inits.Init):
    def __call__(self, w: Tensor, prior_std: Tensor) -> tuple[Tensor, Tensor]:
        return w.mul_(2), torch.full_like(w, -3.0)


class WritingIntoTheScale(inits.Init):
    def __call__(self, w: Tensor, prior_std: Tensor) -> tuple[Tensor, Tensor]:
        return w, prior_std.mul_(0.1).log()


class OfOneRho(inits.Init):
    def __call__(self, w: Tensor, prior_std: Tensor) -> tuple[Tensor, Tensor]:
        return w, torch.tensor(-3.0)


class WithoutAFloor(inits.Init):
    def __call__(self, w: Tensor, prior_std: Tensor) -> tuple[Tensor, Tensor]:
        return w, inits.softplus_inverse(0.1 * w.abs())


class InHalfPrecision(inits.Init):
    def __call__(self, w: Tensor, prior_std: Tensor) -> tuple[Tensor, Tensor]:
        return w, torch.full_like(w, -3.0).half()


class InDoublePrecision(inits.Init):
    def __call__(self, w: Tensor, prior_std: Tensor) -> tuple[Tensor, Tensor]:
        return w, torch.full_like(w, -3.0).double()


INITS: list[tuple[type[inits.Init], str, str]] = [
    (WritingIntoTheWeight, "test_what_is_given_is_not_changed", "wrote into w"),
    (WritingIntoTheScale, "test_what_is_given_is_not_changed", "not to be written into"),
    (OfOneRho, "test_mu_and_rho_fit_the_parameter", "rho of a parameter .* must have the parameter's shape"),
    (WithoutAFloor, "test_mu_and_rho_fit_the_parameter", "where the weight is"),
    (InHalfPrecision, "test_mu_and_rho_fit_the_parameter", "must be float32 or float64"),
    (InDoublePrecision, "test_networks_start_with_it", "keep the dtype of w"),
]


@pytest.mark.parametrize(("kind", "test", "told"), INITS, ids=[kind.__name__ for kind, _, _ in INITS])
def test_a_broken_initialization_is_told(kind: type[inits.Init], test: str, told: str) -> None:
    class Contract(InitContract):
        def make(self) -> Any:
            return kind()

    with pytest.raises(AssertionError, match=rf"(?s){told}"):
        getattr(Contract(), test)()


def with_noise(mean: Tensor, var: Tensor) -> Tensor:
    return mean + var.sqrt() * torch.randn_like(mean)


def of_sigma_for_variance(op: Any, input: Tensor, mat2: Any) -> Tensor:
    return with_noise(op(input, mat2.mu), op(input.square(), mat2.sigma))


def of_no_mean(op: Any, input: Tensor, mat2: Any) -> Tensor:
    return with_noise(0.9 * op(input, mat2.mu), op(input.square(), mat2.var()))


def of_no_noise(op: Any, input: Tensor, mat2: Any) -> Tensor:
    return op(input, mat2.mu)


def steep_without_sigma(op: Any, input: Tensor, mat2: Any) -> Tensor:
    return with_noise(op(input, mat2.mu), op(input.square(), mat2.var()))


def of_a_wrong_type(op: Any, input: Tensor, mat2: Any) -> Tensor:
    return steep_without_sigma(op, input, mat2).double()


def of_independent_outputs(op: Any, input: Tensor, mat2: Any) -> Tensor:
    return steep_without_sigma(op, input, mat2)


def flipping_one_axis(op: Any, input: Tensor, mat2: Any) -> Tensor:
    noise = op(input * mat2.flip(input, 1, -1), mat2.perturbation())
    return op(input, mat2.mu) + noise * torch.randint_like(noise, 2).mul(2).sub(1)


# bmm with a matrix of each example's own: (examples, rows, in) and (examples, in, out)
RULES_BROKEN: list[tuple[Callable[..., Tensor], str, str, str]] = [
    (of_sigma_for_variance, "local", "test_mean_and_variance_are_those_of_drawn_weights", "sigma taken for sigma²"),
    (of_no_noise, "local", "test_mean_and_variance_are_those_of_drawn_weights", "the variance"),
    (of_no_mean, "local", "test_mean_and_variance_are_those_of_drawn_weights", "the mean .* standard errors"),
    (of_no_noise, "local", "test_gradients_reach_mu_and_sigma", "no gradient reaches sigma"),
    (of_no_mean, "local", "test_without_sigma_it_is_the_operation", "must be that of the means"),
    (steep_without_sigma, "local", "test_without_sigma_it_is_the_operation", "mind the slope of sqrt"),
    (of_a_wrong_type, "local", "test_the_output_has_shape_and_type_of_the_operations", "cast the noise"),
    (of_independent_outputs, "flipout", "test_mean_and_variance_are_those_of_drawn_weights", "covariances within"),
    (flipping_one_axis, "flipout", "test_one_noise_is_kept_for_several_uses", "two uses of one weight have two noises"),
]


@pytest.mark.parametrize(("function", "estimator", "test", "told"), RULES_BROKEN)
def test_a_broken_rule_is_told(
    function: Callable[..., Tensor], estimator: str, test: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))
    rules.rule(estimator, torch.bmm, of=("mat2",))(function)
    with pytest.raises(AssertionError, match=rf"(?s){told}"):
        getattr(Bmm(estimator), test)()


class Bmm(RuleContract):
    operation = torch.bmm

    def __init__(self, estimator: str) -> None:
        self.estimator = estimator

    def arguments(self) -> Sequence[Any]:
        return x(2, 3, 3), w(2, 3, 2)


def test_flipout_of_one_draw_for_all_examples_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Linear(RuleContract):
        estimator, operation = "flipout", F.linear

        def arguments(self) -> Sequence[Any]:
            return x(2, 3), w(2, 3)

    def of_one_draw(op: Any, input: Tensor, weight: Any) -> Tensor:
        return op(input, weight.mu + weight.perturbation())

    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))
    rules.rule("flipout", F.linear)(of_one_draw)
    with pytest.raises(AssertionError, match="outputs of two examples are correlated"):
        Linear().test_mean_and_variance_are_those_of_drawn_weights()


def test_a_rule_that_a_network_does_not_meet_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))
    with pytest.raises(AssertionError, match=r"decorate one with varify\.estimators\.rule"):
        Bmm("local").test_without_sigma_it_is_the_operation()
    rules.rule("local", torch.bmm, of=("input",))(of_no_noise)
    with pytest.raises(AssertionError, match=r"EstimatorError.*of=` and `refuses="):
        Bmm("local").test_a_network_meets_it()


def test_contracts_leave_the_random_state_alone_and_say_what_is_missing() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    TestLaplace().test_kl_divergence_is_that_of_draws()
    assert torch.equal(torch.rand(3), expected)
    with pytest.raises(NotImplementedError, match=r"PriorContract must define make\(self\): return the prior"):
        PriorContract().test_a_network_takes_it()
