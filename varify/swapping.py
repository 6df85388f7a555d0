"""Running a module of the user's own with other weights in the place of its parameters."""

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import GeneratorType
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from varify.recomputing import recomputing
from varify.turns import Turns


@dataclass
class Swap:
    """Weights, by name within `module`, in the place of its parameters; `turns` are the network's."""

    module: nn.Module
    weights: Mapping[str, Tensor]
    turns: Turns | None
    _inside: int = 0

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`function(*args, **kwargs)` with the weights in place; they are as before afterwards, whatever happens."""
        if self._inside:  # recomputed within the forward itself: on another thread, taking turns would wait for ever
            return function(*args, **kwargs)
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
        cached, parametrize._cache_enabled = parametrize._cache_enabled, 0  # else all draws would be the first
        self._inside += 1
        try:
            for table, attr, parameter in places:
                table[attr] = wanted[id(parameter)]  # type: ignore[assignment]  # a plain tensor serves as well
            for part, _ in lists:
                part._flat_weights = [getattr(part, name, None) for name in part._flat_weights_names]
            yield
        finally:
            self._inside -= 1
            parametrize._cache_enabled = cached
            for table, attr, parameter in places:
                table[attr] = parameter
            for part, flat in lists:
                part._flat_weights = flat


def run_with(
    module: nn.Module,
    weights: dict[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    holder: nn.Module | None = None,
) -> Any:
    """Call `module` with `weights` in the place of parameters; as it was afterwards.

    The weights are by name within `holder`, which is `module` itself if there is none.
    """
    swap = Swap(holder or module, weights, Turns.taken())
    output = swap.call(module, *args, **kwargs)
    leaves = pytree.tree_leaves(output)
    if not any(isinstance(leaf, GeneratorType) for leaf in leaves):
        return output
    return pytree.tree_map(lambda leaf: _stepwise(leaf, swap) if isinstance(leaf, GeneratorType) else leaf, output)


def _stepwise(generator: Generator[Any, Any, Any], swap: Swap) -> Generator[Any, Any, Any]:
    """A generator whose body runs later, step by step, with the weights of the call that made it."""
    step, given = generator.send, None
    while True:
        try:
            value = swap.call(step, given)
        except StopIteration as end:
            return end.value
        try:
            step, given = generator.send, (yield value)
        except GeneratorExit:
            swap.call(generator.close)
            raise
        except BaseException as error:
            step, given = generator.throw, error  # type: ignore[assignment]
