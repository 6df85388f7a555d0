"""Running a module of the user's own with other weights in the place of its parameters."""

import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from types import GeneratorType
from typing import Any, NamedTuple

import torch.utils.checkpoint as checkpoint_module
from torch import Tensor, nn
from torch.func import functional_call

from varify.turns import Turns


class Swap(NamedTuple):
    """Weights, by name within `module`, in the place of its parameters; `turns` are the network's."""

    module: nn.Module
    weights: dict[str, Tensor]
    turns: Turns | None

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`function(*args, **kwargs)` with the weights in place; they are as before afterwards, whatever happens."""
        with ExitStack() as stack:
            if self.turns is not None:
                stack.enter_context(self.turns.writing())
            stack.enter_context(_recomputing_with(self))
            try:
                named = {f"module.{name}": weight for name, weight in self.weights.items()}
                return functional_call(_Caller(self.module), named, (function, args, kwargs))
            finally:
                for part in self.module.modules():
                    if isinstance(part, nn.RNNBase):  # else it keeps the drawn weights in its list of flat ones
                        part._init_flat_weights()


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


# --- torch.utils.checkpoint runs its function again in backward, when the weights are the module's own again: the
# gradients would be those of the means. So what is checkpointed within `Swap.call` is recomputed within it as well.

_within = threading.local()  # .swaps: those that this thread is in, the outermost first
_plain: dict[str, Any] = {}
_users, _lock = 0, threading.Lock()


@contextmanager
def _recomputing_with(swap: Swap) -> Iterator[None]:
    _install()
    before = getattr(_within, "swaps", ())
    _within.swaps = (*before, swap)
    try:
        yield
    finally:
        _within.swaps = before
        _uninstall()


def _install() -> None:
    """The two functions that torch.utils.checkpoint looks up, replaced while any thread is within a swap."""
    global _users
    with _lock:
        _users += 1
        if _users == 1:
            for name, stand_in in (
                ("_checkpoint_without_reentrant_generator", _non_reentrant),
                ("CheckpointFunction", _Reentrant),
            ):
                _plain[name] = getattr(checkpoint_module, name)
                setattr(checkpoint_module, name, stand_in)


def _uninstall() -> None:
    global _users
    with _lock:
        _users -= 1
        if _users == 0:
            for name, original in _plain.items():
                setattr(checkpoint_module, name, original)


def _non_reentrant(function: Any, *args: Any, **kwargs: Any) -> Any:
    # `checkpoint` itself runs the function the first time; what is handed on here is for later times.
    for swap in reversed(getattr(_within, "swaps", ())):
        function = _with(swap, function)
    return _plain["_checkpoint_without_reentrant_generator"](function, *args, **kwargs)


def _with(swap: Swap, function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: swap.call(function, *args, **kwargs)


class _Reentrant:
    """The reentrant kind calls backward within backward, which would go twice through the graph of a draw."""

    @staticmethod
    def apply(function: Any, preserve_rng_state: bool, *args: Any) -> Any:
        if not getattr(_within, "swaps", ()):
            return _plain["CheckpointFunction"].apply(function, preserve_rng_state, *args)
        return checkpoint_module.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)
