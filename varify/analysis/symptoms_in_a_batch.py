"""Checks of what draws of the weights do with a batch: each from evidence to what it found, in words."""

import math

import torch
from torch import nn

from varify.analysis.checks import Found, check
from varify.analysis.evidence import Evidence
from varify.analysis.symptoms import LEAST_LEARNED
from varify.errors import listed

# Adam's beta1 = 0.9 averages (1 + beta1)/(1 - beta1) = 19 gradients: below 1/19 a step is more noise than signal.
LEAST_SIGNAL = 1 / 19
TINY_BATCH = 8
LEAST_SPREAD = 1e-3  # of the outputs over draws, relative to that over data
LEAST_GAIN = 3.0  # standard errors by which the nll is less than with targets of other data


@check(
    "gradient-noise",
    *("batch", "criterion"),
    change="a step is more noise than signal even after Adam's average over 19: larger batches, "
    "variationalize(..., estimator='auto'), more draws (ELBO(n_samples=...)), or smaller sigmas at the start",
)
def _gradient_noise(e: Evidence) -> Found | str:
    learned = {name: g for name, g in (("mu", e.trained.mu), ("rho", e.trained.rho)) if g.mean}
    if not learned:
        return "no mu and no rho has a gradient"
    snr = {name: g.signal_to_noise for name, g in learned.items()}
    if any(math.isnan(value) for value in snr.values()):
        return "the gradients are not finite"
    message = " and ".join(f"{value:.3g} for {name}" for name, value in snr.items())
    message = f"mean²/variance of the nll's gradient over draws of the weights, on this batch: {message}"
    return Found("warning" if snr.get("mu", math.inf) < LEAST_SIGNAL else "fine", message, snr)


@check(
    "tiny-batch-norm",
    "batch",
    change=f"use batches of at least {TINY_BATCH}, put these layers in eval mode, or use GroupNorm",
)
def _tiny_batch_norm(e: Evidence) -> Found | str:
    norms = [
        name
        for name, m in e.network.named_modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and (m.training or m.running_mean is None)
    ]
    if not norms:
        return Found("fine", "nothing normalizes by the statistics of a batch")
    message = f"{listed(norms)} normalize by the statistics of a batch of {e.batch.size}"
    return Found("warning" if e.batch.size < TINY_BATCH else "fine", message, {"batch": e.batch.size})


@check(
    "equal-draws",
    "batch",
    change="there is no uncertainty to predict with: vnet.summary() tells the sigmas, and what is deterministic; "
    "choose by where= parameters that the network uses",
)
def _equal_draws(e: Evidence) -> Found | str:
    found = _spreads(e)
    if isinstance(found, str):
        return found
    spread, scale = found
    ill = spread <= LEAST_SPREAD * scale
    return Found("error" if ill else "fine", _told(spread, scale), {"draws": spread, "data": scale})


@check(
    "noise-dominates",
    *("batch", "criterion"),
    change="if it was trained, what the means know is lost in the noise of the weights, or they know nothing. Lower "
    "beta and start anew, since sigmas at the prior hardly come back: where predictions at the means are good, from "
    "varify.variationalize(vnet.mean_model()).train(), which has small sigmas around them, else from the plain network",
)
def _noise_dominates(e: Evidence) -> Found | str:
    found = _spreads(e)
    if isinstance(found, str):
        return found
    spread, scale = found
    message, figures = _told(spread, scale), {"draws": spread, "data": scale}
    if spread <= scale:
        return Found("fine", message, figures)
    gain, learned = e.trained.gain, e.trained.learned
    if not math.isfinite(e.trained.nll):
        return f"{message}; whether anything was learned can't be told, since the loss is not finite"
    if gain is None:
        return f"{message}; whether anything was learned can't be told, for want of data with other targets"
    # Where data are mostly noise, so are the predictions of a network that is as good as can be: then it did learn.
    if gain > LEAST_GAIN and (learned is None or learned > LEAST_LEARNED):
        return Found("fine", f"{message}, and yet they fit the targets better than those of other data", figures)
    return Found("warning", f"{message}, and fit the targets no better than those of other data", figures)


def _told(spread: float, scale: float) -> str:
    return f"predictions differ between draws by {spread:.3g}, and between data by {scale:.3g}"


def _spreads(e: Evidence) -> tuple[float, float] | str:
    """Standard deviations of the outputs over draws, and of their means over data."""
    means = e.predicted.mean
    n = sum(mean.numel() for mean in means)
    if not n:
        return "the network returns no floating-point tensor"
    spread = math.sqrt(e.predicted.noise / n)
    if not math.isfinite(spread):
        return "the outputs are not finite"
    scale, size = 0.0, e.batch.size
    if size > 1 and all(mean.shape[0] == size for mean in means):  # each output by itself: constants say nothing
        scale = math.sqrt(sum(float((mean - mean.mean(0)).square().sum()) for mean in means) / n)
    outputs = torch.cat([mean.flatten() for mean in means])
    return spread, scale or float(outputs.std(unbiased=False)) or float(outputs.square().mean().sqrt())
