"""Edges of selection, priors, divergences, pruning and prediction, each against a reference of its own."""

import pytest
import torch
from torch import nn

import varify


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
