"""Estimators give the outputs of transformers the mean, variance and covariances that drawn weights give them.

The outputs are several positions and channels of one example. Rows of a batch of equal examples have the distribution
of one, though they share a draw: a call counts as one observation, the mean over its rows.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import varify

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SIGMA = 0.05
DRAWS, CALLS, ROWS = 20_000, 300, 32
POSITIONS, CHANNELS = 4, 3
OUTPUTS = POSITIONS * CHANNELS
# 12 means and 78 variances and covariances of 4 networks in 3 comparisons, 1080 in all: were they normal, the largest
# would pass this limit in 1 of 1600 choices of the seeds.
LIMIT = 5.0
TOKENS = torch.tensor([[1, 2, 1, 5, 2, 7]])  # some twice, for the embedding; some have their logits among the outputs
PICTURE = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TEXT = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
SEEN = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "image_size": 16}
NETWORKS: dict[str, tuple[str, dict[str, Any], dict[str, Tensor]]] = {
    "BERT": (
        "BertModel",
        {**TEXT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        {"input_ids": TOKENS},
    ),
    "GPT-2": (  # its embedding is its last layer, too
        "GPT2LMHeadModel",
        {"vocab_size": 20, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 8, "bos_token_id": 1}
        | {"eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False},
        {"input_ids": TOKENS},
    ),
    "ViT": ("ViTModel", {**SEEN, "patch_size": 8}, {"pixel_values": PICTURE}),
    "Swin": (
        "SwinModel",
        {"embed_dim": 4, "depths": [2, 1], "num_heads": [1, 2], "window_size": 2, "patch_size": 2, "image_size": 16}
        | {"drop_path_rate": 0.0},
        {"pixel_values": PICTURE},
    ),
}


def made(name: str) -> nn.Module:
    kind, options, _ = NETWORKS[name]
    torch.manual_seed(1)
    network: nn.Module = getattr(transformers, kind)(getattr(transformers, kind).config_class(**options))
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)  # theirs is 0.02, which a sigma of 0.05 would drown
    return network


@torch.no_grad()
def drawn(name: str, seed: int, draws: int) -> Tensor:
    """`(draws, 1, OUTPUTS)` with drawn weights, without varify."""
    network, call = made(name), NETWORKS[name][2]
    torch.manual_seed(seed)

    def run(weights: dict[str, Tensor]) -> Tensor:
        return chosen(torch.func.functional_call(network, weights, (), call)[0])

    found = []
    for _ in range(draws // 1000):
        weights = {n: p + SIGMA * torch.randn(1000, *p.shape) for n, p in network.named_parameters()}
        found.append(torch.func.vmap(run, randomness="same")(weights))
    return torch.cat(found).double()


@torch.no_grad()
def estimated(name: str, estimator: str, seed: int) -> Tensor:
    """`(CALLS, ROWS, OUTPUTS)`."""
    vnet = varify.variationalize(made(name), init=varify.inits.Constant(SIGMA), estimator=estimator, where="*").train()
    batch = {key: value.expand(ROWS, *value.shape[1:]) for key, value in NETWORKS[name][2].items()}
    torch.manual_seed(seed)
    vnet(**batch)  # the first call draws the weights
    return torch.stack([chosen(vnet(**batch)[0]) for _ in range(CALLS)]).double()


def chosen(output: Tensor) -> Tensor:
    """`(rows, OUTPUTS)` of `(rows, positions, channels)`."""
    positions = torch.linspace(0, output.shape[1] - 1, POSITIONS).long()
    return output[:, positions, :CHANNELS].flatten(1)


def observations(y: Tensor, centre: Tensor) -> Tensor:
    """`(calls, 90)`: outputs and products of two, of their distances from `centre`, as means over rows."""
    y = y - centre
    first, second = torch.triu_indices(OUTPUTS, OUTPUTS)
    return torch.cat([y, y[..., first] * y[..., second]], -1).mean(1)


def z_scores(y: Tensor, reference: Tensor) -> Tensor:
    """`(90,)`: the difference of each mean, in standard errors."""
    centre = reference.mean((0, 1))
    a, b = observations(y, centre), observations(reference, centre)
    return (a.mean(0) - b.mean(0)) / (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap's, of attention and pooling
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_have_the_moments_that_drawn_weights_give_them(name: str) -> None:
    reference = drawn(name, 0, DRAWS)
    assert z_scores(drawn(name, 1, DRAWS), reference).abs().max() < LIMIT
    for estimator in ("auto", "flipout"):
        assert z_scores(estimated(name, estimator, 2), reference).abs().max() < LIMIT, estimator


def test_auto_takes_flipout_for_a_matrix_that_all_positions_of_an_example_meet() -> None:
    vnet = varify.variationalize(made("GPT-2"), estimator="auto").train()
    vnet(input_ids=TOKENS.expand(4, -1))
    told = {row.names[0]: row.estimator for row in vnet.summary().rows if row.names[0].endswith("c_attn.weight")}
    assert set(told.values()) == {"flipout"}
