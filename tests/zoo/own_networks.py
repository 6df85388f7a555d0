"""Ways of writing a network that converters trip over: those of `tests.networks`, and some more."""

import warnings
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import varify
from tests.networks import CASES
from tests.zoo.entries import Entry, Zoo, floats, positional


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([self.block(3, 4), self.block(4, 8)])
        self.bottom = self.block(8, 8)
        self.up = nn.ModuleList([nn.ConvTranspose2d(8, 8, 2, stride=2), nn.ConvTranspose2d(8, 4, 2, stride=2)])
        self.join = nn.ModuleList([self.block(16, 8), self.block(8, 4)])
        self.head = nn.Conv2d(4, 2, 1)

    @staticmethod
    def block(inside: int, outside: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inside, outside, 3, padding=1), nn.GroupNorm(2, outside), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for block in self.down:
            x = block(x)
            kept.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottom(x)
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([up(x), kept.pop()], 1))
        return self.head(x)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        parts = [nn.ModuleList([nn.Linear(3, 5), nn.Linear(5, 3)]) for _ in range(3)]
        # The reentrant kind goes through the graph of a weight's draw once for each checkpoint, so it can't be shared.
        self.parts = nn.ModuleList(parts if reentrant else [parts[0]] * 3)
        self.head, self.reentrant = nn.Linear(3, 2), reentrant

    def part(self, x: Tensor, i: int) -> Tensor:
        first, second = self.parts[i]
        return torch.tanh(second(F.dropout(torch.tanh(first(x)), 0.3, self.training)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.part(x, 0)
        for i in (1, 2):
            x = checkpoint(self.part, x, i, use_reentrant=self.reentrant)
        return self.head(x)


class CheckpointedLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint_sequential(self.layers, 2, x, use_reentrant=False)


class Stepwise(nn.Module):
    """Its forward is a generator, which runs when it is iterated over."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Iterator[Tensor]:
        for layer in self.layers:
            x = torch.tanh(layer(x))
            yield x


class SumOfSteps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps = Stepwise()

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack(list(self.steps(x))).sum(0)


class Packs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.out(nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])


class Nested(nn.Module):
    """A variational part within: it keeps its posterior, and the outer conversion takes the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), varify.variationalize(nn.Linear(4, 2), estimator="weights")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


class MultiScale(nn.Module):
    """One block at every scale, on raw parameters, as often as the input is long."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.bias = nn.Parameter(floats(3, 3, 3) / 3), nn.Parameter(floats(3) / 3)

    def forward(self, x: Tensor) -> Tensor:
        while x.shape[-1] > 2:
            x = F.avg_pool1d(torch.tanh(F.conv1d(x, self.kernel, self.bias, padding=1)), 2)
        return x.mean(-1)


class Ema(nn.Module):
    """Writes into buffers in forward, in place and anew."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.lerp_(x.detach().mean(0), 0.1)
            self.steps = self.steps + 1
        return self.fc(x - self.seen)


class NonLeaf(nn.Module):
    """Keeps a tensor that was computed from its parameters, which copy.deepcopy refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.cache = (self.fc.weight * 2).sum(0)

    def forward(self, x: Tensor) -> Tensor:
        self.cache = (self.fc.weight * 2).sum(0)
        return self.fc(x) + self.cache


class TrainingHead(nn.Module):
    """An auxiliary head that exists in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.extra = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = torch.relu(self.body(x))
        return (self.head(x), self.extra(x)) if self.training else self.head(x)


class SharedAttention(nn.Module):
    """One module at two places, which torch.fx can't follow; torch.func.functional_call takes it for two."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(4, 2)
        self.second = self.first
        self.cells = nn.ModuleList([nn.GRU(4, 4)] * 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        x = self.second(self.first(x, x, x)[0], x, x)[0]
        return self.cells[1](self.cells[0](x)[0])[0]


def hooked_everywhere() -> nn.Module:
    network = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Tanh()), nn.Linear(3, 2))
    network.register_forward_pre_hook(_double_input)
    network[1].register_forward_hook(_add_one)
    network[2].register_full_backward_hook(_triple)
    return network


def _double_input(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] * 2,)


def _add_one(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    return output + 1


def _triple(module: nn.Module, into: tuple[Tensor, ...], out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(3 * grad for grad in into)


def frozen_body() -> nn.Module:
    body = nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.ReLU()).requires_grad_(False)
    return nn.Sequential(body, nn.Flatten(), nn.Linear(15, 2))


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Conv1d(2, 3, 2), dim=None)


def entries() -> Zoo:
    x = positional(floats(4, 3))
    more = {
        "UNet": Entry(UNet, positional(floats(2, 3, 8, 8))),
        "checkpoint(use_reentrant=False)": Entry(partial(Checkpointed, False), x),
        "checkpoint(use_reentrant=True)": Entry(partial(Checkpointed, True), x),
        "checkpoint_sequential": Entry(CheckpointedLayers, x),
        "a forward that is a generator": Entry(SumOfSteps, x),
        "packs and pads": Entry(Packs, positional(floats(3, 5, 4), torch.tensor([2, 5, 3]))),
        "a variational part": Entry(Nested, x),
        "one block at every scale": Entry(MultiScale, positional(floats(2, 3, 16))),
        "buffers written in forward": Entry(Ema, x),
        "a non-leaf attribute": Entry(NonLeaf, x),
        "a head in training only": Entry(TrainingHead, x),
        "a module at two places": Entry(SharedAttention, positional(floats(3, 2, 4))),
        "hooks of all kinds": Entry(hooked_everywhere, x),
        "a frozen body": Entry(frozen_body, positional(floats(3, 2, 6))),
        "old weight_norm of a whole kernel": Entry(old_weight_norm, positional(floats(3, 2, 6))),
    }
    cases = {name: Entry(case.make, partial(_first_call, name)) for name, case in CASES.items()}
    return {**cases, **more}


def _first_call(name: str) -> tuple[tuple[object, ...], dict[str, object]]:
    return CASES[name].calls[0]
