"""fit_sigma, fit_prior, pruning, fixed weights and description length."""

import copy
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import varify
from tests.networks import CASES, Recurrent, TiedLanguageModel, seeded
from varify import posteriors
from varify.analysis import fit_prior, fit_sigma
from varify.analysis.batch import Batch
from varify.weights.posterior import PRUNED


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3))


def data(n: int = 10) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator))


def expected_sigma(squares: Tensor, num_data: int, seen: int, prior_std: float) -> Tensor:
    return (num_data * squares / seen + 1 / prior_std**2).rsqrt()


def test_fit_sigma_by_one_backward_pass_per_datum() -> None:
    network = classifier()
    vnet = varify.variationalize(network, prior=varify.priors.Gaussian(std=0.7)).train()
    varify.fit_sigma(vnet, DataLoader(data(), batch_size=4), F.cross_entropy, num_data=50, temperature=1)
    assert all(m.training for m in vnet.modules())
    network.eval()
    for name, parameter in network.named_parameters():
        squares = torch.zeros_like(parameter)
        for x, y in zip(*data().tensors, strict=True):
            network.zero_grad()
            F.cross_entropy(network(x[None]), y[None]).backward()
            squares += parameter.grad**2
        q = vnet.posteriors[name]
        assert torch.equal(q.mu, parameter)
        torch.testing.assert_close(q.sigma, expected_sigma(squares, 50, 10, 0.7), rtol=1e-4, atol=1e-6)


def test_gauss_newton_of_a_linear_softmax_is_its_hessian() -> None:
    torch.manual_seed(0)
    network = nn.Linear(4, 3).double()
    x, y = data().tensors
    vnet = varify.variationalize(network, prior=varify.priors.Gaussian(std=2.0))
    varify.fit_sigma(vnet, [(x.double(), y)], F.cross_entropy, num_data=10, curvature="ggn", temperature=0.25)
    weight = network.weight.detach()
    loss = lambda w: F.cross_entropy(x.double() @ w.T + network.bias.detach(), y, reduction="sum")  # noqa: E731
    hessian = torch.autograd.functional.hessian(loss, weight).reshape(12, 12).diag().reshape(3, 4)
    torch.testing.assert_close(vnet.posteriors["weight"].sigma, 0.5 * (hessian + 0.25).rsqrt())


@pytest.mark.parametrize("curvature", ["fisher", "ggn"])
def test_fit_sigma_finds_the_posterior_of_linear_regression(curvature: str) -> None:
    """With Gaussian noise the generalised Gauss-Newton matrix is exact; the Fisher is in expectation."""
    torch.manual_seed(0)
    x = torch.randn(4000, 3, dtype=torch.float64)
    y = x @ torch.ones(3, 1, dtype=torch.float64) + 2 * torch.randn(4000, 1, dtype=torch.float64)
    network = nn.Linear(3, 1, bias=False).double()
    network.weight.data = torch.linalg.lstsq(x, y).solution.T
    vnet = varify.variationalize(network, prior=varify.priors.Gaussian(std=0.05))
    likelihood = varify.GaussianLikelihood(sigma=2.0).double()
    varify.fit_sigma(vnet, DataLoader(TensorDataset(x, y), 500), likelihood, num_data=4000, curvature=curvature)
    precision = (x.T @ x).diag() / 4 + 400
    tolerance = 1e-5 if curvature == "ggn" else 0.1  # 4,000 squares of products: about 2 %
    torch.testing.assert_close(vnet.posteriors["weight"].sigma[0], precision.rsqrt(), rtol=tolerance, atol=0.0)


@pytest.mark.parametrize("case", ["lstm", "transformer", "untraceable", "cnn"])
def test_fit_sigma_on_any_network(case: str) -> None:
    network = seeded(CASES[case]).eval()
    (x,), _ = CASES[case].calls[0]
    vnet = varify.variationalize(network)
    target = torch.zeros_like(network(x))
    varify.fit_sigma(vnet, [(x, target)], F.mse_loss, num_data=len(x), temperature=1)
    name = list(vnet.posteriors)[-1]
    squares = torch.zeros_like(network.get_parameter(name))
    for i in range(len(x)):
        loss = F.mse_loss(network(x[i : i + 1]), target[i : i + 1])
        gradient = torch.autograd.grad(loss, network.get_parameter(name), allow_unused=True)[0]
        squares += 0 if gradient is None else gradient**2
    q = vnet.posteriors[name]
    torch.testing.assert_close(q.sigma, expected_sigma(squares, 1, 1, q.prior.std), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("curvature", ["fisher", "ggn"])
def test_the_curvature_keeps_no_graph_of_the_data(curvature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that are not variational learn too: through these, sums over the data would hold every datum's graph."""
    vnet = varify.variationalize(nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)))
    assert vnet.module[1].weight.requires_grad
    sums, found = fit_sigma.sums_of_squares, []

    def recorded(*args: object) -> Iterator[dict[str, Tensor]]:
        for squares in sums(*args):
            found.extend(squares.values())
            yield squares

    monkeypatch.setattr(fit_sigma, "sums_of_squares", recorded)
    varify.fit_sigma(vnet, DataLoader(data(), batch_size=5), F.cross_entropy, num_data=10, curvature=curvature)
    assert found
    assert not any(square.requires_grad for square in found)


def test_bad_fits_change_nothing() -> None:
    vnet = varify.variationalize(classifier())
    before = copy.deepcopy(vnet.state_dict())
    x, y = data().tensors
    fit = varify.fit_sigma
    with pytest.raises(TypeError, match="num_data"):
        fit(vnet, [(x, y)], F.cross_entropy)
    for loader, criterion, options, message in (
        ([], F.cross_entropy, {"num_data": 10}, "the loader is empty"),
        ([(x, y)], F.cross_entropy, {"num_data": 9}, "num_data=9, but the loader gave 10"),
        (
            [(x, y)],
            F.cross_entropy,
            {"num_data": 10, "curvature": "hessian"},
            "curvature must be .*hessian",
        ),
        (
            [(x, y)],
            F.cross_entropy,
            {"num_data": 10, "temperature": 0.0},
            "temperature must be a positive number",
        ),
        ([(x, y)], lambda o, t: o, {"num_data": 10}, r"must return a scalar, .*, got a tensor of shape \(1, 3\)"),
        ([(x, 3)], F.cross_entropy, {"num_data": 10}, "a batch of targets"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(vnet, loader, criterion, **options)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fit(vnet, [(x[:, :3], y)], F.cross_entropy, num_data=10)
    for key, value in vnet.state_dict().items():
        assert torch.equal(value, before[key]) if isinstance(value, Tensor) else value == before[key]
    vnet.set_prior("conjugate_known_mean", mean=0.0, alpha_0=1.0, beta_0=1.0)
    with pytest.raises(varify.PriorError, match=r"the prior of 0.weight, ConjugateKnownMean\(.*\), has no variance"):
        fit(vnet, [(x, y)], F.cross_entropy, num_data=10)


def test_fit_prior_minimizes_the_divergence() -> None:
    vnet = varify.variationalize(classifier(), init=varify.inits.Normal((0.1, 0.5), (-2.0, 0.5)))
    vnet.set_prior("mixtgauss", sigma_1=1.0, sigma_2=0.1, pi=0.5, where="3.bias")
    fitted = varify.fit_prior(vnet)
    assert list(fitted) == ["0.weight", "0.bias", "3.weight"]
    q = vnet.posteriors["0.weight"]
    best = q.kl_divergence().item()
    for factor in (0.97, 1.03):
        vnet.set_prior(varify.priors.Gaussian(std=fitted["0.weight"] * factor), where="0.weight")
        assert vnet.posteriors["0.weight"].kl_divergence().item() > best
    second_moment = (q.mu**2 + torch.log1p(q.rho.exp()) ** 2).mean().sqrt()
    assert fitted["0.weight"] == pytest.approx(second_moment.item(), rel=1e-5)
    assert list(varify.fit_prior(vnet, where="0.*")) == ["0.weight", "0.bias"]
    with pytest.raises(varify.PriorError, match="matches no parameter with a Gaussian prior"):
        varify.fit_prior(vnet, where="3.bias")


def test_fitted_priors_keep_their_means_and_equal_those_that_set_prior_gives() -> None:
    torch.manual_seed(0)
    means = torch.randn(6, 4)
    vnet = varify.variationalize(classifier(), prior={"0.weight": varify.priors.Gaussian(means, 0.5)})
    other = copy.deepcopy(vnet)
    for name, std in varify.fit_prior(vnet).items():
        q = other.posteriors[name]
        by_hand = (q.mu - q.prior.mean).pow(2).mean() + torch.log1p(q.rho.exp()).pow(2).mean()
        assert std == pytest.approx(by_hand.sqrt().item(), rel=1e-5)
        other.set_prior(varify.priors.Gaussian(q.prior.mean, std), where=name)
    assert torch.equal(vnet.posteriors["0.weight"].prior.mean, means)
    assert str(vnet.summary()) == str(other.summary())


def test_fit_prior_looks_through_the_names_once(monkeypatch: pytest.MonkeyPatch) -> None:
    vnet = varify.variationalize(nn.Sequential(*[nn.Linear(2, 2) for _ in range(20)]))
    seen = []
    real = fit_prior.matching
    for module in (fit_prior, posteriors):
        monkeypatch.setattr(module, "matching", lambda names, where: seen.append(where) or real(names, where))
    assert len(varify.fit_prior(vnet)) == 40
    assert seen == ["*"]


# --- weights that are fixed


@pytest.mark.parametrize("pretrained_row", [0.0, 0.7])
def test_the_padding_row_of_an_embedding_is_not_random(pretrained_row: float) -> None:
    network = nn.Sequential(nn.Embedding(5, 3, padding_idx=1), nn.Linear(3, 2))
    network[0].weight.data[1] = pretrained_row
    vnet = varify.variationalize(network, init=varify.inits.Normal())
    q = vnet.posteriors["0.weight"]
    assert q.mu[1].eq(pretrained_row).all()
    assert vnet.sample_model()[0].weight[1].eq(pretrained_row).all()
    (vnet(torch.tensor([[1, 2]])).sum() + vnet.prior_loss()).backward()
    assert not q.mu.grad[1].any()
    assert not q.rho.grad[1].any()
    assert q.rho.grad[2].all()
    sigma, std = torch.log1p(q.rho.exp()), q.prior.std  # the KL is that of the other rows
    terms = torch.log(std / sigma) + (sigma**2 + q.mu**2) / (2 * std**2) - 0.5
    assert q.kl_divergence().item() == pytest.approx(terms[[0, 2, 3, 4]].sum().item(), rel=1e-5)


def test_priors_know_which_weights_are_fixed() -> None:
    whole, part = nn.Embedding(5, 3, padding_idx=0), nn.Embedding(4, 3)
    part.weight.data = whole.weight.data[1:].clone()
    tensor_std = torch.rand(5, 3) + 0.1
    for prior, same in (
        (varify.priors.Gaussian(std=tensor_std), varify.priors.Gaussian(std=tensor_std[1:])),
        (torch.distributions.Laplace(0.0, tensor_std), torch.distributions.Laplace(0.0, tensor_std[1:])),
        (varify.priors.Conjugate(0.0, 3.0, 0.5, 0.5), varify.priors.Conjugate(0.0, 3.0, 0.5, 0.5)),
        (torch.distributions.StudentT(3.0, 0.0, tensor_std), torch.distributions.StudentT(3.0, 0.0, tensor_std[1:])),
    ):
        a = varify.variationalize(whole, prior=prior, init=varify.inits.Constant(0.3))
        b = varify.variationalize(part, prior=same, init=varify.inits.Constant(0.3))
        losses = []
        for vnet in (a, b):
            torch.manual_seed(0)
            losses.append(vnet.prior_loss().item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# --- pruning


def test_pruning_takes_the_lowest_signal_to_noise() -> None:
    vnet = varify.variationalize(classifier(), init=varify.inits.Normal((0.0, 0.5), (-2.0, 1.0)))
    ratios = torch.cat([(q.mu.abs() / torch.log1p(q.rho.exp())).flatten() for q in vnet.posteriors.values()]).detach()
    assert varify.prune(vnet, 0.4) == pytest.approx(round(0.4 * 51) / 51)
    lost = ratios.argsort()[: round(0.4 * 51)]
    means = torch.cat([q.mu.flatten() for q in vnet.posteriors.values()])
    assert set(means.eq(0).nonzero().flatten().tolist()) == set(lost.tolist())
    assert varify.prune(vnet, 0.4) == pytest.approx(round(0.4 * 51) / 51)  # those before are included
    limit = ratios.sort().values[30].item()
    assert varify.prune(vnet, threshold=limit) == pytest.approx(30 / 51)


def test_pruned_weights_stay_zero_through_training_and_in_checkpoints() -> None:
    vnet = varify.variationalize(classifier())
    x, y = data().tensors
    optimizer = torch.optim.SGD(vnet.parameters(), lr=0.1, momentum=0.9)
    for step in range(20):
        if step == 10:  # the momentum has not forgotten them
            varify.prune(vnet, 0.5)
        loss = F.cross_entropy(vnet(x), y) + vnet.prior_loss() / 10
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    masks = {n: q.mu != q.mu if q.fixed is None else q.fixed == PRUNED for n, q in vnet.posteriors.items()}
    other = varify.variationalize(classifier())
    other.load_state_dict(vnet.state_dict())
    for network in (
        vnet.sample_model(),
        vnet.mean_model(),
        copy.deepcopy(vnet).mean_model(),
        other.eval().module,
        other.sample_model(),
    ):
        zeros = {name: p == 0 for name, p in network.named_parameters()}
        assert sum(int(z.sum()) for z in zeros.values()) == sum(int(m.sum()) for m in masks.values()) == 26
        assert all(torch.equal(zeros[name], masks[name]) for name in masks)
    vnet.train()
    optimizer.step()
    assert not vnet.state_dict()["module.0.weight"][masks["0.weight"]].any()
    assert not other.state_dict()["module.0.weight"][masks["0.weight"]].any()
    assert copy.deepcopy(vnet).posteriors["0.weight"].fixed is not None


def test_reading_a_pruned_network_writes_nothing() -> None:
    vnet = varify.variationalize(classifier())
    varify.prune(vnet, 0.5)
    with torch.no_grad():
        vnet.module[0].weight.add_(1.0)  # as a momentum does
    versions = {name: (id(t), t._version) for name, t in (*vnet.named_parameters(), *vnet.named_buffers())}
    for _ in (vnet.state_dict(), vnet.eval(), vnet.train(), vnet.summary(), vnet.mean_model(), vnet.posteriors):
        assert {n: (id(t), t._version) for n, t in (*vnet.named_parameters(), *vnet.named_buffers())} == versions
    found = vnet.mean_model()[0].weight
    assert torch.equal(found == 0, vnet.posteriors["0.weight"].fixed == PRUNED)


def test_pruned_weights_cost_nothing_and_a_fresh_network_can_load_over_them() -> None:
    vnet = varify.variationalize(classifier())
    fresh = copy.deepcopy(vnet.state_dict())
    varify.prune(vnet, 1.0)
    assert vnet.prior_loss().item() == 0.0
    vnet.load_state_dict(fresh)
    assert vnet.posteriors["0.weight"].fixed is None


@pytest.mark.parametrize("estimator", ["local", "flipout"])
def test_estimators_leave_pruned_weights_out(estimator: str) -> None:
    vnet = varify.variationalize(nn.Linear(3, 2, bias=False), estimator=estimator, strict=True)
    varify.prune(vnet, 1.0)
    assert not vnet(torch.ones(4, 3)).any()


def test_a_pruning_curve_leaves_the_network_alone() -> None:
    vnet = varify.variationalize(classifier())
    before = copy.deepcopy(vnet.state_dict())
    curve = varify.pruning_curve(vnet, lambda v: sum(p.abs().sum().item() for p in v.module.parameters()), (0, 0.5, 1))
    assert [share for share, _ in curve] == pytest.approx([0, 26 / 51, 1])
    assert curve[0][1] > curve[1][1] > curve[2][1] == 0
    assert all(torch.equal(v, before[k]) for k, v in vnet.state_dict().items() if isinstance(v, Tensor))


def test_bad_pruning() -> None:
    vnet = varify.variationalize(classifier())
    for arguments, message in (
        ({}, "either fraction or threshold"),
        ({"fraction": 0.5, "threshold": 1.0}, "not both"),
        ({"fraction": 1.5}, r"fraction must lie within \[0, 1\], got 1.5"),
        ({"threshold": -1.0}, "threshold must be at least 0, got -1.0"),
        ({"fraction": 0.5, "where": "conv*"}, "matches no parameter"),
    ):
        with pytest.raises(ValueError, match=message):
            varify.prune(vnet, **arguments)
    assert not any(q.fixed is not None for q in vnet.posteriors.values())


# --- description length


def test_description_length_by_hand() -> None:
    vnet = varify.variationalize(TiedLanguageModel())
    tokens = torch.arange(10).reshape(5, 2)
    targets = torch.arange(5)
    criterion = lambda output, target: F.cross_entropy(output[:, 0], target)  # noqa: E731
    torch.manual_seed(0)
    found = varify.description_length(vnet, DataLoader(TensorDataset(tokens, targets), 2), criterion, n_samples=50)
    assert set(found.weights) == set(vnet.posteriors)
    for name, q in vnet.posteriors.items():
        assert found.weights[name] == pytest.approx(q.kl_divergence().item() / math.log(2))
    codes = []
    for _ in range(400):
        p = vnet.sample_model()(tokens)[:, 0].softmax(1)
        codes.append(-sum(math.log2(p[i, i].item()) for i in range(5)))
    codes = torch.tensor(codes)
    error = codes.std().item() * (1 / 400 + 1 / 50) ** 0.5
    assert abs(found.data - codes.mean().item()) < 5 * error  # false alarm: 1 run in 1.7 million
    assert found.total == pytest.approx(sum(found.weights.values()) + found.data)
    assert found.total_bytes == found.total / 8
    assert found.num_data == 5
    assert "all weights" in str(found)
    assert str(found).splitlines()[-1].startswith("total")
    for loader, n_samples, message in (
        ([], 1, "the loader is empty"),
        ([(tokens, targets)], 0, "n_samples must be a positive"),
    ):
        with pytest.raises(ValueError, match=message):
            varify.description_length(vnet, loader, criterion, n_samples=n_samples)


def test_signal_to_noise_of_a_recurrent_network() -> None:
    vnet = varify.variationalize(Recurrent(), init=varify.inits.Moped(0.25))
    for q in vnet.posteriors.values():
        assert q.snr.median().item() == pytest.approx(4.0, rel=1e-3)


def overparametrized() -> tuple[nn.Module, Tensor, Tensor]:
    """A network of 4,500 weights that has fitted 60 data, and these."""
    torch.manual_seed(2)
    x = torch.randn(60, 4)
    y = (x[:, 0] * x[:, 1] + 0.7 * torch.randn(60) > 0).long()
    network = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
    return network, x, y


def risk(vnet: varify.VariationalModule, x: Tensor, y: Tensor) -> tuple[float, float]:
    """NLL at the means, and of the predictive by 4,000 draws, one forward each: nats."""
    vnet.eval()
    with torch.no_grad(), vnet.sampling():
        probabilities = torch.stack([vnet(x).softmax(-1) for _ in range(4000)]).mean(0)
        at_means = F.cross_entropy(vnet.mean_model()(x), y).item()
    return at_means, F.nll_loss(probabilities.log(), y).item()


def test_by_default_the_sigmas_do_no_harm_where_those_of_laplace_do() -> None:
    network, x, y = overparametrized()
    rise, sigma = {}, {}
    for temperature in (None, 1.0):
        vnet = varify.variationalize(network)
        varify.fit_sigma(vnet, [(x, y)], F.cross_entropy, num_data=60, temperature=temperature)
        nll, predictive = risk(vnet, x, y)
        rise[temperature] = predictive / nll - 1
        sigma[temperature] = torch.cat([q.sigma.flatten() for q in vnet.posteriors.values()])
    assert rise[1.0] > 0.5
    # 1 % or 0.005 nats by four draws; what more draws say scatters by about as much
    allowed = max(0.01, 0.005 / nll)
    assert -0.02 < rise[None] < allowed + 0.02
    ratio = sigma[None] / sigma[1.0]
    torch.testing.assert_close(ratio, ratio[0].expand_as(ratio), rtol=1e-3, atol=0.0)
    # and it is the largest such: of ten times the variance the rise is above what is allowed
    vnet = varify.variationalize(network)
    wider = 10 * ratio[0].item() ** 2
    varify.fit_sigma(vnet, [(x, y)], F.cross_entropy, num_data=60, temperature=wider)
    assert risk(vnet, x, y)[1] / nll - 1 > 2 * allowed


@pytest.mark.parametrize("unit", [1.0, "of an NLL of 0", 0.1])
def test_by_default_the_temperature_is_1_where_the_data_determine_the_weights(unit: float | str) -> None:
    """In any unit of the targets, also in one where the density's NLL, of the data looked at, is 0."""
    torch.manual_seed(0)
    x = torch.randn(400, 3)
    y = x @ torch.ones(3, 1) + torch.randn(400, 1)
    if isinstance(unit, str):
        residual = y - x @ torch.linalg.lstsq(x, y).solution
        unit = math.exp(-0.5 * (residual[:128].square().mean().item() + math.log(2 * math.pi)))
    y = unit * y
    network = nn.Linear(3, 1, bias=False)
    network.weight.data = torch.linalg.lstsq(x, y).solution.T
    found = []
    for temperature in (None, 1.0):
        vnet = varify.variationalize(network)
        varify.fit_sigma(
            vnet, [(x, y)], varify.GaussianLikelihood(unit), num_data=400, curvature="ggn", temperature=temperature
        )
        found.append(vnet.posteriors["weight"].rho.detach().clone())
    assert torch.equal(*found)


def test_the_default_temperature_is_of_the_first_data_and_takes_one_random_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network, x, y = overparametrized()
    many = [(x.repeat(2, 1), y.repeat(2))] * 5
    found, seen = fit_sigma.harmless_temperature, []

    def watched(vnet: object, posteriors: object, batches: list[Batch], criterion: object) -> float:
        seen.extend(batch.size for batch in batches)
        assert all(torch.equal(b.leaves[0], x.repeat(2, 1)[: b.size]) for b in batches)
        assert all(torch.equal(b.leaves[1], y.repeat(2)[: b.size]) for b in batches)
        return found(vnet, posteriors, batches, criterion)

    monkeypatch.setattr(fit_sigma, "harmless_temperature", watched)
    vnet = varify.variationalize(network)
    torch.manual_seed(0)
    varify.fit_sigma(vnet, iter(many), F.cross_entropy, num_data=10_000)
    after = torch.rand(3)
    torch.manual_seed(0)
    torch.randint(2**62, ())
    assert torch.equal(after, torch.rand(3))
    assert seen == [120, 8]


def test_the_default_temperature_keeps_masks_and_leaves_the_network_as_it_was_after_an_error() -> None:
    network, x, y = overparametrized()
    vnet = varify.variationalize(network)
    varify.prune(vnet, 0.5)
    before = copy.deepcopy(vnet.state_dict())
    calls = []

    def fails_later(output: Tensor, target: Tensor) -> Tensor:
        calls.append(None)
        if len(calls) > 8:
            raise RuntimeError("out of patience")
        return F.cross_entropy(output, target)

    with pytest.raises(RuntimeError, match="out of patience"):
        varify.fit_sigma(vnet, [(x[:3], y[:3])] * 2, fails_later, num_data=60)
    assert all(torch.equal(value, before[name]) for name, value in vnet.state_dict().items())
    varify.fit_sigma(vnet, [(x, y)], F.cross_entropy, num_data=60)
    for q in vnet.posteriors.values():
        assert q.fixed is None or (q.sigma[q.fixed != 0] == 0).all()
    after = vnet.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {name for name in before if name.startswith("rho.")}


def test_data_without_a_finite_loss_leave_the_temperature_to_the_user() -> None:
    network, x, y = overparametrized()
    vnet = varify.variationalize(network)
    before = copy.deepcopy(vnet.state_dict())
    ignored = y.clone()
    ignored[3] = -100  # of one datum alone the mean over no target is NaN
    with pytest.raises(varify.ArgumentError, match="leave out data without a finite loss"):
        varify.fit_sigma(vnet, [(x, ignored)], F.cross_entropy, num_data=60)
    assert all(torch.equal(value, before[name]) for name, value in vnet.state_dict().items())
    varify.fit_sigma(vnet, [(x, ignored)], F.cross_entropy, num_data=60, temperature=1)


def test_a_loader_may_fill_its_tensors_again() -> None:
    network, x, y = overparametrized()

    def refilled() -> Iterator[tuple[Tensor, Tensor]]:
        inputs, targets = torch.empty(20, 4), torch.empty(20, dtype=torch.long)
        for i in range(0, 60, 20):
            inputs.copy_(x[i : i + 20])
            targets.copy_(y[i : i + 20])
            yield inputs, targets

    found = []
    for loader in (refilled(), [(x[i : i + 20], y[i : i + 20]) for i in range(0, 60, 20)]):
        vnet = varify.variationalize(network)
        torch.manual_seed(0)
        varify.fit_sigma(vnet, loader, F.cross_entropy, num_data=60)
        found.append(torch.cat([q.rho.flatten() for q in vnet.posteriors.values()]))
    assert torch.equal(*found)
