"""A Gaussian prior whose std is learned: by the gradient of the KL, saved and optimized along."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

import varify
from varify.priors import Gaussian


def network(prior: object = None, **options: object) -> varify.VariationalModule:
    torch.manual_seed(0)
    prior = Gaussian(std=0.3, learn_std=True) if prior is None else prior
    return varify.variationalize(nn.Sequential(nn.Embedding(5, 4, padding_idx=0), nn.Linear(4, 3)), prior=prior)


def test_the_divergence_and_its_gradient_are_torchs() -> None:
    vnet = network().double()
    kl = vnet.prior_loss()
    kl.backward()
    by_hand = 0.0
    for name, q in vnet.posteriors.items():
        u = q.unmasked()
        log_std = torch.tensor(math.log(0.3), dtype=torch.float64, requires_grad=True)
        normals = [
            torch.distributions.Normal(u.mean.detach(), u.sigma.detach()),
            torch.distributions.Normal(0, log_std.exp()),
        ]
        expected = torch.distributions.kl_divergence(*normals).sum()
        expected.backward()
        by_hand += expected.item()
        assert q.prior.log_std.grad.item() == pytest.approx(log_std.grad.item(), rel=1e-5), name
    assert kl.item() == pytest.approx(by_hand, rel=1e-5)


def test_alone_it_ends_where_fit_prior_is() -> None:
    vnet, fixed = network(), network(Gaussian(std=0.3))
    expected = varify.fit_prior(fixed)
    stds = [q.prior.log_std for q in vnet.posteriors.values()]
    optimizer = torch.optim.LBFGS(stds, max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = vnet.prior_loss()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = {name: q.prior.std.item() for name, q in vnet.posteriors.items()}
    assert found == pytest.approx(expected, rel=1e-3)
    assert len(set(found.values())) == 3
    assert vnet.posteriors["1.weight"].prior.stddev().requires_grad is False


def test_fit_prior_sets_the_parameter_that_the_optimizer_knows() -> None:
    vnet = network()
    before = {name: q.prior.log_std for name, q in vnet.posteriors.items()}
    fitted = varify.fit_prior(vnet)
    for name, q in vnet.posteriors.items():
        assert q.prior.log_std is before[name]
        assert q.prior.std.item() == pytest.approx(fitted[name], rel=1e-6)


def test_optimizers_have_it_among_the_scales() -> None:
    vnet = network()
    names = {id(p): name for name, p in vnet.named_parameters()}
    means, scales = varify.parameter_groups(vnet, lr=0.1)
    assert {names[id(p)].split(".")[0] for p in scales["params"]} == {"rho", "prior"}
    assert {names[id(p)].split(".")[0] for p in means["params"]} == {"module"}
    assert sum("log_std" in name for name in names.values()) == 3
    assert not [name for name, _ in network(Gaussian(std=0.3)).named_parameters() if name.startswith("prior")]


def test_it_is_saved_and_loaded_in_place(tmp_path: Path) -> None:
    vnet = network()
    with torch.no_grad():
        for i, q in enumerate(vnet.posteriors.values()):
            q.prior.log_std.fill_(-1.0 - i)
    varify.save(vnet, tmp_path / "a.safetensors")
    again = varify.load(tmp_path / "a.safetensors", network().module)
    assert again.prior_loss().item() == vnet.prior_loss().item()
    assert again.posteriors["1.weight"].prior.log_std.requires_grad
    assert repr(again.posteriors["0.weight"].prior) == "Gaussian(std=0.3679, learn_std=True)"
    resumed = network()  # an optimizer is made before its state is loaded
    known = {id(p) for group in varify.parameter_groups(resumed, lr=0.1) for p in group["params"]}
    resumed.load_state_dict(vnet.state_dict())
    assert {id(p) for p in resumed.parameters()} == known
    assert resumed.prior_loss().item() == vnet.prior_loss().item()
    other = network(Gaussian(std=0.3))
    other.load_state_dict(vnet.state_dict())
    assert other.prior_loss().item() == vnet.prior_loss().item()
    fixed = network(Gaussian(std=0.2))
    resumed.load_state_dict(fixed.state_dict())
    assert resumed.prior_loss().item() == fixed.prior_loss().item()


def test_copies_priors_set_again_and_update_prior() -> None:
    import copy

    vnet = network()
    new = copy.deepcopy(vnet)
    with torch.no_grad():
        new.posteriors["1.weight"].prior.log_std.fill_(1.0)
    assert vnet.posteriors["1.weight"].prior.std.item() == pytest.approx(0.3)
    vnet.set_prior(new.posteriors["1.weight"].prior, where="1.bias")
    assert vnet.posteriors["1.bias"].prior.std.item() == pytest.approx(math.e)
    assert vnet.posteriors["1.bias"].prior.log_std is not new.posteriors["1.weight"].prior.log_std
    varify.prune(vnet, 0.5)
    vnet.prior_loss().backward()
    assert vnet.posteriors["1.weight"].prior.log_std.grad is not None
    varify.update_prior(vnet)
    assert vnet.prior_loss().item() == pytest.approx(0, abs=1e-5)
    centered = network(Gaussian(centered=True, learn_std=True))
    assert centered.posteriors["1.weight"].prior.std.item() == pytest.approx(0.5)  # of a fan-in of 4
    assert centered.half().posteriors["1.weight"].prior.log_std.dtype == torch.float32


def test_where_it_makes_no_sense_it_is_refused() -> None:
    with pytest.raises(varify.PriorError, match=r"std has shape \(3,\) and learn_std=True learns one number"):
        Gaussian(std=torch.ones(3), learn_std=True)
    with pytest.raises(varify.PriorError, match="'mixtgauss': got an unexpected keyword argument 'learn_std'"):
        network().set_prior("mixtgauss", learn_std=True)
    with pytest.raises(varify.PriorError, match=r"std requires a gradient.*Gaussian\(std=\.\.\., learn_std=True\)"):
        Gaussian(std=nn.Parameter(torch.tensor(0.1)))
