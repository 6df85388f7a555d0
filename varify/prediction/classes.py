"""The outputs of a classifier's draws as probabilities, and what these say of a label."""

import torch
import torch.nn.functional as F
from torch import Tensor

from varify.errors import ArgumentError

OUTPUTS = ("logits", "probabilities", "binary_logits")


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
