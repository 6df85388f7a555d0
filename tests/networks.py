"""Networks that converters trip over, each with the calls to make of it."""

import random
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Case(NamedTuple):
    """`make()` builds the network, `calls` are (args, kwargs) to try on it; some can't be pickled even when plain."""

    make: Callable[[], nn.Module]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    pickles: bool = True


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect")
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False)
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(6 * 3 * 3, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.dropout(F.relu(self.conv2(x)), 0.4, self.training)
        return self.fc(self.drop(x.flatten(1)))


class TiedLanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embedding(tokens))))


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.again = self.inner

    def forward(self, x: Tensor) -> Tensor:
        return self.again(torch.relu(self.inner(x)))


class LoopedCell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 6)
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:  # (batch, time, 4)
        h = x.new_zeros(x.shape[0], 6)
        for t in range(3):
            h = self.cell(x[:, t], h)
        return self.out(h)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.rnn = kind(4, 5, num_layers=2, bidirectional=True, batch_first=True, dropout=0.2)
        self.out = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0][:, -1])


class SelfAttention(nn.Module):
    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.need_weights = need_weights
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y, weights = self.attention(x, x, x, key_padding_mask=mask, need_weights=self.need_weights)
        if weights is not None:
            y = y * (1 + weights.sum(-1, keepdim=True))
        return self.out(y)


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positive, self.negative = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.positive(x) if x.sum() > 0 else self.negative(x)


class OptionalMask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0, residual: bool = False) -> Tensor:
        y = self.fc(x) * scale
        if mask is not None:
            y = y * mask
        return y + x if residual else y


class DictOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, batch: dict[str, Tensor]) -> Any:
        y = self.fc(batch["x"])
        return OrderedDict(logits=y, extra=(y.exp(), None, "a name"), n=3)


class RawParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(2, 1, 3))
        self.matrix = nn.Parameter(torch.randn(4, 2))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.list = nn.ParameterList([torch.randn(2), torch.randn(2)])
        self.register_buffer("mean", torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:  # (batch, 1, 6)
        y = F.conv1d(x - self.mean.mean(), self.kernel)
        return self.scale * (y @ self.matrix) + self.list[0] - self.list[1]


class BranchOnType(nn.Module):
    """What fx would trace the wrong way without a word."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        xs = [x] if isinstance(x, torch.Tensor) else x
        return self.fc(torch.cat(list(xs), 1)) * (2 if type(xs) is list else 3)


class NoGradPart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.body(x)
        return self.head(x)


class Noisy(nn.Module):
    """Randomness and constants made within forward, which fx would freeze in."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(3)
        total += torch.randn(3)
        return self.fc(x + total) + torch.arange(3)


class LayerDrop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.training and torch.rand([]) < 0.5:
                continue
            x = torch.tanh(layer(x))
        return x


class Counting(nn.Module):
    """Keeps things it sees: attributes, a list, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.calls, self.seen = 0, []
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(tuple(x.shape))
        self.total += x.detach().sum()
        return self.fc(x) * self.calls


class CallCounter(nn.Module):
    """Nothing but a counter would give it away."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.calls = nn.Linear(3, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.fc(x) * self.calls


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * grad


class CustomFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(StraightThrough.apply(self.first(x)))


class Chunks(nn.Module):
    """An inner module returns as many chunks as fit."""

    class Splitter(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [x[i : i + 2] for i in range(0, len(x), 2)]

    def __init__(self) -> None:
        super().__init__()
        self.split, self.fc = Chunks.Splitter(), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.fc(part) for part in self.split(x)])


class TwoLayers(nn.Module):
    """`decide(a, b, x)` chooses between two layers, or does something else that a recording could get wrong."""

    def __init__(self, decide: Callable[[nn.Module, nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.decide = nn.Linear(3, 3), nn.Linear(3, 3), decide

    def forward(self, x: Tensor) -> Tensor:
        return self.decide(self.a, self.b, x)


def swallow(a: nn.Module, b: nn.Module, x: Tensor) -> Tensor:
    try:
        return a(x) if a(x).sum() > -1e9 else b(x)
    except Exception:
        return b(x)


def write_into_view(a: nn.Module, b: nn.Module, x: Tensor) -> Tensor:
    y = a(x)
    row = y[0]
    row += b(x)[1]
    alias = y
    alias *= 2
    return y


def own_generator(a: nn.Module, b: nn.Module, x: Tensor) -> Tensor:
    return a(x) + torch.randn(3, generator=torch.Generator().manual_seed(3))


def without_gradient(a: nn.Module, b: nn.Module, x: Tensor) -> Tensor:
    return a(torch.no_grad()(b)(x))  # no with statement of the network's own


HAZARDS: dict[str, Callable[[nn.Module, nn.Module, Tensor], Tensor]] = {
    "isinstance": lambda a, b, x: a(x) if isinstance(b(x), Tensor) else b(x),
    "no_grad by a decorator": without_gradient,
    "python's random": lambda a, b, x: a(x) if random.Random(int(torch.initial_seed())).random() < 2 else b(x),
    "a fresh constant": lambda a, b, x: a(x) + torch.zeros(3).add_(x[0]),
    "type()": lambda a, b, x: a(x) if type(b(x)) is Tensor else b(x),
    "identity": lambda a, b, x: a(x) if x.dtype is torch.float32 else b(x),
    "id()": lambda a, b, x: a(x) if id(x) == id(x) and id(a.weight) != id(b.weight) else b(x),
    "equal dtypes": lambda a, b, x: a(x) if x.dtype == torch.float32 else b(x),
    "dtype in a set": lambda a, b, x: a(x) if b(x).dtype in {torch.float32} else b(x),
    "size in a set": lambda a, b, x: a(x) if x.shape[0] in {4, 5} else b(x),
    "dict lookup": lambda a, b, x: {4: a, 5: b}.get(x.shape[0], nn.Identity())(x),
    "hasattr": lambda a, b, x: a(x) if hasattr(x, "no_such_thing") else b(x),
    "requires_grad": lambda a, b, x: a(x) if x.requires_grad == True else b(x),  # noqa: E712
    "printed": lambda a, b, x: a(x) if f"{x.shape[0]}" == "4" else b(x),
    "swallowed": swallow,
    "in place": write_into_view,
    "generator": own_generator,
}


def collide() -> nn.Module:
    net = nn.Sequential(OrderedDict(conv=nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), conv_1=nn.Linear(3, 3)))
    net.register_parameter("conv_1_weight", nn.Parameter(torch.zeros(2)))
    return net


def hooked() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    net[0].register_forward_hook(lambda module, args, output: output * 2)
    return net


def weight_norms() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, yet in many a checkpoint
        old_style = torch.nn.utils.weight_norm(nn.Linear(4, 3))
    return nn.Sequential(
        torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
        torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
        old_style,
    )


def encoder(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def _x(*shape: int) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))),), {}


def _with(call: Any, **kwargs: Any) -> Any:
    return call[0], kwargs


CASES = {
    **{
        name: Case(lambda decide=decide: TwoLayers(decide), [_x(4, 3), _x(5, 3)], False)
        for name, decide in HAZARDS.items()
    },
    "mlp": Case(lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2, bias=False)), [_x(4, 3), _x(3)]),
    "bare linear": Case(lambda: nn.Linear(3, 2), [_x(4, 3)]),
    "cnn": Case(ConvNet, [_x(4, 1, 8, 8)]),
    "tied": Case(TiedLanguageModel, [((torch.arange(10).reshape(2, 5),), {})]),
    "called twice": Case(CalledTwice, [_x(5, 4)]),
    "looped cell": Case(LoopedCell, [_x(2, 3, 4)]),
    "lstm": Case(Recurrent, [_x(2, 3, 4)]),
    "gru": Case(lambda: Recurrent(nn.GRU), [_x(2, 3, 4)]),
    "attention": Case(
        lambda: SelfAttention(True), [_x(2, 3, 8), _with(_x(2, 3, 8), mask=torch.tensor([[0, 0, 1], [0, 1, 1]]).bool())]
    ),
    "attention without weights": Case(lambda: SelfAttention(False), [_x(2, 3, 8)]),
    "transformer": Case(encoder, [_x(2, 3, 8)]),
    "transformer norm_first": Case(lambda: encoder(norm_first=True), [_x(2, 3, 8)]),
    "untraceable": Case(Untraceable, [_x(4, 3), ((-torch.ones(4, 3),), {}), ((torch.ones(4, 3),), {})]),
    "optional": Case(
        OptionalMask,
        [
            _x(4, 3),
            _with(_x(4, 3), mask=torch.tensor([1.0, 0, 1])),
            _with(_x(4, 3), mask=None, scale=2.0),
            _with(_x(4, 3), residual=True, scale=2),
            ((), {"mask": torch.ones(3), "x": torch.ones(4, 3)}),
        ],
    ),
    "dict output": Case(DictOutput, [(({"x": torch.ones(4, 3)},), {})]),
    "raw parameters": Case(RawParameters, [((torch.randn(3, 1, 6),), {})]),
    "branch on type": Case(BranchOnType, [_x(4, 3)]),
    "no_grad part": Case(NoGradPart, [_x(4, 3)]),
    "noisy": Case(Noisy, [_x(4, 3)]),
    "layer drop": Case(LayerDrop, [_x(4, 3)] * 4),
    "counting": Case(Counting, [_x(4, 3), _x(4, 3), _x(2, 3)]),
    "call counter": Case(CallCounter, [_x(4, 3)] * 3),
    "custom function": Case(CustomFunction, [_x(4, 3)]),
    "chunks": Case(Chunks, [_x(4, 3), _x(7, 3)]),
    "colliding names": Case(collide, [_x(4, 3)]),
    "hooked": Case(hooked, [_x(4, 3)], pickles=False),
    "weight norms": Case(weight_norms, [_x(4, 3)], pickles=False),
}


def seeded(case: Case) -> nn.Module:
    """The case's network, the same at every call."""
    torch.manual_seed(0)
    return case.make()
