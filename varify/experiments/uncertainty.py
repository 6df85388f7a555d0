"""Where a network's uncertainty comes from, on its own data and on others (after PyTorch-BayesianCNN's study)."""

from dataclasses import dataclass

import torch
from torch import Tensor

import varify
from varify.experiments.evaluation import detection
from varify.experiments.progress import shown

NORMALIZATIONS = ("softmax", "normalized")
BATCH = 500


@dataclass(frozen=True)
class Uncertainty:
    """Of a set of inputs.

    Attributes:
        epistemic: by normalization, variance of the label by input and class, `(n, classes)`.
        aleatoric: likewise.
        entropy: of the prediction, `(n,)`, nats.
        mutual_information: of label and weights, `(n,)`, nats.
    """

    epistemic: dict[str, Tensor]
    aleatoric: dict[str, Tensor]
    entropy: Tensor
    mutual_information: Tensor

    def scores(self) -> dict[str, Tensor]:
        """By name, a number for each input, `(n,)`: variances are summed over the classes."""
        found = {}
        for kind in NORMALIZATIONS:
            found[f"epistemic, {kind}"] = self.epistemic[kind].sum(1)
            found[f"aleatoric, {kind}"] = self.aleatoric[kind].sum(1)
        return found | {"entropy": self.entropy, "mutual information": self.mutual_information}


@torch.no_grad()
def uncertainty_of(
    vnet: varify.VariationalModule, inputs: Tensor, n_samples: int, seed: int, title: str | None = None
) -> Uncertainty:
    """Of the inputs, `(n, channels, size, size)`, with `n_samples` draws of the weights, the same for each batch."""
    parts: dict[str, list[Tensor]] = {}
    for x in shown(inputs.split(BATCH), title):
        prediction = varify.Prediction(vnet.predict(x, n_samples=n_samples, seed=seed).samples.double())
        for kind in NORMALIZATIONS:
            pair = prediction.covariances(kind)
            for name, covariance in zip(("epistemic", "aleatoric"), pair, strict=True):
                parts.setdefault(f"{name} {kind}", []).append(covariance.diagonal(dim1=-2, dim2=-1).cpu())
        parts.setdefault("entropy", []).append(prediction.entropy().cpu())
        parts.setdefault("mutual", []).append(prediction.mutual_information().cpu())
    joined = {name: torch.cat(values) for name, values in parts.items()}
    sources = [{kind: joined[f"{name} {kind}"] for kind in NORMALIZATIONS} for name in ("epistemic", "aleatoric")]
    return Uncertainty(sources[0], sources[1], joined["entropy"], joined["mutual"])


def compared(inside: Uncertainty, outside: Uncertainty) -> dict[str, dict[str, float]]:
    """By score, its mean on both, and the AUROC with which it tells them apart."""
    pairs = {name: (score, outside.scores()[name]) for name, score in inside.scores().items()}
    return {
        name: {"inside": float(a.mean()), "outside": float(b.mean()), "auroc": detection(a, b)}
        for name, (a, b) in pairs.items()
    }
