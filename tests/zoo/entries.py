"""One architecture of the zoo: how it is made, and a call of it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Entry(NamedTuple):
    """`make()` builds the network with random weights; `call()` gives (args, kwargs) for it."""

    make: Callable[[], nn.Module]
    call: Callable[[], Call]


def pixels(size: int, batch: int = 2, channels: int = 3) -> Callable[[], Call]:
    return lambda: ((floats(batch, channels, size, size),), {})


def floats(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(*shape: int, high: int = 50, seed: int = 0) -> Tensor:
    return torch.randint(3, high, shape, generator=torch.Generator().manual_seed(seed))


def positional(*args: Any) -> Callable[[], Call]:
    return lambda: (args, {})


def keywords(**kwargs: Any) -> Callable[[], Call]:
    return lambda: ((), dict(kwargs))


Zoo = Mapping[str, Entry]
