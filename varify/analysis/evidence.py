"""What a diagnosis rests on: the weights of a network, and what a copy of it does with a batch."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DistributedSampler, RandomSampler, WeightedRandomSampler

from varify.analysis.batch import output_of, pair
from varify.errors import ArgumentError
from varify.module import VariationalModule
from varify.network.arguments import has_length, unpack
from varify.network.copies import copy_network
from varify.objective.elbo import scalar
from varify.posteriors import cuda_devices
from varify.weights.posterior import GaussianPosterior
from varify.within import sampling, variational_parts


class FirstBatch(NamedTuple):
    """One batch; `size` data, of `total` in the loader, None where that is unknown."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    targets: Any
    size: int
    total: int | None

    @classmethod
    def of(cls, network: nn.Module, inputs: object, targets: object, total: int | None) -> "FirstBatch":
        """`inputs` as for `ELBO`."""
        args, kwargs = unpack(inputs, network)
        return cls(args, kwargs, targets, size_of(network, inputs), total)

    def call(self, network: nn.Module) -> Any:
        """What a network returns for it."""
        return output_of(network, self.args, self.kwargs)


def size_of(network: nn.Module, inputs: object) -> int:
    """How many data the first tensor of the inputs has."""
    dim = network.posteriors.settings.batch_dim if isinstance(network, VariationalModule) else 0
    leaves = pytree.tree_leaves(dict(inputs) if isinstance(inputs, Mapping) else inputs)
    return next((x.shape[dim] for x in leaves if isinstance(x, Tensor) and x.dim() > dim), 1)


def total_of(network: nn.Module, loader: Iterable[Any] | None) -> int | None:
    """How many data a loader has, where that can be told without going through it."""
    if isinstance(loader, (list, tuple)):
        return sum(size_of(network, pair(batch)[0]) for batch in loader)
    sampler: Any = getattr(loader, "sampler", None)
    if isinstance(sampler, DistributedSampler):
        sampler = sampler.dataset  # it has a share of them, one for each process
    elif isinstance(sampler, (RandomSampler, WeightedRandomSampler)):
        sampler = None  # its length is how many of them an epoch takes
    sources: tuple[Any, ...] = (sampler, getattr(loader, "dataset", None))
    return next((len(source) for source in sources if hasattr(source, "__len__")), None)


def first_batch(network: nn.Module, loader: Iterable[Any] | None, batch: object) -> FirstBatch | None:
    """Of the loader, or the batch that is given; None without either.

    Raises:
        ArgumentError: both, an empty loader, or a batch that is no pair or has no data.
    """
    if loader is not None and batch is not None:
        raise ArgumentError("loader and batch exclude each other: the batch that is looked at is the loader's first")
    if loader is None and batch is None:
        return None
    first = batch if loader is None else next(iter(loader), None)
    if loader is not None and first is None:
        raise ArgumentError("loader must give a batch of (inputs, targets), got an empty one")
    inputs, targets = pair(first)
    found = FirstBatch.of(network, inputs, targets, total_of(network, loader))
    if not found.size:
        raise ArgumentError("a batch must have data, got inputs of length 0")
    return found


@contextmanager
def random_numbers_kept(network: nn.Module, loader: object) -> Iterator[None]:
    """After it torch's random numbers, and those of the loader's own generator, go on as if nothing had been."""
    devices = sorted({i for part in variational_parts(network) for i in cuda_devices(part.posteriors)})
    own = [g for g in (getattr(loader, "generator", None),) if isinstance(g, torch.Generator)]
    before = [g.get_state() for g in own]
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for generator, state in zip(own, before, strict=True):
            generator.set_state(state)


class Running:
    """Mean and variance over draws of a list of tensors, one draw at a time (Welford 1962)."""

    def __init__(self) -> None:
        self.n, self.mean, self.squares = 0, list[Tensor](), list[Tensor]()

    def add(self, tensors: Iterable[Tensor]) -> None:
        """One draw."""
        found = [t.detach().to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]
        if not self.n:
            self.mean, self.squares = [torch.zeros_like(t) for t in found], [torch.zeros_like(t) for t in found]
        self.n += 1
        for t, mean, squares in zip(found, self.mean, self.squares, strict=True):
            delta = t - mean
            mean += delta / self.n
            squares += delta * (t - mean)

    @property
    def noise(self) -> float:
        """Variance over draws, summed over all elements."""
        return sum(float(squares.sum()) for squares in self.squares) / (self.n - 1)

    @property
    def signal_to_noise(self) -> float:
        """Mean²/variance of one draw, both summed over all elements; the mean's own variance is taken out of it."""
        squared = sum(float(mean.square().sum()) for mean in self.mean)
        noise = self.noise
        found = (squared - noise / self.n) / noise if noise else float("inf")
        return 0.0 if found < 0 else found  # and NaN stays


class Trained(NamedTuple):
    """What a copy of the network does with the batch as it is trained, over draws.

    Attributes:
        losses: the nll of the batch, of each draw.
        others: likewise with targets of other data; None where these can't be told apart.
        output: of one draw.
        mu: gradients of the nll with respect to the means; without draws where none is learned.
        rho: likewise.
    """

    losses: Tensor
    others: Tensor | None
    output: Any
    mu: Running
    rho: Running

    @property
    def nll(self) -> float:
        """Of the batch, mean over the draws."""
        return float(self.losses.mean())

    @property
    def learned(self) -> float | None:
        """How much less the nll is than with targets of other data, relative; None where that can't be told."""
        other = 0.0 if self.others is None else float(self.others.mean())
        return (other - self.nll) / abs(other) if other else None

    @property
    def gain(self) -> float | None:
        """How much less it is, in standard errors of the mean over draws; None where targets make no difference."""
        if self.others is None or torch.equal(self.others, self.losses):
            return None
        gains = self.others - self.losses
        return float(gains.mean() / (gains.std() / len(gains) ** 0.5))


@dataclass(frozen=True)
class Evidence:
    """What the checks ask for; what takes time is found when it is asked for, once.

    Attributes:
        network: only looked at.
        posteriors: of all variational parts, by name.
        batch: a `FirstBatch`; None if none was given, as are `criterion` and `num_data`: checks ask for what they need.
        criterion: to call.
        num_data: that the KL is divided by.
        beta: weight of the KL.
        n_draws: of the weights.
    """

    network: nn.Module
    posteriors: Mapping[str, GaussianPosterior]
    batch: Any
    criterion: Any
    num_data: Any
    beta: float
    n_draws: int

    @cached_property
    def trained(self) -> Trained:
        """In the modes of the network, with weights drawn even if it is in eval mode."""
        network, batch, criterion = copy_network(self.network), self.batch, self.criterion
        parts = variational_parts(network)
        for part in parts:
            part.training = True  # and not those of its modules: a frozen normalization layer stays as it is
        qs = [q for part in parts for q in part.posteriors.values()]
        mus, rhos = ([p for p in ps if p.requires_grad] for ps in ([q.mu for q in qs], [q.rho for q in qs]))
        losses, others, mu, rho = [], [], Running(), Running()
        swapped_targets = swapped(batch.targets, batch.size)
        with torch.enable_grad():
            if any(part.posteriors.settings.wants_estimators for part in parts):
                batch.call(network)  # the first call has no estimators
            for _ in range(self.n_draws):
                output = batch.call(network)
                loss = scalar(criterion(output, batch.targets))
                losses.append(loss.detach())
                if swapped_targets is not None:
                    with torch.no_grad():
                        others.append(scalar(criterion(output, swapped_targets)).detach())
                if loss.requires_grad and (mus or rhos):
                    found = torch.autograd.grad(loss, [*mus, *rhos], allow_unused=True, materialize_grads=True)
                    mu.add(found[: len(mus)])
                    rho.add(found[len(mus) :])
        output = pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, output)
        return Trained(torch.stack(losses), torch.stack(others) if others else None, output, mu, rho)

    @cached_property
    def predicted(self) -> Running:
        """Floating-point outputs over draws, in eval mode."""
        network, batch, found = copy_network(self.network).eval(), self.batch, Running()
        with torch.no_grad(), sampling(network):
            for _ in range(self.n_draws):
                found.add(floating(batch.call(network)))
        return found


def floating(tree: object) -> list[Tensor]:
    """The floating-point tensors in a structure that have a length."""
    return [x for x in pytree.tree_leaves(tree) if has_length(x) and x.is_floating_point()]


def doubled(tree: object) -> Any:
    """A structure with every entry of a batch twice."""
    return pytree.tree_map(lambda x: torch.cat([x, x]) if has_length(x) else x, tree)


def swapped(targets: object, size: int) -> Any:
    """The targets of a batch of `size` data, each given to another datum; None where they are the same then."""
    leaves, spec = pytree.tree_flatten(targets)
    others = [_rolled(x, size) if has_length(x) else x for x in leaves]
    changed = any(has_length(x) and not torch.equal(x, y) for x, y in zip(leaves, others, strict=True))
    return pytree.tree_unflatten(others, spec) if changed else None


def _rolled(x: Tensor, size: int) -> Tensor:
    """By half a batch, in the dimension that counts data, or their tokens."""
    dim = next((d for d, n in enumerate(x.shape) if n == size), 0)
    return x.roll(x.shape[dim] // size * (size // 2), dim)


def posteriors_of(network: nn.Module) -> dict[str, GaussianPosterior]:
    """Of all variational parts within `network`, by the part's path and the parameter's name."""
    parts = [(path, part) for path, part in network.named_modules() if isinstance(part, VariationalModule)]
    return {f"{path}.{name}" if path else name: q for path, part in parts for name, q in part.posteriors.items()}


def share(counts: Sequence[tuple[int, int]]) -> float:
    """Of (found, of all) pairs, all together."""
    return sum(found for found, _ in counts) / max(sum(n for _, n in counts), 1)
