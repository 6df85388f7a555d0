"""Which tensors of a batch have an entry for each datum."""

import warnings
from collections.abc import Iterable, Sequence
from itertools import chain, combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from varify.analysis.batch import INPUTS, SAY, TARGETS, Batch, Flat, Leaves, spread
from varify.errors import ArgumentError, listed
from varify.module import VariationalModule
from varify.objective.arguments import has_length
from varify.objective.elbo import Criterion, scalar

# Of so many tensors of one length all combinations are tried: 63.
MOST_TRIED = 6


class Splitter:
    """Tells how many data a batch has and which of its tensors have an entry for each of them.

    One tensor of inputs has. Of several, those have with which the network's output for a datum is the same alone as
    within its batch; of several targets, those with which the batch's loss is the mean of the data's. Where that
    doesn't tell, those whose length follows the batch's over the loader. It is found once, in the first batch of more
    than one datum.

    Args:
        vnet: tried at one draw of its weights: at the means, a layer that starts at 0 would hide what it is given.
        loader: of (inputs, targets). Gone through once more where lengths must tell, unless it is an iterator.
        criterion: `(output, targets)` to a mean over the batch.
        batched: the answer: booleans in the structure of (inputs, targets), each for a tensor or for all in a part.
    """

    def __init__(self, vnet: VariationalModule, loader: Iterable[Any], criterion: Criterion, batched: Any) -> None:
        self._vnet, self._loader, self._criterion, self._batched = vnet, loader, criterion, batched
        self._found: dict[Any, Leaves] = {}
        self._network: nn.Module | None = None

    def size(self, inputs: Any, targets: Any) -> int:
        """Number of data in a batch.

        Raises:
            ArgumentError: it can't be told.
        """
        flat = Flat.of(self._vnet, inputs, targets)
        if self._batched is None:
            lengths = {len(flat.leaves[i]) for i in flat.tensors(INPUTS)}
            if not lengths:
                return next((len(flat.leaves[i]) for i in flat.tensors(TARGETS)), 1)
            if len(lengths) == 1:
                return lengths.pop()
        return flat.size(self._inputs(flat))

    def split(self, inputs: Any, targets: Any) -> Batch:
        """The batch, with what of it belongs to single data.

        Raises:
            ArgumentError: there is no tensor in the inputs or in the targets, their lengths don't fit, or it is unknown
                which are cut.
        """
        flat = Flat.of(self._vnet, inputs, targets)
        for part in (TARGETS, INPUTS):
            if not flat.tensors(part):
                raise ArgumentError(f"the loader must give (inputs, targets) with a batch of {part}: a tensor at least")
        chosen = self._inputs(flat)
        size = flat.size(chosen)
        if size < 2:  # cutting changes nothing, and shows nothing
            return Batch(flat.leaves, flat.spec, [0] * len(flat.leaves), size)
        return flat.batch(chosen | self._targets(flat, chosen))

    def _inputs(self, flat: Flat) -> Leaves:
        """The leaves of the inputs that belong to single data."""
        tensors, key = flat.tensors(INPUTS), (INPUTS, flat.key)
        if self._batched is not None:
            return self._told(flat, INPUTS)
        if len(tensors) == 1:
            return frozenset(tensors)
        if key not in self._found:
            lengths = sorted({len(flat.leaves[i]) for i in tensors} - {0})
            guesses = [g for n in lengths for g in _subsets([i for i in tensors if len(flat.leaves[i]) == n])]
            fitting = [guess for guess in guesses if self._follows(flat, guess)]
            if fitting and all(flat.size(guess) == 1 for guess in fitting):
                return fitting[0]  # nothing is cut: a later batch may tell
            self._found[key] = self._only(flat, fitting, guesses, frozenset())
        return self._found[key]

    def _targets(self, flat: Flat, inputs: Leaves) -> Leaves:
        """The leaves of the targets that belong to single data, `inputs` being those of the inputs."""
        size, tensors, key = flat.size(inputs), flat.tensors(TARGETS), (TARGETS, flat.key)
        if self._batched is not None:
            return self._told(flat, TARGETS)
        if key not in self._found:
            if len(tensors) == 1 and len(flat.leaves[tensors[0]]) == size:
                return frozenset(tensors)
            guesses = _subsets([i for i in tensors if len(flat.leaves[i]) and len(flat.leaves[i]) % size == 0])
            fitting = [guess for guess in guesses if self._adds_up(flat, inputs | guess)]
            # what is flattened may have another order, which lengths don't tell
            whole = [guess for guess in guesses if all(len(flat.leaves[i]) == size for i in guess)]
            self._found[key] = self._only(flat, fitting, whole, inputs)
        return self._found[key]

    def _told(self, flat: Flat, part: str) -> Leaves:
        flags = list(spread(self._batched, flat.given))
        chosen = frozenset(i for i in flat.tensors(part) if flags[i])
        if not chosen:
            raise ArgumentError(f"batched={self._batched!r} has True for no tensor of the {part}")
        return chosen

    def _only(self, flat: Flat, fitting: list[Leaves], guesses: list[Leaves], inputs: Leaves) -> Leaves:
        """The one guess that fits, by itself or by the lengths over the loader."""
        if len(fitting) != 1 and iter(self._loader) is not self._loader:
            fitting = self._varying(flat, fitting or guesses, inputs)
        if len(fitting) == 1:
            return fitting[0]
        told = listed((f"{flat.names[i]} {tuple(x.shape)}" for i, x in enumerate(flat.leaves) if has_length(x)), 9)
        example = pytree.tree_map(has_length, flat.given)
        raise ArgumentError(f"it can't be told which of {told} have an entry for each datum; {SAY}, such as {example}")

    def _varying(self, flat: Flat, guesses: list[Leaves], inputs: Leaves) -> list[Leaves]:
        """Of the guesses, those whose lengths vary together over the loader, with the lengths of `inputs`."""
        lengths = []
        for batch in self._loader:
            other = Flat.of(self._vnet, *batch)
            if other.key != flat.key:
                return []
            lengths.append([len(x) if has_length(x) else 0 for x in other.leaves])
        columns = list(zip(*lengths, strict=True))
        alike = [
            {i for i in flat.tensors(TARGETS if inputs else INPUTS) if columns[i] == columns[min(inputs or guess)]}
            for guess in guesses
        ]
        return [g for g, same in zip(guesses, alike, strict=True) if same == g and len(set(columns[min(g)])) > 1]

    def _follows(self, flat: Flat, guess: Leaves) -> bool:
        """Whether the output for a datum is the same alone as within its batch."""
        size = flat.size(guess)
        whole = self._output(flat, flat.leaves)
        for index in ([0], [size - 1]) if size > 1 else ([0, 0],):
            try:
                part = self._output(flat, [x[index] if i in guess else x for i, x in enumerate(flat.leaves)])
            except Exception:  # lengths that don't fit together
                return False
            if not _is_part(part, whole, index, size):
                return False
        return True

    def _adds_up(self, flat: Flat, guess: Leaves) -> bool:
        """Whether the batch's loss is the mean of the data's."""
        batch = flat.batch(guess)
        whole = self._loss(batch.of(flat.leaves))
        try:
            losses = [self._loss(batch.datum(i)) for i in range(batch.size)]
            return _close(torch.stack(losses).mean(), whole)
        except Exception:  # as above
            return False

    def _output(self, flat: Flat, leaves: Sequence[Any]) -> list[Tensor]:
        args, kwargs, _ = pytree.tree_unflatten(list(leaves), flat.spec)
        return [x for x in pytree.tree_leaves(self._run(args, kwargs)) if has_length(x)]

    def _loss(self, batch: Any) -> Tensor:
        args, kwargs, targets = batch
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of targets that a wrong guess leaves whole
            return scalar(self._criterion(self._run(args, kwargs), targets))

    def _run(self, args: Any, kwargs: Any) -> Any:
        if self._network is None:
            self._network = self._vnet.sample_model().eval()
        with torch.no_grad():
            return self._network(*args, **kwargs)


def _subsets(indices: list[int]) -> list[Leaves]:
    """All but the empty one; of many indices, all together and all but one."""
    n = len(indices)
    sizes = range(n, 0, -1) if n <= MOST_TRIED else (n, n - 1)
    return [frozenset(s) for s in chain.from_iterable(combinations(indices, size) for size in sizes)]


def _is_part(part: list[Tensor], whole: list[Tensor], index: list[int], size: int) -> bool:
    """Whether the outputs that follow the batch, of which there must be one, are those of the data at `index`."""
    if len(part) != len(whole):
        return False
    followed = False
    for p, w in zip(part, whole, strict=True):
        if p.shape == w.shape:
            continue  # of all data together
        dims = [d for d in range(w.dim()) if p.dim() == w.dim() and p.shape[d] != w.shape[d]]
        if len(dims) != 1 or w.shape[dims[0]] % size or p.shape[dims[0]] * size != w.shape[dims[0]] * len(index):
            return False
        (dim,) = dims
        groups = w.unflatten(dim, (size, w.shape[dim] // size))
        picked = groups.index_select(dim, torch.tensor(index, device=w.device)).flatten(dim, dim + 1)
        if not _close(p, picked):
            return False
        followed = True
    return followed


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding, which is larger for half precision, and on a GPU by TF32."""
    if not (b.is_floating_point() or b.is_complex()):
        return torch.equal(a, b)
    tolerance = max(1e-3, torch.finfo(b.dtype).eps ** 0.5)
    scale = b[b.isfinite()].abs().mean().nan_to_num().item()
    return torch.allclose(a, b.to(a.dtype), rtol=tolerance, atol=tolerance * scale, equal_nan=True)
