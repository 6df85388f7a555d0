"""The objective's terms, schedules, likelihoods, and the importance-weighted bound."""

import math

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import varify
from tests.networks import DictOutput, OptionalMask
from varify import ELBO, schedules


def problem() -> tuple[varify.VariationalModule, Tensor, Tensor]:
    torch.manual_seed(0)
    vnet = varify.variationalize(nn.Linear(3, 2), init=varify.inits.Constant(0.3), estimator="weights").train()
    return vnet, torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])


@pytest.mark.parametrize("n_samples", [1, 3])
def test_terms_are_the_sums_that_they_say(n_samples: int) -> None:
    vnet, x, y = problem()
    torch.manual_seed(1)
    terms = ELBO(num_data=100, n_samples=n_samples, beta=0.5)(vnet, F.cross_entropy, x, y)
    torch.manual_seed(1)
    noise = [{name: q.noise() for name, q in vnet.posteriors.items()} for _ in range((n_samples + 1) // 2)]
    draws = [eps for pair in noise for eps in (pair, {name: -e for name, e in pair.items()})][:n_samples]
    nlls = []
    for eps in draws:
        with vnet.fixed_draw(eps):
            nlls.append(F.cross_entropy(vnet(x), y).item())
    nll = sum(nlls) / n_samples
    kl = sum(q.kl_divergence().item() for q in vnet.posteriors.values())
    assert terms.nll.item() == pytest.approx(nll)
    assert terms.kl.item() == pytest.approx(kl)
    assert terms.loss.item() == pytest.approx(nll + 0.5 * kl / 100)
    terms.loss.backward()
    assert all(p.grad.any() for p in vnet.parameters())


@pytest.mark.parametrize("n_samples", [1, 3, 10])
def test_the_gradient_of_rho_does_not_depend_on_the_number_of_samples(n_samples: int) -> None:
    """With BLiTZ it is divided by it, since all samples see the last noise."""
    torch.manual_seed(0)
    vnet = varify.variationalize(nn.Linear(3, 1, bias=False).double(), init=varify.inits.Constant(0.5)).train()
    x, q = torch.randn(4, 3, dtype=torch.float64), vnet.posteriors["weight"]
    total = (x @ q.mu.T).square().mean() + (x.square() @ torch.log1p(q.rho.exp()).square().T).mean()
    expected = torch.autograd.grad(total, q.rho)[0]
    elbo = ELBO(num_data=4, n_samples=n_samples, beta=0.0)
    grads = []
    for _ in range(2000):
        vnet.zero_grad()
        elbo(vnet, F.mse_loss, x, torch.zeros(4, 1, dtype=torch.float64)).loss.backward()
        grads.append(q.rho.grad.clone())
    found = torch.stack(grads)
    z = (found.mean(0) - expected) / (found.std(0) / 2000**0.5)
    assert z.abs().max() < 5  # three numbers: false alarm 1 run in 500,000


def test_inputs_as_tensor_tuple_and_dict() -> None:
    vnet = varify.variationalize(OptionalMask())
    x, mask, y = torch.randn(4, 3), torch.tensor([1.0, 0.0, 1.0]), torch.zeros(4, 3)
    found = []
    for inputs in ((x, mask), {"x": x, "mask": mask}):
        torch.manual_seed(0)
        found.append(ELBO(num_data=4)(vnet, F.mse_loss, inputs, y).nll.item())
    assert found[0] == found[1]
    ELBO(num_data=4)(vnet, F.mse_loss, x, y)
    by_name = varify.variationalize(DictOutput())
    criterion = lambda output, target: F.cross_entropy(output["logits"], target)  # noqa: E731
    terms = ELBO(num_data=4)(by_name, criterion, ({"x": torch.ones(4, 3)},), torch.zeros(4, dtype=torch.long))
    assert terms.loss.isfinite()


def test_a_bayesian_part_of_a_plain_network() -> None:
    network = nn.Sequential(nn.Linear(3, 4), varify.variationalize(nn.Linear(4, 2)))
    terms = ELBO(num_data=10)(network, F.cross_entropy, torch.randn(5, 3), torch.zeros(5, dtype=torch.long))
    assert terms.kl.item() == varify.prior_loss(network).item() > 0


def test_schedules_by_hand() -> None:
    blundell = schedules.blundell(4)
    weights = [8 / 15, 4 / 15, 2 / 15, 1 / 15]  # 2^(M − i)/(2^M − 1)
    assert [blundell(i) for i in range(8)] == pytest.approx([4 * w for w in weights * 2])
    assert sum(schedules.blundell(20_000)(i) for i in range(20_000)) == pytest.approx(20_000)
    assert [schedules.uniform(7)(i) for i in range(3)] == [1.0, 1.0, 1.0]
    assert [schedules.warm_up(4, end=0.5)(i) for i in range(6)] == pytest.approx([0, 0.125, 0.25, 0.375, 0.5, 0.5])
    assert [schedules.cyclical(4)(i) for i in range(6)] == pytest.approx([0, 0.5, 1, 1, 0, 0.5])
    for make in (schedules.uniform, schedules.blundell, schedules.warm_up, schedules.cyclical):
        with pytest.raises(ValueError, match="must be a positive integer, got 0"):
            make(0)
    with pytest.raises(ValueError, match=r"rising must lie within .*, got 0"):
        schedules.cyclical(4, rising=0)


def test_a_schedule_counts_training_steps_alone() -> None:
    vnet, x, y = problem()
    elbo = ELBO(num_data=5, beta=schedules.warm_up(2))
    for expected in (0.0, 0.5, 1.0, 1.0):
        assert elbo.beta == expected
        terms = elbo(vnet, F.cross_entropy, x, y)
        assert terms.loss.item() == pytest.approx(terms.nll.item() + expected * terms.kl.item() / 5)
    with torch.no_grad():
        elbo(vnet.eval(), F.cross_entropy, x, y)
    assert elbo.step == 4


def test_training_in_eval_mode_is_told_once() -> None:
    vnet, x, y = problem()
    for network in (vnet.eval(), nn.Sequential(vnet).eval()):
        elbo = ELBO(num_data=5)
        with pytest.warns(
            varify.VarifyWarning, match=r"is in eval mode .* elbo\.step stays at 0\. Call vnet\.train\(\)"
        ):
            elbo(network, F.cross_entropy, x, y)
        elbo(network, F.cross_entropy, x, y)  # a second warning would be an error here
    assert issubclass(varify.VarifyWarning, UserWarning)


def test_validation_and_sampling_in_eval_mode_are_silent() -> None:
    vnet, x, y = problem()
    frozen = varify.variationalize(nn.Linear(3, 2)).eval().requires_grad_(False)
    with torch.no_grad():
        ELBO(num_data=5)(vnet.eval(), F.cross_entropy, x, y)
    with vnet.sampling():
        ELBO(num_data=5)(vnet, F.cross_entropy, x, y)
    ELBO(num_data=5, bound="importance_weighted")(vnet, F.cross_entropy, x, y)  # draws in every mode
    ELBO(num_data=5)(frozen, F.cross_entropy, x, y)
    ELBO(num_data=5)(vnet.train(), F.cross_entropy, x, y)


def test_the_kls_weight_by_itself() -> None:
    vnet, x, y = problem()
    count = sum(p.numel() for p in vnet.module.parameters())
    assert count == 8
    for num_data, expected in ((5, 0.03 * 0.625**0.5), (8, 0.03), (16, 0.06), (160, 0.6), (267, 1.0), (10**6, 1.0)):
        elbo = ELBO(num_data=num_data)
        assert elbo.beta is None
        terms = elbo(vnet, F.cross_entropy, x, y)
        assert elbo.beta == varify.kl_weight(vnet, num_data) == pytest.approx(expected)
        assert terms.loss.item() == pytest.approx(terms.nll.item() + expected * terms.kl.item() / num_data, rel=1e-5)
        assert terms.kl.item() == pytest.approx(vnet.prior_loss().item(), rel=1e-5)
    head = nn.Sequential(nn.Linear(3, 3), varify.variationalize(nn.Linear(3, 2)))
    assert varify.kl_weight(head, 20) == pytest.approx(0.03 * 20 / 8)  # of the variational part alone
    objective = ELBO(num_data=5, bound="importance_weighted")
    objective(vnet, F.cross_entropy, x, y)
    assert objective.beta == 1.0  # else it would be no bound


@pytest.mark.parametrize("weights", [1, 40, 300])
def test_the_kls_weight_by_data_for_each_weight(weights: int) -> None:
    """By their root below one datum for each, in proportion above, and 1 above 33; it rises, and nowhere jumps."""
    network = varify.variationalize(nn.Linear(weights, 1, bias=False))
    found = torch.tensor([varify.kl_weight(network, n) for n in range(1, 40 * weights + 1)])
    by_root, in_proportion, bound = found[:weights], found[weights - 1 : 33 * weights], found[34 * weights :]
    torch.testing.assert_close(by_root, (9e-4 / weights * torch.arange(1, weights + 1)).sqrt())
    torch.testing.assert_close(in_proportion, 0.03 / weights * torch.arange(weights, 33 * weights + 1))
    assert torch.equal(bound, torch.ones(6 * weights))
    assert (found[: 33 * weights].diff() > 0).all()
    assert found[weights - 1 :].diff().max() < 0.0301 / weights + 1e-6  # no jump where the root, the line and 1 meet


def test_the_importance_weighted_bound() -> None:
    """One weight, one datum: tighter than the ELBO and below the evidence, both known by quadrature."""
    torch.manual_seed(0)
    vnet = varify.variationalize(
        nn.Linear(1, 1, bias=False).double(), prior=varify.priors.Gaussian(std=1.0), init=varify.inits.Constant(0.8)
    ).train()
    x, y = torch.ones(1, 1, dtype=torch.float64), torch.full((1, 1), 1.5, dtype=torch.float64)
    likelihood = varify.GaussianLikelihood(sigma=0.7, learn=False).double()
    evidence = scipy.stats.norm(0, math.sqrt(1 + 0.7**2)).logpdf(1.5)
    bounds = {}
    for n_samples in (1, 20, 500):
        objective = ELBO(num_data=1, n_samples=n_samples, bound="importance_weighted")
        repeats = 20_000 // n_samples // (1 if n_samples > 1 else 20)
        losses = torch.stack([objective(vnet, likelihood, x, y).loss.detach() for _ in range(repeats)])
        bounds[n_samples] = (-losses.mean().item(), losses.std().item() / len(losses) ** 0.5)
    terms = [ELBO(num_data=1, beta=1.0)(vnet, likelihood, x, y).loss.detach() for _ in range(1000)]
    elbo, error = -torch.stack(terms).mean().item(), torch.stack(terms).std().item() / 1000**0.5
    assert abs(bounds[1][0] - elbo) < 5 * (error + bounds[1][1])
    assert bounds[1][0] + 5 * bounds[1][1] < bounds[20][0] < evidence + 5 * bounds[20][1]
    assert abs(bounds[500][0] - evidence) < 5 * bounds[500][1] + 0.005  # the bias falls as 1/S
    objective(vnet, likelihood, x, y).loss.backward()
    assert all(p.grad.any() for p in vnet.parameters())


@pytest.mark.parametrize("targets", [1, 3])
def test_gaussian_likelihoods_equal_scipys(targets: int) -> None:
    torch.manual_seed(0)
    mean, y = torch.randn(5, targets, dtype=torch.float64), torch.randn(5, targets, dtype=torch.float64)
    expected = -scipy.stats.norm(mean.numpy(), 0.7).logpdf(y.numpy()).sum(1).mean()
    likelihood = varify.GaussianLikelihood(sigma=0.7).double()
    assert likelihood(mean, y).item() == pytest.approx(expected, rel=1e-6)
    rho = torch.randn(5, targets, dtype=torch.float64)
    sigma = 1e-3 + torch.log1p(rho.exp())
    expected = -scipy.stats.norm(mean.numpy(), sigma.numpy()).logpdf(y.numpy()).sum(1).mean()
    heteroscedastic = varify.HeteroscedasticGaussianLikelihood()
    assert heteroscedastic(torch.cat([mean, rho], 1), y).item() == pytest.approx(expected, rel=1e-6)


def test_a_noise_level_is_learned() -> None:
    torch.manual_seed(0)
    likelihood, y = varify.GaussianLikelihood(sigma=3.0), 0.5 * torch.randn(2000, 1)
    optimizer = torch.optim.LBFGS(likelihood.parameters(), line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        nll = likelihood(torch.zeros_like(y), y)
        nll.backward()
        return nll

    for _ in range(5):
        optimizer.step(closure)
    assert likelihood.sigma.item() == pytest.approx(y.square().mean().sqrt().item(), rel=1e-4)


def test_parameter_groups() -> None:
    vnet = varify.variationalize(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)))
    means, rhos = varify.parameter_groups(vnet, lr=1e-3, rho_lr=1e-2)
    assert (means["lr"], rhos["lr"]) == (1e-3, 1e-2)
    assert {id(p) for p in rhos["params"]} == {id(q.rho) for q in vnet.posteriors.values()}
    assert len(means["params"]) == 4
    assert varify.parameter_groups(vnet, lr=1e-3)[1]["lr"] == 5e-3
    torch.optim.AdamW(varify.parameter_groups(vnet, lr=1e-3), weight_decay=0.1)


def test_bad_objectives() -> None:
    vnet, x, y = problem()
    with pytest.raises(TypeError, match="num_data"):
        ELBO()
    for options, told in (
        ({"num_data": 0}, "num_data must be a positive integer, got 0"),
        ({"num_data": 5, "n_samples": 0}, "n_samples must be a positive integer, got 0"),
        ({"num_data": 5, "beta": -1.0}, "beta must be 'auto', a number of at least 0, .*, got -1.0"),
        ({"num_data": 5, "bound": "iwae"}, "bound must be one of .*, got 'iwae'"),
    ):
        with pytest.raises(ValueError, match=told):
            ELBO(**options)
    with pytest.raises(ValueError, match="num_data=4, but this batch alone has 5"):
        ELBO(num_data=4)(vnet, F.cross_entropy, x, y)
    per_datum = lambda output, target: F.cross_entropy(output, target, reduction="none")  # noqa: E731
    with pytest.raises(ValueError, match=r"the criterion must return a scalar, .*, got a tensor of shape \(5,\)"):
        ELBO(num_data=5)(vnet, per_datum, x, y)
    with pytest.raises(ValueError, match=r"the criterion must return a scalar, .*, got a float"):
        ELBO(num_data=5)(vnet, lambda output, target: 1.0, x, y)
    with pytest.raises(ValueError, match="needs a VariationalModule, not Sequential"):
        ELBO(num_data=5, bound="importance_weighted")(nn.Sequential(vnet), F.cross_entropy, x, y)
    with pytest.raises(ValueError, match="sigma must be a positive number, got 0"):
        varify.GaussianLikelihood(sigma=0)
    with pytest.raises(ValueError, match="floor must be a positive number, got -1"):
        varify.HeteroscedasticGaussianLikelihood(floor=-1)
    with pytest.raises(ValueError, match=r"the mean has shape \(5, 1\), the target \(5,\)"):
        varify.GaussianLikelihood()(torch.zeros(5, 1), torch.zeros(5))
    with pytest.raises(ValueError, match="the head has 3 outputs"):
        varify.HeteroscedasticGaussianLikelihood()(torch.zeros(5, 3), torch.zeros(5, 1))


def test_a_variational_module_in_two_places_counts_once() -> None:
    head = varify.variationalize(nn.Linear(3, 3))
    network = nn.Sequential(head, nn.Tanh(), nn.Sequential(head))
    assert varify.prior_loss(network).item() == pytest.approx(head.prior_loss().item())
