"""Likelihoods whose noise is not Gaussian: of heavy tails, of counts, of ordered classes."""

import math
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varify.errors import ArgumentError, positive_int, positive_number
from varify.objective.likelihoods import Likelihood, precise
from varify.weights.posterior import softplus_inverse


class _Scaled(Likelihood):
    """(y − output)/scale has a distribution without parameters to learn, with a density symmetric about 0."""

    discrete: ClassVar = False

    def __init__(self, scale: float, learn: bool) -> None:
        super().__init__()
        self.rho = nn.Parameter(softplus_inverse(torch.tensor(positive_number("scale", scale))), requires_grad=learn)

    @property
    def scale(self) -> Tensor:
        """In units of y, `()`."""
        return F.softplus(self.rho)


class LaplaceLikelihood(_Scaled):
    """y ~ Laplace(output, scale): the absolute error, with a noise level for all data that is trained along.

    Args:
        scale: mean absolute deviation of the noise at the start, in units of y, > 0; its standard deviation is
            √2 times that.
        learn: whether `rho`, scale = softplus(rho), requires a gradient.
    """

    def __init__(self, scale: float = 1.0, learn: bool = True) -> None:
        super().__init__(scale, learn)

    def moments(self, output: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        output = precise(output)
        return output, (2 * self.scale.to(output.dtype).square()).expand_as(output)

    def log_prob(self, output: Tensor, target: Tensor) -> Tensor:  # noqa: D102
        return -(target - output).abs() / self.scale - (2 * self.scale).log()

    def cdf(self, output: Tensor, target: Tensor) -> Tensor:
        """Probability that y is at most `target`, in its shape."""
        z = (target - output) / self.scale
        tail = 0.5 * torch.exp(-z.abs())
        return torch.where(z < 0, tail, 1 - tail)


class StudentTLikelihood(_Scaled):
    """y ~ output + scale·t with df degrees of freedom: a regression that outliers don't pull (Lange et al. 1989).

    Args:
        df: > 2, so that the noise has a variance, scale²·df/(df − 2); not learned. The smaller, the heavier the tails.
        scale: of the noise at the start, in units of y, > 0.
        learn: whether `rho`, scale = softplus(rho), requires a gradient.
    """

    def __init__(self, df: float = 4.0, scale: float = 1.0, learn: bool = True) -> None:
        super().__init__(scale, learn)
        self.df = positive_number("df", df)
        if self.df <= 2:
            raise ArgumentError(f"df must be greater than 2, got {df}: with fewer the noise has no variance")

    def moments(self, output: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        output = precise(output)
        var = self.scale.to(output.dtype).square() * self.df / (self.df - 2)
        return output, var.expand_as(output)

    def log_prob(self, output: Tensor, target: Tensor) -> Tensor:  # noqa: D102
        z = (target - output) / self.scale
        half = (self.df + 1) / 2
        constant = math.lgamma(half) - math.lgamma(self.df / 2) - 0.5 * math.log(self.df * math.pi)
        return constant - self.scale.log() - half * torch.log1p(z.square() / self.df)

    def cdf(self, output: Tensor, target: Tensor) -> Tensor:
        """Probability that y is at most `target`, in its shape; to 1e-6.

        With t = √df·tan(a) it is an integral of cos(a)^(df − 1), by Gauss and Legendre's rule.
        """
        z = (target - output) / self.scale / math.sqrt(self.df)
        # far out there is nothing left to add: the rule's points belong where the integrand is
        end = z.abs().atan().clamp_max(min(math.pi / 2, 8 / math.sqrt(self.df - 1)))
        log_norm = math.lgamma((self.df + 1) / 2) - math.lgamma(self.df / 2) - 0.5 * math.log(math.pi)
        area = torch.zeros_like(end)
        for point, weight in zip(*np.polynomial.legendre.leggauss(48), strict=True):
            area = area + float(weight) * (end * (0.5 + 0.5 * float(point))).cos() ** (self.df - 1)
        return 0.5 + math.exp(log_norm) * 0.5 * end * area * z.sign()


class PoissonLikelihood(Likelihood):
    """y ~ Poisson(exp(output)): counts, from a head that gives the logarithm of the rate."""

    discrete: ClassVar = True

    def moments(self, output: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        rate = output.exp()
        return rate, rate

    def log_prob(self, output: Tensor, target: Tensor) -> Tensor:  # noqa: D102
        if not ((target >= 0) & (target == target.floor())).all():
            raise ArgumentError("targets must be counts: whole numbers of at least 0")
        target = target.to(output.dtype)
        return target * output - output.exp() - torch.lgamma(target + 1)

    def cdf(self, output: Tensor, target: Tensor) -> Tensor:
        """Probability that y is at most `target`, in its shape."""
        count = target.floor()
        found: Tensor = torch.special.gammaincc(count.clamp_min(0) + 1, output.exp())
        return torch.where(count < 0, 0.0, found)


class OrdinalLikelihood(Likelihood):
    """y one of ordered classes 0, 1, ...: P(y ≤ k) = sigmoid(cutpoint_k − output) (McCullagh 1980, JRSS B 42).

    The head gives one number for a target; the cutpoints are trained along.

    Args:
        n_classes: at least 2.
        learn: whether the cutpoints require a gradient.
    """

    discrete: ClassVar = True

    def __init__(self, n_classes: int, learn: bool = True) -> None:
        super().__init__()
        self.n_classes = positive_int("n_classes", n_classes)
        if self.n_classes < 2:
            raise ArgumentError(f"n_classes must be at least 2, got {n_classes}")
        # at the start the classes are equally probable where the output is 0
        even = torch.logit(torch.arange(1, self.n_classes) / self.n_classes)
        self.first = nn.Parameter(even[:1].clone(), requires_grad=learn)
        self.gap_rho = nn.Parameter(softplus_inverse(even.diff()), requires_grad=learn)

    @property
    def cutpoints(self) -> Tensor:
        """Between the classes, rising, `(n_classes − 1,)`, in units of the output."""
        return torch.cat([self.first, self.first + F.softplus(self.gap_rho).cumsum(0)])

    def probabilities(self, output: Tensor) -> Tensor:
        """Of each class, `(*output, n_classes)`; `varify.Prediction(these, "probabilities")` has their measures."""
        classes = torch.arange(self.n_classes, device=output.device).expand(*output.shape, self.n_classes)
        return self.log_prob(output.unsqueeze(-1).expand_as(classes), classes).exp()

    def moments(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the class's number, each `(*output)`."""
        p = self.probabilities(output)
        k = torch.arange(self.n_classes, dtype=p.dtype, device=p.device)
        mean = (p * k).sum(-1)
        return mean, (p * (k - mean.unsqueeze(-1)).square()).sum(-1)

    def log_prob(self, output: Tensor, target: Tensor) -> Tensor:  # noqa: D102
        if not ((target >= 0) & (target < self.n_classes) & (target == target.floor())).all():
            raise ArgumentError(f"targets must be classes, whole numbers within [0, {self.n_classes})")
        cutpoints, k = self.cutpoints.to(output.dtype), target.long()
        infinite = cutpoints.new_full((1,), math.inf)
        upper, lower = torch.cat([cutpoints, infinite])[k], torch.cat([-infinite, cutpoints])[k]
        gap = torch.cat([infinite, cutpoints.diff(), infinite])[k]
        # sigmoid(a) − sigmoid(b) = sigmoid(a)·sigmoid(−b)·(1 − e^(b − a)), which does not cancel far out
        return F.logsigmoid(upper - output) + F.logsigmoid(output - lower) + torch.log(-torch.expm1(-gap))

    def cdf(self, output: Tensor, target: Tensor) -> Tensor:
        """Probability that y is at most `target`, in its shape."""
        k = target.floor().long()
        inner = (self.cutpoints.to(output.dtype)[k.clamp(0, self.n_classes - 2)] - output).sigmoid()
        return torch.where(k < 0, 0.0, torch.where(k > self.n_classes - 2, 1.0, inner))
