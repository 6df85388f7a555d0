"""Running a module of the user's own with other weights in the place of its parameters."""

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from types import GeneratorType
from typing import Any, NamedTuple

from torch import Tensor, nn

from varify.recomputing import recomputing
from varify.turns import Turns


class Swap(NamedTuple):
    """Weights, by name within `module`, in the place of its parameters; `turns` are the network's."""

    module: nn.Module
    weights: Mapping[str, Tensor]
    turns: Turns | None

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`function(*args, **kwargs)` with the weights in place; they are as before afterwards, whatever happens."""
        with self.turns.writing() if self.turns else nullcontext(), recomputing(self._around), self._in_place():
            return function(*args, **kwargs)

    def _around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return partial(self.call, function)

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        # Every place of a parameter once. torch.func.functional_call takes a module that is shared for two, and so
        # leaves the weights in it.
        names = dict(self.module.named_parameters(remove_duplicate=False))
        wanted = {id(names[name]): weight for name, weight in self.weights.items()}
        parts = list(self.module.modules())
        places = [(part._parameters, attr, p) for part in parts for attr, p in part._parameters.items()]
        places = [place for place in places if id(place[2]) in wanted]
        # recurrent layers keep a list of their weights besides
        lists = [(part, part._flat_weights) for part in parts if isinstance(part, nn.RNNBase)]
        try:
            for table, attr, parameter in places:
                table[attr] = wanted[id(parameter)]  # type: ignore[assignment]  # a plain tensor serves as well
            for part, _ in lists:
                part._flat_weights = [getattr(part, name, None) for name in part._flat_weights_names]
            yield
        finally:
            for table, attr, parameter in places:
                table[attr] = parameter
            for part, flat in lists:
                part._flat_weights = flat


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
