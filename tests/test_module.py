"""What a variational module promises: draws, gradients, modes, names, state."""

import copy
import io
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import varify
from tests.networks import CASES, Recurrent, TiedLanguageModel, Untraceable, collide, seeded
from varify.priors.gaussian import kl_of_each_weight
from varify.state import read_extra_state

MIXTURE = {"sigma_1": 1.0, "sigma_2": 0.002, "pi": 0.5}


def mlp(**options: object) -> varify.VariationalModule:
    torch.manual_seed(0)
    return varify.variationalize(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), **options)


def x(*shape: int) -> Tensor:
    return torch.randn(*(shape or (4, 3)), generator=torch.Generator().manual_seed(9))


# --- draws and their gradients


def test_a_draw_has_the_posteriors_mean_and_standard_deviation() -> None:
    vnet = varify.variationalize(nn.Linear(2, 2).double(), init=varify.inits.Normal(rho=(0.0, 1.0)))
    q = vnet.posteriors["weight"]
    torch.manual_seed(0)
    draws = torch.stack([vnet.sample_model().weight.detach() for _ in range(20_000)])
    sigma = torch.log1p(q.rho.exp()).detach()
    # 5 standard errors for each of eight numbers: false alarm 1 run in 200,000
    assert ((draws.mean(0) - q.mu).abs() < 5 * sigma / 20_000**0.5).all()
    assert ((draws.std(0) - sigma).abs() < 5 * sigma / 40_000**0.5).all()


def test_forward_is_linear_algebra_on_one_draw_with_gradients_by_hand() -> None:
    vnet = varify.variationalize(nn.Linear(3, 2).double())
    q = vnet.posteriors["weight"]
    inputs = x().double()
    torch.manual_seed(5)
    output = vnet(inputs)
    output.square().sum().backward()
    torch.manual_seed(5)
    eps, eps_b = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    w = q.mu + torch.log1p(q.rho.exp()) * eps
    b = vnet.posteriors["bias"].mu + torch.log1p(vnet.posteriors["bias"].rho.exp()) * eps_b
    torch.testing.assert_close(output, inputs @ w.T + b)
    grad = (2 * output).T @ inputs
    torch.testing.assert_close(q.mu.grad, grad)
    torch.testing.assert_close(q.rho.grad, grad * eps / (1 + torch.exp(-q.rho)))


@pytest.mark.parametrize("prior", [("gaussian", {}), ("mixtgauss", MIXTURE)], ids=["exact", "estimated"])
@pytest.mark.parametrize("name", ["mlp", "called twice", "tied", "untraceable", "lstm"])
def test_prior_loss_leaves_the_data_terms_gradient_alone(name: str, prior: tuple) -> None:
    """The seed systems refill their noise in place: a second draw before backward corrupts the gradient of rho."""
    vnet = varify.variationalize(seeded(CASES[name]), prior=varify.priors.as_prior(prior[0], **prior[1]))
    args, kwargs = CASES[name].calls[0]
    vnet(*args, **kwargs)  # the first call of its kind draws all weights

    def gradients(forwards: int, prior_loss_between: bool, together: bool) -> list[Tensor]:
        vnet.zero_grad()
        losses = []
        for i in range(forwards):
            torch.manual_seed(i)
            losses.append(vnet(*args, **kwargs).square().sum())
            if prior_loss_between:
                vnet.prior_loss()
            if not together:
                losses.pop().backward()
        if together:
            torch.stack(losses).sum().backward()
        return [q.rho.grad.clone() for q in vnet.posteriors.values() if q.rho.grad is not None]

    plain = gradients(3, prior_loss_between=False, together=False)
    assert any(grad.any() for grad in plain)
    for other in (gradients(3, True, False), gradients(3, False, True), gradients(3, True, True)):
        assert len(other) == len(plain)
        for found, expected in zip(other, plain, strict=True):
            torch.testing.assert_close(found, expected)


def test_prior_loss_before_any_forward_and_twice() -> None:
    vnet = mlp()
    first = vnet.prior_loss()
    vnet(x())
    assert vnet.prior_loss().item() == first.item()
    torch.testing.assert_close(sum(vnet.kl_divergence().values()), first)


def test_one_draw_a_forward_serves_every_use() -> None:
    vnet = varify.variationalize(seeded(CASES["tied"]), init=varify.inits.Constant(0.5))
    program_weights = []
    tokens = torch.arange(11)[None]
    with vnet.fixed_draw():
        sample = vnet.sample_model()
        program_weights.append(vnet(tokens))
        torch.testing.assert_close(program_weights[0], sample(tokens))
    assert sample.head.weight is sample.embedding.weight


# --- ties and names


def test_a_tied_parameter_is_one_posterior_with_one_divergence() -> None:
    vnet = varify.variationalize(TiedLanguageModel())
    assert list(vnet.posteriors) == ["embedding.weight", "mix.weight", "mix.bias"]
    assert vnet.posteriors["head.weight"].mu is vnet.posteriors["embedding.weight"].mu
    assert vnet.module.head.weight is vnet.module.embedding.weight
    by_hand = sum(q.kl_divergence().item() for q in vnet.posteriors.values())
    assert vnet.prior_loss().item() == pytest.approx(by_hand)
    assert "embedding.weight = head.weight" in str(vnet.summary())
    with pytest.raises(KeyError, match=r"'nose' has no posterior; there are embedding.weight, mix.weight, mix.bias"):
        vnet.posteriors["nose"]


def test_names_do_not_collide() -> None:
    vnet = varify.variationalize(collide())
    assert len(vnet.posteriors) == 7
    assert sum(p.numel() for p in vnet.parameters()) == 2 * sum(p.numel() for p in collide().parameters())
    assert {"rho.conv.1.weight", "rho.conv_1.weight", "rho.conv_1_weight"} <= set(vnet.state_dict())


def test_modules_within_and_around() -> None:
    body = nn.Linear(3, 4).requires_grad_(False)
    head = varify.variationalize(nn.Linear(4, 2))
    network = nn.Sequential(body, nn.ReLU(), head)
    assert varify.prior_loss(network).item() == head.prior_loss().item()
    assert varify.prior_loss(body).item() == 0.0
    outer = varify.variationalize(network, where="0.*")
    assert list(outer.posteriors) == ["0.weight", "0.bias"]
    own = sum(kl.item() for kl in outer.kl_divergence().values())
    assert outer.prior_loss().item() == pytest.approx(own + head.prior_loss().item())
    outer(x()).sum().backward()
    assert outer.module[2].rho.weight.grad.any()


def test_default_choice_and_where() -> None:
    network = seeded(CASES["cnn"])
    network.fc.bias.requires_grad_(False)
    vnet = varify.variationalize(network)
    assert list(vnet.posteriors) == ["conv1.weight", "conv1.bias", "conv2.weight", "fc.weight"]
    assert not vnet.module.fc.bias.requires_grad
    table = str(vnet.summary())
    assert "frozen" in table
    assert "normalization layer" in table
    everything = varify.variationalize(network, where="*")
    assert set(everything.posteriors) == {name for name, _ in network.named_parameters()}
    assert not everything.posteriors["fc.bias"].rho.requires_grad
    by_type = varify.variationalize(network, where=lambda name, p, owner: isinstance(owner, nn.Conv2d) and p.dim() > 1)
    assert list(by_type.posteriors) == ["conv1.weight", "conv2.weight"]
    several = varify.variationalize(network, where=["conv1.*", "fc.weight"])
    assert list(several.posteriors) == ["conv1.weight", "conv1.bias", "fc.weight"]


def test_priors_and_initializations_by_glob() -> None:
    vnet = mlp(
        prior={"*.bias": varify.priors.Gaussian(std=2.0), "2.*": "gaussian"},
        init={"0.*": varify.inits.Constant(0.25), "2.weight": "zero_mean"},
    )
    stds = {name: round(q.prior.std, 4) for name, q in vnet.posteriors.items()}
    assert stds == {"0.weight": 1.0, "0.bias": 2.0, "2.weight": 0.4472, "2.bias": 0.4472}
    torch.testing.assert_close(vnet.posteriors["0.weight"].sigma, torch.full((5, 3), 0.25))
    assert not vnet.posteriors["2.weight"].mu.any()


def test_initializations() -> None:
    network = nn.Linear(400, 300)
    w = network.weight
    sigma = lambda init: varify.variationalize(network, init=init).posteriors["weight"].sigma  # noqa: E731
    torch.testing.assert_close(sigma(None), torch.full_like(w, 0.1 * w.detach().double().norm() / w.numel() ** 0.5))
    zeros = varify.variationalize(nn.LayerNorm(3), where="*").posteriors["bias"]
    torch.testing.assert_close(zeros.sigma, torch.full((3,), 0.01))
    relative = varify.variationalize(network, prior="gaussian", init="relative").posteriors["weight"]
    torch.testing.assert_close(relative.sigma, torch.full_like(w, 0.1 / 20))
    torch.testing.assert_close(sigma("constant"), torch.full_like(w, 0.01))
    torch.testing.assert_close(sigma(varify.inits.Moped(0.3, floor=1e-3)), (0.3 * w.abs()).clamp_min(1e-3))
    pyvarinf = varify.variationalize(network, prior="gaussian", init="zero_mean")
    assert not pyvarinf.posteriors["weight"].mu.any()
    assert pyvarinf.prior_loss().item() == pytest.approx(
        0.0, abs=0.05
    )  # the sum of 120,300 terms of up to 3, in single precision
    torch.manual_seed(0)
    q = varify.variationalize(network, init=varify.inits.Normal(mu=(0.5, 0.1), rho=(-3.0, 0.2))).posteriors["weight"]
    for found, (mean, std) in ((q.mu, (0.5, 0.1)), (q.rho, (-3.0, 0.2))):  # 5 standard errors of 120,000 numbers
        assert abs(found.mean() - mean) < 5 * std / 120_000**0.5
        assert abs(found.std() - std) < 5 * std / 240_000**0.5


# --- modes


def test_eval_is_the_mean_and_sampling_draws() -> None:
    vnet = mlp().eval()
    assert torch.equal(vnet(x()), vnet.module(x()))
    assert torch.equal(vnet(x()), vnet(x()))
    with vnet.sampling():
        assert not torch.equal(vnet(x()), vnet(x()))
    assert torch.equal(vnet(x()), vnet(x()))
    vnet.train()
    assert not torch.equal(vnet(x()), vnet(x()))


def test_fixed_draw_keeps_the_noise_and_follows_the_parameters() -> None:
    vnet = mlp()
    with vnet.fixed_draw():
        first = vnet(x())
        assert torch.equal(vnet(x()), first)
        with torch.no_grad():
            vnet.posteriors["2.bias"].mu.add_(1.0)
        torch.testing.assert_close(vnet(x()), first + 1)
    assert not torch.equal(vnet(x()), vnet(x()))


def test_lbfgs_within_a_fixed_draw_descends() -> None:
    vnet, inputs, targets = mlp(), x(), x(4, 2)
    optimizer = torch.optim.LBFGS(vnet.parameters(), max_iter=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(vnet(inputs), targets) + vnet.prior_loss() / 1000
        loss.backward()
        return loss

    with vnet.fixed_draw():
        before = closure().item()
        optimizer.step(closure)
        assert closure().item() < 0.5 * before


def test_an_exception_within_a_context_ends_it() -> None:
    vnet = mlp().eval()
    for context in (vnet.sampling, vnet.fixed_draw):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), context():
            vnet(x(4, 7))
    assert torch.equal(vnet(x()), vnet(x()))


def test_ordinary_models_again() -> None:
    torch.manual_seed(0)
    network = Recurrent()
    vnet = varify.variationalize(network)
    mean, sample = vnet.mean_model(), vnet.sample_model()
    assert type(mean) is type(sample) is Recurrent
    assert torch.equal(mean.eval()(x(2, 3, 4)), network.eval()(x(2, 3, 4)))
    assert all(p.requires_grad for p in sample.parameters())
    vnet.eval()
    with vnet.sampling(), vnet.fixed_draw():
        sample = vnet.sample_model()
        torch.testing.assert_close(sample(x(2, 3, 4)), vnet(x(2, 3, 4)))
    sample.out.bias.data.zero_()
    assert vnet.module.out.bias.any()


def test_an_argument_of_any_type_will_do() -> None:
    class Config:
        factor = 3.0

    class Configured(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, inputs: Tensor, config: Config) -> Tensor:
            return self.fc(inputs) * config.factor

    vnet = varify.variationalize(Configured())
    with vnet.fixed_draw():
        torch.testing.assert_close(vnet(x(), Config()), vnet.sample_model()(x(), Config()))


def test_hooks_and_modes_of_parts_are_live() -> None:
    vnet = mlp()
    vnet(x())
    seen: list[Tensor] = []
    handle = vnet.module[0].register_forward_hook(lambda module, args, output: seen.append(output))
    vnet(x())
    assert len(seen) == 1
    handle.remove()
    vnet(x())
    assert len(seen) == 1
    cnn = varify.variationalize(seeded(CASES["cnn"]))
    args = CASES["cnn"].calls[0][0]
    cnn(*args)
    before = cnn.module.bn1.running_mean.clone()
    cnn.module.bn1.eval()
    cnn(*args)
    assert torch.equal(cnn.module.bn1.running_mean, before)


def test_a_network_rebuilt_after_the_conversion_is_an_error_that_says_so() -> None:
    vnet = mlp()
    vnet(x())
    vnet.module[2] = nn.Linear(5, 7)
    with pytest.raises(varify.StructureError, match=r"2.weight, 2.bias of vnet.module changed"):
        vnet(x())


def test_the_users_exception_comes_through_and_the_network_stays_usable() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.rnn = nn.Linear(3, 2), nn.LSTM(3, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            output = self.fc(inputs) + self.rnn(inputs)[0]
            if inputs.max() > 10:
                raise ValueError("too large")
            return output

    vnet = varify.variationalize(Picky())
    means = {name: p.clone() for name, p in vnet.module.named_parameters()}
    with pytest.raises(ValueError, match="too large"):
        vnet(torch.full((4, 3), 11.0))
    for name, parameter in vnet.module.named_parameters():
        assert isinstance(parameter, nn.Parameter)
        assert torch.equal(parameter, means[name])
    assert vnet(x()).shape == (4, 2)
    copy.deepcopy(vnet)


# --- state


def test_the_plain_checkpoint_is_the_checkpoint_of_the_means() -> None:
    torch.manual_seed(3)
    trained = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    vnet = mlp()
    vnet.module.load_state_dict(trained.state_dict())
    assert torch.equal(vnet.eval()(x()), trained(x()))
    back = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    back.load_state_dict(vnet.module.state_dict())
    assert torch.equal(back(x()), trained(x()))


def test_a_wrong_checkpoint_is_reported_and_changes_nothing() -> None:
    vnet = mlp(prior=varify.priors.Gaussian(std=0.3))
    before = copy.deepcopy(vnet.state_dict())
    other = varify.variationalize(nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)))
    larger = varify.variationalize(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2), nn.Linear(2, 2)))
    truncated = {k: v for k, v in other.state_dict().items() if k != "module.2.bias"}
    for state, told in (
        (other.state_dict(), "size mismatch for module.0.weight"),
        (larger.state_dict(), 'Unexpected key.*"module.3.weight"'),
        (truncated, 'Missing key.*"module.2.bias"'),
        (vnet.module.state_dict(), r"vnet.module.load_state_dict\("),
    ):
        with pytest.raises(RuntimeError, match=f"(?s){told}"):
            vnet.load_state_dict(state)
        for key, value in vnet.state_dict().items():
            assert torch.equal(value, before[key]) if isinstance(value, Tensor) else value == before[key]


def test_loading_a_prior_nobody_registered_says_what_to_do() -> None:
    vnet = mlp()
    state = vnet.state_dict()
    state["_extra_state"] = read_extra_state(state["_extra_state"])
    state["_extra_state"]["priors"]["0.bias"]["kind"] = "horseshoe"
    with pytest.raises(varify.PriorError, match=r"'horseshoe' for 0.bias; import the module that defines it"):
        vnet.load_state_dict(state)


def test_strict_false_and_assign_are_torchs() -> None:
    vnet = mlp()
    state = {k: v for k, v in vnet.state_dict().items() if not k.startswith("rho")}
    report = vnet.load_state_dict(state, strict=False)
    assert set(report.missing_keys) == {f"rho.{name}" for name in vnet.posteriors}
    vnet.load_state_dict(copy.deepcopy(vnet.state_dict()), assign=True)
    vnet(x()).sum().backward()


def test_nan_is_never_hidden() -> None:
    vnet = mlp()
    vnet.posteriors["2.weight"].mu.data[0, 0] = float("nan")
    assert vnet.prior_loss().isnan()
    marked = [line for line in str(vnet.summary()).splitlines() if "NaN" in line and line.startswith("2.weight")]
    assert len(marked) == 1
    vnet = mlp(prior=varify.priors.ScaleMixture(**MIXTURE))
    vnet.posteriors["0.bias"].rho.data[0] = float("nan")
    assert vnet.prior_loss().isnan()
    assert "!NaN" in str(vnet.summary())


def test_summary_is_a_table_in_notebooks_too() -> None:
    vnet = varify.variationalize(Untraceable())
    vnet(x())
    table = vnet.summary()
    assert "12 of 16" not in str(table)
    assert "Untraceable: 16 of 16 parameters variational" in str(table)
    html = table._repr_html_()
    assert html.count("<tr>") == 5
    assert "Gaussian(std=1)" in html


def test_a_summary_tells_the_share_at_the_prior_and_the_mean_signal_to_noise() -> None:
    network = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 1, bias=False))
    vnet = varify.variationalize(network, prior=varify.priors.Gaussian(std=2.0), init=varify.inits.Constant(2.0))
    first, second = vnet.posteriors.values()
    first.mu.data = torch.tensor([[0.0, 0.1, 4.1], [-6.0, 0.2, 0.3]])  # KL = mu²/8: .011 from .3 on
    second.mu.data = torch.tensor([[2.0, 0.0]])
    expected = (0.1 + 4.1 + 6.0 + 0.2 + 0.3 + 2.0) / 2.0 / 8
    assert str(vnet.summary()).endswith(f"nats, 50.0% at the prior, mean |mu|/sigma {expected:.3g}")
    vnet.set_prior(varify.priors.ScaleMixture(**MIXTURE), where="1.weight")
    assert "50.0% of those with Gaussian priors at the prior" in str(vnet.summary())
    vnet.set_prior(varify.priors.ScaleMixture(**MIXTURE))
    assert "at the prior" not in str(vnet.summary())
    vnet.set_prior(varify.priors.Gaussian(std=2.0))
    varify.prune(vnet, 0.5)  # the four that are least: fixed weights are neither at the prior nor signal
    assert str(vnet.summary()).endswith(f"nats, 0.0% at the prior, mean |mu|/sigma {(4.1 + 6 + 2 + 0.3) / 2 / 4:.3g}")


@pytest.mark.parametrize("std", [0.3, torch.tensor([[0.1], [2.0]])])
def test_the_divergence_of_each_weight_adds_up_to_the_divergence(std: Any) -> None:
    torch.manual_seed(0)
    vnet = varify.variationalize(nn.Linear(3, 2, bias=False), prior=varify.priors.Gaussian(mean=0.4, std=std))
    q = vnet.posteriors["weight"]
    q.rho.data = torch.linspace(-60, 3, 6).reshape(2, 3)  # sigma of the first underflows
    normal = torch.distributions.Normal
    each = torch.distributions.kl_divergence(
        normal(q.mu.double(), F.softplus(q.rho.double())), normal(0.4, torch.as_tensor(std).double())
    )
    torch.testing.assert_close(kl_of_each_weight(q), each.flatten().float())
    torch.testing.assert_close(kl_of_each_weight(q).sum(), q.kl_divergence())


def test_saved_whole_and_loaded() -> None:
    vnet = mlp(prior=varify.priors.ScaleMixture(**MIXTURE)).eval()
    file = io.BytesIO()
    torch.save(vnet, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(x()), vnet(x()))
    vnet.posteriors["0.weight"].mu.data.zero_()
    assert not torch.equal(loaded(x()), vnet(x()))  # a copy, with closures of its own


def test_attributes_that_change_between_calls_are_live() -> None:
    class Tempered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.t, self.options, self.schedule = nn.Linear(3, 2), 1.0, {"scale": 2.0}, [1.0]

        def forward(self, inputs: Tensor) -> Tensor:
            return self.fc(inputs) / self.t * self.options["scale"] + self.schedule[0]

    vnet = varify.variationalize(Tempered())
    with vnet.fixed_draw():
        for change in (
            lambda m: None,
            lambda m: setattr(m, "t", 100.0),
            lambda m: m.options.update(scale=5.0),
            lambda m: m.schedule.__setitem__(0, -3.0),
            lambda m: setattr(m.fc, "forward", lambda inputs: inputs[:, :2]),
        ):
            change(vnet.module)
            torch.testing.assert_close(vnet(x()), vnet.sample_model()(x()))


def test_state_kept_outside_modules_is_not_frozen() -> None:
    import collections
    import random

    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.queue = nn.Linear(3, 2), collections.deque(maxlen=3)
            self.random = random.Random(0)

        def forward(self, inputs: Tensor) -> Tensor:
            self.queue.append(len(self.queue))
            return self.fc(inputs) * (1 if self.random.random() < 0.5 else 2)

    vnet = varify.variationalize(Remembers())
    with vnet.fixed_draw():
        outputs = {float(vnet(x())[0, 0].detach()) for _ in range(10)}
    assert len(outputs) == 2
    assert list(vnet.module.queue) == [3, 3, 3]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of later versions of torch
def test_parts_that_are_torchscript_or_have_sparse_gradients_stay_deterministic() -> None:
    scripted = torch.jit.script(nn.Linear(3, 3))
    vnet = varify.variationalize(nn.Sequential(nn.Linear(3, 3), scripted))
    assert list(vnet.posteriors) == ["0.weight", "0.bias"]
    vnet(x()).sum().backward()
    words = varify.variationalize(nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2)))
    assert "sparse gradients" in str(words.summary())
    words(torch.tensor([1, 2])).sum().backward()


def test_rho_of_tiny_and_large_sigmas() -> None:
    from varify.weights.posterior import softplus_inverse

    for sigma in (1e-30, 1e-10, 1e-3, 1.0, 30.0, 200.0):
        rho = softplus_inverse(torch.tensor(sigma))
        expected = math.log(math.expm1(sigma)) if sigma < 30 else sigma
        assert rho.item() == pytest.approx(expected, rel=1e-6)
        assert F.softplus(rho).item() == pytest.approx(sigma, rel=1e-5)


def test_contexts_nest() -> None:
    vnet = mlp().eval()
    with vnet.sampling():
        with vnet.sampling():
            pass
        assert not torch.equal(vnet(x()), vnet(x()))
        with vnet.fixed_draw():
            first = vnet(x())
            with vnet.fixed_draw():
                assert not torch.equal(vnet(x()), first)
            assert torch.equal(vnet(x()), first)


def test_every_parameter_has_a_prior_of_its_own() -> None:
    shared = varify.priors.Gaussian(mean=torch.zeros(1), std=1.0)
    vnet = mlp(prior={"0.*": shared})
    shared.mean.fill_(7.0)
    vnet.posteriors["0.bias"].prior.mean.fill_(3.0)
    assert vnet.posteriors["0.weight"].prior is not vnet.posteriors["0.bias"].prior
    assert not shared.mean.eq(3.0).any()


def test_one_tensor_given_twice_is_one_tensor() -> None:
    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return self.fc(first) if first is second else 2 * self.fc(second)

    vnet, inputs = varify.variationalize(Same()), x()
    with vnet.fixed_draw():
        torch.testing.assert_close(2 * vnet(inputs, inputs), vnet(inputs, inputs.clone()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_has_the_gradients_of_the_drawn_weights(reentrant: bool) -> None:
    """Recomputed in backward, a block would see the means."""
    from torch.utils.checkpoint import checkpoint

    class Block(nn.Module):
        def __init__(self, checkpointed: bool) -> None:
            super().__init__()
            self.a, self.b, self.checkpointed = nn.Linear(3, 3), nn.Linear(3, 3), checkpointed

        def block(self, inputs: Tensor) -> Tensor:
            return torch.tanh(self.b(torch.tanh(self.a(inputs))))

        def forward(self, inputs: Tensor) -> Tensor:
            return checkpoint(self.block, inputs, use_reentrant=reentrant) if self.checkpointed else self.block(inputs)

    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        vnet = varify.variationalize(Block(checkpointed), init=varify.inits.Constant(0.5)).train()
        torch.manual_seed(1)
        vnet(x().requires_grad_()).sum().backward()
        gradients.append([p.grad for p in vnet.parameters()])
    for plain, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, plain)


def test_an_attribute_that_hides_one_of_its_class_and_one_of_another_type() -> None:
    class Tempered(nn.Module):
        temperature = 1.0

        def __init__(self) -> None:
            super().__init__()
            self.fc, self.options, self.k = nn.Linear(3, 2), None, 2

        def forward(self, inputs: Tensor) -> Tensor:
            shift = 0.0 if self.options is None else self.options[0]
            return self.fc(inputs) / self.temperature + shift + torch.full((2,), self.k)

    vnet = varify.variationalize(Tempered())
    with vnet.fixed_draw():
        first = vnet(x())
        vnet.module.temperature = 10.0
        torch.testing.assert_close(vnet(x()), (first - 2) / 10 + 2)
        vnet.module.options = [1, 2]
        torch.testing.assert_close(vnet(x()), (first - 2) / 10 + 3)
        vnet.module.k = 2.5
        torch.testing.assert_close(vnet(x()), (first - 2) / 10 + 3.5)


def test_equal_attributes_of_other_types_are_other_attributes() -> None:
    class Filled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.k = nn.Linear(3, 2), 2

        def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
            return self.fc(inputs), torch.full((2,), self.k)

    vnet = varify.variationalize(Filled())
    assert vnet(x())[1].dtype == torch.int64
    vnet.module.k = 2.0
    assert vnet(x())[1].dtype == torch.float32


def test_untying_after_the_conversion_is_noticed() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    network[1].weight = network[0].weight
    vnet = varify.variationalize(network)
    vnet(x())
    vnet.module[1].weight = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(varify.StructureError, match=r"1\.weight of vnet\.module changed since the conversion"):
        vnet(x())


class Borrowing(nn.Module):
    """Uses a weight of another layer's, which it holds in a list; torch.fx can't follow it."""

    def __init__(self, lender: nn.Module) -> None:
        super().__init__()
        self.lender, self.bias = [lender], nn.Parameter(torch.zeros(5))

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return nn.functional.linear(hidden, self.lender[0].weight) + self.bias


def test_a_weight_that_an_opaque_module_borrows_is_the_same_draw() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 3)
            self.head = Borrowing(self.embedding)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.embedding(tokens))

    vnet = varify.variationalize(Tied(), init=varify.inits.Constant(1.0))
    tokens = torch.arange(5)
    kept = vnet.module.embedding.weight
    with vnet.fixed_draw():
        torch.testing.assert_close(vnet(tokens), vnet.sample_model()(tokens))
    assert vnet.module.embedding.weight is kept


def test_names_that_are_methods_elsewhere() -> None:
    network = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("get", "put", "leaf", "fix", "code")})
    assert len(varify.variationalize(network, where="*").posteriors) == 10


class Doubtful(nn.Module):
    """Torch.fx can't follow it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: Tensor) -> Tensor:
        return self.inner(inputs) if inputs.sum() < 1e9 else inputs


@pytest.mark.parametrize("wrap", [Doubtful, nn.Sequential])
def test_draws_within_a_cached_parametrization_differ(wrap: Any) -> None:
    net = wrap(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2, bias=False)))
    vnet = varify.variationalize(net)
    with nn.utils.parametrize.cached():
        for vectorize in (False, True):
            assert vnet.predict(x(), n_samples=3, vectorize=vectorize).std.all()
        vnet(x())
    with vnet.sampling():
        assert not torch.equal(vnet(x()), vnet(x()))


def test_a_generator_keeps_its_protocol_and_its_weights() -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.caught = nn.Linear(3, 3), 0

        def forward(self, inputs: Tensor) -> Any:
            return {"steps": self.steps(inputs)}

        def steps(self, inputs: Tensor) -> Any:
            try:
                scale = yield self.fc(inputs)
                yield self.fc(inputs) * scale
            except KeyError:
                self.caught += 1
                yield self.fc(inputs) * 0
            return "the end"

    vnet = varify.variationalize(Steps(), init=varify.inits.Constant(1.0))
    with vnet.fixed_draw():
        drawn = vnet.sample_model().fc(x())
        steps = vnet(x())["steps"]
        torch.testing.assert_close(next(steps), drawn)
        torch.testing.assert_close(steps.send(3.0), 3 * drawn)
        with pytest.raises(StopIteration, match="the end"):
            next(steps)
        steps = vnet(x())["steps"]
        next(steps)
        assert not steps.throw(KeyError("a reason")).any()
        assert vnet.module.caught == 1
        steps = vnet(x())["steps"]
        next(steps)
        steps.close()
    assert isinstance(vnet.module.fc.weight, nn.Parameter)


def test_the_padding_row_of_an_embedding_tied_to_the_head_is_a_row_as_any_other() -> None:
    network = nn.Sequential(nn.Embedding(5, 3, padding_idx=1), nn.Linear(3, 5, bias=False))
    network[1].weight = network[0].weight
    vnet = varify.variationalize(network)
    vnet(torch.tensor([[0, 2]])).square().sum().backward()
    q = vnet.posteriors["0.weight"]
    assert q.fixed is None
    assert q.mu.grad[1].all()
    assert q.rho.grad[1].all()


@pytest.mark.parametrize("prior", [varify.priors.ScaleMixture(**MIXTURE), varify.priors.Conjugate(0.0, 3.0, 0.5, 0.5)])
def test_within_a_fixed_draw_an_estimated_divergence_is_a_function(prior: Any) -> None:
    vnet = mlp(prior=prior)
    with vnet.fixed_draw():
        first = vnet.prior_loss()
        torch.randn(1)
        state = torch.get_rng_state()
        assert torch.equal(vnet.prior_loss(), first)
        assert torch.equal(torch.get_rng_state(), state)
        with torch.no_grad():
            vnet.rho.leaf_at("0.weight").add_(0.1)
        assert not torch.equal(vnet.prior_loss(), first)
    with vnet.fixed_draw():
        second = vnet.prior_loss()
    with vnet.fixed_draw():
        assert not torch.equal(vnet.prior_loss(), second)


def test_functional_says_what_theta_is() -> None:
    vnet = mlp()
    f = vnet.functional(x())
    with pytest.raises(ValueError, match=r"theta lacks 0\.bias, .* for every name in vnet\.posteriors is needed"):
        f(dict(vnet.named_parameters()), x())
    theta = {name: q.rsample() for name, q in vnet.posteriors.items()}
    assert f(theta, x()).shape == (len(x()), 2)
    assert f(theta, input=x()).shape == (len(x()), 2)
