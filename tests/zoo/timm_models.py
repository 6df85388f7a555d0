"""timm: the smallest member of each family (a module of timm), at the smallest images it takes."""

from functools import partial

import pytest

from tests.zoo.entries import Entry, Zoo, pixels

# Families whose smallest member has over 40 million parameters are left out, for time: beit, deepseek_vit,
# gemma4_vit, inception_resnet_v2,
# inception_v4, mobilenetv5, naflexvit, nasnet, pnasnet, qwen3_vit, vision_transformer_sam.
FIXED = {  # take images of any size, or of their own
    "halonet_h1": 256,
    "convmixer_768_32": 32,
    "test_convnext": 32,
    "cpubone_nano": 32,
    "crossvit_tiny_240": 32,
    "csatv2": 64,
    "cs3darknet_focus_s": 32,
    "cspnext_tiny": 32,
    "davit_tiny": 32,
    "densenet121": 32,
    "dla46x_c": 32,
    "dpn48b": 32,
    "edgenext_xx_small": 32,
    "efficientformer_l1": 224,
    "test_efficientnet": 32,
    "efficientvim_m1": 32,
    "efficientvit_b0": 32,
    "fasternet_t0": 32,
    "fastvit_t8": 32,
    "focalnet_tiny_srf": 32,
    "ghostnet_050": 32,
    "hardcorenas_b": 32,
    "hgnetv2_b0": 32,
    "sam2_hiera_tiny": 32,
    "hrnet_w18_small": 32,
    "iformer_t": 32,
    "inception_next_atto": 32,
    "inception_v3": 96,
    "lcnetv2_small": 32,
    "lowformer_b0": 32,
    "test_mambaout": 32,
    "poolformerv2_s12": 32,
    "mobilenetv3_small_050": 32,
    "nextvit_small": 32,
    "test_nfnet": 32,
    "pvt_v2_b0": 32,
    "rdnet_tiny": 32,
    "regnetx_002": 32,
    "repghostnet_050": 32,
    "res2next50": 32,
    "resnest14d": 32,
    "test_resnet": 32,
    "resnetv2_18": 32,
    "rexnet_100": 32,
    "selecsls42": 32,
    "legacy_seresnet18": 32,
    "shvit_s1": 32,
    "skresnet18": 32,
    "starnet_s050": 32,
    "tiny_vit_5m_224": 32,
    "tresnet_m": 32,
    "ese_vovnet19b_slim_dw": 32,
    "legacy_xception": 32,
    "xception41p": 32,
}
RESIZED = (  # are built for 32 pixels
    "test_byobnet",
    "cait_xxs24_224",
    "coat_tiny",
    "convit_tiny",
    "deit_tiny_patch16_224",
    "efficientformerv2_s0",
    "efficientvit_m0",
    "vit_tiny_patch16_dinov3_qkvb",
    "gcvit_xxtiny",
    "hiera_tiny_224",
    "levit_128s",
    "test_coatnet",
    "gmlp_ti16_224",
    "mobilevit_xxs",
    "mvitv2_tiny",
    "nest_tiny",
    "pit_ti_224",
    "repvit_m1",
    "sequencer2d_s",
    "swiftformer_xs",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window16_256",
    "swinv2_cr_tiny_224",
    "tnt_s_legacy_patch16_224",
    "twins_svt_small",
    "visformer_tiny",
    "test_vit",
    "vit_tiny_r_s16_p8_224",
    "test_vit_relpos",
    "vitamin_small_224",
    "volo_d1_224",
    "xcit_nano_12_p8_224",
)


def entries() -> Zoo:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    fixed = {name: Entry(partial(timm.create_model, name, num_classes=7), pixels(size)) for name, size in FIXED.items()}
    resized = {
        name: Entry(partial(timm.create_model, name, num_classes=7, img_size=32), pixels(32)) for name in RESIZED
    }
    return dict(sorted({**fixed, **resized}.items()))
