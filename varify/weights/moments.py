"""Mean and standard deviation of a parameter, which estimator rules take instead of a draw; and examples."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from varify.weights.fused import is_plain
from varify.weights.noise import normal_like


class Examples(NamedTuple):
    """Which rows of an operation belong to one example.

    Attributes:
        number: of examples, B.
        dim: the dimension that counts them, in the operation's input and output alike; its size is B·k, with k rows an
            example. None: all rows share one draw, since they belong to one example or to none.
        minor: whether the rows of an example are B apart; otherwise they are adjacent.
    """

    number: int = 1
    dim: int | None = None
    minor: bool = False

    def of_rows(self, rows: int, device: torch.device) -> Tensor:
        """Which example each of so many rows belongs to, `(rows,)`."""
        numbers, repeats = torch.arange(self.number, device=device), rows // self.number
        return numbers.repeat(repeats) if self.minor else numbers.repeat_interleave(repeats)

    def spread(self, signs: Tensor, like: Tensor, dim: int) -> Tensor:
        """`signs`, `(B, C)`, repeated and reshaped to multiply `like`, whose channels are at `dim`."""
        assert self.dim is not None
        repeats = like.shape[self.dim] // self.number
        if repeats > 1:
            signs = signs.repeat(repeats, 1) if self.minor else signs.repeat_interleave(repeats, 0)
        shape = [1] * like.dim()
        shape[self.dim], shape[dim] = signs.shape
        if self.dim > dim % like.dim():
            signs = signs.T
        return signs.reshape(shape)


class SharedNoise:
    """The noise of a parameter in one call, shared by several uses: each example sees one weight at all of them.

    It is drawn when it is made, at the start of the call, and not at the first use, which may be in a checkpoint: what
    is drawn there, backward draws there again.

    Args:
        sigma: of the parameter, `(*shape)`.
        dtype: of the network.
        number: of examples, B.

    Attributes:
        perturbation: sigma·eps, `(*shape)`.
        signs: by axis of the parameter, `(B, size)`.
    """

    def __init__(self, sigma: Tensor, dtype: torch.dtype, number: int) -> None:
        self.perturbation = (sigma * normal_like(sigma)).to(dtype)
        self.signs = [_random_signs(number, size, self.perturbation) for size in sigma.shape or (1,)]


class Moments:
    """Mean and standard deviation of a parameter, each `(*shape)`, which a rule takes instead of a draw.

    Attributes:
        mu: in the network's dtype.
        sigma: in single precision or better.
        examples: which rows of the operation belong to one example.
    """

    __slots__ = ("_shared", "_transposed", "examples", "mu", "sigma")

    def __init__(
        self,
        mu: Tensor,
        sigma: Tensor,
        examples: Examples = Examples(),  # noqa: B008  # immutable
        shared: SharedNoise | None = None,
        transposed: bool = False,
    ) -> None:
        self.mu, self.sigma, self.examples = mu, sigma, examples
        self._shared, self._transposed = shared, transposed

    def at(self, examples: Examples) -> "Moments":
        """The same moments at an operation with these examples."""
        return Moments(self.mu, self.sigma, examples, self._shared, self._transposed)

    def keeping(self, number: int) -> "Moments":
        """The same moments with one noise for all uses in a call of `number` examples."""
        shared = SharedNoise(self.sigma, self.mu.dtype, number)
        return Moments(self.mu, self.sigma, self.examples, shared, self._transposed)

    @property
    def shape(self) -> torch.Size:
        """The shape of the parameter."""
        return self.mu.shape

    def viewed(self, view: Callable[[Tensor], Tensor], *, transposes: bool = False) -> "Moments":
        """The moments of a view of the parameter; `transposes`: shared noise is then transposed as well."""
        mu, sigma = view(self.mu), view(self.sigma).to(self.sigma.dtype)
        return Moments(mu, sigma, self.examples, self._shared, self._transposed != transposes)

    def var(self, scale: Tensor | float = 1.0) -> Tensor:
        """(sigma/scale)², in the network's dtype."""
        scaled = self.sigma / scale if isinstance(scale, Tensor) or scale != 1 else self.sigma
        return scaled.square().to(self.mu.dtype)

    def perturbation(self) -> Tensor:
        """sigma·eps, eps ~ N(0, 1), in the network's dtype."""
        if self._shared is None:
            return (self.sigma * normal_like(self.sigma)).to(self.mu.dtype)
        shared = self._shared.perturbation
        return (shared.T if self._transposed else shared).to(self.mu.dtype)

    def drawn(self) -> Tensor:
        """Mu + sigma·eps, in the network's dtype."""
        return self.mu + self.perturbation()

    @property
    def is_kept(self) -> bool:
        """Whether several uses share one noise."""
        return self._shared is not None

    def signs(self, axis: int) -> Tensor:
        """Random signs `(B, size of the axis)` in the network's dtype, by example and index of the parameter's axis."""
        if self._shared is None:
            return _random_signs(self.examples.number, self.mu.shape[axis] if self.mu.dim() else 1, self.mu)
        return self._shared.signs[1 - axis if self._transposed else axis].to(self.mu.dtype)

    def flip(self, like: Tensor, axis: int, dim: int) -> Tensor | float:
        """Signs to multiply `like` with, whose channels at `dim` correspond to the parameter's `axis`.

        The product of the signs of all axes is the sign of an element's perturbation in an example, so that the example
        sees one weight at all its rows. Groups of channels share signs.
        """
        if self.examples.dim is None:
            return 1.0
        signs, dim, channels = self.signs(axis).to(like.dtype), dim % like.dim(), like.shape[dim]
        if dim == self.examples.dim:  # the rows are the channels: each has the sign of its own example alone
            index = torch.arange(channels, device=like.device)
            picked = signs[self.examples.of_rows(channels, like.device), index % signs.shape[1]]
            return picked.view([-1 if d == dim else 1 for d in range(like.dim())])
        return self.examples.spread(signs.repeat(1, channels // signs.shape[1]), like, dim)


def _random_signs(count: int, size: int, like: Tensor) -> Tensor:
    """Signs `(count, size)`, each the top bit of a random byte, of which a 64-bit integer brings eight."""
    if not is_plain():  # transforms have no rule for the bytes of an integer
        return torch.randint(0, 2, (count, size), dtype=like.dtype, device=like.device).mul_(2).sub_(1)
    n = count * size
    numbers = torch.empty(-(-n // 8), dtype=torch.int64, device=like.device).random_(-(2**63), None)
    signs = numbers.view(torch.int8)[:n].bitwise_right_shift_(7).bitwise_or_(1)
    return signs.view(count, size).to(like.dtype)
