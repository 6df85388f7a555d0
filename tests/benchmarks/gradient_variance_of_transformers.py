"""Variance of the gradient with estimator="auto" for transformers with random weights, relative to drawn weights.

    python -m tests.benchmarks.gradient_variance_of_transformers [--repeats N]

On one batch of random data, the gradient of the loss is drawn many times with each estimator, without dropout. Printed
are, by network, the ratio of the variances summed over the entries of all matrices, and the median over matrices of
each one's ratio.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import varify
from tests import operators
from tests.benchmarks.gradient_variance import variances
from tests.zoo.entries import floats, tokens

BATCH = 8
TEXT = {"vocab_size": 500, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
READ = {"input_ids": tokens(BATCH, 16, high=500)}
SEEN = {"pixel_values": floats(BATCH, 3, 32, 32), "labels": tokens(BATCH, high=10)}
NETWORKS: dict[str, tuple[str, dict[str, Any], dict[str, Tensor]]] = {
    "BERT": (
        "BertForSequenceClassification",
        {**TEXT, "intermediate_size": 256, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        | {"num_labels": 10},
        {**READ, "labels": tokens(BATCH, high=10)},
    ),
    "GPT-2": (
        "GPT2LMHeadModel",
        {"vocab_size": 500, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 32, "use_cache": False}
        | {"bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        {**READ, "labels": READ["input_ids"]},
    ),
    "ViT": (
        "ViTForImageClassification",
        {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256}
        | {"image_size": 32, "patch_size": 8, "num_labels": 10},
        SEEN,
    ),
    "Swin": (
        "SwinForImageClassification",
        {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 4, "image_size": 32}
        | {"drop_path_rate": 0.0, "num_labels": 10},
        SEEN,
    ),
}


def found(name: str, estimator: str, repeats: int) -> tuple[dict[str, float], float]:
    """See `variances`; of parameters of two or more dimensions."""
    import transformers

    kind, options, call = NETWORKS[name]
    torch.manual_seed(0)
    network = getattr(transformers, kind)(getattr(transformers, kind).config_class(**options))
    vnet = varify.variationalize(network, prior="gaussian", init="relative", estimator=estimator).train()
    loss: Callable[[], Tensor] = lambda: vnet(**call).loss  # noqa: E731
    loss()  # the first call draws the weights
    torch.manual_seed(1)
    every, seconds = variances(vnet, loss, repeats)
    matrices = {n for n, q in vnet.posteriors.items() if q.mu.dim() > 1}
    return {key: value for key, value in every.items() if key.split()[1] in matrices}, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=400)
    repeats = parser.parse_args().repeats
    operators.declare()
    print(f"{repeats} draws, batch {BATCH}; variance of the gradient with auto / with drawn weights\n")
    print("| network | mu, all matrices | rho, all matrices | mu, median matrix | rho, median matrix | time |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in NETWORKS:
        (drawn, slow), (auto, fast) = (found(name, estimator, repeats) for estimator in ("weights", "auto"))
        figures = []
        for summary in (_of_all, _median):
            figures += [summary(auto, drawn, kind) for kind in ("mu", "rho")]
        print(f"| {name} | " + " | ".join(f"{f:.3f}" for f in (*figures, fast / slow)) + " |", flush=True)


def _of_all(variance: dict[str, float], other: dict[str, float], kind: str) -> float:
    keys = [key for key in other if key.startswith(kind)]
    return sum(variance[key] for key in keys) / sum(other[key] for key in keys)


def _median(variance: dict[str, float], other: dict[str, float], kind: str) -> float:
    return statistics.median(variance[key] / other[key] for key in other if key.startswith(kind) and other[key] > 0)


if __name__ == "__main__":
    main()
