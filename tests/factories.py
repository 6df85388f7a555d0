"""Networks as users of the command line write them: `varify train --model tests.factories:NAME`."""

import torch
from torch import Tensor, nn

import varify


@varify.priors.register("laplace-of-the-factories")
class Laplace(varify.priors.Prior):
    def __init__(self, scale: float, n_mc_samples: int = 1) -> None:
        super().__init__(n_mc_samples)
        self.keep_positive(scale=scale)

    def log_prob(self, w: Tensor) -> Tensor:
        return torch.distributions.Laplace(0.0, self.scale).log_prob(w).sum()


def fits(classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(1024), nn.Linear(1024, classes))


def seven() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(1024, 7))


def nothing() -> None:
    return None


def raises() -> nn.Module:
    return nn.Linear(1 // 0, 1)


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / (1 // 0)


def fails_later() -> nn.Module:
    return Fails()
