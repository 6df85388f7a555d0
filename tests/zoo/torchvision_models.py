"""torchvision: a small member of every family of classifiers and segmentation networks."""

from functools import partial

import pytest

from tests.zoo.entries import Entry, Zoo, pixels

CLASSIFIERS = {
    "alexnet": 64,
    "convnext_tiny": 32,
    "densenet121": 32,
    "efficientnet_b0": 32,
    "efficientnet_v2_s": 32,
    "googlenet": 96,
    "inception_v3": 299,
    "maxvit_t": 224,
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
    "vit_b_32": 32,
    "wide_resnet50_2": 32,
}
SEGMENTATION = ("deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large")


def entries() -> Zoo:
    models = pytest.importorskip("torchvision", reason="torchvision is not installed").models
    zoo = {}
    for name, size in CLASSIFIERS.items():
        options = {"init_weights": False, "aux_logits": True} if name in ("googlenet", "inception_v3") else {}
        if name.startswith("vit"):
            options = {"image_size": 32}
        zoo[name] = Entry(partial(models.get_model, name, weights=None, num_classes=7, **options), pixels(size))
    for name in SEGMENTATION:
        make = partial(models.get_model, name, weights=None, weights_backbone=None, num_classes=4)
        zoo[name] = Entry(make, pixels(64))
    return zoo
