"""The outputs of a classifier's draws as probabilities, and what these say of a label."""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from varify.errors import ArgumentError, VarifyWarning

OUTPUTS = ("logits", "probabilities", "binary_logits")


def check_real(samples: Tensor) -> None:
    """Refuse integers, such as labels, of which a softmax would say nothing.

    Raises:
        ArgumentError: the samples are integers.
    """
    if not samples.is_floating_point():
        raise ArgumentError(
            f"the outputs are {samples.dtype}, no logits or probabilities: return what the labels were taken from, "
            "or take mean, std and quantiles"
        )


def classes_last(samples: Tensor, class_dim: int) -> Tensor:
    """`(n_samples, *batch, ..., classes)`, the classes' dimension last.

    Raises:
        ArgumentError: there are no two classes in dimension `class_dim` of an output.
    """
    shape, dim = tuple(samples.shape[1:]), class_dim
    if len(shape) == 1 and dim < 0:
        raise ArgumentError(
            f"outputs of shape {shape} have one dimension, which is the batch's: for one logit of two classes say "
            "outputs='binary_logits'; for the classes of a single datum, class_dim=0"
        )
    if not -len(shape) <= dim < len(shape) or shape[dim] < 2:
        raise ArgumentError(
            f"outputs of shape {shape} have no two classes in dimension {dim}; "
            "for one logit of two classes say outputs='binary_logits'"
        )
    return samples.movedim(dim if dim < 0 else dim + 1, -1)


def check_outputs(samples: Tensor, outputs: str, class_dim: int) -> None:
    """Refuse "probabilities" that are none, and warn of "logits" that are probabilities already.

    Raises:
        ArgumentError: a probability is below 0, or those of an output don't sum to 1.
    """
    if outputs == "binary_logits" or not samples.numel():
        return
    samples = classes_last(samples.detach(), class_dim)
    unit = torch.finfo(samples.dtype).eps if samples.is_floating_point() else 0.0
    least = float(samples.min())
    off = float((samples.sum(-1, dtype=torch.promote_types(samples.dtype, torch.float32)) - 1).abs().max())
    if outputs == "probabilities" and (least < 0 or off > max(1e-3, 8 * unit)):  # never of what is not finite
        fact = f"a value of {least:.3g}" if least < 0 else f"classes whose sum is {off:.3g} away from 1"
        raise ArgumentError(
            f"outputs='probabilities', but an output has {fact}: if these are logits, leave outputs= out"
        )
    if outputs == "logits" and least >= 0 and off <= 16 * unit:
        warnings.warn(
            "every output is at least 0 and sums to 1 over the classes, as after a softmax, and is taken for logits: "
            "say outputs='probabilities'",
            VarifyWarning,
            stacklevel=4,
        )


def probability_samples(samples: Tensor, outputs: str, class_dim: int) -> Tensor:
    """Of each draw, `(n_samples, *batch, ..., classes)`, the classes' dimension last."""
    if outputs == "binary_logits":
        second = samples.sigmoid()
        return torch.stack([1 - second, second], -1)
    samples = classes_last(samples, class_dim)
    return samples if outputs == "probabilities" else samples.softmax(-1)


def log_probability_samples(samples: Tensor, outputs: str, class_dim: int) -> Tensor:
    """The logarithms of `probability_samples`, exact where a probability underflows."""
    if outputs == "binary_logits":
        return torch.stack([F.logsigmoid(-samples), F.logsigmoid(samples)], -1)
    samples = classes_last(samples, class_dim)
    return samples.log() if outputs == "probabilities" else samples.log_softmax(-1)


def entropy(p: Tensor) -> Tensor:
    """Of probabilities `(*, classes)`, nats, `(*)`."""
    found: Tensor = torch.special.entr(p).sum(-1)  # −p log p, 0 at 0
    return found


def covariances(p: Tensor) -> tuple[Tensor, Tensor]:
    """Epistemic and aleatoric, each `(*batch, ..., classes, classes)`, of the draws' probabilities (Kwon et al.)."""
    away = p - p.mean(0)
    epistemic = torch.einsum("s...i,s...j->...ij", away, away) / len(p)
    aleatoric = p.mean(0).diag_embed() - torch.einsum("s...i,s...j->...ij", p, p) / len(p)
    return epistemic, aleatoric
