"""The continuous ranked probability score of a mixture over draws."""

import math

import numpy as np
import torch
from torch import Tensor

from varify.prediction.noise import Likelihood, OtherNoise, check_targets, moments, quantile
from varify.prediction.scores import TensorLike

TAIL = 1e-5  # left out at each end, where it counts by its square
PANELS, POINTS = 32, 4  # of the integral, and of Gauss and Legendre's rule in each
MOST_VALUES = 4096  # of a discrete target; more are taken several at once


def crps(likelihood: Likelihood | None, samples: Tensor, targets: TensorLike) -> Tensor:
    """By target, `(*batch, ...)`; see `Prediction.crps`.

    Raises:
        ArgumentError: the targets have another shape.
    """
    mean, var = (samples, torch.zeros_like(samples)) if likelihood is None else moments(likelihood, samples)
    labels = check_targets(targets, mean[0])
    if isinstance(likelihood, OtherNoise):
        by_distribution = _summed if likelihood.discrete else _integrated
        return by_distribution(likelihood, samples, labels)
    # a draw at a time: all pairs at once would take n_samples times the memory
    between = torch.stack([_expected_distance(mean - mean[s], var + var[s]).mean(0) for s in range(len(mean))]).mean(0)
    return _expected_distance(labels - mean, var).mean(0) - 0.5 * between


def _expected_distance(mean: Tensor, var: Tensor) -> Tensor:
    """E|x| of x ~ N(mean, var)."""
    std = var.sqrt()
    z = mean / std.clamp_min(torch.finfo(std.dtype).tiny)
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    found: Tensor = 2 * std * density + mean * (2 * torch.special.ndtr(z) - 1)
    return found


def _squared_error(likelihood: OtherNoise, samples: Tensor, x: Tensor, targets: Tensor) -> Tensor:
    """(P(Y ≤ x) − 1[y ≤ x])² of the mixture, at several x of each target."""
    shape = len(x), *samples.shape
    reached = likelihood.cdf(samples.expand(shape), x.unsqueeze(1).expand(shape)).detach().mean(1)
    return (reached - (targets <= x).to(reached)).square()


def _integrated(likelihood: OtherNoise, samples: Tensor, targets: Tensor) -> Tensor:
    """Over all x. The panels lie as the draws do, closest where these and their noise are."""
    mean, var = moments(likelihood, samples)
    # around each draw up to a hundred standard deviations; within one, panels of at most a quarter of it
    steps = 0.1 * torch.linspace(-7.6, 7.6, PANELS + 1, dtype=mean.dtype, device=mean.device).sinh()
    around = torch.cat([mean + step * var.sqrt() for step in steps]).sort(0).values[len(mean) // 2 :: len(mean)]
    edges = torch.cat([around, targets.unsqueeze(0)]).sort(0).values
    points, weights = torch.as_tensor(np.stack(np.polynomial.legendre.leggauss(POINTS))).to(mean) / 2
    column = (-1, *(1 for _ in targets.shape))
    found = torch.zeros_like(targets)
    for low, width in zip(edges[:-1], edges.diff(dim=0), strict=True):
        errors = _squared_error(likelihood, samples, low + width * (0.5 + points.reshape(column)), targets)
        found += width * (weights.reshape(column) * errors).sum(0)
    return found


def _summed(likelihood: OtherNoise, samples: Tensor, targets: Tensor) -> Tensor:
    """Over all whole x, each of which stands for the unit from there on."""
    low = torch.minimum(quantile(likelihood, samples, TAIL), targets).floor()
    high = torch.maximum(quantile(likelihood, samples, 1 - TAIL), targets).ceil()
    at_once = ((high - low) / MOST_VALUES).ceil().clamp_min(1)
    found = torch.zeros_like(targets)
    for i in range(int(((high - low) / at_once).max().ceil()) + 1 if targets.numel() else 0):
        x = low + i * at_once
        found += at_once * _squared_error(likelihood, samples, (x + at_once / 2).floor()[None], targets)[0]
    return found
