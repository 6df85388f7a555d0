"""A parameter's mean and standard deviation in the place of a draw, and whose noise is whose."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Examples(NamedTuple):
    """Which rows of an operation belong to one example.

    Attributes:
        number: of examples, B.
        dim: the dimension that counts them, of the operation's input and output alike: of size B·k with k rows an
            example. None: all rows share one draw, as those of one example or of none do.
        minor: the rows of an example are B apart; else they follow one another.
    """

    number: int = 1
    dim: int | None = None
    minor: bool = False

    def spread(self, signs: Tensor, like: Tensor, dim: int) -> Tensor:
        """`signs`, `(B, C)`, by example and channel, in a shape that multiplies `like` with its channels at `dim`."""
        assert self.dim is not None
        repeats = like.shape[self.dim] // self.number
        if repeats > 1:
            signs = signs.repeat(repeats, 1) if self.minor else signs.repeat_interleave(repeats, 0)
        shape = [1] * like.dim()
        shape[self.dim], shape[dim] = signs.shape
        if self.dim > dim % like.dim():
            signs = signs.T
        return signs.reshape(shape)


class Kept:
    """The noise of a parameter in one call, kept so that several uses meet one drawn weight in each example.

    It is drawn when it is made and not when it is first used, which may be in a checkpoint: what is drawn there is to
    be drawn there again.

    Args:
        sigma: of the parameter, `(*shape)`.
        dtype: of the network.
        number: of examples, B.

    Attributes:
        perturbation: sigma·eps, `(*shape)`.
        signs: of each axis of the parameter, `(B, size)`.
    """

    def __init__(self, sigma: Tensor, dtype: torch.dtype, number: int) -> None:
        self.perturbation = (sigma * torch.randn_like(sigma)).to(dtype)
        self.signs = [_random_signs(number, size, self.perturbation) for size in sigma.shape or (1,)]


class Moments:
    """Mean and standard deviation of a parameter, each `(*shape)`: what a rule is given in place of a draw.

    Attributes:
        mu: in the network's dtype.
        sigma: in single precision or better.
        examples: which rows of the operation that meets it are one example's.
    """

    __slots__ = ("_kept", "_transposed", "examples", "mu", "sigma")

    def __init__(
        self,
        mu: Tensor,
        sigma: Tensor,
        examples: Examples = Examples(),  # noqa: B008  # immutable
        kept: Kept | None = None,
        transposed: bool = False,
    ) -> None:
        self.mu, self.sigma, self.examples = mu, sigma, examples
        self._kept, self._transposed = kept, transposed

    def at(self, examples: Examples) -> "Moments":
        """The same, at an operation whose rows are these examples'."""
        return Moments(self.mu, self.sigma, examples, self._kept, self._transposed)

    def keeping(self, number: int) -> "Moments":
        """The same, with one noise for all its uses in a call of so many examples."""
        kept = Kept(self.sigma, self.mu.dtype, number)
        return Moments(self.mu, self.sigma, self.examples, kept, self._transposed)

    @property
    def shape(self) -> torch.Size:
        """The parameter's."""
        return self.mu.shape

    def viewed(self, view: Callable[[Tensor], Tensor], *, transposes: bool = False) -> "Moments":
        """Those of a view of the parameter, such as a part; of a transposed matrix the kept noise is so, too."""
        mu, sigma = view(self.mu), view(self.sigma).to(self.sigma.dtype)
        return Moments(mu, sigma, self.examples, self._kept, self._transposed != transposes)

    def var(self, scale: Tensor | float = 1.0) -> Tensor:
        """(sigma/scale)², in the network's dtype."""
        return (self.sigma / scale).square().to(self.mu.dtype)

    def perturbation(self) -> Tensor:
        """sigma·eps, eps ~ N(0, 1), in the network's dtype."""
        if self._kept is None:
            return (self.sigma * torch.randn_like(self.sigma)).to(self.mu.dtype)
        kept = self._kept.perturbation
        return (kept.T if self._transposed else kept).to(self.mu.dtype)

    @property
    def is_kept(self) -> bool:
        """Whether several uses share one noise."""
        return self._kept is not None

    def signs(self, axis: int) -> Tensor:
        """Random signs `(B, size of the axis)` in the network's dtype, by example and index of the parameter's axis."""
        if self._kept is None:
            return _random_signs(self.examples.number, self.mu.shape[axis] if self.mu.dim() else 1, self.mu)
        return self._kept.signs[1 - axis if self._transposed else axis].to(self.mu.dtype)

    def flip(self, like: Tensor, axis: int, dim: int) -> Tensor | float:
        """What `like`, whose channels at `dim` are the parameter's `axis`, is to be multiplied with: signs.

        The product of the signs of all axes is the sign of an element's perturbation in that example, so that each
        example sees one drawn weight at all its rows. Channels in groups share their signs.
        """
        if self.examples.dim is None:
            return 1.0
        signs = self.signs(axis)
        signs = signs.repeat(1, like.shape[dim] // signs.shape[1])
        return self.examples.spread(signs.to(like.dtype), like, dim)


def _random_signs(count: int, size: int, like: Tensor) -> Tensor:
    return torch.randint(0, 2, (count, size), dtype=like.dtype, device=like.device).mul_(2).sub_(1)
