"""The network as a linear function of its weights: its value at the means, and its derivative times a weight's way."""

import re
import warnings
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from varify.errors import ArgumentError
from varify.prediction.vectorizing import FUSED_ATTENTION, FUSED_LAYERS, Off, Switch, Theta

Tensors = list[Tensor]
# f(theta) to the tensors that are linearized, and to those that are not
Parts = Callable[[Theta], tuple[Tensors, Tensors]]

# Kernels that have no derivative in forward mode, nor a second one in reverse mode; torch has others for each.
PLAIN_KERNELS = Off(
    FUSED_LAYERS,
    *FUSED_ATTENTION,
    Switch(torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled),
    Switch(torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled),
)


class Linearized:
    r"""$f(\mu) + J(\mu)(\theta - \mu)$ as a function of theta (Immer et al. 2021, arXiv:2008.08400).

    By `torch.func.jvp`, which can be vectorized over theta; where an operation has no forward-mode derivative, with
    torch's plain kernels; where it has none in these either, by differentiating the reverse mode's product. What the
    network detaches has no part in J, as in its gradients. Outputs that are not floating-point are those at mu.

    Args:
        run: the network's output for weights.
        means: mu, by name.
    """

    def __init__(self, run: Callable[[Theta], Any], means: Theta) -> None:
        self._run, self._means = run, means
        self._ways = [_forward, _forward_plainly, _reverse_plainly]
        _load_derivatives()

    def __call__(self, theta: Theta) -> Any:
        """The expansion's output for theta, in the structure of the network's own.

        Raises:
            ArgumentError: an operation can't be differentiated in any of these ways.
        """
        tangents = {name: theta[name].detach() - mu for name, mu in self._means.items()}
        template: list[Any] = []

        def parts(weights: Theta) -> tuple[Tensors, Tensors]:
            template[:] = [self._run(weights)]
            found = _tensors(template[0])
            return [x for x in found if _has_derivative(x)], [x for x in found if not _has_derivative(x)]

        first: Exception | None = None
        for way in self._ways:
            try:
                values, others = way(parts, self._means, tangents)
                self._ways = self._ways[self._ways.index(way) :]
                return _rebuilt(template.pop(), values, others)
            except Exception as error:
                first = first or error.with_traceback(None)  # whose frames hold tensors of the call
                template.clear()
        plain = self._run(self._means)  # the user's own error comes here again, by itself
        if not any(map(_has_derivative, _tensors(plain))):
            raise ArgumentError("linearized=True needs a network that returns floating-point tensors")
        raise ArgumentError(f"linearized=True needs the derivative by the weights, but {_told(first)}") from first


@cache
def _load_derivatives() -> None:
    with (
        warnings.catch_warnings()
    ):  # torch does so itself at its first jvp, and then warns of its own use of TorchScript
        warnings.simplefilter("ignore")
        import_module("torch._decomp.decompositions_for_jvp")


def _forward(parts: Parts, means: Theta, tangents: Theta) -> tuple[Tensors, Tensors]:
    jvp: Any = torch.func.jvp  # whose annotations know no aux
    values, moved, others = jvp(parts, (means,), (tangents,), has_aux=True)
    return [value + move for value, move in zip(values, moved, strict=True)], others


def _forward_plainly(parts: Parts, means: Theta, tangents: Theta) -> tuple[Tensors, Tensors]:
    with PLAIN_KERNELS:
        return _forward(parts, means, tangents)


@torch.enable_grad()
def _reverse_plainly(parts: Parts, means: Theta, tangents: Theta) -> tuple[Tensors, Tensors]:
    """J v as the derivative by u of (Jᵀ u)·v, which is linear in u."""
    leaves = {name: mu.detach().requires_grad_() for name, mu in means.items()}
    with PLAIN_KERNELS:
        values, others = parts(leaves)
        if not values:
            raise RuntimeError("nothing to differentiate")
        steps = [_step(value, leaves, tangents) if value.requires_grad else torch.zeros_like(value) for value in values]
    return [value.detach() + step for value, step in zip(values, steps, strict=True)], [x.detach() for x in others]


def _step(value: Tensor, leaves: Theta, tangents: Theta) -> Tensor:
    """J v of one tensor."""
    u = torch.linspace(1, 2, value.numel(), dtype=value.dtype, device=value.device).view_as(value).requires_grad_()
    weights = list(leaves.values())
    gradients = torch.autograd.grad(value, weights, u, create_graph=True, retain_graph=True, allow_unused=True)
    pairs = [(g, tangents[name]) for name, g in zip(leaves, gradients, strict=True) if g is not None]
    if not pairs:
        return torch.zeros_like(value)
    moving = [(g, v) for g, v in pairs if g.requires_grad]
    step = torch.zeros_like(value)
    if moving:
        products, ways = zip(*moving, strict=True)
        (step,) = torch.autograd.grad(products, u, ways, retain_graph=True, allow_unused=True, materialize_grads=True)
    # A backward that can't be differentiated, which torch doesn't tell of here, has no part in the step: Jᵀu·v is u·Jv.
    one, other = [(g.detach() * v).sum() for g, v in pairs], (u.detach() * step).sum()
    rounding = torch.finfo(value.dtype).eps ** 0.5
    scale = sum((g.detach() * v).abs().sum() for g, v in pairs) + (u.detach() * step).abs().sum()
    if abs(sum(one) - other) > rounding * scale:
        raise RuntimeError("an operation's backward can't be differentiated")
    return step


def _told(error: Exception | None) -> str:
    """What torch says, in short; of an operation without a derivative, its name."""
    found = re.search(r"forward AD with (\S+)", str(error))
    return f"torch has none of {found[1]}" if found else f"torch says: {str(error).partition(chr(10))[0]}"


def _has_derivative(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _tensors(output: object) -> Tensors:
    found: Tensors = []
    mapped(lambda x: found.append(x) or x, output)  # type: ignore[func-returns-value]
    return found


def _rebuilt(template: object, values: Tensors, others: Tensors) -> Any:
    """The template with other tensors in the places of its own."""
    left, rest = iter(values), iter(others)
    return mapped(lambda x: next(left if _has_derivative(x) else rest), template)


def mapped(function: Callable[[Tensor], Tensor], output: object) -> Any:
    """The output with `function` of each of its tensors."""

    def of_leaf(leaf: object) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        if isinstance(leaf, PackedSequence):
            return leaf._replace(data=function(leaf.data))
        if is_dataclass(leaf) and not isinstance(leaf, type):
            return replace(leaf, **{f.name: mapped(function, getattr(leaf, f.name)) for f in fields(leaf) if f.init})
        return leaf

    return pytree.tree_map(of_leaf, output)
