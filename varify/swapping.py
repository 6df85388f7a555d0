"""Running a module of the user's own with other weights in the place of its parameters."""

from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext
from functools import partial
from types import GeneratorType
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.func import functional_call

from varify.recomputing import recomputing
from varify.turns import Turns


class Swap(NamedTuple):
    """Weights, by name within `module`, in the place of its parameters; `turns` are the network's."""

    module: nn.Module
    weights: dict[str, Tensor]
    turns: Turns | None

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`function(*args, **kwargs)` with the weights in place; they are as before afterwards, whatever happens."""
        named = {f"module.{name}": weight for name, weight in self.weights.items()}
        with self.turns.writing() if self.turns else nullcontext(), recomputing(self._around):
            try:
                return functional_call(_Caller(self.module), named, (function, args, kwargs))
            finally:
                for part in self.module.modules():
                    if isinstance(part, nn.RNNBase):  # else it keeps the drawn weights in its list of flat ones
                        part._init_flat_weights()

    def _around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return partial(self.call, function)


class _Caller(nn.Module):
    """What functional_call is given: a module that calls any function, and that nobody's hooks see."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def __call__(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return function(*args, **kwargs)


def run_with(module: nn.Module, weights: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call `module` with `weights` (by name within it) in the place of its parameters; as it was afterwards."""
    swap = Swap(module, weights, Turns.taken())
    output = swap.call(module, *args, **kwargs)
    return _stepwise(output, swap) if isinstance(output, GeneratorType) else output


def _stepwise(generator: Generator[Any, Any, Any], swap: Swap) -> Iterator[Any]:
    """A generator whose body runs later, step by step, with the weights of the call that made it."""
    end = object()
    while (value := swap.call(next, generator, end)) is not end:
        yield value
