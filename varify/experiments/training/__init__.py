"""Training a network and its variational twin, with a state that can be saved between any two epochs."""

from varify.experiments.training.training import Training

__all__ = ["Training"]
