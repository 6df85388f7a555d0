"""How good two networks are, and how well they know it."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score, roc_auc_score
from torch import Tensor, nn

from varify import Prediction, VariationalModule
from varify.experiments.data import Images

BINS = 10
BATCH = 1000


@dataclass(frozen=True)
class Evaluation:
    """One network on held-out images and on letters.

    Attributes:
        probabilities: of the held-out images, `(n, classes)`.
        entropy: of them, `(n,)`, nats; `letter_entropy` likewise.
        metrics: accuracy, NLL (nats per image), expected calibration error (10 bins, top label), and AUROC of the
            entropy as a detector of letters.
    """

    probabilities: Tensor
    labels: Tensor
    entropy: Tensor
    letter_entropy: Tensor
    metrics: dict[str, float]


def evaluate(network: nn.Module, images: Images, n_samples: int, seed: int) -> Evaluation:
    """The network's predictions and their metrics; of a variational one, with `n_samples` draws under `seed`."""
    torch.manual_seed(seed)
    log_p = _log_probabilities(network, images.test, n_samples)
    letters = _log_probabilities(network, images.letters, n_samples)
    entropies = [-(x.exp() * x).sum(1) for x in (log_p, letters)]
    is_letter = torch.cat([torch.full_like(x, i, dtype=torch.long) for i, x in enumerate(entropies)])
    labels = images.test_labels
    metrics = {
        "accuracy": accuracy_score(labels.cpu(), log_p.argmax(1).cpu()),
        "nll": F.nll_loss(log_p, labels),
        "ece": calibration_error(log_p.exp().cpu(), labels.cpu()),
        "letters_auroc": roc_auc_score(is_letter.cpu(), torch.cat(entropies).cpu()),
    }
    figures = {name: float(value) for name, value in metrics.items()}
    return Evaluation(log_p.exp().cpu(), labels.cpu(), entropies[0].cpu(), entropies[1].cpu(), figures)


def calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """Expected calibration error of the top label, `(n, classes)` and `(n,)`: mean over the data of |bin's gap|."""
    confidence, label = (x.numpy() for x in probabilities.max(1))
    right = label == labels.numpy()
    share, mean = calibration_curve(right, confidence.clip(0, 1), n_bins=BINS)
    # scikit-learn gives the curve of the bins that have data, each open below
    sizes = np.bincount(np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], confidence.clip(0, 1)), minlength=BINS)
    return float((abs(share - mean) * sizes[sizes > 0]).sum() / len(right))


@torch.no_grad()
def _log_probabilities(network: nn.Module, inputs: Tensor, n_samples: int) -> Tensor:
    """`(n, classes)`, in double precision: a mean of probabilities near 1 needs the digits for its logarithm."""
    parts = []
    for x in inputs.split(BATCH):
        if isinstance(network, VariationalModule):
            parts.append(Prediction(network.predict(x, n_samples=n_samples).samples.double()).probabilities().log())
        else:
            parts.append(network.eval()(x).double().log_softmax(1))
    return torch.cat(parts)
