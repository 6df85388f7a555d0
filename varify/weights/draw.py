"""One draw of many parameters."""

from collections.abc import Mapping

import torch
from torch import Tensor

from varify.weights.kl import Posterior
from varify.weights.posterior import cast


def draw(posteriors: Mapping[str, Posterior], fixed: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """theta: one draw of every parameter by name, each in its network's dtype.

    Args:
        posteriors: by name.
        fixed: noise to reuse by name; what is missing is drawn and put in.
    """
    theta = {}
    for name, q in posteriors.items():
        eps = q.noise() if fixed is None or name not in fixed else fixed[name]
        if fixed is not None:
            fixed[name] = eps
        theta[name] = _asking_for_gradients(cast(q.at(eps), q.mu.dtype), q.mu)
    return theta


def _asking_for_gradients(drawn: Tensor, mu: Tensor) -> Tensor:
    """A draw that requires a gradient where gradients are off and the parameter does: a forward may ask."""
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._functorch.maybe_current_level() is not None
    ):
        return drawn  # which can't be done within transforms
    return drawn.requires_grad_(mu.requires_grad)
