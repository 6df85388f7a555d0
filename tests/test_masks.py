"""Weights that are not random: draws, divergences and gradients, against formulas that choose weight by weight."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal
from torch.distributions.kl import kl_divergence as reference_kl

import varify
from varify.posteriors import GaussianPosterior
from varify.priors import Gaussian
from varify.priors.total_kl import BLOCK, total_kl
from varify.weights.draw import draw
from varify.weights.fused import LARGE

AT_MU, PRUNED = 1, 2
SHAPES = [(3, 4), (LARGE + 5,), (BLOCK + 7,)]
KINDS: dict[str, Callable[[int], Tensor]] = {
    "padding": lambda n: (torch.arange(n) % 3 == 0) * AT_MU,
    "pruned": lambda n: (torch.arange(n) % 2 == 0) * PRUNED,
    "both": lambda n: torch.arange(n) % 3,
    "none": lambda n: torch.zeros(n),
    "all at mu": lambda n: torch.full((n,), AT_MU),
    "all pruned": lambda n: torch.full((n,), PRUNED),
    "nothing random": lambda n: torch.arange(n) % 2 + 1,
}
PRIORS = [Gaussian(std=0.5), Gaussian(mean=0.3, std=2.0)]


def masked(
    shape: tuple[int, ...], kind: str, prior: Gaussian = PRIORS[0], dtype: torch.dtype = torch.float64
) -> GaussianPosterior:
    torch.manual_seed(0)
    mu, rho = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype) - 1
    fixed = KINDS[kind](mu.numel()).to(torch.int8).view(shape)
    return GaussianPosterior(mu.requires_grad_(), rho.requires_grad_(), prior, fixed)


def by_formula(q: GaussianPosterior, eps: Tensor) -> Tensor:
    assert q.fixed is not None
    free, pruned = (q.fixed == 0).to(eps), (q.fixed == PRUNED).to(eps)
    return (1 - pruned) * q.mu + free * torch.logaddexp(q.rho, torch.zeros_like(q.rho)) * eps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_draw_and_its_gradients_are_those_of_the_formula(kind: str, shape: tuple[int, ...]) -> None:
    q = masked(shape, kind)
    eps, seen = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    before = eps.clone()
    theta = draw({"w": q}, {"w": eps})["w"]
    expected = by_formula(q, eps)
    torch.testing.assert_close(theta, expected)
    assert torch.equal(eps, before)
    found = torch.autograd.grad((theta * seen).sum(), (q.mu, q.rho), allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(found, torch.autograd.grad((expected * seen).sum(), (q.mu, q.rho)))
    with torch.no_grad():
        torch.testing.assert_close(draw({"w": q}, {"w": eps})["w"], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_noise_moves_random_weights_alone(kind: str) -> None:
    q = masked((LARGE + 5,), kind)
    assert q.fixed is not None
    still = by_formula(q, torch.zeros_like(q.rho))
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            theta = draw({"w": q})["w"]
        assert theta.requires_grad
        assert torch.equal(theta == still, q.fixed != 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_draw_is_a_tensor_of_its_own(kind: str) -> None:
    q = masked((3, 4), kind)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            theta = draw({"w": q})["w"]
        before = theta.detach().clone()
        with torch.no_grad():
            q.mu.add_(1.0)
        assert torch.equal(theta, before)


@pytest.mark.parametrize("kind", ["both", "nothing random", "all at mu"])
def test_draws_of_half_networks_stay_half(kind: str) -> None:
    q = masked((3, 4), kind, dtype=torch.float32)
    half = GaussianPosterior(q.mu.detach().bfloat16().requires_grad_(), q.rho, q.prior, q.fixed)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            assert draw({"w": half})["w"].dtype == torch.bfloat16


@pytest.mark.parametrize("prior", [*PRIORS, "tensors"], ids=["no mean", "numbers", "tensors"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_divergence_is_that_of_random_weights(kind: str, shape: tuple[int, ...], prior: Gaussian | str) -> None:
    if isinstance(prior, str):
        prior = Gaussian(mean=torch.randn(shape[-1:]).double(), std=torch.rand(shape[-1:]).double() + 0.5)
    q = masked(shape, kind, prior)
    assert q.fixed is not None
    before = q.mu.detach().clone()
    (kl,) = total_kl([q])
    assert torch.equal(q.mu, before)
    sigma = torch.logaddexp(q.rho, torch.zeros_like(q.rho))
    p = Normal(*(torch.as_tensor(each, dtype=torch.float64) for each in (prior.mean, prior.std)))
    expected = (reference_kl(Normal(q.mu, sigma), p) * (q.fixed == 0)).sum()
    torch.testing.assert_close(kl, expected, rtol=1e-7, atol=1e-7)
    found = torch.autograd.grad(kl, (q.mu, q.rho), allow_unused=True, materialize_grads=True)
    wanted = torch.autograd.grad(expected, (q.mu, q.rho))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    again = torch.autograd.grad(total_kl([q])[0], (q.mu, q.rho), create_graph=True)
    torch.testing.assert_close(again, wanted, rtol=1e-9, atol=1e-9)


def test_a_sigma_that_underflows_counts_where_it_is_random() -> None:
    rho = torch.tensor([-1000.0, -2000.0, 0.0], requires_grad=True)
    q = GaussianPosterior(torch.zeros(3), rho, Gaussian(std=1.0), torch.tensor([0, AT_MU, PRUNED], dtype=torch.int8))
    (kl,) = total_kl([q])
    torch.testing.assert_close(kl.item(), 1000.0 - 0.5)  # log(s/sigma) − ½, with log sigma = rho
    torch.testing.assert_close(torch.autograd.grad(kl, rho)[0], torch.tensor([-1.0, 0.0, 0.0]))


def test_derivatives_are_those_of_finite_differences_twice_over() -> None:
    fixed, eps = torch.tensor([[0, 1, 2], [2, 0, 0]], dtype=torch.int8), torch.randn(2, 3, dtype=torch.float64)

    def both(mu: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
        q = GaussianPosterior(mu, rho, PRIORS[1], fixed)
        return draw({"w": q}, {"w": eps})["w"], total_kl([q])[0]

    torch.manual_seed(1)
    inputs = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(both, inputs)
    assert torch.autograd.gradgradcheck(both, inputs)


def test_what_is_known_of_a_mask_follows_what_is_written_into_it() -> None:
    vnet = varify.variationalize(nn.Linear(4, 3)).eval()
    vnet.posteriors.set_mask("weight", torch.ones(3, 4))
    other = copy.deepcopy(vnet)
    other.posteriors.set_mask("weight", torch.tensor([[0, 1, 0, 1]] * 3))
    pruned = copy.deepcopy(vnet)
    pruned.posteriors.set_mask("weight", torch.full((3, 4), PRUNED))
    pruned.module.weight.data.fill_(1.0)  # as an optimizer's momentum may
    x, still = torch.randn(2, 4), vnet.posteriors["weight"].mu.detach().clone()
    assert torch.equal(vnet.posteriors.draw()["weight"], still)
    torch.testing.assert_close(vnet(x), F.linear(x, still, vnet.module.bias))
    vnet.load_state_dict(other.state_dict())
    assert torch.equal(vnet.posteriors.draw()["weight"] == still, other.posteriors["weight"].fixed != 0)
    vnet.load_state_dict(pruned.state_dict())
    assert not vnet.posteriors.draw()["weight"].any()
    torch.testing.assert_close(vnet(x), vnet.module.bias.expand(2, 3))
    q = vnet.posteriors["weight"]
    assert q.fixed is not None
    for value, random in ((AT_MU, False), (0, True), (AT_MU, False)):
        with torch.no_grad():
            q.fixed.fill_(value)
        assert torch.equal(q.mu, draw({"w": q})["w"]) != random


def test_tensors_without_random_weights_take_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    vnet = varify.variationalize(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), estimator="weights").train()
    for name in ("0.weight", "0.bias"):
        vnet.posteriors.set_mask(name, torch.ones(vnet.posteriors[name].mu.shape))
    torchs, shapes = torch.randn_like, []
    monkeypatch.setattr(torch, "randn_like", lambda x, **k: shapes.append(tuple(x.shape)) or torchs(x, **k))
    vnet(torch.randn(5, 4)).sum().backward()
    assert shapes == [(2, 3), (2,)]
    assert vnet.module[0].weight.grad is not None
    for name in ("0.weight", "0.bias"):
        grad = vnet.rho.leaf_at(name).grad
        assert grad is not None, "DDP would wait for it"
        assert not grad.any()


def test_masks_that_nobody_can_read_are_heeded() -> None:
    q = masked((3, 4), "both")
    with torch.inference_mode():
        in_inference = GaussianPosterior(q.mu, q.rho, q.prior, KINDS["all at mu"](12).to(torch.int8).view(3, 4))
        assert torch.equal(draw({"w": in_inference})["w"], q.mu)
        in_inference.fixed.zero_()  # which counts no version
        assert not torch.equal(draw({"w": in_inference})["w"], q.mu)
    meta = GaussianPosterior(*(t.detach().to("meta") for t in (q.mu, q.rho)), q.prior, torch.zeros(3, 4, device="meta"))
    assert draw({"w": meta})["w"].is_meta
    masks = torch.stack([KINDS["all at mu"](4), KINDS["none"](4)]).to(torch.int8)
    mu, rho = torch.randn(4), torch.zeros(4)

    def one(fixed: Tensor) -> Tensor:
        return draw({"w": GaussianPosterior(mu, rho, q.prior, fixed)})["w"]

    drawn = torch.func.vmap(one, randomness="different")(masks)
    assert torch.equal(drawn[0], mu)
    assert (drawn[1] != mu).all()


def test_a_padding_row_learns_from_the_network_and_keeps_its_rho() -> None:
    torch.manual_seed(0)
    vnet = varify.variationalize(nn.Embedding(5, 3, padding_idx=1), estimator="weights").train()
    elbo = varify.ELBO(num_data=10)
    tokens = torch.tensor([0, 1, 4])
    elbo(vnet, lambda y, t: F.mse_loss(y, t), tokens, torch.zeros(3, 3)).loss.backward()
    rho_grad = vnet.rho.leaf_at("weight").grad
    assert rho_grad is not None
    assert not rho_grad[1].any()
    assert rho_grad[[0, 4]].all()
    assert rho_grad[[2, 3]].all()  # of the divergence


def test_a_mask_made_in_inference_mode_and_one_written_before_backward() -> None:
    vnet = varify.variationalize(nn.Linear(3, 2))
    with torch.inference_mode():
        varify.prune(vnet, 0.5)
    kl = vnet.prior_loss()
    kl.backward()
    assert all(torch.isfinite(q.rho.grad).all() for q in vnet.posteriors.values())
    vnet = varify.variationalize(nn.Linear(3, 2))
    varify.prune(vnet, 0.5)
    kl, q = vnet.prior_loss(), vnet.posteriors["weight"]
    random = q.fixed == 0
    q.fixed.zero_()
    kl.backward()
    assert torch.equal(q.rho.grad != 0, random)


def test_fixed_weights_may_have_any_mu_and_rho() -> None:
    vnet = varify.variationalize(nn.Linear(3, 2))
    mask = torch.zeros(2, 3)
    mask[0, 0] = mask[1, 1] = 1
    q = vnet.posteriors["weight"]
    scales = [(q.sigma[i, i].item(), q.mu[i, i].item()) for i in (0, 1)]
    expected = vnet.prior_loss().item() - sum(0.5 * (s**2 + m**2 - 1) - math.log(s) for s, m in scales)
    vnet.posteriors.set_mask("weight", mask)
    with torch.no_grad():
        vnet.posteriors["weight"].rho[0, 0] = -math.inf
        vnet.posteriors["weight"].mu[1, 1] = math.inf
    kl = vnet.prior_loss()
    assert kl.item() == pytest.approx(expected, rel=1e-5)
    kl.backward()
    assert all(torch.isfinite(g).all() for q in vnet.posteriors.values() for g in (q.mu.grad, q.rho.grad))


def test_what_a_mask_has_is_that_of_this_mask() -> None:
    q = varify.variationalize(nn.Linear(3, 2)).posteriors["weight"]
    q.fixed = torch.ones(2, 3, dtype=torch.int8)
    assert q.mask_has == (False, False)
    q.fixed = torch.full((2, 3), 2, dtype=torch.int8)  # of the same version
    assert q.mask_has == (False, True)
