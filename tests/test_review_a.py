"""Edges of selection, priors, divergences, pruning and prediction, each against a reference of its own."""

import pytest
import torch
import torch.nn.functional as F
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
    "laplace": priors.make(td.Laplace(0.0, 0.5)),
    "cauchy": priors.make(td.Cauchy(torch.zeros(1), 0.5)),
    "mixture": priors.make(
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
