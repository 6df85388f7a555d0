"""Prune the weights with the lowest signal-to-noise ratio |mu|/sigma.

Graves 2011, Practical Variational Inference for Neural Networks; Blundell et al. 2015, arXiv:1505.05424, section 5.1.
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from varify.errors import ArgumentError
from varify.module import VariationalModule
from varify.network.selection import matching
from varify.network.sharding import refuse_sharded
from varify.weights.posterior import PRUNED, GaussianPosterior
from varify.within import check_variational


@torch.no_grad()
def prune(
    vnet: VariationalModule,
    fraction: float | None = None,
    *,
    threshold: float | None = None,
    where: str | Sequence[str] = "*",
) -> float:
    """Set the weights with the lowest signal-to-noise ratio to 0 permanently: in draws, training and the state dict.

    An optimizer's momentum may move their parameters for a while. Whatever reads the means through `vnet` has them at
    0: a forward in eval mode, `vnet.state_dict`, `mean_model`, `varify.save`. For the plain network take
    `vnet.mean_model()`, and not `vnet.module`, whose parameters are what the optimizer left.

    Args:
        vnet: changed in place.
        fraction: share of the weights to be 0 afterwards, including those pruned before, within [0, 1].
        threshold: instead of a fraction: prune all weights with |mu|/sigma below it.
        where: glob, or several, on the names of the parameters to prune.

    Returns:
        The share of the weights that are pruned now, of the parameters that `where` matches.

    Raises:
        ArgumentError: neither or both of fraction and threshold, or one out of range.
        SelectionError: `where` matches nothing.
    """
    if (fraction is None) == (threshold is None):
        raise ArgumentError(
            f"either fraction or threshold must be set, and not both, got fraction={fraction}, threshold={threshold}"
        )
    if fraction is not None and not 0 <= fraction <= 1:
        raise ArgumentError(f"fraction must lie within [0, 1], got {fraction}")
    if threshold is not None and not threshold >= 0:
        raise ArgumentError(f"threshold must be at least 0, got {threshold}")
    check_variational(vnet, "varify.prune")
    refuse_sharded(vnet, "varify.prune")
    posteriors = dict(vnet.posteriors)
    among = {name: posteriors[name] for name in matching(posteriors, where)}
    if threshold is not None:
        chosen = {name: _scores(q.snr, q.fixed) < threshold for name, q in among.items()}
    else:
        chosen = _lowest({name: _scores(_log_snr(q), q.fixed) for name, q in among.items()}, fraction or 0.0)
    for name, lost in chosen.items():
        fixed = posteriors[name].fixed
        mask = torch.zeros_like(lost, dtype=torch.int8) if fixed is None else fixed.clone()
        mask[lost] = PRUNED
        if lost.any():
            vnet.posteriors.set_mask(name, mask)
    return sum(int(lost.sum()) for lost in chosen.values()) / sum(lost.numel() for lost in chosen.values())


def _log_snr(q: GaussianPosterior) -> Tensor:
    """log(|mu|/sigma), `(*shape)`; finite for every free weight, also if sigma underflows or mu is 0."""
    log_mean = q.mean.abs().log()
    return (log_mean - q.log_sigma).clamp_min(torch.finfo(log_mean.dtype).min)


def _scores(signal: Tensor, fixed: Tensor | None) -> Tensor:
    """The signal to rank by: -inf where a weight is pruned already, inf where it is fixed for another reason."""
    if fixed is None:
        return signal
    return signal.masked_fill(fixed == PRUNED, -math.inf).masked_fill((fixed != 0) & (fixed != PRUNED), math.inf)


def _lowest(scores: dict[str, Tensor], fraction: float) -> dict[str, Tensor]:
    """By parameter, which weights have the lowest scores of all, in a single ranking over all parameters."""
    # By rank and not by a threshold, since many weights may have the score at the border.
    device = next(iter(scores.values())).device
    together = torch.cat([s.flatten().to(device) for s in scores.values()])
    lost = torch.zeros(together.shape, dtype=torch.bool, device=device)
    lost[together.argsort()[: round(fraction * together.numel())]] = True
    lost &= together != math.inf
    parts = lost.split([s.numel() for s in scores.values()])
    return {name: part.reshape(s.shape).to(s.device) for (name, s), part in zip(scores.items(), parts, strict=True)}


def pruning_curve(
    vnet: VariationalModule,
    evaluate: Callable[[VariationalModule], float],
    fractions: Iterable[float] = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98),
    *,
    where: str | Sequence[str] = "*",
) -> list[tuple[float, float]]:
    """A figure of merit as a function of the share of weights pruned.

    Args:
        vnet: left alone; a copy is pruned.
        evaluate: from the pruned network to the figure, such as its accuracy on held-out data.
        fractions: shares to prune, taken in increasing order.
        where: see `prune`.

    Returns:
        Pairs of the share pruned and the figure.
    """
    pruned = copy.deepcopy(vnet)
    return [(prune(pruned, fraction, where=where), float(evaluate(pruned))) for fraction in sorted(fractions)]
