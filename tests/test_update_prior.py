"""The posterior as the next prior: data in parts are worth as much as together."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import varify

NOISE = 2.0


def fitted(vnet: varify.VariationalModule, x: Tensor, y: Tensor) -> None:
    """To the optimum of the bound, with the likelihood's mean over a Gaussian weight in closed form."""
    optimizer = torch.optim.LBFGS(vnet.parameters(), max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")
    q = vnet.posteriors["weight"]

    def closure() -> Tensor:
        optimizer.zero_grad()
        squares = (y - x @ q.mu.T).square() + x.square() @ q.sigma.square().T
        loss = squares.sum() / (2 * NOISE**2) + vnet.prior_loss()
        loss.backward()
        return loss

    optimizer.step(closure)


def test_learning_in_parts_is_learning_at_once() -> None:
    torch.manual_seed(0)
    x, noise = torch.randn(30, 1, dtype=torch.float64), NOISE * torch.randn(30, 1, dtype=torch.float64)
    y = 1.5 * x + noise
    vnet = varify.variationalize(nn.Linear(1, 1, bias=False).double(), prior=varify.priors.Gaussian(std=0.8))
    for part in (slice(0, 10), slice(10, 14), slice(14, 30)):
        fitted(vnet, x[part], y[part])
        varify.update_prior(vnet)
        assert vnet.prior_loss().item() == pytest.approx(0, abs=1e-12)
    precision = 1 / 0.8**2 + x.square().sum() / NOISE**2  # the exact posterior of all the data (Bishop 2006, eq. 3.51)
    q = vnet.posteriors["weight"]
    assert q.mu.item() == pytest.approx(((x * y).sum() / NOISE**2 / precision).item(), rel=1e-5)
    assert q.sigma.item() == pytest.approx(precision.item() ** -0.5, rel=1e-5)


def network() -> varify.VariationalModule:
    torch.manual_seed(0)
    return varify.variationalize(nn.Sequential(nn.Embedding(5, 4, padding_idx=0), nn.Linear(4, 3), nn.Linear(3, 2)))


def test_where_masks_and_files(tmp_path: Path) -> None:
    vnet = network()
    varify.prune(vnet, 0.5, where="1.*")
    before = vnet.posteriors["2.weight"].prior
    kl = vnet.kl_divergence()["2.weight"]
    varify.update_prior(vnet, where=["0.*", "1.*"])
    assert vnet.posteriors["2.weight"].prior is before
    after = vnet.kl_divergence()
    assert torch.equal(after["2.weight"], kl)
    for name in ("0.weight", "1.weight", "1.bias"):
        assert after[name].item() == pytest.approx(0, abs=1e-5)
    with torch.no_grad():  # a prior is what was, and follows no parameter
        vnet.posteriors["1.weight"].mu.add_(0.5)
        vnet.posteriors["0.weight"].mu[1:].add_(0.5)
    moved = vnet.kl_divergence()
    for name in ("0.weight", "1.weight"):
        q = vnet.posteriors[name].unmasked()
        by_torch = torch.distributions.kl_divergence(
            torch.distributions.Normal(q.mean, q.sigma), torch.distributions.Normal(q.prior.mean, q.prior.std)
        )
        assert 0 < moved[name].item() == pytest.approx(by_torch.sum().item(), rel=1e-4)
    varify.save(vnet, tmp_path / "a.safetensors")
    again = varify.load(tmp_path / "a.safetensors", network().module)
    assert torch.equal(again.prior_loss(), vnet.prior_loss())
    varify.update_prior(again)
    assert again.prior_loss().item() == pytest.approx(0, abs=1e-5)


def test_what_has_no_posterior_is_refused() -> None:
    with pytest.raises(varify.ModelError, match=r"varify\.update_prior needs a variational module, got a Linear"):
        varify.update_prior(nn.Linear(2, 2))
    vnet = network()
    before = {name: q.prior for name, q in vnet.posteriors.items()}
    with pytest.raises(varify.SelectionError, match="head"):
        varify.update_prior(vnet, where=["0.*", "head*"])
    assert all(vnet.posteriors[name].prior is prior for name, prior in before.items())
