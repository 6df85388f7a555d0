"""Draws and divergences with gradients of their own: against torch.distributions and finite differences."""

import copy
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal
from torch.distributions.kl import kl_divergence as reference_kl
from torch.utils._python_dispatch import TorchDispatchMode

import varify
from varify.estimators.local import _with_noise as with_noise
from varify.estimators.rules import find_rule
from varify.posteriors import GaussianPosterior
from varify.priors import Gaussian
from varify.priors.total_kl import BLOCK, total_kl
from varify.weights.draw import draw
from varify.weights.fused import LARGE
from varify.weights.moments import Examples, Moments

SIZES = [(3, 2), (LARGE + 5,), (2 * BLOCK + 7,)]


def posterior(shape: tuple[int, ...], prior: Gaussian, dtype: torch.dtype = torch.float64) -> GaussianPosterior:
    torch.manual_seed(0)
    mu, rho = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype) - 1
    return GaussianPosterior(mu.requires_grad_(), rho.requires_grad_(), prior)


def sigma_by_definition(rho: Tensor) -> Tensor:
    return torch.logaddexp(rho, torch.zeros_like(rho))


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("learns", [(True, True), (True, False), (False, True)])
def test_a_draw_is_mu_plus_sigma_eps_in_value_and_gradient(shape: tuple[int, ...], learns: tuple[bool, bool]) -> None:
    q = posterior(shape, Gaussian(std=1.0))
    q.mu.requires_grad_(learns[0])
    q.rho.requires_grad_(learns[1])
    eps, seen = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    theta = draw({"w": q}, {"w": eps})["w"]
    expected = q.mu + sigma_by_definition(q.rho) * eps
    torch.testing.assert_close(theta, expected)
    wanted = [t for t in (q.mu, q.rho) if t.requires_grad]
    found = torch.autograd.grad((theta * seen).sum(), wanted)
    torch.testing.assert_close(found, torch.autograd.grad((expected * seen).sum(), wanted))


def test_derivatives_of_draws_and_divergences_are_those_of_finite_differences_twice_over() -> None:
    eps = torch.randn(2, 3, dtype=torch.float64)
    priors = [Gaussian(mean=0.3, std=0.7), Gaussian(mean=torch.randn(3).double(), std=torch.rand(2, 1).double() + 0.5)]

    def both(mu: Tensor, rho: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        posteriors = {"a": GaussianPosterior(mu, rho, priors[0]), "b": GaussianPosterior(other, rho + 1, priors[1])}
        return (*draw(posteriors, {"a": eps, "b": -eps}).values(), torch.stack(total_kl(posteriors.values())).sum())

    torch.manual_seed(1)
    inputs = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(both, inputs)
    assert torch.autograd.gradgradcheck(both, inputs)


PRIORS = {
    "numbers": Gaussian(mean=0.2, std=0.3),
    "no mean": Gaussian(std=2.0),
    "tensors": Gaussian(mean=torch.tensor([0.5, -0.5]).double(), std=torch.tensor([[1.0], [0.1], [2.0]]).double()),
}


@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)
@pytest.mark.parametrize("shape", [(3, 2), (LARGE + 5,), (2 * BLOCK + 7,)])
def test_the_total_divergence_is_that_of_torchs_distributions(prior: Gaussian, shape: tuple[int, ...]) -> None:
    if len(shape) == 1 and isinstance(prior.std, Tensor):
        prior = Gaussian(mean=torch.linspace(-1, 1, *shape).double(), std=torch.linspace(0.5, 2, *shape).double())
    q = posterior(shape, prior)
    (kl,) = total_kl([q])
    p = Normal(*(torch.as_tensor(each, dtype=torch.float64) for each in (prior.mean, prior.std)))
    expected = reference_kl(Normal(q.mu, sigma_by_definition(q.rho)), p).sum()
    torch.testing.assert_close(kl, expected)
    torch.testing.assert_close(
        torch.autograd.grad(kl, (q.mu, q.rho)), torch.autograd.grad(expected, (q.mu, q.rho)), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sigma_that_underflows_has_a_finite_divergence_with_the_slope_of_a_logarithm(dtype: torch.dtype) -> None:
    rho = torch.tensor([-1000.0, -200.0, -50.0, -30.0, 0.0, 60.0], dtype=dtype, requires_grad=True)
    (kl,) = total_kl([GaussianPosterior(torch.zeros_like(rho), rho, Gaussian(std=0.5))])
    # log(s/sigma) + sigma²/2s² − ½ with log sigma = rho far below 0, and sigma = rho far above
    exact = sum(-0.6931471805599453 - r - 0.5 for r in (-1000.0, -200.0, -50.0, -30.0))
    middle = reference_kl(Normal(0.0, torch.tensor(2.0).double().log()), Normal(torch.tensor(0.0).double(), 0.5))
    exact += float(middle) + float(reference_kl(Normal(0.0, torch.tensor(60.0).double()), Normal(0.0, 0.5)))
    torch.testing.assert_close(kl.item(), exact, rtol=1e-5, atol=0)
    (slope,) = torch.autograd.grad(kl, rho)
    torch.testing.assert_close(slope[:4], -torch.ones(4, dtype=dtype), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(slope[5].item(), 60 / 0.25 - 1 / 60, rtol=1e-5, atol=0)


class Heavy(Gaussian):
    """A Gaussian by name only."""

    def log_prob(self, w: Tensor) -> Tensor:
        return -w.abs().sum()


def test_prior_loss_is_the_sum_over_names_whatever_the_priors_and_masks() -> None:
    network = nn.Sequential(nn.Embedding(5, 4, padding_idx=0), nn.Linear(4, 3), nn.Linear(3, 2).double())
    vnet = varify.variationalize(network, prior="gaussian")
    vnet.set_prior(varify.priors.Gaussian(centered=True), where="1.weight")
    vnet.set_prior(Gaussian(mean=torch.tensor([0.1, 0.2, 0.3]), std=0.5), where="1.bias")
    by_name = vnet.kl_divergence()
    assert set(by_name) == set(vnet.posteriors)
    total = vnet.prior_loss()
    torch.testing.assert_close(total.double(), sum(kl.double() for kl in by_name.values()), rtol=1e-6, atol=1e-6)
    vnet.set_prior(Heavy(std=1.0), where="2.weight")  # its divergence is an estimate
    with vnet.fixed_draw():
        torch.testing.assert_close(vnet.prior_loss(), vnet.prior_loss(), rtol=0, atol=0)
        estimated = vnet.kl_divergence()
        assert estimated["2.weight"] != by_name["2.weight"]
        torch.testing.assert_close(vnet.prior_loss().double(), sum(kl.double() for kl in estimated.values()))


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("estimator", ["weights", "flipout", "local"])
def test_a_step_computes_sigma_once_for_draws_and_divergence(estimator: str) -> None:
    vnet = varify.variationalize(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), estimator=estimator).train()
    elbo, x, y = varify.ELBO(num_data=10, n_samples=2), torch.randn(5, 4), torch.randn(5, 2)
    elbo(vnet, F.mse_loss, x, y)  # which is recorded with draws
    with Counting() as counting:
        elbo(vnet, F.mse_loss, x, y).loss.backward()
    assert counting.calls["softplus"] == 4
    assert all(q.shared is None for q in vnet.posteriors.values())


@pytest.mark.parametrize("vectorize", [True, False])
def test_a_prediction_computes_sigma_once_for_all_draws(vectorize: bool) -> None:
    vnet = varify.variationalize(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))
    with Counting() as counting:
        prediction = vnet.predict(torch.randn(5, 4), n_samples=7, vectorize=vectorize)
    assert counting.calls["softplus"] == 4
    assert len(prediction.samples.unique(dim=0)) == 7
    assert all(q.shared is None for q in vnet.posteriors.values())


def test_sharing_ends_with_the_objective_and_heeds_what_is_written_into_rho() -> None:
    vnet = varify.variationalize(nn.Linear(4, 3)).train()
    before = vnet.prior_loss()  # whose graph lives on
    for rho in vnet.rho.parameters():
        rho.data.sub_(1.0)  # without a trace in its version
    assert vnet.prior_loss() > before + 1
    with vnet.posteriors.sharing_sigma():
        loss = vnet.prior_loss()
        with torch.no_grad():
            for rho in vnet.rho.parameters():
                rho.sub_(1.0)
        assert vnet.prior_loss() > loss + 1

        def fails(*_: object) -> Tensor:
            raise RuntimeError("of the criterion")

        with pytest.raises(RuntimeError, match="of the criterion"):
            varify.ELBO(num_data=20)(vnet, fails, torch.randn(2, 4), torch.randn(2, 3))
    assert all(q.shared is None for q in vnet.posteriors.values())


@pytest.mark.parametrize("prior", ["gaussian", "mixture"])
def test_gradients_of_the_objective_are_those_of_the_formulas(prior: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    vnet = varify.variationalize(network, prior=Gaussian(std=0.5)).train()
    if prior == "mixture":
        vnet.set_prior(varify.priors.ScaleMixture(1.0, 0.1, 0.5), where="0.weight")
    noise = {name: torch.randn_like(q.rho) for name, q in vnet.posteriors.items()}
    x, y = torch.randn(5, 4).double(), torch.randn(5, 2).double()
    with vnet.fixed_draw(noise):
        terms = varify.ELBO(num_data=20, beta=1.0)(vnet, F.mse_loss, x, y)
    w = {name: q.mu + sigma_by_definition(q.rho) * noise[name] for name, q in vnet.posteriors.items()}
    output = torch.tanh(x @ w["0.weight"].T + w["0.bias"]) @ w["2.weight"].T + w["2.bias"]
    nll = (output - y).square().mean()
    torch.testing.assert_close(terms.nll, nll)
    parameters = list(vnet.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(terms.nll, parameters, retain_graph=True), torch.autograd.grad(nll, parameters)
    )
    terms.nll.backward()  # one after another, as some loops do
    terms.kl.backward()
    if prior == "gaussian":
        kl = sum(
            reference_kl(Normal(q.mu, sigma_by_definition(q.rho)), Normal(0.0, 0.5)).sum()
            for q in vnet.posteriors.values()
        )
        torch.testing.assert_close(terms.kl, kl)


def test_weights_that_a_call_does_not_use_get_no_gradient_of_it() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    vnet = varify.variationalize(network).train()
    theta = vnet.posteriors.draw()
    theta["0.weight"].sum().backward()
    assert vnet.module[0].weight.grad is not None
    assert vnet.module[1].weight.grad is None
    assert vnet.rho.leaf_at("1.weight").grad is None


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, at its first jvp
def test_transforms_and_modes_of_autograd_see_the_plain_formulas() -> None:
    q = posterior((3, 2), Gaussian(std=1.0))
    eps = torch.randn(3, 2, dtype=torch.float64)

    def loss(mu: Tensor, rho: Tensor) -> Tensor:
        p = GaussianPosterior(mu, rho, q.prior)
        return draw({"w": p}, {"w": eps})["w"].square().sum() + total_kl([p])[0]

    mu, rho = q.mu.detach(), q.rho.detach()
    expected = torch.autograd.grad(loss(q.mu, q.rho), (q.mu, q.rho))
    torch.testing.assert_close(torch.func.grad(loss, (0, 1))(mu, rho), expected)
    twice = torch.func.vmap(torch.func.grad(loss, (0, 1)))(mu.expand(2, 3, 2), rho.expand(2, 3, 2))
    torch.testing.assert_close(twice[1][1], expected[1])
    _, along = torch.func.jvp(lambda r: loss(mu, r), (rho,), (torch.ones_like(rho),))
    torch.testing.assert_close(along, expected[1].sum())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(rho, torch.ones_like(rho))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(loss(mu, dual)).tangent, expected[1].sum())
    hessian = torch.autograd.functional.hessian(lambda r: loss(mu, r), rho)
    torch.testing.assert_close(hessian, torch.func.hessian(lambda r: loss(mu, r))(rho))


def test_draws_of_half_networks_are_made_in_single_precision() -> None:
    q = posterior((5,), Gaussian(std=1.0), torch.float32)
    half = GaussianPosterior(q.mu.detach().bfloat16().requires_grad_(), q.rho, q.prior)
    eps = torch.randn(5)
    theta = draw({"w": half}, {"w": eps})["w"]
    assert theta.dtype == torch.bfloat16
    torch.testing.assert_close(
        theta, (half.mu.float() + sigma_by_definition(q.rho) * eps).bfloat16(), rtol=0.01, atol=0
    )
    (theta.sum() + total_kl([half])[0]).backward()
    assert half.mu.grad is not None
    assert half.mu.grad.dtype == torch.bfloat16


def test_the_same_seed_gives_the_same_draw_with_gradients_and_without_whatever_is_beside_it() -> None:
    vnet = varify.variationalize(nn.Sequential(nn.Linear(200, 200), nn.Linear(200, 3))).train()
    torch.manual_seed(0)
    expected = {name: q.rsample() for name, q in vnet.posteriors.items()}
    torch.manual_seed(0)
    found = vnet.posteriors.draw()
    torch.manual_seed(0)
    with torch.no_grad():
        undifferentiated = vnet.posteriors.draw()
    for name in expected:
        assert torch.equal(expected[name], found[name])
        assert torch.equal(expected[name], undifferentiated[name])


def test_posteriors_can_be_copied_and_pickled_while_they_share_sigma() -> None:
    q = posterior((3,), Gaussian(std=1.0))
    q.shared = []
    q.known_sigma()
    for other in (copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        with torch.no_grad():
            other.rho.add_(1.0)
        torch.testing.assert_close(other.sigma, sigma_by_definition(other.rho))


def test_noise_on_outputs_has_the_derivatives_of_finite_differences_and_none_at_no_variance() -> None:
    def noisy(mean: Tensor, var: Tensor) -> Tensor:
        torch.manual_seed(0)
        return with_noise(mean, var)

    mean, var = torch.randn(5, dtype=torch.float64), torch.rand(5, dtype=torch.float64) + 0.1
    inputs = (mean.requires_grad_(), var.requires_grad_())
    assert torch.autograd.gradcheck(noisy, inputs)
    assert torch.autograd.gradgradcheck(noisy, inputs)
    found = noisy(mean, var)
    torch.manual_seed(0)
    torch.testing.assert_close(found, mean + var**0.5 * torch.randn(5, dtype=torch.float64))
    none = torch.tensor([0.0, 1.0, -1e-9], requires_grad=True)
    (slope,) = torch.autograd.grad(noisy(torch.zeros(3), none).sum(), none)
    assert slope[0] == slope[2] == 0
    assert slope[1] != 0


def test_signs_are_fair_and_independent() -> None:
    torch.manual_seed(0)
    signs = Moments(torch.zeros(37, 3), torch.ones(37, 3), Examples(4001, 0)).signs(0)
    assert signs.shape == (4001, 37)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    columns = signs.T @ signs / 4001**0.5 - torch.eye(37) * 4001**0.5  # ~ N(0, 1) off the diagonal
    assert columns.abs().max() < 5.5  # false alarm: 666 pairs of 4e-8
    assert abs(signs.sum() / (4001 * 37) ** 0.5) < 5
    torch.manual_seed(0)
    assert torch.equal(signs, Moments(torch.zeros(37, 3), torch.ones(37, 3), Examples(4001, 0)).signs(0))


def test_flipout_of_what_no_example_has_for_itself_is_one_operation_with_a_drawn_weight() -> None:
    rule = find_rule("flipout", F.linear)
    assert rule is not None
    weight, bias = Moments(torch.randn(3, 2), torch.full((3, 2), 0.5)), Moments(torch.randn(3), torch.ones(3))
    x = torch.randn(4, 2)
    with Counting() as counting:
        outputs = torch.stack([rule.function(Examples(), x, weight, bias) for _ in range(4000)])
    assert counting.calls["addmm"] + counting.calls["linear"] == 4000
    error = outputs.var(0).sqrt() / 4000**0.5
    assert ((outputs.mean(0) - F.linear(x, weight.mu, bias.mu)).abs() < 5 * error).all()  # false alarm: 7e-6
    expected = 0.25 * x.square().sum(1, keepdim=True) + 1
    torch.testing.assert_close(outputs.var(0), expected.expand(4, 3), rtol=5 * (2 / 4000) ** 0.5, atol=0)


def test_a_rho_that_is_changed_before_backward_is_an_error_as_in_torch() -> None:
    for sizes in ((3,), (3, 4)):
        vnet = varify.variationalize(nn.ParameterList([torch.randn(n) for n in sizes]))
        theta = vnet.posteriors.draw()
        with torch.no_grad():
            for rho in vnet.rho.parameters():
                rho.add_(1.0)
        with pytest.raises(RuntimeError, match="modified"):
            sum(w.sum() for w in theta.values()).backward()


def test_sigma_found_in_inference_mode_serves_a_thread_that_trains() -> None:
    vnet = varify.variationalize(nn.Linear(300, 300))  # large enough for a node of its own
    q = vnet.posteriors["weight"]
    q.shared = []
    try:
        with torch.inference_mode():
            q.known_sigma()
        vnet.prior_loss().backward()
    finally:
        q.shared = None
    assert torch.isfinite(q.rho.grad).all()
