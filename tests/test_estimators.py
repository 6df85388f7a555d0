"""Estimators against linear algebra: outputs' mean and covariance over drawn weights, and unbiased gradients.

The operations are linear in their weights, so over draws of the weights the outputs of one example have mean
op(x, mu) and covariance J diag(sigma²) Jᵀ, with J the derivative of one example's outputs by the weights.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import varify
from varify import inits

S = 3000
LIMIT = 6.0  # standard errors; some 5,000 numbers are compared in all: false alarm 1 run in 100,000


class MatMul(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.w, self.how = nn.Parameter(torch.randn(3, 2)), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "@":
            return x @ self.w
        if self.how == "method":
            return x.matmul(self.w)
        return torch.matmul(self.w, x) if self.how == "left" else torch.matmul(x, other=self.w)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Bilinear(3, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[:, :3], x[:, 3:])


class Op(NamedTuple):
    make: Callable[[], nn.Module]
    x: tuple[int, ...]
    local_keeps_correlations: bool = False
    batched: bool = True


OPS = {
    "linear": Op(lambda: nn.Linear(3, 2), (4, 3), True),
    "linear without batch": Op(lambda: nn.Linear(3, 2), (3,), True, batched=False),
    "linear without bias": Op(lambda: nn.Linear(3, 2, bias=False), (4, 3), True),
    "linear over time": Op(lambda: nn.Linear(3, 2), (3, 4, 3)),
    "conv1d": Op(lambda: nn.Conv1d(2, 3, 3, padding=1, stride=2), (2, 2, 6)),
    "conv2d": Op(lambda: nn.Conv2d(2, 4, 3, padding=1, groups=2, padding_mode="circular"), (2, 2, 3, 3)),
    "conv2d without batch": Op(lambda: nn.Conv2d(2, 2, 2, bias=False), (2, 3, 3), batched=False),
    "conv3d": Op(lambda: nn.Conv3d(1, 2, 2, dilation=1), (2, 1, 2, 3, 2)),
    "conv_transpose1d": Op(lambda: nn.ConvTranspose1d(2, 2, 3, stride=2), (2, 2, 3)),
    "conv_transpose2d": Op(lambda: nn.ConvTranspose2d(2, 4, 2, groups=2, output_padding=1, stride=2), (2, 2, 2, 2)),
    "conv_transpose3d": Op(lambda: nn.ConvTranspose3d(1, 2, 2), (2, 1, 1, 2, 1)),
    "matmul": Op(lambda: MatMul("@"), (4, 3), True),
    "matmul over time": Op(lambda: MatMul("method"), (2, 3, 3)),
    "matmul by keyword": Op(lambda: MatMul("keyword"), (4, 3), True),
    "bilinear": Op(Pair, (4, 5), True),
}
MATRIX_ON_THE_LEFT = Op(lambda: MatMul("left"), (2, 4), batched=False)


def variational(op: Op, estimator: str) -> tuple[varify.VariationalModule, Tensor]:
    torch.manual_seed(0)
    network = op.make().double()
    vnet = varify.variationalize(network, estimator=estimator, init=inits.Normal((0.3, 0.5), (0.0, 0.5)), strict=True)
    return vnet.train(), torch.randn(op.x, dtype=torch.float64)


def exact_moments(vnet: varify.VariationalModule, x: Tensor, batched: bool) -> tuple[Tensor, list[Tensor]]:
    """Mean of the outputs, and covariance of each example's."""
    means = {name: q.mu.detach() for name, q in vnet.posteriors.items()}
    sigma = torch.cat([q.sigma.detach().flatten() for q in vnet.posteriors.values()])
    output = functional_call(vnet.module, means, x)
    jacobians = torch.autograd.functional.jacobian(
        lambda *w: functional_call(vnet.module, dict(zip(means, w, strict=True)), x), tuple(means.values())
    )
    flat = torch.cat([jacobian.reshape(output.numel(), -1) for jacobian in jacobians], 1)
    examples = flat.reshape(len(output) if batched else 1, -1, flat.shape[1])
    return output, [(j * sigma.square()) @ j.T for j in examples]


def draws(vnet: varify.VariationalModule, x: Tensor) -> Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return torch.stack([vnet(x) for _ in range(S)])


def worst_mean(samples: Tensor, mean: Tensor, covariances: list[Tensor]) -> float:
    """In standard errors."""
    variances = torch.cat([c.diag() for c in covariances])
    return float(((samples.mean(0) - mean).flatten() / (variances / S).sqrt()).abs().max())


def worst_covariance(samples: Tensor, covariances: list[Tensor], diagonal: bool) -> float:
    """In standard errors, taken from the samples: with signs, products have heavier tails than a Gaussian's."""
    worst = 0.0
    for i, expected in enumerate(covariances):
        one = samples.reshape(S, len(covariances), -1)[:, i]
        one = one - one.mean(0)
        products = one[:, :, None] * one[:, None, :]
        z = (products.mean(0) - expected) / (products.std(0) / S**0.5)
        worst = max(worst, float((z.diag() if diagonal else z).abs().max()))
    return worst


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("estimator", ["local", "flipout", "weights"])
def test_outputs_have_the_moments_of_drawn_weights(estimator: str, name: str) -> None:
    vnet, x = variational(OPS[name], estimator)
    mean, covariances = exact_moments(vnet, x, OPS[name].batched)
    samples = draws(vnet, x)
    assert {row.estimator for row in vnet.summary().rows} == {estimator}
    assert worst_mean(samples, mean, covariances) < LIMIT
    keeps_correlations = estimator != "local" or OPS[name].local_keeps_correlations
    assert worst_covariance(samples, covariances, diagonal=not keeps_correlations) < LIMIT


@pytest.mark.parametrize("estimator", ["local", "weights"])
def test_a_matrix_on_the_left(estimator: str) -> None:
    vnet, x = variational(MATRIX_ON_THE_LEFT, estimator)
    mean, covariances = exact_moments(vnet, x, False)
    samples = draws(vnet, x)
    assert worst_mean(samples, mean, covariances) < LIMIT
    assert worst_covariance(samples, covariances, diagonal=True) < LIMIT
    with pytest.raises(varify.EstimatorError, match="w: flipout has no rule for it as this argument of matmul"):
        variational(MATRIX_ON_THE_LEFT, "flipout")[0](x)


@pytest.mark.parametrize("estimator", ["local", "flipout"])
def test_embedding(estimator: str) -> None:
    """The same token twice in an example has one noise in flipout; in local reparameterization it has two."""
    torch.manual_seed(0)
    network = nn.Embedding(5, 2, padding_idx=0).double()
    vnet = varify.variationalize(network, estimator=estimator, init=inits.Normal((0.3, 0.5), (0.0, 0.5)), strict=True)
    tokens = torch.tensor([[1, 2, 1], [3, 1, 4]])
    mean, covariances = exact_moments(vnet, tokens, True)
    samples = draws(vnet, tokens)
    assert worst_mean(samples, mean, covariances) < LIMIT
    assert worst_covariance(samples, covariances, diagonal=estimator == "local") < LIMIT
    assert torch.equal(vnet(torch.zeros(2, dtype=torch.long)), network(torch.zeros(2, dtype=torch.long)))
    renormalized = varify.variationalize(nn.Embedding(5, 2, max_norm=1.0), estimator=estimator)
    renormalized(tokens)
    assert "weights (max_norm depends on the drawn rows)" in str(renormalized.summary())


def test_flipout_examples_are_uncorrelated_and_local_draws_are_independent() -> None:
    for estimator in ("flipout", "local"):
        vnet, x = variational(OPS["linear"], estimator)
        x = x[:1].expand(4, 3)
        samples = draws(vnet, x)
        samples = samples - samples.mean(0)
        correlations = torch.corrcoef(samples.permute(1, 0, 2).reshape(4, -1)) - torch.eye(4)
        assert correlations.abs().max() < LIMIT / S**0.5
    vnet, x = variational(OPS["linear"], "weights")
    samples = draws(vnet, x[:1].expand(4, 3))
    assert torch.equal(samples[:, 0], samples[:, 3])


@pytest.mark.parametrize("estimator", ["local", "flipout"])
@pytest.mark.parametrize("name", OPS)
def test_without_sigma_they_give_the_mean_output_exactly_with_finite_gradients(estimator: str, name: str) -> None:
    vnet, x = variational(OPS[name], estimator)
    for q in vnet.posteriors.values():
        q.rho.data.fill_(-2000.0)
    for inputs in (x, torch.zeros_like(x)):
        output = vnet(inputs)
        torch.testing.assert_close(output, vnet.module(inputs), rtol=1e-12, atol=1e-12)
        output.sum().backward()
        assert all(p.grad.isfinite().all() for p in vnet.parameters())
    assert torch.equal(vnet.eval()(x), vnet.module(x))


@pytest.mark.parametrize("estimator", ["weights", "local", "flipout", "auto"])
@pytest.mark.parametrize("twice", [False, True], ids=["once", "used twice"])
def test_gradients_are_unbiased(estimator: str, twice: bool) -> None:
    """E[out²] summed is mean² + var: its derivative by rho is known without a draw (for one layer used once)."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 3, bias=False).double()
    network = nn.Sequential(layer, nn.Identity(), layer) if twice else layer
    vnet = varify.variationalize(network, estimator=estimator, init=inits.Normal((0.3, 0.5), (-1.0, 0.5)))
    q = next(iter(vnet.posteriors.values()))
    x = torch.randn(4, 3, dtype=torch.float64)
    if twice:  # by a million draws and no varify
        eps = torch.randn(400_000, 3, 3, dtype=torch.float64)
        sigma = torch.log1p(q.rho.detach().exp())
        w = (q.mu.detach() + sigma * eps).requires_grad_()
        ((x @ w.mT) @ w.mT).square().sum().backward()
        of_draws = w.grad * eps * torch.sigmoid(q.rho.detach())
        expected, error_2 = of_draws.mean(0), of_draws.var(0) / len(eps)
    else:
        total = (x @ q.mu.T).square().sum() + (x.square() @ torch.log1p(q.rho.exp()).square().T).sum()
        expected, error_2 = torch.autograd.grad(total, q.rho)[0], torch.zeros(())
    grads = []
    for _ in range(S):
        vnet.zero_grad()
        vnet(x).square().sum().backward()
        grads.append(q.rho.grad.clone())
    found = torch.stack(grads)
    z = (found.mean(0) - expected) / (found.var(0) / S + error_2).sqrt()
    assert z.abs().max() < LIMIT
    assert ("it has 2 uses" in str(vnet.summary())) == (twice and estimator == "local")


def test_fallbacks_are_reported_or_raised() -> None:
    class Everything(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.rnn = nn.Linear(3, 3), nn.GRU(3, 3)
            self.scale, self.unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(self.fc(x) / self.scale)[0]

    vnet = varify.variationalize(Everything(), estimator="local")
    assert "local, from the first training call on" in str(vnet.summary())
    x = torch.randn(4, 3)
    vnet(x)
    reported = {row.names[0]: row.estimator for row in vnet.summary().rows}
    assert reported["fc.weight"] == reported["fc.bias"] == "local"
    assert reported["scale"] == "weights (local has no rule for div)"
    assert reported["unused"] == "weights (no operation was seen to use it)"
    assert reported["rnn.weight_ih_l0"] == "weights (local has no rule for gru)"
    with pytest.raises(varify.EstimatorError, match=r"strict=True.*scale: local has no rule for div"):
        varify.variationalize(Everything(), estimator="local", strict=True)(x)
    globbed = varify.variationalize(Everything(), estimator={"*": "weights", "fc.*": "flipout"}, strict=True)
    globbed(x)
    reported = {row.names[0]: row.estimator for row in globbed.summary().rows}
    assert reported["fc.weight"] == "flipout"
    assert reported["scale"] == reported["rnn.weight_ih_l0"] == "weights"
    assert re.search(r"flipout_linear\(.*Examples\(4, 0, False\), x0, fc_weight, fc_bias\)", globbed.code(x))


def test_auto_takes_local_once_per_datum_and_flipout_elsewhere() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.over_time, self.fc = nn.Conv1d(2, 3, 3), nn.Linear(4, 5), nn.Linear(15, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.over_time(self.conv(x)).flatten(1))

    vnet = varify.variationalize(Both(), estimator="auto", strict=True)
    vnet(torch.randn(2, 2, 6))
    reported = {row.names[0]: row.estimator for row in vnet.summary().rows}
    assert reported == {
        **dict.fromkeys(("conv.weight", "conv.bias", "over_time.weight", "over_time.bias"), "flipout"),
        **dict.fromkeys(("fc.weight", "fc.bias"), "local"),
    }


def test_estimators_serve_in_training_alone_and_are_saved() -> None:
    vnet, x = variational(OPS["linear"], "local")
    assert not torch.equal(vnet(x[:1].expand(4, 3))[0], vnet(x[:1].expand(4, 3))[1])
    for context in (vnet.sampling, vnet.fixed_draw):
        with context():
            output = vnet(x[:1].expand(4, 3))
            torch.testing.assert_close(output[0], output[1])  # one drawn weight for all
    other = varify.variationalize(OPS["linear"].make().double())
    other.load_state_dict(vnet.state_dict())
    other(x)
    assert {row.estimator for row in other.summary().rows} == {"local"}


def test_a_bias_without_its_weight_and_a_weight_without_its_bias() -> None:
    x = torch.randn(4, 3)
    only_bias = varify.variationalize(nn.Linear(3, 2), where="bias", estimator="local")
    only_bias(x)
    assert "weights (local has no rule for it as this argument of linear)" in str(only_bias.summary())
    only_weight = varify.variationalize(nn.Linear(3, 2), where="weight", estimator="flipout", strict=True)
    only_weight(x).sum().backward()
    mixed = varify.variationalize(nn.Linear(3, 2), estimator={"weight": "local"}, strict=True)
    mixed(x).sum().backward()
    assert mixed.posteriors["bias"].rho.grad.any()


def test_unknown_estimators_are_named() -> None:
    for estimator in ("lrt", 3, {"weight": "radial"}):
        with pytest.raises(varify.EstimatorError, match="one of 'auto', 'flipout', 'local', 'weights', got"):
            varify.variationalize(nn.Linear(3, 2), estimator=estimator)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_small_sigmas(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 400).to(dtype)
    for estimator in ("local", "flipout"):
        vnet = varify.variationalize(layer, estimator=estimator, init=inits.Constant(1e-4), strict=True)
        for q in vnet.posteriors.values():
            q.mu.data.zero_()
        std = vnet(torch.ones(8, 64, dtype=dtype)).float().std().item()
        # sqrt(65)·1e-4 from 3,200 outputs; sigma² = 1e-8 is 0 in half precision
        assert std == pytest.approx(65**0.5 * 1e-4, rel=0.1)


def test_a_custom_rule_is_one_decorated_function() -> None:
    @varify.estimators.rule("local", torch.bmm, of=("mat2",))
    def local_bmm(op: object, input: Tensor, mat2: varify.estimators.Moments) -> Tensor:
        mean, var = torch.bmm(input, mat2.mu), torch.bmm(input**2, mat2.sigma**2)
        return mean + var.sqrt() * torch.randn_like(mean)

    class Batched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(2, 3, 2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(x, self.w)

    vnet = varify.variationalize(Batched(), estimator="local", strict=True)
    vnet(torch.randn(2, 4, 3)).sum().backward()
    assert vnet.posteriors["w"].rho.grad.any()
    del varify.estimators.rules._RULES["local", torch.bmm]


@pytest.mark.parametrize("way", ["mul", "add"])
def test_a_weight_that_an_example_meets_at_several_positions_by_broadcasting_is_one_draw(way: str) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return getattr(x, way)(self.w)

    vnet = varify.variationalize(Outer(), estimator="auto", where="w", init=inits.Constant(0.5))
    x = torch.randn(2, 3, 1)  # as many positions as the weight has elements
    vnet(x)
    found = vnet(torch.ones(2, 3, 1))
    torch.testing.assert_close(found, found[:, :1].expand_as(found))  # all positions of an example are alike
    pairs = [vnet(torch.ones(2, 3, 1)) for _ in range(20)]  # of three signs each: all alike in 1 run of 8 ** 20
    assert any(not torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("estimator", ["local", "flipout"])
def test_addmm_has_the_type_of_the_original_under_autocast_and_small_noise_in_half(estimator: str) -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.zeros(4, 2)), nn.Parameter(torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.weight)

    vnet = varify.variationalize(Conv1D(), estimator=estimator, strict=True, init=inits.Constant(1e-4))
    x = torch.ones(64, 4)
    with torch.autocast("cpu", torch.bfloat16):
        vnet(x)
        assert vnet(x).dtype == vnet.module(x).dtype == torch.bfloat16
    half = vnet.half()
    half(x.half())
    noise = torch.stack([half(x.half()).float() for _ in range(50)])
    # of five weights with sigma 1e-4, whose square is 0 in half precision: 3,200 pairs or more, off by 10 % at most
    assert noise.std().item() == pytest.approx(5**0.5 * 1e-4, rel=0.1 if estimator == "local" else 0.4)
