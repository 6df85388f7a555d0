"""How good two networks are, and how well they know it."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varify import Prediction, VariationalModule
from varify.experiments import operators
from varify.experiments.data import Images

operators.declare()  # torchmetrics imports torchvision

from torchmetrics.functional.classification import (  # noqa: E402
    binary_auroc,
    multiclass_accuracy,
    multiclass_calibration_error,
)

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
    classes, labels = log_p.shape[1], images.test_labels
    metrics = {
        "accuracy": multiclass_accuracy(log_p, labels, classes, average="micro"),
        "nll": F.nll_loss(log_p, labels),
        "ece": multiclass_calibration_error(log_p.exp(), labels, classes, n_bins=BINS),
        "letters_auroc": binary_auroc(torch.cat(entropies), is_letter),
    }
    figures = {name: float(value) for name, value in metrics.items()}
    return Evaluation(log_p.exp().cpu(), labels.cpu(), entropies[0].cpu(), entropies[1].cpu(), figures)


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
