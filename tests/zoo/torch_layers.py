"""Every layer of torch.nn that has parameters, with its options, and torch's ways of reparametrizing one."""

import itertools
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from tests.zoo.entries import Entry, Zoo, floats, positional, tokens

POINTS = {1: (8,), 2: (8, 8), 3: (6, 6, 6)}
SPREAD = {"stride": 2, "padding": 1, "dilation": 2, "groups": 2}
LABELS = torch.tensor([0, 3, 7, 2])


def entries() -> Zoo:
    zoo = {**_dense(), **_convolutions(), **_normalisations(), **_recurrent(), **_attention(), **_reparametrized()}
    return {name: Entry(make, positional(*args)) for name, (make, args) in zoo.items()}


Made = dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...]]]


def _dense() -> Made:
    bag = (tokens(2, 4, high=9), None, floats(2, 4))
    return {
        "Linear": (partial(nn.Linear, 3, 2), (floats(4, 3),)),
        "Linear(bias=False)": (partial(nn.Linear, 3, 2, bias=False), (floats(2, 4, 3),)),
        "Bilinear": (partial(nn.Bilinear, 3, 4, 2), (floats(5, 3), floats(5, 4))),
        "PReLU": (partial(nn.PReLU, 3), (floats(4, 3),)),
        "Embedding": (partial(nn.Embedding, 9, 3), (tokens(2, 4, high=9),)),
        "Embedding(padding_idx, max_norm)": (
            partial(nn.Embedding, 9, 3, padding_idx=4, scale_grad_by_freq=True),
            (tokens(2, 4, high=9),),
        ),
        "EmbeddingBag": (partial(nn.EmbeddingBag, 9, 3), (tokens(2, 4, high=9),)),
        "EmbeddingBag(sum)": (partial(nn.EmbeddingBag, 9, 3, mode="sum"), bag),
        "EmbeddingBag(max)": (partial(nn.EmbeddingBag, 9, 3, mode="max"), (tokens(2, 4, high=9),)),
        "AdaptiveLogSoftmaxWithLoss": (
            partial(nn.AdaptiveLogSoftmaxWithLoss, 6, 8, cutoffs=[3, 5], head_bias=True),
            (floats(4, 6), LABELS),
        ),
        "ParameterList, ParameterDict": (_Collections, (floats(4, 3),)),
    }


def _convolutions() -> Made:
    zoo: Made = {}
    for dims, size in POINTS.items():
        conv, transposed = getattr(nn, f"Conv{dims}d"), getattr(nn, f"ConvTranspose{dims}d")
        x = floats(2, 4, *size)
        zoo[conv.__name__] = (partial(conv, 4, 6, 3), (x,))
        zoo[f"{conv.__name__}(stride, padding, dilation, groups)"] = (partial(conv, 4, 6, 2, **SPREAD), (x,))
        zoo[f"{conv.__name__}(same)"] = (partial(conv, 4, 6, 3, padding="same", bias=False), (x,))
        for mode in ("reflect", "replicate", "circular"):
            zoo[f"{conv.__name__}({mode})"] = (partial(conv, 4, 6, 3, padding=1, padding_mode=mode), (x,))
        zoo[transposed.__name__] = (partial(transposed, 4, 6, 3, output_padding=1, stride=2, groups=2), (x,))
    return zoo


def _normalisations() -> Made:
    zoo: Made = {}
    body = partial(nn.Sequential)
    for dims, size in POINTS.items():
        x = floats(3, 4, *size)
        conv = getattr(nn, f"Conv{dims}d")
        for norm in (getattr(nn, f"BatchNorm{dims}d"), getattr(nn, f"InstanceNorm{dims}d")):
            zoo[norm.__name__] = (lambda c=conv, n=norm: body(c(4, 4, 1), n(4, affine=True)), (x,))
            zoo[f"{norm.__name__}(other statistics)"] = (
                lambda c=conv, n=norm: body(
                    c(4, 4, 1), n(4, affine=True, track_running_stats=n.__name__.startswith("I"), momentum=0.3)
                ),
                (x,),
            )
    image = floats(3, 4, 5, 5)
    zoo["GroupNorm"] = (lambda: body(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4)), (image,))
    zoo["LayerNorm"] = (lambda: body(nn.Linear(5, 5), nn.LayerNorm(5)), (image,))
    zoo["RMSNorm"] = (lambda: body(nn.Linear(5, 5), nn.RMSNorm(5)), (image,))
    zoo["SyncBatchNorm in eval, BatchNorm1d in train"] = (_Synced, (floats(6, 4),))
    return zoo


def _recurrent() -> Made:
    zoo: Made = {}
    x = floats(3, 5, 4)
    for kind in (nn.RNN, nn.LSTM, nn.GRU):
        for layers, bias, batch_first, dropout, both in itertools.product(
            (1, 2), (True, False), (True, False), (0.0, 0.3), (True, False)
        ):
            if dropout and layers == 1:
                continue
            options = {"num_layers": layers, "bias": bias, "batch_first": batch_first, "dropout": dropout}
            told = [f"{k}={v}" for k, v in {**options, "bidirectional": both}.items()]
            zoo[f"{kind.__name__}({', '.join(told)})"] = (partial(kind, 4, 3, bidirectional=both, **options), (x,))
    zoo["RNN(relu)"] = (partial(nn.RNN, 4, 3, nonlinearity="relu"), (x,))
    zoo["LSTM(proj_size)"] = (partial(nn.LSTM, 4, 3, proj_size=2, num_layers=2), (x,))
    zoo["LSTM with a state"] = (partial(nn.LSTM, 4, 3), (x, (floats(1, 5, 3), floats(1, 5, 3, seed=1))))
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 3, 2, 2, 1]))
    zoo["GRU of a packed sequence"] = (partial(nn.GRU, 4, 3), (packed,))
    for cell in (nn.RNNCell, nn.GRUCell):
        zoo[cell.__name__] = (partial(cell, 4, 3), (floats(5, 4), floats(5, 3)))
    zoo["LSTMCell"] = (partial(nn.LSTMCell, 4, 3), (floats(5, 4), (floats(5, 3), floats(5, 3, seed=1))))
    return zoo


def _attention() -> Made:
    x, memory = floats(3, 2, 8), floats(4, 2, 8, seed=1)
    layer = {"d_model": 8, "nhead": 2, "dim_feedforward": 12}
    zoo: Made = {
        "MultiheadAttention": (partial(nn.MultiheadAttention, 8, 2), (x, x, x)),
        "MultiheadAttention(kdim, vdim, bias_kv)": (
            partial(nn.MultiheadAttention, 8, 2, kdim=5, vdim=6, add_bias_kv=True, add_zero_attn=True, dropout=0.2),
            (x, floats(4, 2, 5), floats(4, 2, 6)),
        ),
        "Transformer": (
            partial(nn.Transformer, num_encoder_layers=1, num_decoder_layers=1, **layer),
            (x, memory),
        ),
        "TransformerEncoder of nested tensors": (
            lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(**layer, batch_first=True), 2),
            (x,),
        ),
        "TransformerDecoder": (
            lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(**layer), 2),
            (x, memory),
        ),
    }
    for norm_first, activation in itertools.product((True, False), ("relu", "gelu")):
        options: dict[str, Any] = {**layer, "norm_first": norm_first, "activation": activation}
        told = f"norm_first={norm_first}, {activation}"
        zoo[f"TransformerEncoderLayer({told})"] = (partial(nn.TransformerEncoderLayer, **options), (x,))
        zoo[f"TransformerDecoderLayer({told})"] = (partial(nn.TransformerDecoderLayer, **options), (x, memory))
    return zoo


def _reparametrized() -> Made:
    x = floats(4, 3)

    def old_style(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # deprecated, yet in many a checkpoint
            return nn.Sequential(wrap(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))

    def shared() -> nn.Module:
        network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        network[1].weight = network[0].weight
        return network

    def pruned() -> nn.Module:
        return prune.l1_unstructured(nn.Linear(3, 4), "weight", amount=0.5)

    def own() -> nn.Module:
        network = nn.Linear(3, 3)
        parametrize.register_parametrization(network, "weight", _Symmetric())
        parametrize.register_parametrization(network, "weight", _Scaled())
        return network

    return {
        "parametrizations.weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(3, 4)), (x,)),
        "parametrizations.spectral_norm": (lambda: parametrizations.spectral_norm(nn.Linear(3, 4)), (x,)),
        "parametrizations.orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(3, 3)), (x,)),
        "parametrizations.orthogonal(cayley)": (
            lambda: parametrizations.orthogonal(nn.Linear(3, 3), orthogonal_map="cayley"),
            (x,),
        ),
        "parametrize.register_parametrization": (own, (x,)),
        "utils.weight_norm": (lambda: old_style(nn.utils.weight_norm), (x,)),
        "utils.spectral_norm": (lambda: old_style(nn.utils.spectral_norm), (x,)),
        "utils.prune": (pruned, (x,)),
        "a tied weight": (shared, (x,)),
    }


class _Collections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.some = nn.ParameterList([torch.rand(3), torch.rand(3)])
        self.named = nn.ParameterDict({"w": nn.Parameter(torch.rand(3, 2)), "b": nn.Parameter(torch.rand(2))})

    def forward(self, x: Tensor) -> Tensor:
        for scale in self.some:
            x = x * scale
        return x @ self.named["w"] + self.named["b"]


class _Synced(nn.Module):
    """SyncBatchNorm needs a GPU in training."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.plain, self.synced = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.SyncBatchNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(self.fc(x)) if self.training else self.synced(self.fc(x))


class _Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).mT


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.3))

    def forward(self, w: Tensor) -> Tensor:
        return w * self.scale
