"""How good probabilities of classes are, given the labels."""

import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from varify.errors import ArgumentError

# What `torch.as_tensor` takes: a tensor, an array, a list of numbers.
TensorLike = Tensor | ArrayLike


def check_labels(labels: TensorLike, like: Tensor) -> Tensor:
    """The labels as integers beside probabilities `(*labels, classes)`.

    Raises:
        ArgumentError: they have another shape, are no whole numbers, or are beyond the classes.
    """
    labels = torch.as_tensor(labels)
    shape, classes = tuple(like.shape[:-1]), like.shape[-1]
    if tuple(labels.shape) != shape:
        raise ArgumentError(
            f"the labels have shape {tuple(labels.shape)}; with the classes' dimension left out the prediction has "
            f"{shape}: a label is one whole number, no indicator of {classes} entries"
        )
    whole = labels.long()
    if labels.is_floating_point() and not torch.equal(whole.to(labels.dtype), labels):
        raise ArgumentError(
            "the targets are no whole numbers, so they are no labels: for a regression say "
            "likelihood=varify.GaussianLikelihood(), the one it was trained with"
        )
    if labels.numel() and not 0 <= int(whole.min()) <= int(whole.max()) < classes:
        raise ArgumentError(
            f"labels must lie within [0, {classes}), got {int(whole.min())} to {int(whole.max())}: leave out what has "
            "no label, Prediction(prediction.samples[:, keep]) and labels[keep]"
        )
    return whole.to(like.device)


def log_prob_of_labels(log_p: Tensor, labels: TensorLike) -> Tensor:
    """`(n_samples, *labels, classes)` to that of each label by draw, `(n_samples, *labels)`."""
    index = check_labels(labels, log_p[0]).expand(log_p.shape[:-1])
    return log_p.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def accuracy(p: Tensor, labels: TensorLike) -> Tensor:
    """Share of labels that are the most probable class."""
    return (p.argmax(-1) == check_labels(labels, p)).to(p.dtype).mean()


def brier(p: Tensor, labels: TensorLike) -> Tensor:
    """Mean over labels of the sum over classes of squared differences."""
    indicator = F.one_hot(check_labels(labels, p), p.shape[-1])
    return (p - indicator).square().sum(-1).mean()


def calibration_error(p: Tensor, labels: TensorLike, n_bins: int) -> Tensor:
    """Expected calibration error of the top label, in bins of equal width, each open below; NaN of no data."""
    right = (p.argmax(-1) == check_labels(labels, p)).to(p.dtype).flatten()
    confidence = p.max(-1).values.flatten()
    edges = torch.linspace(0, 1, n_bins + 1, dtype=p.dtype, device=p.device)[1:-1]
    # a bin's share of the data times the gap of its means is its gap of sums over the number of data
    gaps = torch.zeros(n_bins, dtype=p.dtype, device=p.device)
    gaps.index_add_(0, torch.bucketize(confidence, edges), right - confidence)
    return gaps.abs().sum() / len(right)
