"""Many draws of one network, sequentially or vectorized, with the same weights either way."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from varify.prediction.vectorizing import Cost, Stack, Theta, run_vectorized, watched

# Draws are made in chunks of at most this many bytes, and vectorized in chunks whose weights and largest operation
# take no more.
CHUNK_BYTES = 2**28
# On a CPU one operation of several draws is faster than several only if each is so small that starting it counts:
# with less memory than this to write, on average.
SMALL = 2**15
# On a CPU larger tensors get fresh pages of memory at each operation, which takes longer than their arithmetic.
FRESH_BYTES = 2**25


class Source(NamedTuple):
    """Where draws come from.

    Attributes:
        take: from a number to so many new draws, in a list or stacked.
        bytes: of one draw.
        devices: of the parameters.
    """

    take: Callable[[int], list[Theta] | Stack]
    bytes: int
    devices: set[torch.device]

    @property
    def on_cpu(self) -> bool:
        """Whether draws run on a CPU."""
        return all(device.type == "cpu" for device in self.devices)

    def same_numbers_after(self) -> AbstractContextManager[None]:
        """Context that leaves torch's random numbers as they were."""
        return torch.random.fork_rng(sorted(device.index for device in self.devices if device.type == "cuda"))

    def pays(self, cost: Cost) -> bool:
        """Whether draws are expected to run faster vectorized.

        Nothing is timed, since which way is taken decides on the last bits of the outputs.
        """
        shared = cost.drawn < cost.all / 2  # what doesn't depend on the draw then runs once
        return not self.bytes or shared or not self.on_cpu or cost.drawn + self.bytes < SMALL * cost.operations

    def at_once(self, cost: Cost) -> int:
        """How many draws to vectorize at once."""
        each = max(1, self.bytes + cost.peak)
        cached, most = max(1, FRESH_BYTES // each), max(1, CHUNK_BYTES // each)
        # unless what doesn't depend on the draw, and runs once a chunk, would be much of the work
        return min(cached, most) if self.on_cpu and cached * cost.drawn > 2 * (cost.all - cost.drawn) else most


class Draws(NamedTuple):
    """What `many` returns.

    Attributes:
        outputs: by draw, in order; stacked, if they are tensors that came so.
        vectorized: whether they ran vectorized.
        cost: of a draw, if it was found out here.
        fails: whether the draws were seen not to run vectorized, though the network keeps no tensors of a call.
    """

    outputs: Sequence[Any] | Tensor
    vectorized: bool
    cost: Cost | None
    fails: bool


def many(
    run: Callable[[Theta], Any],
    source: Source,
    n_samples: int,
    vectorize: bool | None,
    *,
    cost: Cost | None = None,
    certain: Callable[[Theta], Any] | None = None,
) -> Draws:
    """Outputs of `n_samples` draws.

    Args:
        run: from one draw to the network's output.
        source: of the draws. A chunk is drawn before any of it runs, so that the weights are the same either way.
        n_samples: number of draws.
        vectorize: whether to run vectorized; None: where that is expected to be faster.
        cost: of a draw, if it is known. If not, the first draw is run alone and vectorized, and then all
            sequentially if the network stores a tensor of the call (those of a vectorized run are of no use outside of
            it), or if the outputs differ (a network with its own random generator, for example, uses one number for
            all draws of a vectorized run).
        certain: where not the draws alone are random, `run` without what else is, so that outputs can be compared.
    """
    randomness = "error" if certain is None else "different"
    chunks: list[list[Any] | Tensor] = []
    alone: list[Any] = []
    found: Cost | None = None
    fails = False
    at_once = n_samples
    way = n_samples > 1 and vectorize is not False
    while (missing := n_samples - sum(map(len, chunks))) > 0:
        draws = source.take(min(missing, max(1, CHUNK_BYTES // max(1, source.bytes))))
        number = draws.number if isinstance(draws, Stack) else len(draws)
        if way and cost is None:
            # a first call must have the draws that a later one has
            with nullcontext() if certain is None else source.same_numbers_after():
                cost, keeps, alone = _probed(certain or run, _one(draws, 0), randomness)
            alone = alone if certain is None else []
            found, way, fails = cost, cost is not None, cost is None and not keeps
        way = way and cost is not None and (vectorize is True or source.pays(cost))
        done = 0
        while way and done < number and cost is not None:
            end = min(number, done + min(at_once, source.at_once(cost)))
            try:
                chunk = draws.part(done, end) if isinstance(draws, Stack) else Stack.of(draws[done:end])
                chunks.append(run_vectorized(run, chunk, randomness)[0])
                alone, done = [], end
            except torch.OutOfMemoryError:
                if end - done == 1:
                    raise
                at_once = max(1, (end - done) // 2)
            except Exception:  # a size at which it fails, or an error of the user's, which the loop raises again
                way, found, fails = False, None, True
        if done < number:
            chunks.append([alone.pop() if alone else run(_one(draws, i)) for i in range(done, number)])
    return Draws(_joined(chunks), way, found, fails)


def _joined(chunks: list[list[Any] | Tensor]) -> Sequence[Any] | Tensor:
    stacked = [chunk for chunk in chunks if isinstance(chunk, Tensor)]
    if len(stacked) == len(chunks):
        return stacked[0] if len(stacked) == 1 else torch.cat(stacked)
    return [output for chunk in chunks for output in chunk]


def _one(draws: list[Theta] | Stack, i: int) -> Theta:
    return draws.draw(i) if isinstance(draws, Stack) else draws[i]


def _probed(run: Callable[[Theta], Any], theta: Theta, randomness: str) -> tuple[Cost | None, bool, list[Any]]:
    """The cost of a draw, None if it can't be vectorized; whether the network keeps tensors; the output alone."""
    gradients = torch.is_grad_enabled()
    with torch.no_grad():  # a graph would keep tensors of its own
        first, keeps = watched(run, theta)
        alone = [] if gradients else [first]
        if keeps:
            return None, True, alone
        try:
            (again,), cost = run_vectorized(run, Stack.of([theta]), randomness, counts=True)
        except Exception:  # no batching rule, randomness, or an error of the user's, which the loop raises again
            return None, False, alone
    return cost if _agree(again, first) else None, False, alone


def _agree(one: object, other: object) -> bool:
    """Whether two outputs are equal up to rounding."""
    (leaves, spec), (others, other_spec) = pytree.tree_flatten(one), pytree.tree_flatten(other)
    return spec == other_spec and all(map(_alike, leaves, others))


def _alike(one: object, other: object) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return bool(one == other)
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if not (one.is_floating_point() or one.is_complex()) or not one.numel():
        return torch.equal(one, other)
    rounding = torch.finfo(one.dtype).eps ** 0.5
    scale = float(other.abs().nan_to_num(0.0, 0.0, 0.0).max())
    return torch.allclose(one, other, rounding, rounding * scale, equal_nan=True)
