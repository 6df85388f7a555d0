"""What contracts share: a fixed seed, means that are compared by standard errors, and a network to convert."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

DRAWS = 3000
# Standard errors. Two means of so many draws differ by more for 1 of 500 million numbers; a contract compares at most
# some thousand. So a right one fails for 1 choice of the seed in 100,000, and with this seed always or never.
LIMIT = 6.0


@contextmanager
def fixed_seed() -> Iterator[None]:
    """Within, random numbers are the same every time; those after it are as if it had not been. A decorator, too."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # not torch.manual_seed, which seeds those of all devices
        yield


@contextmanager
def or_else(way_out: str) -> Iterator[None]:
    """Within, an error of any kind breaks the contract."""
    try:
        yield
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}. {way_out}") from error


def assert_same_mean(found: Tensor, reference: Tensor, message: str) -> None:
    """Of independent observations along the first dimension."""
    errors = [x.var(0) / len(x) for x in (found, reference)]
    apart, error = (found.mean(0) - reference.mean(0)).abs(), (errors[0] + errors[1]).sqrt()
    # of what is the same in all draws, rounding remains
    wrong = ~(apart <= LIMIT * error + 1e-9 * (1 + reference.mean(0).abs()))
    if wrong.any():
        worst = (apart / error.clamp_min(1e-12)).max()
        raise AssertionError(
            f"{message}; {int(wrong.sum())} of {wrong.numel()} differ, by {worst:.1f} standard errors or less"
        )


class SmallNetwork(nn.Module):
    """x * weight + other, each of a shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight, self.other = (nn.Parameter(torch.randn(shape)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return x * self.weight + self.other
