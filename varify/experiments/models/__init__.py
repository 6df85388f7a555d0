"""The networks of the command line, and those that its user names."""

from varify.experiments.models.building import build
from varify.experiments.models.networks import MODELS, AlexNet, LeNet, mlp, three_conv

__all__ = ["MODELS", "AlexNet", "LeNet", "build", "mlp", "three_conv"]
