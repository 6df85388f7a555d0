"""Edges of selection, priors, divergences, pruning and prediction, each against a reference of its own."""

import functools
import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
from mpmath import mp, mpf
from torch import distributions as td
from torch import nn

import varify
from varify import priors


def variational(net: nn.Module) -> set[str]:
    return set(varify.variationalize(net).posteriors)


# --- normalization layers


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm([4, 8, 8]),
        nn.LayerNorm([8, 8]),
        nn.RMSNorm([4, 8, 8]),
        nn.GroupNorm(2, 4),
        nn.BatchNorm2d(4),
        nn.InstanceNorm2d(4, affine=True),
        nn.SyncBatchNorm(4),
    ],
    ids=repr,
)
def test_scales_of_torchs_normalization_layers_stay_as_they_are(norm: nn.Module) -> None:
    assert variational(nn.Sequential(nn.Conv2d(3, 4, 3), norm)) == {"0.weight", "0.bias"}


def test_a_layer_that_inherits_from_torchs_normalization_keeps_its_own_matrix_variational() -> None:
    class Shift(nn.LayerNorm):
        def __init__(self) -> None:
            super().__init__([4, 4])
            self.mix = nn.Parameter(torch.randn(4, 4))
            self.gain = nn.Parameter(torch.ones(()))

    assert variational(Shift()) == {"mix"}


# from torch, timm and transformers, and as people write them
NORMS = """LayerNorm LlamaRMSNorm BatchNormAct2d FrozenBatchNorm2d T5LayerNorm GroupNorm1 EvoNorm2dS0 EvoNorm2dS0a
LayerNorm2d LayerNorm2dFp32 FilterResponseNormTlu2d T5DenseNorm AutoformerLayernorm NemotronLayerNorm1P Llama4TextL2Norm
NemotronH_Omni_RMSNorm VoxtralRealtimeTextAdaRmsNorm Qwen3NextRMSNormGated DebertaLayerNorm SplitBatchNorm2d RmsNorm2d
GlobalResponseNorm SimpleNorm2dFp32 _BatchNorm xLSTMMultiHeadLayerNorm ZayaQKNorm TTSTimestepNorm LayerNormalization
layer_norm rms_norm batchnorm LAYERNORM RMSnorm InputNormalizer GroupNormalisation ScaleNorms""".split()  # noqa: SIM905
OTHERS = """AbnormalityNet AbnormalNorman NormalCell LogitNormal Normal NormalEstimator Unnormed Enormous Normandy
abnormal_head NORMAL ABNORMALITY Subnormal""".split()  # noqa: SIM905


@pytest.mark.parametrize("name", NORMS + OTHERS)
def test_norm_counts_as_a_word_of_a_class_name(name: str) -> None:
    def init(self: nn.Module) -> None:
        nn.Module.__init__(self)
        self.scale, self.matrix = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, 3))

    made: nn.Module = type(name, (nn.Module,), {"__init__": init})()
    assert variational(made) == ({"matrix"} if name in NORMS else {"matrix", "scale"})


# --- tensors of which no weight is left

EVERY_PRIOR = {
    "gaussian": priors.Gaussian(std=0.5),
    "mixtgauss": priors.ScaleMixture(1.0, 0.1, 0.5),
    "conjugate": priors.Conjugate(0.0, 3.0, 0.5, 0.5),
    "conjugate_known_mean": priors.ConjugateKnownMean(0.0, 0.5, 0.5),
    "laplace": priors.as_prior(td.Laplace(0.0, 0.5)),
    "cauchy": priors.as_prior(td.Cauchy(torch.zeros(1), 0.5)),
    "mixture": priors.as_prior(
        td.MixtureSameFamily(td.Categorical(torch.ones(2)), td.Normal(torch.zeros(2), torch.ones(2)))
    ),
}


def two_layers(**options: object) -> varify.VariationalModule:
    torch.manual_seed(0)
    return varify.variationalize(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), **options)


@pytest.mark.parametrize("kind", EVERY_PRIOR)
def test_a_tensor_pruned_as_a_whole_adds_nothing_to_the_divergence(kind: str) -> None:
    vnet = two_layers(prior=EVERY_PRIOR[kind])
    varify.prune(vnet, 1.0, where="0.bias")
    noise = {name: q.noise() for name, q in vnet.posteriors.items()}
    assert vnet.posteriors["0.bias"].log_ratio(noise["0.bias"]).item() == 0.0
    torch.manual_seed(1)
    left = [vnet.posteriors[name].kl_divergence() for name in ("0.weight", "2.weight", "2.bias")]
    torch.manual_seed(1)
    loss = vnet.prior_loss()
    torch.testing.assert_close(loss, torch.stack(left).sum())
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in vnet.parameters())
    assert not vnet.rho.leaf_at("0.bias").grad.any()


@pytest.mark.parametrize("bound", ["elbo", "importance_weighted"])
def test_a_network_pruned_as_a_whole_trains_on(bound: str) -> None:
    vnet = two_layers(prior=EVERY_PRIOR["conjugate"])
    varify.prune(vnet, 1.0)
    terms = varify.ELBO(num_data=5, n_samples=2, bound=bound)(vnet, F.mse_loss, torch.ones(5, 3), torch.ones(5, 2))
    terms.loss.backward()
    assert terms.kl.item() == 0.0
    assert terms.loss.item() == pytest.approx(1.0)


def test_fit_prior_leaves_out_what_is_pruned_as_a_whole() -> None:
    vnet, whole = two_layers(), two_layers()
    varify.prune(vnet, 1.0, where="0.*")
    former = vnet.posteriors["0.bias"].prior
    expected = varify.fit_prior(whole, where="2.*")
    assert varify.fit_prior(vnet) == pytest.approx(expected)
    assert vnet.posteriors["0.bias"].prior is former
    assert varify.fit_prior(vnet, where="0.bias") == {}


# --- sigma that underflows

RHOS = [-1e4, -105.0, -95.0, -44.0, -20.0, 2.0]
# log densities in mpmath's arithmetic, as the textbooks have them
LOG_DENSITIES = {
    "gaussian": (priors.Gaussian(0.2, 0.5), lambda w: mp.log(mp.npdf(w, mpf(0.2), mpf(0.5)))),
    "normal": (priors.as_prior(td.Normal(0.2, 0.5)), lambda w: mp.log(mp.npdf(w, mpf(0.2), mpf(0.5)))),
    "laplace": (priors.as_prior(td.Laplace(0.2, 0.5)), lambda w: -abs(w - mpf(0.2)) / mpf(0.5)),
    "gumbel": (
        priors.as_prior(td.Gumbel(0.2, 0.5)),
        lambda w: -(w - mpf(0.2)) / mpf(0.5) - mp.exp(-(w - mpf(0.2)) / mpf(0.5)) - mp.log(mpf(0.5)),
    ),
    "student": (
        priors.as_prior(td.StudentT(3.0, 0.2, 0.5)),
        lambda w: -2 * mp.log(1 + ((w - mpf(0.2)) / mpf(0.5)) ** 2 / 3),
    ),
    "cauchy": (
        priors.as_prior(td.Cauchy(0.2, 0.5)),
        lambda w: -mp.log(mpf(0.5) * mp.pi * (1 + ((w - mpf(0.2)) / mpf(0.5)) ** 2)),
    ),
    "mixtgauss": (
        priors.ScaleMixture(1.0, 0.1, 0.3),
        lambda w: mp.log(mpf(0.3) * mp.npdf(w, 0, 1) + (1 - mpf(0.3)) * mp.npdf(w, 0, mpf(0.1))),
    ),
}
LOG_CONSTANTS = {  # of the densities above that are not normalized
    "laplace": -mp.log(2 * mpf(0.5)),
    "student": mp.log(mp.gamma(2) / (mp.gamma(mpf(1.5)) * mp.sqrt(3 * mp.pi) * mpf(0.5))),
}


@functools.cache
def kl_and_slope(kind: str, mu: float, rho: float) -> tuple[float, float]:
    """KL(q‖p) of one weight and its derivative in rho, by quadrature over z = (w − mu)/sigma with 30 digits."""
    log_p, constant = LOG_DENSITIES[kind][1], LOG_CONSTANTS.get(kind, 0)

    def kl(rho: mpf) -> mpf:
        sigma = mp.log1p(mp.exp(rho))
        kink = (mpf(0.2) - mpf(mu)) / sigma
        points = sorted({mpf(-14), *([kink] if abs(kink) < 14 else []), mpf(0), mpf(14)})
        density = lambda z: mp.npdf(z) * (mp.log(mp.npdf(z)) - mp.log(sigma) - constant - log_p(mu + sigma * z))  # noqa: E731
        return mp.quad(density, points)

    with mp.workdps(30):
        return float(kl(mpf(rho))), float((kl(mpf(rho) + mpf("1e-10")) - kl(mpf(rho) - mpf("1e-10"))) / mpf("2e-10"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rho", RHOS)
@pytest.mark.parametrize("kind", ["gaussian", "normal", "laplace", "gumbel"])
def test_exact_divergences_and_slopes_hold_for_any_rho(kind: str, rho: float, dtype: torch.dtype) -> None:
    expected, slope = kl_and_slope(kind, 0.7, rho)
    mu = torch.tensor([0.7], dtype=dtype, requires_grad=True)
    leaf = torch.tensor([rho], dtype=dtype, requires_grad=True)
    kl = varify.GaussianPosterior(mu, leaf, LOG_DENSITIES[kind][0].to(dtype)).kl_divergence()
    kl.backward()
    digits = 1e-5 if dtype == torch.float32 else 1e-6 if kind != "gaussian" else 1e-12  # those keep float32 settings
    assert kl.item() == pytest.approx(expected, rel=digits)
    assert leaf.grad.item() == pytest.approx(slope, rel=digits)
    assert mu.grad.isfinite().all()


@pytest.mark.parametrize("rho", [-1e4, -95.0, -44.0])
@pytest.mark.parametrize("kind", ["student", "cauchy", "mixtgauss"])
def test_estimated_divergences_and_slopes_hold_for_any_rho(kind: str, rho: float) -> None:
    # with so small a sigma every draw is the mean, so that one estimate is the divergence
    expected, slope = kl_and_slope(kind, 0.7, rho)
    mu, leaf = torch.tensor([0.7], requires_grad=True), torch.tensor([rho], requires_grad=True)
    q = varify.GaussianPosterior(mu, leaf, LOG_DENSITIES[kind][0])
    kl = q.kl_divergence()
    kl.backward()
    assert kl.item() == pytest.approx(expected, rel=1e-5)
    assert leaf.grad.item() == pytest.approx(slope, rel=1e-5)
    assert mu.grad.isfinite().all()
    log_ratio = q.log_ratio(torch.tensor([0.3]))  # log q(w) = log N(0.3) − log sigma
    log_normal = -(0.3**2) / 2 - math.log(math.sqrt(2 * math.pi))
    expected_entropy = 0.5 + math.log(math.sqrt(2 * math.pi)) + rho
    assert q.entropy().item() == pytest.approx(expected_entropy, rel=1e-6)
    assert log_ratio.item() == pytest.approx(log_normal + expected + expected_entropy - rho, rel=1e-5)


@pytest.mark.parametrize("kind", EVERY_PRIOR)
def test_no_divergence_is_nan_where_sigma_underflows(kind: str) -> None:
    vnet = two_layers(prior=EVERY_PRIOR[kind])
    with torch.no_grad():
        vnet.rho.leaf_at("0.weight").fill_(-1e4)
        vnet.posteriors["0.weight"].mu[0] = 0.0
        vnet.posteriors["0.weight"].mu[1] = 1e6
    loss = vnet.prior_loss()
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in vnet.parameters())
    torch.testing.assert_close(vnet.rho.leaf_at("0.weight").grad, torch.full((4, 3), -1.0))
    assert (0 * loss).item() == 0.0  # as at a warm-up's first step


def test_a_step_of_training_from_a_far_too_small_rho() -> None:
    vnet = varify.variationalize(nn.Linear(3, 1), init=varify.inits.Normal((0.0, 0.1), (-200.0, 0.0)))
    elbo = varify.ELBO(num_data=5, beta=lambda step: float(step))
    optimizer = torch.optim.SGD(vnet.parameters(), lr=0.1)
    for _ in range(2):  # beta = 0, then 1
        optimizer.zero_grad()
        elbo(vnet, F.mse_loss, torch.ones(5, 3), torch.ones(5, 1)).loss.backward()
        optimizer.step()
    # the KL's slope of −1, by N = 5, at a rate of 0.1
    torch.testing.assert_close(vnet.rho.leaf_at("weight"), torch.full((1, 3), -200 + 0.1 / 5))


# --- pruning where sigma underflows


def test_pruning_all_leaves_no_weight_however_certain() -> None:
    vnet = two_layers()
    with torch.no_grad():
        vnet.rho.leaf_at("0.weight").fill_(-200.0)
        vnet.rho.leaf_at("2.bias").fill_(-1e4)
    assert varify.prune(vnet, 1.0) == 1.0
    assert not any(p.any() for p in vnet.mean_model().parameters())
    assert not vnet(torch.ones(2, 3)).any()


def test_the_order_of_pruning_holds_where_sigma_underflows() -> None:
    vnet = varify.variationalize(nn.Linear(6, 1, bias=False))
    mu, rho = [1.0, -1.0, 0.0, 1.0, 1e-6, 3.0], [-300.0, -200.0, -1e4, -1.0, -210.0, -200.0]
    with torch.no_grad():
        vnet.posteriors["weight"].mu[0], vnet.rho.leaf_at("weight")[0] = torch.tensor(mu), torch.tensor(rho)
    order = sorted(range(6), key=lambda i: mp.mpf(abs(mu[i])) / mp.log1p(mp.exp(rho[i])))
    for k in range(7):
        assert varify.prune(vnet, k / 6) == pytest.approx(k / 6)
        lost = vnet.posteriors["weight"].mu[0].eq(0).nonzero().flatten().tolist()
        assert sorted(lost) == sorted({2, *order[:k]})  # one mean is 0 from the start
    assert varify.prune(vnet, threshold=0.0) == 1.0  # those pruned before are included


def test_pruning_all_leaves_the_padding_row_alone() -> None:
    vnet = varify.variationalize(nn.Embedding(5, 3, padding_idx=1))
    with torch.no_grad():
        vnet.posteriors["weight"].mu[1] = 7.0
    assert varify.prune(vnet, 1.0) == pytest.approx(12 / 15)
    assert vnet.posteriors["weight"].mu.tolist() == [[0.0] * 3, [7.0] * 3, *[[0.0] * 3] * 3]


# --- the support of a prior

BOUNDED = [
    td.Uniform(-1e4, 1e4),
    td.Uniform(-1e4 * torch.ones(3), 1e4),
    td.Independent(td.Uniform(-1e4, 1e4), 0),
    td.MixtureSameFamily(td.Categorical(torch.ones(2)), td.Uniform(-1e4 * torch.ones(2), 1e4)),
    td.HalfNormal(1.0),
    td.Pareto(1e-9, 1.0),
    td.Poisson(1.0),
    td.Geometric(0.5),
    td.Bernoulli(0.5),
    td.Beta(1.0, 1.0),
]


@pytest.mark.parametrize("distribution", BOUNDED, ids=[f"{i} {type(d).__name__}" for i, d in enumerate(BOUNDED)])
def test_priors_that_no_posterior_lies_within_are_refused(distribution: td.Distribution) -> None:
    with pytest.raises(varify.PriorError, match=r"a weight may be any real number|write a varify\.priors\.Prior"):
        varify.variationalize(nn.Linear(3, 2), prior=distribution)


@pytest.mark.parametrize(
    "distribution",
    [
        td.Gumbel(0.0, 1.0),
        td.Gumbel(0.1, 1e-2),
        td.Gumbel(torch.zeros(3), 1.0),
        td.MixtureSameFamily(td.Categorical(torch.ones(2)), td.Gumbel(torch.zeros(2), 1.0)),
    ],
    ids=str,
)
def test_priors_on_the_real_line_are_taken_and_travel(distribution: td.Distribution) -> None:
    vnet, other = (varify.variationalize(nn.Linear(3, 2, bias=False), prior=p) for p in (distribution, "gaussian"))
    torch.manual_seed(0)
    w = 0.1 * torch.randn(2, 3)
    expected = distribution.log_prob(w).sum()
    other.load_state_dict(vnet.state_dict())
    for network in (vnet, other):
        torch.testing.assert_close(network.posteriors["weight"].prior.log_prob(w), expected)


def test_a_gumbel_priors_divergence_of_a_network_equals_quadrature() -> None:
    net = nn.Linear(3, 2)
    vnet = varify.variationalize(net, prior=td.Gumbel(0.2, 0.5), init=varify.inits.Normal((0.0, 0.1), (-3.0, 0.0)))
    means = [m for q in vnet.posteriors.values() for m in q.mu.flatten().tolist()]
    assert vnet.prior_loss().item() == pytest.approx(sum(kl_and_slope("gumbel", m, -3.0)[0] for m in means), rel=1e-5)


# --- predictions in half precision

HALVES = [torch.bfloat16, torch.float16]


def close(found: torch.Tensor, expected: np.ndarray) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), torch.as_tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("n_samples", [1, 300, 1000])
def test_moments_and_quantiles_of_half_precision_equal_numpys_in_double(n_samples: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    prediction = varify.Prediction((30 + torch.randn(n_samples, 5, 2)).to(dtype))
    values = prediction.samples.double().numpy()
    close(prediction.mean, values.mean(0))
    close(prediction.std, values.std(0))
    close(prediction.quantile(0.3), np.quantile(values, 0.3, axis=0))
    close(
        prediction.quantile(torch.tensor([0.31, 1.0], dtype=dtype).double()),
        np.quantile(values, torch.tensor([0.31, 1.0], dtype=dtype).tolist(), axis=0),
    )
    for level in (0.5, 0.95, 0.999):
        for end, side in zip(prediction.interval(level), (-1, 1), strict=True):
            close(end, np.quantile(values, (1 + side * level) / 2, axis=0))


def test_the_ends_of_an_interval_are_as_precise_as_the_outputs() -> None:
    torch.manual_seed(0)
    samples = torch.randn(1000, 3, dtype=torch.float64)
    expected = torch.as_tensor(np.quantile(samples.numpy(), [0.0005, 0.9995], axis=0))
    torch.testing.assert_close(torch.stack(varify.Prediction(samples).interval(0.999)), expected, rtol=1e-12, atol=0)


def by_loop(p: np.ndarray) -> dict[str, np.ndarray]:
    """Measures of probabilities `(n_samples, batch, classes)`, one datum after another."""
    found: dict[str, list] = {"entropy": [], "information": [], "epistemic": [], "aleatoric": []}
    for draws in p.swapaxes(0, 1):
        mean = draws.mean(0)
        entropy, conditional = scipy.stats.entropy(mean), np.mean([scipy.stats.entropy(one) for one in draws])
        found["entropy"].append(entropy)
        found["information"].append(entropy - conditional)
        found["epistemic"].append(np.cov(draws.T, bias=True))
        found["aleatoric"].append(np.mean([np.diag(one) - np.outer(one, one) for one in draws], axis=0))
    return {name: np.stack(values) for name, values in found.items()}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("outputs", ["logits", "probabilities", "binary_logits"])
def test_measures_on_classes_of_half_precision_equal_a_loop_in_double(outputs: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    samples = 3 + 0.05 * torch.randn(100, 6, 10)
    if outputs == "probabilities":
        samples = samples.softmax(-1)
    samples = (samples[..., 0] if outputs == "binary_logits" else samples).to(dtype)
    values = samples.double().numpy()
    if outputs == "logits":
        p = scipy.special.softmax(values, -1)
    else:
        p = (
            values
            if outputs == "probabilities"
            else np.stack([scipy.special.expit(-values), scipy.special.expit(values)], -1)
        )
    prediction = varify.Prediction(samples, outputs)
    close(prediction.probabilities(), p.mean(0))
    if outputs == "probabilities":  # rounded, they do not add up to 1, as scipy would make them do
        p_sum = -(p.mean(0) * np.log(p.mean(0))).sum(-1)
        close(prediction.entropy(), p_sum)
        close(prediction.mutual_information(), p_sum + (p * np.log(p)).sum(-1).mean(0))
        return
    expected = by_loop(p)
    close(prediction.entropy(), expected["entropy"])
    close(prediction.mutual_information(), expected["information"])
    assert prediction.mutual_information().min() > 0
    for found, name in zip(prediction.covariances(), ("epistemic", "aleatoric"), strict=True):
        close(found, expected[name])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_regression_of_half_precision_equals_a_mixture_in_double(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    likelihood = varify.HeteroscedasticGaussianLikelihood()
    prediction = varify.Prediction((10 + 0.05 * torch.randn(200, 4, 2)).to(dtype))
    mean, rho = prediction.samples.double().numpy()[..., :1], prediction.samples.double().numpy()[..., 1:]
    sigma = 1e-3 + np.logaddexp(0, rho)
    variances = prediction.variances(likelihood)
    close(variances.epistemic, mean.var(0))
    close(variances.aleatoric, (sigma**2).mean(0))
    for end, q in zip(prediction.interval(0.9, likelihood), (0.05, 0.95), strict=True):
        assert end.dtype == torch.float32
        below = scipy.stats.norm.cdf(end.double().numpy(), mean, sigma).mean(0)
        assert np.abs(below - q).max() < 1e-5
    assert prediction.coverage(torch.full((4, 1), 10.0, dtype=dtype), 0.9, likelihood).item() == 1.0


# --- shapes and graphs of measures


@pytest.mark.parametrize("batch", [(), (1,), (4,), (2, 3), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("normalization", ["softmax", "normalized"])
def test_summed_covariances_for_any_batch(batch: tuple[int, ...], normalization: str) -> None:
    torch.manual_seed(0)
    samples = torch.randn(9, *batch, 3, dtype=torch.float64)
    values = samples.reshape(9, -1, 3).numpy()
    p = scipy.special.softmax(values, -1) if normalization == "softmax" else np.logaddexp(0, values)
    p /= p.sum(-1, keepdims=True)
    for found, name in zip(
        varify.Prediction(samples, class_dim=len(batch)).covariances(normalization, summed=True),
        ("epistemic", "aleatoric"),
        strict=True,
    ):
        expected = by_loop(p)[name].sum(0) if math.prod(batch) else np.zeros((3, 3))
        torch.testing.assert_close(found, torch.as_tensor(expected))


def test_summed_covariances_of_one_binary_logit() -> None:
    samples = torch.tensor([0.3, -0.2, 1.0], dtype=torch.float64)
    p = scipy.special.expit(samples.numpy())
    epistemic, aleatoric = varify.Prediction(samples, "binary_logits").covariances(summed=True)
    sign = np.array([[1.0, -1.0], [-1.0, 1.0]])
    torch.testing.assert_close(epistemic, torch.as_tensor(p.var() * sign))
    torch.testing.assert_close(aleatoric, torch.as_tensor((p * (1 - p)).mean() * sign))


def test_measures_of_a_learned_noise_carry_no_graph() -> None:
    likelihood = varify.GaussianLikelihood(0.5)
    prediction = varify.Prediction(torch.randn(9, 4, 2))
    low, high = prediction.interval(0.9, likelihood)
    coverage = prediction.coverage(torch.zeros(4, 2), 0.9, likelihood)
    variances = prediction.variances(likelihood)
    for measure in (low, high, coverage, *variances, variances.total):
        assert not measure.requires_grad
        measure.numpy()
    np.testing.assert_allclose(variances.aleatoric.numpy(), 0.25, rtol=1e-6)
    assert likelihood.rho.grad is None
    assert likelihood.rho.requires_grad


# --- sigma from curvature


@pytest.mark.parametrize("curvature", ["fisher", "ggn"])
def test_fit_sigma_of_a_pruned_network_is_at_its_zeros(curvature: str) -> None:
    vnet = two_layers(prior=priors.Gaussian(std=0.7))
    varify.prune(vnet, 0.5)
    pruned = vnet.mean_model().double()
    with torch.no_grad():
        for q in vnet.posteriors.values():  # as momentum would
            q.mu += 0.5 * (q.fixed == 2)
    x, y = torch.randn(6, 3), torch.randn(6, 2)
    varify.fit_sigma(
        vnet, [(x, y)], lambda a, b: (a - b).square().sum() / 2, num_data=30, curvature=curvature, temperature=1
    )
    for name, parameter in pruned.named_parameters():
        squares = torch.zeros_like(parameter)
        for one, target in zip(x.double(), y.double(), strict=True):
            output = pruned(one)
            rows = [torch.autograd.grad(o, parameter, retain_graph=True)[0] for o in output]
            # the Hessian of half a squared error is the identity, its gradient the residual
            scores = [sum(row * r for row, r in zip(rows, output - target, strict=True))]
            squares += sum(s.square() for s in (scores if curvature == "fisher" else rows)).detach()
        q = vnet.posteriors[name]
        expected = (30 / 6 * squares + 1 / 0.7**2).rsqrt().float()
        torch.testing.assert_close(q.sigma[q.fixed == 0], expected[q.fixed == 0], rtol=1e-4, atol=1e-6)
