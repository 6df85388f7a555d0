"""torchvision: a small member of every family of classifiers and segmentation networks."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from torch import nn

from tests.zoo.entries import Entry, Zoo, pixels

CLASSIFIERS = {
    "alexnet": 64,
    "convnext_tiny": 32,
    "densenet121": 32,
    "efficientnet_b0": 32,
    "efficientnet_v2_s": 32,
    "googlenet": 96,
    "inception_v3": 299,
    "mnasnet0_5": 32,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "regnet_x_400mf": 32,
    "regnet_y_400mf": 32,
    "resnet18": 32,
    "resnext50_32x4d": 32,
    "shufflenet_v2_x0_5": 32,
    "squeezenet1_1": 32,
    "swin_t": 32,
    "swin_v2_t": 64,
    "vgg11": 32,
    "wide_resnet50_2": 32,
}
WIDE = ("alexnet", "vgg11")  # a hundred million weights in their classifiers
SEGMENTATION = ("deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large")


def entries() -> Zoo:
    models = pytest.importorskip("torchvision", reason="torchvision is not installed").models
    zoo = {
        "maxvit": Entry(partial(_maxvit, models), pixels(32)),
        "vision_transformer": Entry(partial(_vision_transformer, models), pixels(32)),
    }
    for name, size in CLASSIFIERS.items():
        options = {"init_weights": False, "aux_logits": True} if name in ("googlenet", "inception_v3") else {}
        make = partial(models.get_model, name, weights=None, num_classes=7, **options)
        zoo[name] = Entry(partial(_narrowed, make) if name in WIDE else make, pixels(size))
    for name in SEGMENTATION:
        make = partial(models.get_model, name, weights=None, weights_backbone=None, num_classes=4)
        zoo[name] = Entry(make, pixels(64))
    return zoo


def _narrowed(make: Callable[[], Any]) -> nn.Module:
    network: nn.Module = make()
    inputs = next(m for m in network.classifier if isinstance(m, nn.Linear)).in_features
    network.classifier = nn.Sequential(nn.Linear(inputs, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, 7))
    return network


def _maxvit(models: Any) -> nn.Module:
    stages = {"block_channels": [8, 16], "block_layers": [1, 1], "head_dim": 4, "stochastic_depth_prob": 0.2}
    network: nn.Module = models.MaxVit((32, 32), stem_channels=8, partition_size=4, num_classes=7, **stages)
    return network


def _vision_transformer(models: Any) -> nn.Module:
    size = {"num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}
    network: nn.Module = models.VisionTransformer(32, 8, num_classes=7, dropout=0.1, **size)
    nn.init.normal_(network.heads.head.weight)  # torchvision starts it at 0, where no gradient passes
    return network
