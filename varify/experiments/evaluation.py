"""How good a network is, and how well it knows it."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score, roc_auc_score
from torch import Tensor, nn

from varify import Prediction, VariationalModule
from varify.experiments.progress import shown

BINS = 10
BATCH = 1000


@dataclass(frozen=True)
class Evaluation:
    """One network on held-out images and on images of another kind.

    Attributes:
        probabilities: of the held-out images, `(n, classes)`.
        labels: of these, `(n,)`.
        entropy: of them, `(n,)`, nats; `other_entropy` of the others.
        metrics: accuracy, NLL (nats per image), expected calibration error (10 bins, top label), Brier score (the sum
            over classes), and AUROC of the entropy as a detector of the others.
    """

    probabilities: Tensor
    labels: Tensor
    entropy: Tensor
    other_entropy: Tensor
    metrics: dict[str, float]


def evaluate(
    network: nn.Module,
    held_out: tuple[Tensor, Tensor],
    other: Tensor,
    n_samples: int,
    seed: int,
    title: str | None = None,
) -> Evaluation:
    """The network's predictions and their metrics; of a variational one, with `n_samples` draws under `seed`.

    Each batch of both sets meets the same weights, as in `uncertainty_of`, so that both tell the same figures. With a
    title, it is shown how far this is.
    """
    images, labels = held_out
    log_p, others = (log_probabilities(network, inputs, n_samples, seed, title) for inputs in (images, other))
    entropies = [torch.special.entr(x.exp()).sum(1) for x in (log_p, others)]
    p = log_p.exp()
    metrics = {
        "accuracy": accuracy_score(labels.cpu(), p.argmax(1).cpu()),
        "nll": F.nll_loss(log_p, labels),
        "ece": calibration_error(p.cpu(), labels.cpu()),
        "brier": (p - F.one_hot(labels, p.shape[1])).square().sum(1).mean(),
        "ood_auroc": detection(entropies[0], entropies[1]),
    }
    figures = {name: float(value) for name, value in metrics.items()}
    return Evaluation(p.cpu(), labels.cpu(), entropies[0].cpu(), entropies[1].cpu(), figures)


def detection(inside: Tensor, outside: Tensor) -> float:
    """AUROC of a score, `(n,)` and `(m,)`, which is to be greater outside."""
    is_outside = torch.cat([torch.zeros(len(inside)), torch.ones(len(outside))])
    return float(roc_auc_score(is_outside, torch.cat([inside, outside]).cpu()))


def calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """Expected calibration error of the top label, `(n, classes)` and `(n,)`: mean over the data of |bin's gap|."""
    confidence, label = (x.numpy() for x in probabilities.max(1))
    right = label == labels.numpy()
    share, mean = calibration_curve(right, confidence.clip(0, 1), n_bins=BINS)
    # scikit-learn gives the curve of the bins that have data, each open below
    sizes = np.bincount(np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], confidence.clip(0, 1)), minlength=BINS)
    return float((abs(share - mean) * sizes[sizes > 0]).sum() / len(right))


def nll(network: nn.Module, images: Tensor, labels: Tensor, n_samples: int) -> float:
    """Of the predictive distribution, nats per image; torch's random numbers stay as they are."""
    return float(F.nll_loss(log_probabilities(network, images, n_samples, seed=0), labels))


@torch.no_grad()
def log_probabilities(
    network: nn.Module, inputs: Tensor, n_samples: int, seed: int, title: str | None = None
) -> Tensor:
    """`(n, classes)`, in double precision: a mean of probabilities near 1 needs the digits for its logarithm."""
    parts = []
    for x in shown(inputs.split(BATCH), title):
        if isinstance(network, VariationalModule):
            samples = network.predict(x, n_samples=n_samples, seed=seed).samples
            parts.append(Prediction(samples.double()).probabilities().log())
        else:
            parts.append(network.eval()(x).double().log_softmax(1))
    return torch.cat(parts)
