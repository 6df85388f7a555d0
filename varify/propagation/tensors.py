"""Tensors without storage that stand for Gaussians while the user's own code runs: an operation on them is its rule."""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from varify.errors import PropagationError
from varify.graph.recording import inside
from varify.propagation.rules import Uncertain, canonical, find_rule

# Queries that need no numbers.
_ANSWERED = frozenset(
    {f"get {name}" for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "itemsize")}
    | {f"get {name}" for name in ("is_cuda", "is_cpu", "is_meta", "is_mps", "is_sparse", "is_quantized", "is_nested")}
    | {"size", "dim", "numel", "nelement", "ndimension", "is_floating_point", "is_complex", "is_contiguous"}
    | {"element_size", "get_device", "is_inference", "is_same_size"}
)
_TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = str(Path(__file__).parents[1]) + os.sep


class UncertainTensor(Tensor):
    """What the user's code meets in the place of a tensor that is random.

    Attributes:
        gaussian: its mean and variance.
        shares: whether another such tensor is a view of this one, or this one of another.
        owns: whether its memory is this call's, and that of its views alone: it is not that of a parameter, and no
            other tensor has the same variance beside another mean.
    """

    gaussian: Uncertain
    shares: bool
    owns: bool

    @staticmethod
    def __new__(cls, gaussian: Uncertain, owns: bool = True) -> "UncertainTensor":  # noqa: D102
        mean, var = gaussian.mean, gaussian.var
        new: Any = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, mean.shape, dtype=mean.dtype, device=mean.device, requires_grad=mean.requires_grad or var.requires_grad
        )
        new.gaussian, new.shares, new.owns = gaussian, False, owns
        return new  # type: ignore[no-any-return]

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()

    @classmethod
    def __torch_function__(
        cls, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, canonical(func)
        if name in _ANSWERED:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if name == "__len__":
            return args[0].shape[0]
        rule = find_rule(func)
        if rule is not None:
            return _wrapped(_called(rule, func, args, kwargs), _uncertain((args, kwargs)))
        inner = inside(func)
        if inner is not None:
            return inner(*args, **kwargs)
        if name == "__setitem__" or (isinstance(name, str) and name.endswith("_") and not name.endswith("__")):
            return _in_place(func, str(name), args, kwargs)
        raise _refused(func, "it has no rule")

    @classmethod
    def __torch_dispatch__(cls, func: object, types: object, args: object = (), kwargs: object = None) -> Any:  # type: ignore[override]
        raise _refused(func, "it runs where torch functions are not seen, as in TorchScript")

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"UncertainTensor(shape={tuple(self.gaussian.mean.shape)})"


def gaussians_of(value: object) -> Any:
    """The value with Gaussians in the place of the tensors that stand for them; lists and tuples alike."""
    if isinstance(value, UncertainTensor):
        return value.gaussian
    if isinstance(value, (list, tuple)) and any(isinstance(v, UncertainTensor) for v in value):
        return [gaussians_of(v) for v in value]
    return value


def _called(rule: Callable[..., Any], func: object, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    positional, named = [gaussians_of(a) for a in args], {key: gaussians_of(a) for key, a in kwargs.items()}
    if "out" in named:
        raise _refused(func, "it writes into out=")
    try:
        return rule(func, *positional, **named)
    except PropagationError as error:
        raise _refused(func, str(error)) from None
    except TypeError as error:  # arguments that the rule does not know, or do not fit the operation
        raise _refused(func, f"its rule does not take these arguments ({error})") from error


def _uncertain(arguments: object) -> list[UncertainTensor]:
    return [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, UncertainTensor)]


def _wrapped(result: object, sources: list[UncertainTensor]) -> Any:
    """The result as a tensor for the user's code; notes which tensors have the same memory."""
    if isinstance(result, (list, tuple)):
        return type(result)([_wrapped(item, sources) for item in result])
    if not isinstance(result, Uncertain):
        return result
    for source in sources:
        if result is source.gaussian:  # the operation did nothing, such as dropout in eval mode
            return source
    # a variance that a rule has expanded, unlike the mean, is one number for several elements
    new = UncertainTensor(result, owns=0 not in result.var.stride() or 0 in result.mean.stride())
    for source in sources:
        alike = [_memory(a) == _memory(b) for a, b in zip(_both(result), _both(source.gaussian), strict=True)]
        if all(alike):
            source.shares = new.shares = True
            new.owns = source.owns
        elif any(alike):
            source.owns = new.owns = False
    return new


def _both(gaussian: Uncertain) -> tuple[Tensor, Tensor]:
    return gaussian.mean, gaussian.var


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _in_place(func: object, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """An operation that writes its result into its first argument."""
    target = args[0]
    if not isinstance(target, UncertainTensor):
        raise _refused(func, "it would write what is uncertain into a tensor that is not: make a new tensor instead")
    if name == "__setitem__":
        result = _with_item(target.gaussian, args[1], gaussians_of(args[2]))
    else:
        plain = next((getattr(at, name[:-1]) for at in (Tensor, torch, torch._C._nn) if hasattr(at, name[:-1])), None)
        rule = find_rule(name[:-1])
        if rule is None or plain is None:
            raise _refused(func, "it has no rule")
        result = _called(rule, plain, args, kwargs)
        if result.mean.shape != target.shape or result.mean.dtype != target.dtype:
            raise _refused(func, "it would change a tensor's shape or type in place: make a new tensor instead")
    if not target.shares:
        # a rule may hand on the memory of an argument, such as the variance of x in x + 1, which may be a parameter's
        used = {_memory(t) for source in _uncertain((args, kwargs)) for t in _both(source.gaussian)}
        target.gaussian = Uncertain(*(t.clone() if _memory(t) in used else t for t in _both(result)))
        target.owns = True
        return target
    # what it is a view of, or a view of it, must see the result too
    if not target.owns:
        raise _refused(func, "it would write into a view of what is used elsewhere: make a new tensor instead")
    for old, new in zip(_both(target.gaussian), _both(result), strict=True):
        old.copy_(new)
    return target


def _with_item(gaussian: Uncertain, index: Any, value: Any) -> Uncertain:
    """A copy in which some elements are others."""
    mean, var = (t.clone() for t in _both(gaussian))
    mean[index], var[index] = (value.mean, value.var) if isinstance(value, Uncertain) else (value, 0.0)
    return Uncertain(mean, var)


# --- refusals


def _refused(func: object, why: str) -> PropagationError:
    name = canonical(func)
    name = name if isinstance(name, str) else getattr(name, "__name__", repr(name))
    return PropagationError(
        f"mean and variance can't be propagated through {name.removeprefix('get .')}{_place()}: {why}. "
        "vnet.predict draws weights instead, for any network; varify.propagation.rule adds a rule"
    )


def _place() -> str:
    """Where in the user's network the operation is: the module by its path, and the line of its code."""
    frame: FrameType | None = sys._getframe(1)
    module: nn.Module | None = None
    line = ""
    while frame is not None:
        code, owner = frame.f_code, frame.f_locals.get("self")
        if code is RUNS_NETWORK.__code__:
            network = frame.f_locals["network"]
            path = next((name for name, part in network.named_modules() if part is module), None)
            at = f" in {path or 'forward'} ({type(module).__name__})" if path is not None else ""
            return f"{at}{line}"
        if module is None and isinstance(owner, nn.Module):
            module = owner
        if not line and not code.co_filename.startswith((_TORCH, _HERE)):
            line = f", line {frame.f_lineno} of {code.co_filename}"
        frame = frame.f_back
    return line


def run_network(network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call the network; refusals look for the frame of this function to name the module that they are in."""
    return network(*args, **kwargs)


RUNS_NETWORK = run_network
