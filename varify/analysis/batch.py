"""A batch, flattened to its tensors and split into single data."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from varify.errors import ArgumentError
from varify.network.arguments import has_length, unpack
from varify.network.signature import copied

INPUTS, TARGETS = "inputs", "targets"
HINT = "say batched=..., booleans in the structure of (inputs, targets), True for what has an entry for each datum"
Leaves = frozenset[int]


@dataclass(frozen=True)
class Batch:
    """One batch, flattened.

    Attributes:
        leaves: of (args, kwargs, targets).
        spec: to unflatten leaves.
        entries: by leaf, how many entries of its first dimension belong to one datum: 1, or the number of tokens in
            flattened targets; 0 if the leaf belongs to the batch as a whole.
        size: number of data.
    """

    leaves: list[Any]
    spec: Any
    entries: list[int]
    size: int

    def columns(self) -> list[Any]:
        """The leaves; those with entries for each datum as `(size, entries, ...)`."""
        pairs = zip(self.leaves, self.entries, strict=True)
        return [x if not n else x.unsqueeze(1) if n == 1 else x.unflatten(0, (self.size, n)) for x, n in pairs]

    def datum(self, i: int) -> Any:
        """(args, kwargs, targets) of a batch of datum `i` alone."""
        return self.of([x[i] if n else x for x, n in zip(self.columns(), self.entries, strict=True)])

    def first(self, n: int) -> "Batch":
        """Its first n data, or as many as there are, in memory of their own: a loader may fill its tensors again."""
        n = min(n, self.size)
        return Batch(
            [x[: n * k].clone() if k else x for x, k in zip(self.leaves, self.entries, strict=True)],
            self.spec,
            self.entries,
            n,
        )

    def of(self, leaves: Iterable[Any]) -> Any:
        """(args, kwargs, targets) with other leaves."""
        return pytree.tree_unflatten(list(leaves), self.spec)


@dataclass(frozen=True)
class Flat:
    """A batch, flattened to the leaves of (args, kwargs, targets); the first `n_inputs` are inputs."""

    leaves: list[Any]
    spec: Any
    n_inputs: int
    pair: Any  # (inputs, targets)

    @classmethod
    def of(cls, network: nn.Module, inputs: object, targets: object) -> "Flat":
        """Flatten a loader's batch as the inputs of `network` and the targets."""
        args, kwargs = unpack(inputs, network)
        leaves, spec = pytree.tree_flatten((args, kwargs, _plain(targets)))
        return cls(leaves, spec, len(pytree.tree_leaves((args, kwargs))), (_plain(inputs), _plain(targets)))

    @property
    def key(self) -> Any:
        """A hashable key of the batch's structure, under which findings hold for other batches."""
        return repr(self.spec), tuple(has_length(x) for x in self.leaves)

    @property
    def names(self) -> list[str]:
        """Names of the leaves, such as `inputs[0]`."""
        paths, _ = pytree.tree_flatten_with_path(self.pair)
        parts = [INPUTS] * self.n_inputs + [TARGETS] * (len(self.leaves) - self.n_inputs)
        return [part + pytree.keystr(path[1:]) for part, (path, _) in zip(parts, paths, strict=True)]

    def tensors(self, part: str) -> list[int]:
        """Indices of the tensors that have a length."""
        return [i for i, x in enumerate(self.leaves) if has_length(x) and (i < self.n_inputs) == (part == INPUTS)]

    def size(self, chosen: Leaves) -> int:
        """The length that the inputs among `chosen` share."""
        lengths = {i: len(self.leaves[i]) for i in sorted(chosen) if i < self.n_inputs}
        if len(set(lengths.values())) > 1:
            tensors = ", ".join(f"{self.names[i]} {tuple(self.leaves[i].shape)}" for i in lengths)
            raise ArgumentError(f"{tensors} should each have an entry for each datum, but their lengths differ; {HINT}")
        return next(iter(lengths.values()))

    def divides(self, i: int, size: int) -> bool:
        """Whether leaf `i` can be cut into so many data."""
        return bool(len(self.leaves[i])) and len(self.leaves[i]) % size == 0

    def uncut(self, i: int, size: int) -> ArgumentError:
        """What to raise where it can't."""
        tensor = f"{self.names[i]} {tuple(self.leaves[i].shape)}"
        return ArgumentError(
            f"{tensor} can't be cut into {size} data, as many as the inputs have. If it belongs to these inputs, {HINT}"
        )

    def batch(self, chosen: Leaves) -> Batch:
        """The batch with `chosen` split into as many data as the inputs have."""
        size = self.size(chosen)
        for i in sorted(chosen):
            if not self.divides(i, size):
                raise self.uncut(i, size)
        entries = [len(x) // size if i in chosen else 0 for i, x in enumerate(self.leaves)]
        return Batch(self.leaves, self.spec, entries, size)


def pair(batch: object) -> tuple[Any, Any]:
    """(inputs, targets), as a loader gives them.

    Raises:
        ArgumentError: it gives something else.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        what = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise ArgumentError(f"a batch must be (inputs, targets), got a {what}")
    inputs, targets = batch
    return inputs, targets


def output_of(network: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What the network returns for copies of these tensors, which it may write into, and which other calls see too."""
    args, kwargs = copied(args, kwargs)
    return network(*args, **kwargs)


def spread(batched: object, tree: object) -> Iterator[bool]:
    """A boolean for each leaf of `tree`, from a tree of booleans of which one may stand for a whole part."""
    tree = _plain(tree)
    if isinstance(batched, bool):
        yield from [batched] * len(pytree.tree_leaves(tree))
    elif isinstance(batched, Mapping) and isinstance(tree, dict) and set(batched) == set(tree):
        for key, part in tree.items():
            yield from spread(batched[key], part)
    elif isinstance(batched, (tuple, list)) and isinstance(tree, (tuple, list)) and len(batched) == len(tree):
        for flag, part in zip(batched, tree, strict=True):
            yield from spread(flag, part)
    else:
        what = f"{type(tree).__name__} of {len(tree)}" if isinstance(tree, (dict, tuple, list)) else type(tree).__name__
        raise ArgumentError(f"batched has {batched!r} for a {what}; {HINT}")


def _plain(tree: object) -> Any:
    """A mapping as a dict, which pytree can flatten; anything else unchanged."""
    return dict(tree) if isinstance(tree, Mapping) else tree
