"""Rules of propagation against draws and linear algebra; networks where it is exact; what it refuses, and how.

A comparison with draws fails at 5 standard errors: falsely once in 1.7 million elements. The seeds are fixed.
"""

import contextlib
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import varify
from tests.networks import CASES
from varify.objective.other_likelihoods import LaplaceLikelihood, StudentTLikelihood
from varify.propagation import Uncertain, rule, rules, tensors
from varify.propagation.activations import rectified
from varify.propagation.tensors import UncertainTensor

DRAWS, ERRORS = 100_000, 5.0


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def uncertain(*shape: int, spread: float = 1.0) -> UncertainTensor:
    mean, std = torch.randn(shape, dtype=torch.float64), spread * torch.rand(shape, dtype=torch.float64)
    return UncertainTensor(Uncertain(mean, std.square()))


def plain(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def assert_moments_of_draws(f: Callable[..., Any], *args: Any, draws: int = DRAWS) -> None:
    """What f makes of Gaussians has the mean and variance of f of many draws."""
    found = f(*args)
    assert isinstance(found, UncertainTensor), found

    def one(_: Tensor) -> Tensor:
        drawn = [
            a.gaussian.mean + a.gaussian.var.sqrt() * torch.randn_like(a.gaussian.mean)
            if isinstance(a, UncertainTensor)
            else a
            for a in args
        ]
        output: Tensor = f(*drawn)
        return output

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vmap's, of operations that it is slow at
        samples = torch.vmap(one, randomness="different", chunk_size=20_000)(torch.zeros(draws))
    mean, var = samples.mean(0), samples.var(0)
    assert found.shape == mean.shape
    away = samples - mean
    error_of_mean = (var / draws).sqrt()
    error_of_var = ((away**4).mean(0) - var.square()).clamp_min(0).div(draws).sqrt()
    got = found.gaussian
    assert ((got.mean - mean).abs() <= ERRORS * error_of_mean + 1e-12).all()
    assert ((got.var - var).abs() <= ERRORS * error_of_var + 1e-12).all()


# ------------------------------------------------------------------------------------------- rules against draws

W = plain
AFFINE: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "linear": (F.linear, ((2, 3), (4, 3), (4,))),
    "conv1d": (lambda x, w, b: F.conv1d(x, w, b, stride=2, padding=1), ((2, 2, 5), (3, 2, 3), (3,))),
    "conv2d": (lambda x, w, b: F.conv2d(x, w, b, padding=1, groups=2), ((1, 2, 3, 3), (2, 1, 3, 3), (2,))),
    "conv2d same": (lambda x, w, b: F.conv2d(x, w, b, padding="same"), ((1, 1, 3, 3), (2, 1, 3, 3), (2,))),
    "conv3d": (lambda x, w, b: F.conv3d(x, w, b), ((1, 1, 2, 3, 3), (2, 1, 2, 2, 2), (2,))),
    "transposed": (lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2), ((1, 2, 2, 2), (2, 1, 2, 2), (1,))),
    "matmul and add": (lambda x, w, b: x @ w + b, ((2, 2, 3), (3, 4), (4,))),
    "addmm": (lambda x, w, b: torch.addmm(b, x, w, beta=0.5, alpha=2.0), ((2, 3), (3, 4), (4,))),
    "einsum": (lambda x, w, b: torch.einsum("bi,oi->bo", x, w) - b, ((2, 3), (4, 3), (4,))),
}


@pytest.mark.parametrize("random", ["x", "w", "b", "xw", "xb", "wb", "xwb"])
@pytest.mark.parametrize("name", AFFINE)
def test_products(name: str, random: str) -> None:
    f, shapes = AFFINE[name]
    made = [uncertain(*s) if letter in random else plain(*s) for letter, s in zip("xwb", shapes, strict=True)]
    assert_moments_of_draws(f, *made, draws=20_000)


def test_bilinear_and_products_of_matrices() -> None:
    for x, y in ((uncertain(1, 3), plain(1, 2)), (plain(1, 3), uncertain(1, 2)), (plain(1, 3), plain(1, 2))):
        assert_moments_of_draws(F.bilinear, x, y, uncertain(2, 3, 2), uncertain(2), draws=5000)
    assert_moments_of_draws(F.bilinear, uncertain(1, 3), plain(1, 2), plain(2, 3, 2), draws=5000)
    assert_moments_of_draws(F.bilinear, plain(1, 3), plain(1, 2), plain(2, 3, 2), uncertain(2), draws=5000)
    assert_moments_of_draws(torch.bmm, uncertain(2, 2, 3), uncertain(2, 3, 2))
    assert_moments_of_draws(torch.baddbmm, uncertain(2, 2, 2), uncertain(2, 2, 3), plain(2, 3, 2))
    assert_moments_of_draws(lambda x: torch.ones(2, 3).double() @ x, uncertain(3, 2))


def test_embedding() -> None:
    tokens = torch.tensor([[0, 2, 1], [3, 3, 0]])
    assert_moments_of_draws(lambda w: F.embedding(tokens, w, padding_idx=0), uncertain(4, 3))


# Each with the absolute error allowed: of a closed form only that of the reference.
ELEMENTWISE: dict[str, tuple[Callable[[Any], Any], float]] = {
    "relu": (F.relu, 1e-8),
    "leaky relu": (lambda x: F.leaky_relu(x, 0.2), 1e-8),
    "relu6": (F.relu6, 1e-8),
    "hardtanh": (lambda x: F.hardtanh(x, -0.3, 0.5), 1e-8),
    "hardsigmoid": (F.hardsigmoid, 1e-8),
    "abs": (torch.abs, 1e-8),
    "square": (lambda x: x**2, 1e-8),
    "x * x": (lambda x: x * x, 1e-8),
    "x + x": (lambda x: x + x, 1e-8),
    "exp": (lambda x: torch.exp(0.3 * x), 1e-8),
    "clamp": (lambda x: x.clamp(-0.3, 0.5), 1e-8),
    "clamp below": (lambda x: torch.clamp(x, min=0.5), 1e-8),
    "clamp above": (lambda x: x.clamp_max(0.5), 1e-8),
    "hardswish": (F.hardswish, 2e-2),  # a derivative jumps
    "tanhshrink": (F.tanhshrink, 2e-3),
    "affine": (lambda x: 2 - (3 * x + 1) / 4, 1e-8),
    "minus": (lambda x: torch.sub(-x, 1.5, alpha=2), 1e-8),
    "tanh": (torch.tanh, 2e-3),
    "sigmoid": (torch.sigmoid, 1e-6),
    "erf": (torch.erf, 1e-3),
    "gelu": (F.gelu, 5e-5),
    "gelu by tanh": (lambda x: F.gelu(x, approximate="tanh"), 5e-5),
    "silu": (F.silu, 5e-5),
    "mish": (F.mish, 5e-5),
    "elu": (F.elu, 5e-3),  # the second derivative jumps
    "selu": (F.selu, 4e-2),  # and so does the first
    "softplus": (lambda x: F.softplus(x, 2.0), 5e-5),
    "log sigmoid": (F.logsigmoid, 5e-5),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_functions_of_an_element_against_fine_quadrature(name: str) -> None:
    f, error = ELEMENTWISE[name]
    m = torch.tensor([-2.5, -0.4, 0.0, 0.7, 3.0], dtype=torch.float64).repeat_interleave(4)
    v = torch.tensor([0.0, 1e-4, 0.3, 4.0], dtype=torch.float64).repeat(5)
    z = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    values = f(m + v.sqrt() * z.unsqueeze(-1))
    mean = torch.trapezoid(values * density.unsqueeze(-1), z, dim=0)
    var = torch.trapezoid((values - mean).square() * density.unsqueeze(-1), z, dim=0)
    got = f(UncertainTensor(Uncertain(m, v))).gaussian
    assert (got.mean - mean).abs().max() < error
    assert (got.var - var).abs().max() < error
    assert (got.var >= 0).all()


@pytest.mark.parametrize(("f", "steepness"), [(torch.tanh, 1.0), (torch.sigmoid, 0.5), (F.gelu, 1.0), (F.silu, 1.0)])
def test_quadrature_is_off_by_no_more_than_it_says_for_wide_inputs(f: Callable[[Any], Any], steepness: float) -> None:
    z = torch.linspace(-9, 9, 90_001, dtype=torch.float64)
    density = torch.exp(-0.5 * z.square()) / torch.exp(-0.5 * z.square()).sum()
    for std, error in ((2.0, 3e-4), (3.0, 3e-3), (5.0, 0.03), (10.0, 0.08)):
        m = std / steepness * torch.linspace(-1.5, 1.5, 11, dtype=torch.float64)
        values = f(m.unsqueeze(-1) + std / steepness * z)
        mean = values @ density
        spread = ((values - mean.unsqueeze(-1)).square() @ density).sqrt()
        got = f(UncertainTensor(Uncertain(m, torch.full_like(m, (std / steepness) ** 2)))).gaussian
        assert ((got.mean - mean).abs() / spread).max() < error
        exact = torch.erf(UncertainTensor(Uncertain(m, torch.full_like(m, std**2)))).gaussian.mean
        assert torch.allclose(exact, torch.erf(m.unsqueeze(-1) + std * z) @ density, atol=1e-8)


IN_PLACE = (
    *(nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.ELU, nn.Hardtanh),
    *(nn.Mish, nn.Hardsigmoid, nn.CELU, nn.SELU),
)


@pytest.mark.parametrize("activation", IN_PLACE)
def test_activations_in_place_are_those_that_are_not(activation: Any) -> None:
    x = uncertain(3, 4)
    expected = activation()(x).gaussian
    written = x * 1.0
    assert activation(inplace=True)(written) is written
    assert torch.equal(written.gaussian.mean, expected.mean)
    assert torch.equal(written.gaussian.var, expected.var)


def test_sums_and_products_of_two() -> None:
    assert_moments_of_draws(lambda x: F.glu(x, 0), uncertain(4, 3))
    assert_moments_of_draws(lambda x, y: torch.add(y, x, alpha=-3), uncertain(6), uncertain(2, 6))
    assert_moments_of_draws(lambda x, y: y * x - x.new_ones(1) + torch.zeros_like(y), uncertain(6), uncertain(2, 6))


def test_a_rectifiers_slope_may_be_uncertain() -> None:
    x = uncertain(3, 2, 4, spread=2.0)
    assert_moments_of_draws(F.prelu, x, uncertain(2))
    assert_moments_of_draws(F.prelu, x, plain(1))
    assert_moments_of_draws(F.prelu, plain(3, 2), uncertain(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rectified_far_from_0_and_without_variance(dtype: torch.dtype) -> None:
    m = torch.tensor([-1e4, -3.0, 0.0, 3.0, 1e4, -1.0, 0.0, 1.0], dtype=dtype)
    v = torch.tensor([1e-6, 1e-8, 1e-12, 1e-8, 1e-4, 0.0, 0.0, 0.0], dtype=dtype)
    got = rectified(m, v)
    assert torch.allclose(got.mean, m.clamp_min(0), rtol=1e-6, atol=1e-6)
    expected = torch.where(m > 0, v, torch.where(m == 0, v * (0.5 - 0.5 / math.pi), 0))
    assert torch.allclose(got.var, expected, rtol=1e-4, atol=1e-15)


STRUCTURAL: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "average": (lambda x: F.avg_pool2d(x, 2), (1, 2, 4, 4)),
    "average, borders": (lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True), (1, 2, 4, 4)),
    "average, borders not counted": (lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), (1, 2, 4, 5)),
    "average, divisor": (lambda x: F.avg_pool2d(x, 2, divisor_override=3), (2, 4, 4)),
    "average, 1d": (lambda x: F.avg_pool1d(x, 3, 2, 1, count_include_pad=False), (1, 2, 5)),
    "average, 3d": (lambda x: F.avg_pool3d(x, 2, padding=1), (1, 2, 2, 4)),
    "adaptive average": (lambda x: F.adaptive_avg_pool2d(x, (2, 3)), (1, 5, 4)),
    "adaptive average, 1d": (lambda x: F.adaptive_avg_pool1d(x, 2), (2, 2, 5)),
    "sum": (lambda x: x.sum((0, 2), keepdim=True), (2, 3, 2)),
    "mean": (lambda x: x.mean(1), (2, 3)),
    "mean of all": (torch.mean, (2, 3)),
    "cat": (lambda x: torch.cat([x, torch.ones(2, 1).double(), 2 * x], 1), (2, 3)),
    "stack": (lambda x: torch.stack([x[0], x[1]], 1), (2, 3)),
    "pad": (lambda x: F.pad(x, (1, 2), value=3.0), (2, 3)),
    "reflected": (lambda x: F.pad(x, (1, 1), mode="reflect"), (1, 2, 3)),
    "parts": (lambda x: (lambda a, b: b - 2 * a)(*x.chunk(2, 1)), (2, 4)),
    "rows": (lambda x: (lambda a, b: b - 2 * a)(*x), (2, 4)),
    "split": (lambda x: torch.split(x, [1, 3], -1)[1], (2, 4)),
    "index": (lambda x: x[:, [2, 0]].T.unsqueeze(0).transpose(1, 2).flatten(1), (2, 3)),
    "view": (lambda x: x.view(3, 2).permute(1, 0).reshape(-1).unflatten(0, (2, 3)).squeeze(), (2, 3)),
    "where": (lambda x: torch.where(torch.arange(3) > 0, x, 1.0), (2, 3)),
    "mask": (lambda x: x.masked_fill(torch.arange(3) > 1, 0.5), (2, 3)),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2), (1, 2, 3)),
    "dropout": (lambda x: F.dropout(x, 0.5, training=False), (2, 3)),
    "expand": (lambda x: x.unsqueeze(0).expand(2, -1, -1), (2, 3)),
}


@pytest.mark.parametrize("name", STRUCTURAL)
def test_pooling_and_shapes(name: str) -> None:
    f, shape = STRUCTURAL[name]
    assert_moments_of_draws(f, uncertain(*shape), draws=20_000)


def test_batch_normalization_in_eval_with_uncertain_scale_and_shift() -> None:
    statistics = plain(3), plain(3).exp()
    x, scale, shift = uncertain(4, 3, 2), uncertain(3), uncertain(3)
    for data, w, b in [(x, scale, shift), (x, plain(3), plain(3)), (plain(4, 3), scale, shift)]:
        assert_moments_of_draws(lambda a, c, d: F.batch_norm(a, *statistics, c, d), data, w, b)
    assert_moments_of_draws(lambda a: F.batch_norm(a, *statistics), uncertain(4, 3))


def test_a_maximum_that_stands_out_is_exact_and_the_variance_is_that_of_the_largest_mean() -> None:
    x = uncertain(1, 2, 4, 4, spread=0.2)
    x.gaussian.mean = 10 * torch.randperm(32).double().view(1, 2, 4, 4)
    for f in (lambda a: F.max_pool2d(a, 2), lambda a: F.adaptive_max_pool2d(a, 2)):
        assert_moments_of_draws(f, x, draws=20_000)
    assert_moments_of_draws(lambda a: F.max_pool1d(a.flatten(1), 3, 2, 1), x, draws=20_000)
    assert_moments_of_draws(lambda a: F.max_pool3d(a, 2, ceil_mode=True), x, draws=20_000)


# ----------------------------------------------------------------------- first-order rules against derivatives


@pytest.mark.parametrize(
    "f",
    [
        lambda x: F.layer_norm(x, (5,)),
        lambda x: F.layer_norm(x, (3, 5), eps=0.1),
        lambda x: F.rms_norm(x, (5,), eps=0.1),
        lambda x: F.group_norm(x.unsqueeze(0), 3, eps=0.1)[0],
        lambda x: F.log_softmax(x, -1),
        lambda x: F.log_softmax(x, 0),
    ],
)
def test_first_order_rules(f: Callable[[Any], Any]) -> None:
    x = uncertain(3, 5)
    jacobian = torch.autograd.functional.jacobian(f, x.gaussian.mean)
    got = f(x).gaussian
    assert torch.allclose(got.mean, f(x.gaussian.mean))
    assert torch.allclose(got.var, (jacobian.square() * x.gaussian.var).sum((-2, -1)))


def test_scale_and_shift_of_a_layer_normalization_may_be_uncertain() -> None:
    x = plain(4, 3)
    assert_moments_of_draws(lambda w, b: F.layer_norm(x, (3,), w, b), uncertain(3), uncertain(3))
    assert_moments_of_draws(lambda w, b: F.group_norm(x, 1, w, b), uncertain(3), uncertain(3))


def test_softmax_of_small_variances_is_of_first_order_and_of_large_ones_near_draws() -> None:
    x = UncertainTensor(Uncertain(plain(2, 4), 1e-8 * torch.rand(2, 4).double()))
    jacobian = torch.autograd.functional.jacobian(lambda a: a.softmax(-1), x.gaussian.mean)
    got = x.softmax(-1).gaussian
    assert torch.allclose(got.mean, x.gaussian.mean.softmax(-1), atol=1e-7)
    assert torch.allclose(got.var, (jacobian.square() * x.gaussian.var).sum((-2, -1)), rtol=1e-5, atol=0)
    assert torch.allclose(F.softmax(uncertain(2, 4, spread=3.0), -1).gaussian.mean.sum(-1), torch.ones(2).double())
    wide = uncertain(6, 4, spread=1.5)
    draws = (wide.gaussian.mean + wide.gaussian.var.sqrt() * torch.randn(DRAWS, 6, 4).double()).softmax(-1)
    assert (wide.softmax(-1).gaussian.mean - draws.mean(0)).abs().max() < 0.06


def test_attention_is_the_operations_that_it_stands_for() -> None:
    q, k, v = uncertain(2, 3, 4), uncertain(2, 5, 4), uncertain(2, 5, 4)
    mask = torch.rand(3, 5) > 0.4
    mask[:, 0] = True
    for given in (None, mask, mask.double().log()):
        got = F.scaled_dot_product_attention(q, k, v, given).gaussian
        scores = q @ k.transpose(1, 2) / 2
        if given is not None:
            scores = scores.masked_fill(~mask, -1e4)
        expected = (scores.softmax(-1) @ v).gaussian
        assert torch.allclose(got.mean, expected.mean)
        assert torch.allclose(got.var, expected.var, atol=1e-7)
    for args in (
        (q.gaussian.mean, k.gaussian.mean, v),
        (q.gaussian.mean, k, v.gaussian.mean),
        (q, *[plain(2, 5, 4)] * 2),
    ):
        assert F.scaled_dot_product_attention(*args, is_causal=True).shape == (2, 3, 4)
    value = uncertain(2, 5, 4)
    assert_moments_of_draws(
        lambda b: F.scaled_dot_product_attention(q.gaussian.mean, k.gaussian.mean, b, is_causal=True, scale=0.7), value
    )


# ------------------------------------------------------------------------------------------------ whole networks


def variational(network: nn.Module, sigma: float = 0.2, **settings: Any) -> varify.VariationalModule:
    return varify.variationalize(network.double(), init=varify.inits.Constant(sigma), **settings)


def test_a_linear_layer_is_exact() -> None:
    vnet, x = variational(nn.Linear(3, 2)), plain(4, 3)
    w, b = vnet.posteriors["weight"], vnet.posteriors["bias"]
    got = vnet.propagate(x)
    for i in range(4):
        for o in range(2):
            mean = sum((w.mu[o, j] * x[i, j]).item() for j in range(3)) + b.mu[o].item()
            var = sum((w.sigma[o, j] * x[i, j]).item() ** 2 for j in range(3)) + b.sigma[o].item() ** 2
            assert math.isclose(got.mean[i, o].item(), mean, rel_tol=1e-9)
            assert math.isclose(got.variance[i, o].item(), var, rel_tol=1e-9)


# Of the layer before, two outputs of the next would share inputs, so that those of the last don't add independently.
@pytest.mark.parametrize("layer", ["1", "2"])
def test_a_linear_chain_with_one_variational_layer_is_exact(layer: str) -> None:
    chain, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2)), plain(6, 3)
    vnet = variational(chain, where=f"{layer}.*")
    # the output is linear in the layer's parameters: its covariance by its derivative
    got = vnet.propagate(x)
    means = {name: q.mean.detach() for name, q in vnet.posteriors.items()}
    jacobians = torch.func.jacrev(lambda theta: vnet.functional()(theta, x))(means)
    var = sum(
        (jacobians[name].flatten(2).square() * q.sigma.flatten().square()).sum(-1)
        for name, q in vnet.posteriors.items()
    )
    assert torch.allclose(got.mean, vnet.functional()(means, x))
    assert torch.allclose(got.variance, var)


@pytest.mark.parametrize("name", ["mlp", "convolutions", "transformer", "residual"])
def test_networks_are_close_to_draws(name: str) -> None:
    network, x = {
        "mlp": lambda: (
            nn.Sequential(nn.Linear(8, 64), nn.ReLU(inplace=True), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 3)),
            plain(5, 8),
        ),
        "convolutions": lambda: (
            nn.Sequential(
                *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU(), nn.AvgPool2d(2), nn.Conv2d(8, 8, 3)),
                *(nn.ReLU(), nn.Flatten(), nn.Linear(32, 3), nn.LogSoftmax(-1)),
            ),
            plain(4, 1, 8, 8),
        ),
        "transformer": lambda: (
            nn.TransformerEncoder(
                nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False
            ),
            plain(3, 5, 16),
        ),
        "residual": lambda: (nn.Sequential(nn.Linear(8, 32), Residual(), Residual(), nn.Linear(32, 3)), plain(5, 8)),
    }[name]()
    vnet = variational(network, sigma=0.03).eval()
    with torch.no_grad():
        got, draws = vnet.propagate(x), vnet.predict(x, n_samples=1000)
    ratio = got.std / draws.std
    # 1,000 draws know a standard deviation to 2.2 %; the rest is what the approximation neglects
    assert (got.mean - draws.mean).abs().max() < 0.5 * draws.std.mean()
    assert 0.65 < ratio.min() < ratio.max() < 1.4
    assert 0.9 < ratio.mean() < 1.1


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        out += x
        return F.relu(out, inplace=True)


def test_writing_in_place_reaches_views_and_what_they_are_views_of() -> None:
    def by_view(x: Any) -> Any:
        row = x[0]
        row.mul_(3.0)
        return x + 1

    def by_base(x: Any) -> Any:
        flat = x.flatten()
        x.mul_(3.0)
        x[0, 1] = 2.0
        return flat + 0

    for f, factor in ((by_view, torch.tensor([[3.0], [1.0]])), (by_base, torch.tensor([[3.0], [3.0]]))):
        x = uncertain(2, 3)
        mean, var = x.gaussian.mean.clone() * factor, x.gaussian.var.clone() * factor**2
        got = f(x).gaussian
        if f is by_view:
            assert torch.allclose(got.mean, mean + 1)
        else:
            mean[0, 1], var[0, 1] = 2.0, 0.0
            assert torch.allclose(got.mean, mean.flatten())
        assert torch.allclose(got.var.flatten(), var.flatten())


def test_writing_in_place_never_reaches_what_is_no_view() -> None:
    x = uncertain(2, 3)
    var = x.gaussian.var.clone()
    for shifted in (x + 1, -x, x - 2 * torch.ones(3).double()):
        row = shifted[0]
        with pytest.raises(varify.PropagationError, match=r"mul_.*used elsewhere"):
            row.mul_(3.0)  # the variance may be that of x
        shifted.mul_(3.0) if not shifted.shares else None
    y = x + 1
    y[0] = 0.0
    y.mul_(3.0)
    assert torch.equal(x.gaussian.var, var)
    assert torch.allclose(y.gaussian.var[1], 9 * var[1])
    assert (y.gaussian.var[0] == 0).all()
    with pytest.raises(varify.PropagationError, match="shape or type"):
        y.unsqueeze_(0)


@pytest.mark.parametrize("shifted", [lambda x: x + 1, lambda x: -x, lambda x: torch.add(input=x, other=1)])
@pytest.mark.parametrize("write", [lambda x: x.add_(1.0), lambda x: x.sub_(other=1.0), lambda x: x.neg_()])
def test_writing_into_a_view_of_what_was_written_into_leaves_others_alone(
    shifted: Callable[[Any], Any], write: Callable[[Any], Any]
) -> None:
    x = uncertain(4)
    mean, var = x.gaussian.mean.clone(), x.gaussian.var.clone()
    y = shifted(x)
    write(y)
    y[:2].mul_(0.0)
    assert torch.equal(y.gaussian.var, torch.tensor([0.0, 0.0, 1.0, 1.0]).double() * var)
    assert torch.equal(x.gaussian.mean, mean)
    assert torch.equal(x.gaussian.var, var)


def test_a_view_of_a_row_is_that_row_alone() -> None:
    x, base, w = uncertain(3), torch.zeros(2, 3).double(), plain(4, 3)
    for f in (lambda: base - x, lambda: torch.addmm(x, plain(2, 4), w), lambda: (base - x).sub_(1.0)):
        y = f()
        with contextlib.suppress(varify.PropagationError):
            y[0].mul_(3.0)
        assert torch.allclose(y.gaussian.var[1], x.gaussian.var)


class WritesShiftedWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        shifted = self.w + 1
        shifted += 1
        shifted[:2].mul_(0.0)
        return x * self.w


def test_writing_into_a_copy_of_a_parameter_leaves_it_alone() -> None:
    vnet = variational(WritesShiftedWeights(), sigma=0.3)
    variance = vnet.propagate(torch.ones(1, 4).double()).variance
    assert torch.allclose(variance, torch.full_like(variance, 0.09))


class WritesWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.fc.weight[0].mul_(2.0)
        return self.fc(x)


def test_writing_into_a_parameter_is_refused() -> None:
    vnet = variational(WritesWeights())
    before = vnet.module.fc.weight.clone()
    with (
        torch.no_grad(),
        pytest.raises(varify.PropagationError, match=r"mul_ in forward .WritesWeights.*used elsewhere"),
    ):
        vnet.propagate(plain(2, 3))
    assert torch.equal(vnet.module.fc.weight, before)


def test_what_is_not_random_runs_by_plain_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[str] = []
    called = tensors._called
    monkeypatch.setattr(
        tensors, "_called", lambda r, func, *rest: served.append(func.__name__) or called(r, func, *rest)
    )
    body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LSTM(4, 4))

    class Headed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = body, nn.Linear(4, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            hidden = self.body(x)[0]
            return self.head(hidden), hidden, hidden.argmax(-1)

    vnet, x = variational(Headed(), where="head.*"), plain(5, 3)
    out, hidden, largest = vnet.propagate(x)
    assert served == ["linear"]
    assert (hidden.variance == 0).all()
    assert torch.equal(hidden.mean, vnet.module.body(x)[0])
    assert torch.equal(largest, hidden.mean.argmax(-1))
    assert (out.variance > 0).all()


def test_masks_pruned_weights_and_padding_rows_have_no_variance() -> None:
    vnet = variational(nn.Sequential(nn.Embedding(5, 3, padding_idx=0), nn.Linear(3, 2, bias=False)))
    varify.prune(vnet, 0.5)
    tokens = torch.tensor([[0, 1, 4]])
    got = vnet.propagate(tokens)
    assert (got.variance[0, 0] == 0).all()
    w = vnet.posteriors["1.weight"]
    e = vnet.posteriors["0.weight"]
    var = (e.mean.square() + e.sigma.square()) @ w.sigma.square().T + e.sigma.square() @ w.mean.square().T
    assert torch.allclose(got.variance[0], var[tokens[0]])
    assert torch.allclose(got.mean, vnet.eval()(tokens))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens)))


def test_tied_weights_have_one_posterior_at_both_uses() -> None:
    vnet, tokens = variational(Tied()), torch.tensor([[1, 2], [3, 3]])
    q = vnet.posteriors["embedding.weight"]
    weight = UncertainTensor(Uncertain(q.mean, q.sigma.square()))
    expected = F.linear(torch.tanh(F.embedding(tokens, weight)), weight).gaussian
    got = vnet.propagate(tokens)
    assert torch.allclose(got.mean, expected.mean)
    assert torch.allclose(got.variance, expected.var)


class TimeFirst(nn.Module):
    """Several inputs, the batch in their second dimension, and a structure for an output."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 4), nn.Linear(2, 4)

    def forward(self, a: Tensor, *, b: Tensor) -> dict[str, Any]:
        joined = self.one(a) + self.two(b)
        return {"last": joined[-1], "all": [joined], "steps": len(joined)}


def test_several_inputs_and_a_structure_for_an_output() -> None:
    vnet, a, b = variational(TimeFirst(), batch_dim=1), plain(6, 4, 3), plain(6, 4, 2)
    got = vnet.propagate(a, b=b)
    assert got["steps"] == 6
    assert torch.equal(got["last"].variance, got["all"][0].variance[-1])
    p = {name: q.sigma.square() for name, q in vnet.posteriors.items()}
    var = a.square() @ p["one.weight"].T + b.square() @ p["two.weight"].T + p["one.bias"] + p["two.bias"]
    assert torch.allclose(got["all"][0].variance, var)


def test_it_runs_in_eval_mode_and_leaves_everything_as_it_was() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.BatchNorm1d(3), nn.Linear(3, 2)
            self.register_buffer("calls", torch.zeros(()))
            self.last: Any = None

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.last = F.dropout(self.fc(self.norm(x)), 0.5, self.training)
            return self.last

    vnet, x = variational(Counting()).train(), plain(4, 3)
    before = {key: value.clone() for key, value in vnet.state_dict().items()}
    got = vnet.propagate(x)
    assert all(torch.equal(value, before[key]) for key, value in vnet.state_dict().items())
    assert vnet.training
    assert vnet.module.fc.training
    assert vnet.module.last is None
    assert torch.allclose(got.mean, vnet.eval()(x))
    assert torch.equal(got.variance, vnet.propagate(x).variance)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Hardtanh, nn.GELU])
def test_gradients_by_mu_and_rho(activation: Callable[[], nn.Module]) -> None:
    network = nn.Sequential(nn.Linear(2, 3), activation(), nn.LayerNorm(3), nn.Linear(3, 2), nn.Softmax(-1))
    vnet, x = variational(network), plain(3, 2)
    parameters = [p for q in vnet.posteriors.values() for p in (q.mu, q.rho)]

    def f(*_: Tensor) -> tuple[Tensor, Tensor]:
        got = vnet.propagate(x)
        return got.mean, got.variance

    assert torch.autograd.gradcheck(f, parameters)


def test_gradients_are_finite_without_variance() -> None:
    m, v = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True), torch.zeros(3, requires_grad=True)
    for f in (F.relu, F.leaky_relu, torch.tanh, F.hardtanh, torch.abs):
        got = f(UncertainTensor(Uncertain(m, v))).gaussian
        grads = torch.autograd.grad(got.mean.sum() + got.var.sum(), (m, v))
        assert all(g.isfinite().all() for g in grads), f


def test_variances_follow_the_weights_however_they_are_written() -> None:
    vnet, x = variational(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))), plain(4, 3)

    def both() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            vnet.propagate(x)
            kept = vnet.propagate(x)
        fresh = vnet.propagate(x)
        assert torch.equal(kept.mean, fresh.mean)
        assert torch.equal(kept.variance, fresh.variance)
        return fresh.mean.detach(), fresh.variance.detach()

    seen = [both()]
    with torch.no_grad():
        vnet.propagate(x)
        vnet.posteriors["2.weight"].rho.add_(0.5)
        seen.append(both())
        vnet.propagate(x)
        vnet.posteriors["2.weight"].mu.mul_(0.5)
        seen.append(both())
        vnet.propagate(x)
        vnet.posteriors["2.weight"].rho.data.add_(0.5)  # of which torch's versions tell nothing
        seen.append(both())
        vnet.propagate(x)
        varify.prune(vnet, 0.5)
        seen.append(both())
        vnet.propagate(x)
        vnet.load_state_dict(
            {key: torch.zeros_like(t) if "rho" in key else t for key, t in vnet.state_dict().items()}, assign=True
        )
        seen.append(both())
    assert all(not torch.equal(a[1], b[1]) for a, b in itertools.pairwise(seen))
    with torch.inference_mode():
        assert torch.equal(vnet.propagate(x).variance, seen[-1][1])


# --------------------------------------------------------------------------------------------------- refusals


class Refusing(nn.Module):
    def __init__(self, what: Callable[[Any], Any]) -> None:
        super().__init__()
        self.fc, self.what = nn.Linear(4, 4), what

    def forward(self, x: Tensor) -> Any:
        return self.what(self.fc(x))  # the line that is named


def into_a_plain_tensor(x: Any) -> Any:
    out = torch.zeros(3, 4, dtype=torch.float64)
    out[:, :2] = x[:, :2]
    return out


REFUSED: dict[str, tuple[Callable[[Any], Any], str, str]] = {
    "cumprod": (lambda x: x.cumprod(0), "cumprod", "it has no rule"),
    "branch": (lambda x: x if x.sum() > 0 else -x, "gt", "it has no rule"),
    "value": (lambda x: x * x.max().item(), "max", "it has no rule"),
    "numpy": (lambda x: x.numpy(), "numpy", "it has no rule"),
    "ratio": (lambda x: 1 / x, "reciprocal", "it has no rule"),
    "written into": (into_a_plain_tensor, "__setitem__", "make a new tensor"),
    "added to": (lambda x: torch.ones(3, 4).double().add_(x), "add_", "make a new tensor"),
    "dropout": (lambda x: F.dropout(x, 0.5), "dropout", "training=True"),
    "statistics": (
        lambda x: F.batch_norm(x, None, None, training=True),
        "batch_norm",
        "statistics of the batch",
    ),
    "cube": (lambda x: x**3, "pow", "x \\*\\* 2"),
    "three operands": (lambda x: torch.einsum("bi,ij,jk->bk", x, x.T, x), "einsum", "3 operands"),
    "integers": (lambda x: x.to(torch.int64), "to", "it rounds"),
    "half": (lambda x: x.to(torch.float16), "to", "half precision"),
    "attribute": (lambda x: x.data, "data", "it has no rule"),
    "an argument": (lambda x: torch.sum(x, 0, out=x), "sum", "out="),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_rule_is_said_by_name_and_place_and_changes_nothing(name: str) -> None:
    what, operation, why = REFUSED[name]

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4), Refusing(what))

        def forward(self, x: Tensor) -> Any:
            return self.inner(x)

    vnet, x = variational(Outer()), plain(3, 4)
    before = {key: value.clone() for key, value in vnet.state_dict().items()}
    with pytest.raises(
        varify.PropagationError,
        match=rf"{operation} in inner.1 .Refusing., line .*test_propagation.py: .*{why}.*vnet.predict",
    ):
        vnet.propagate(x)
    assert all(torch.equal(value, before[key]) for key, value in vnet.state_dict().items())
    vnet.train()(x) if name not in ("numpy", "written into", "an argument", "half", "integers") else None


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_torchscript_is_refused() -> None:
    scripted = torch.jit.script(nn.Linear(3, 3))
    vnet = varify.variationalize(nn.Sequential(nn.Linear(3, 3), scripted), where="0.*")
    with pytest.raises(varify.PropagationError):
        vnet.propagate(torch.randn(2, 3))


def test_batch_normalization_without_running_statistics_is_refused() -> None:
    vnet = variational(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False)))
    with pytest.raises(varify.PropagationError, match=r"batch_norm in 1 .BatchNorm1d.*statistics of the batch"):
        vnet.propagate(plain(4, 3))


def test_half_precision_and_modules_within_are_refused() -> None:
    vnet = varify.variationalize(nn.Linear(3, 2)).half()
    with pytest.raises(varify.ArgumentError, match="half precision"):
        vnet.propagate(torch.randn(2, 3).half())
    nested = varify.variationalize(nn.Sequential(nn.Linear(3, 3), varify.variationalize(nn.Linear(3, 2))), where="0.*")
    with pytest.raises(varify.ArgumentError, match="without variational modules within"):
        nested.propagate(torch.randn(2, 3))
    with pytest.raises(varify.ArgumentError, match="outputs must be one of"):
        varify.variationalize(nn.Linear(3, 2)).propagate(torch.randn(2, 3), outputs="logit")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_a_networks_moments_are_propagated_or_refused(name: str) -> None:
    vnet = varify.variationalize(CASES[name].make())
    for args, kwargs in CASES[name].calls:
        before = {key: value.clone() for key, value in vnet.state_dict().items()}
        try:
            vnet.propagate(*args, **kwargs)
        except varify.PropagationError as error:
            assert "it has no rule" in str(error)  # noqa: PT017
        assert all(torch.equal(value, before[key]) for key, value in vnet.state_dict().items())


@pytest.fixture
def _rules_as_before() -> Iterator[None]:
    before = dict(rules._RULES)
    yield
    rules._RULES.clear()
    rules._RULES.update(before)


@pytest.mark.usefixtures("_rules_as_before")
def test_a_rule_of_ones_own() -> None:
    with pytest.raises(varify.PropagationError, match="cumsum"):
        uncertain(3).cumsum(0)

    @rule(torch.cumsum)
    def cumsum(op: Callable[..., Tensor], input: Uncertain, dim: int) -> Uncertain:
        return Uncertain(op(input.mean, dim), op(input.var, dim))

    assert_moments_of_draws(lambda x: torch.cumsum(x, 0), uncertain(3, 2))
    assert_moments_of_draws(lambda x: x.cumsum(1), uncertain(3, 2))  # the method is the same operation


# ------------------------------------------------------------------------------------- what the prediction says


def prediction(*shape: int, **settings: Any) -> varify.GaussianPrediction:
    x = uncertain(*shape).gaussian
    return varify.GaussianPrediction(x.mean, 4 * x.var, **settings)


def test_quantiles_and_intervals_are_those_of_gaussians() -> None:
    p = prediction(5, 2)
    normal = torch.distributions.Normal(p.mean, p.std)
    low, high = p.interval(0.9)
    assert torch.allclose(normal.cdf(low), torch.tensor(0.05).double())
    assert torch.allclose(normal.cdf(high), torch.tensor(0.95).double())
    assert torch.allclose(p.quantile(0.5), p.mean)
    noise = varify.GaussianLikelihood(0.7).double()
    low, high = p.interval(0.9, noise)
    wide = torch.distributions.Normal(p.mean, (p.variance + 0.49).sqrt())
    assert torch.allclose(wide.cdf(low), torch.tensor(0.05).double())
    assert torch.allclose(wide.cdf(high), torch.tensor(0.95).double())
    for wrong in (0.0, 1.0):
        with pytest.raises(varify.ArgumentError, match="level"):
            p.interval(wrong)
        with pytest.raises(varify.ArgumentError, match="q must"):
            p.quantile(wrong)


@pytest.mark.parametrize("shape", [(7, 60), (30_000,), ()])
def test_variances_of_a_new_target_are_exact_for_noise_that_is_added(shape: tuple[int, ...]) -> None:
    p = prediction(*shape)
    for likelihood, var in (
        (varify.GaussianLikelihood(0.7), 0.49),
        (LaplaceLikelihood(0.3), 0.18),
        (StudentTLikelihood(4.0, 0.3), 0.18),
    ):
        found = p.variances(likelihood.double())
        assert torch.equal(found.epistemic, p.variance)
        assert torch.allclose(found.aleatoric, torch.tensor(var).double())


def mixture(cdf: Callable[[Tensor], Tensor], p: varify.GaussianPrediction) -> Tensor:
    """Mean over the output of a function of it, by the trapezoidal rule."""
    z = torch.linspace(-9, 9, 20_001, dtype=torch.float64).unsqueeze(-1)
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    return torch.trapezoid(cdf(p.mean + p.std * z) * density, z, dim=0)


def test_intervals_with_other_noise_are_quantiles_of_the_mixture() -> None:
    p = prediction(5)
    laplace = LaplaceLikelihood(0.3).double()
    for end, q in zip(p.interval(0.9, laplace), (0.05, 0.95), strict=True):
        below = mixture(lambda output, y=end: laplace.cdf(output, y.expand_as(output)), p)
        assert (below - q).abs().max() < 4e-3  # 128 points know a probability to 1/256
    head = varify.HeteroscedasticGaussianLikelihood().double()
    p = prediction(6, 2)
    assert p.interval(0.9, head)[0].shape == (6, 1)
    found, rho = p.variances(head), varify.GaussianPrediction(p.mean[:, 1], p.variance[:, 1])
    assert torch.allclose(found.epistemic, p.variance[:, :1])  # of the points, mean 0 and variance 1 are exact
    var = mixture(lambda output: (1e-3 + F.softplus(output)).square(), rho)
    assert torch.allclose(found.aleatoric[:, 0], var, rtol=0.02)


def test_gradients_of_intervals_are_finite_where_there_is_no_variance() -> None:
    mean, variance = torch.zeros(3, requires_grad=True), torch.tensor([0.0, 1e-30, 2.0], requires_grad=True)
    for likelihood in (None, varify.GaussianLikelihood(0.1)):
        low, high = varify.GaussianPrediction(mean, variance).interval(0.9, likelihood)
        grads = torch.autograd.grad((high - low).sum(), (mean, variance), allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in grads)
    p = varify.GaussianPrediction(mean, variance)
    (grad,) = torch.autograd.grad(p.std.sum(), variance)
    assert grad[0] == 0
    assert torch.allclose(grad[2], torch.tensor(2.0).rsqrt() / 2)


@pytest.mark.parametrize("class_dim", [-1, 1])
def test_probabilities_and_entropies_of_classes(class_dim: int) -> None:
    p = prediction(6, 4, 3, class_dim=class_dim)
    draws = (p.mean + p.std * torch.randn(50_000, 6, 4, 3).double()).softmax(
        class_dim if class_dim < 0 else class_dim + 1
    )
    assert p.probabilities().shape == (6, 4, 3)
    # of 128 quasi-random points; as many random ones are off by .05
    assert (p.probabilities() - draws.mean(0)).abs().max() < 0.015
    entropy = torch.special.entr(draws.mean(0)).sum(class_dim)
    assert (p.entropy() - entropy).abs().max() < 0.015
    assert (
        p.mutual_information() - (entropy - torch.special.entr(draws).sum(class_dim if class_dim < 0 else 2).mean(0))
    ).abs().max() < 0.02
    assert torch.equal(p.probabilities(), p.probabilities())


def test_binary_logits_and_probabilities() -> None:
    p = prediction(7, outputs="binary_logits")
    draws = (p.mean + p.std * torch.randn(DRAWS, 7).double()).sigmoid().mean(0)
    assert torch.allclose(p.probabilities(), torch.stack([1 - draws, draws], -1), atol=0.005)
    vnet = variational(nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1)))
    p = vnet.propagate(plain(5, 3), outputs="probabilities")
    assert torch.equal(p.probabilities(), p.mean)
    assert torch.allclose(p.entropy(), -(p.mean * p.mean.log()).sum(-1))
    with pytest.raises(varify.ArgumentError, match="logits"):
        p.mutual_information()
    with pytest.raises(varify.ArgumentError, match="binary_logits"):
        prediction(7).probabilities()
