"""Many draws as one autograd function, its gradient written out: fewer passes over the weights than torch's own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

# A tensor of at least so many elements has a node of its own, so that backward frees its noise as soon as its gradient
# is there; all smaller ones share one, since calling it costs more than their arithmetic.
LARGE = 2**15
_ORDINARY = frozenset({Tensor, nn.Parameter})


def is_plain() -> bool:
    """Whether autograd alone looks on: no compiler, no transform of torch.func, no forward-mode differentiation."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._functorch.maybe_current_level() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def is_ordinary(*tensors: Tensor) -> bool:
    """Whether these are torch's own tensors: no subclass, such as a DTensor."""
    return all(type(tensor) in _ORDINARY for tensor in tensors)


def softplus_backward(grad: Tensor, rho: Tensor) -> Tensor:
    """The gradient of rho from that of softplus(rho), in one pass; differentiable."""
    found: Tensor = torch.ops.aten.softplus_backward(grad, rho, 1.0, 20.0)
    return found


class SharedSigma(torch.autograd.Function):
    """Softplus of rho where its numbers are known already."""

    @staticmethod
    def forward(ctx: Any, rho: Tensor, sigma: Tensor) -> Tensor:  # noqa: D102
        ctx.save_for_backward(rho)
        return sigma.view_as(sigma)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]  # noqa: D102
        return softplus_backward(grad, *ctx.saved_tensors), None


class _Draws(torch.autograd.Function):
    """Mu + sigma·eps of many tensors: n mu's, then n rho's; sigma = softplus(rho) and eps without gradient.

    Backward has the gradient of a draw for that of mu, and keeps no sigma: only eps, beside rho, which lives anyhow.
    """

    @staticmethod
    def forward(ctx: Any, sigmas: list[Tensor], eps: list[Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        n = len(eps)
        ctx.set_materialize_grads(False)
        rhos = tensors[n:]
        if n == 1:
            ctx.save_for_backward(*rhos, *eps)
        else:  # not freed by backward, which comes once for each reentrant checkpoint that uses some of the draws
            ctx.kept = *rhos, *eps
            ctx.versions = _versions(ctx.kept)
        if len({t.dtype for t in tensors}) == 1:
            return tuple(torch._foreach_addcmul(tensors[:n], sigmas, eps))
        return tuple(map(_draw, tensors[:n], sigmas, eps))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        n = len(grads)
        saved = ctx.saved_tensors if n == 1 else ctx.kept
        if n > 1 and _versions(saved) != ctx.versions:
            raise RuntimeError("a rho, or the noise, has been modified in place between the draw and its backward")
        needed = ctx.needs_input_grad[2:]
        to_rho = [
            softplus_backward(grad.to(rho.dtype) * eps, rho) if grad is not None and wanted else None
            for grad, rho, eps, wanted in zip(grads, saved[:n], saved[n:], needed[n:], strict=True)
        ]
        return None, None, *grads, *to_rho


class _Certain(torch.autograd.Function):
    """A copy of the mean of a tensor of which nothing is random.

    The gradient of rho is 0 and not none: DDP waits for it, and IVON takes none for a network in eval mode.
    """

    @staticmethod
    def forward(ctx: Any, mean: Tensor, rho: Tensor) -> Tensor:
        ctx.shape, ctx.like = rho.shape, {"dtype": rho.dtype, "device": rho.device}
        return mean.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        return grad, torch.zeros(ctx.shape, **ctx.like) if ctx.needs_input_grad[1] else None


def certain(mean: Tensor, rho: Tensor) -> Tensor:
    """The draw of a tensor of which nothing is random, `(*shape)` in the dtype of the mean: a copy of it.

    Args:
        mean: `(*shape)`.
        rho: `(*shape)`, which gets a gradient of 0.
    """
    drawn: Tensor = _Certain.apply(mean, rho)  # type: ignore[no-untyped-call]
    return drawn


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def _draw(mu: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
    return torch.addcmul(mu.to(sigma.dtype), sigma, eps).to(mu.dtype)


def draws(mus: list[Tensor], rhos: list[Tensor], sigmas: list[Tensor], eps: list[Tensor]) -> tuple[Tensor, ...]:
    """Mu + softplus(rho)·eps of each, in the dtype of mu, differentiable in mu and rho.

    Args:
        mus: `(*shape)` each.
        rhos: likewise, in single precision or better.
        sigmas: softplus of these, without gradient.
        eps: noise, in the dtype of rho, without gradient.
    """
    drawn: tuple[Tensor, ...] = _Draws.apply(sigmas, eps, *mus, *rhos)  # type: ignore[no-untyped-call]
    return drawn
