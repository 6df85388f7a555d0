"""Find out which tensors of a batch have an entry for each datum."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from varify.analysis.batch import HINT, INPUTS, TARGETS, Batch, Flat, Leaves, output_of, pair, spread
from varify.errors import ArgumentError, listed
from varify.module import VariationalModule
from varify.network.arguments import has_length
from varify.objective.elbo import Criterion, check_criterion, loss_of

# With at most this many tensors of one length, all their combinations are tried: 63.
MOST_TRIED = 6


class Batches:
    """The batches of a loader, split into single data, as often as the loader can be traversed; none is empty.

    Args:
        vnet: see `Splitter`, as are the others.
        loader: likewise.
        criterion: likewise.
        batched: likewise.
    """

    def __init__(self, vnet: VariationalModule, loader: Iterable[Any], criterion: Criterion, batched: object) -> None:
        self._loader, self._splitter = loader, Splitter(vnet, loader, criterion, batched)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            found = self._splitter.split(*pair(batch))
            if found.size:
                yield found


class Splitter:
    """Splits batches into single data: finds how many there are and which tensors have an entry for each.

    A single input tensor has. Of several, it is those with which the network's output for a datum is the same alone as
    within its batch; of several targets, those with which the batch's loss is the mean of the losses of its data. Where
    that is ambiguous, it is those whose length varies with the batch size over the loader. It is found once for each
    structure, in the first batch of more than one datum.

    Args:
        vnet: run with one draw of its weights: at the means, a layer that is initialized at 0 would ignore its input.
        loader: of (inputs, targets). Traversed once more if lengths must decide, unless it is an iterator.
        criterion: `(output, targets)` to a mean over the batch.
        batched: the answer, if the user has it: booleans in the structure of (inputs, targets), for tensors or parts.

    Raises:
        ArgumentError: the network's batch is not the first dimension.
    """

    def __init__(self, vnet: VariationalModule, loader: Iterable[Any], criterion: Criterion, batched: object) -> None:
        check_criterion(criterion)
        self._vnet, self._loader, self._criterion, self._batched = vnet, loader, criterion, batched
        self._found: dict[Any, Leaves] = {}
        batch_dim = vnet.posteriors.settings.batch_dim
        if batch_dim:
            raise ArgumentError(
                f"data are told apart along the first dimension, and this network has batch_dim={batch_dim}: convert "
                "it within a module that has the batch first and transposes it"
            )
        self._network: nn.Module | None = None

    def size(self, inputs: object, targets: object) -> int:
        """Number of data in a batch.

        Raises:
            ArgumentError: it is ambiguous.
        """
        flat = Flat.of(self._vnet, inputs, targets)
        if self._batched is None:
            lengths = {len(flat.leaves[i]) for i in flat.tensors(INPUTS)}
            if not lengths:
                return next((len(flat.leaves[i]) for i in flat.tensors(TARGETS)), 1)
            if len(lengths) == 1:
                return lengths.pop()
        return flat.size(self._inputs(flat))

    def split(self, inputs: object, targets: object) -> Batch:
        """The batch, with the number of entries of each tensor for a datum.

        Raises:
            ArgumentError: there is no tensor in the inputs or in the targets, their lengths do not fit, or it is
                ambiguous which have an entry for each datum.
        """
        flat = Flat.of(self._vnet, inputs, targets)
        for part in (TARGETS, INPUTS):
            if not flat.tensors(part):
                raise ArgumentError(f"the loader must give (inputs, targets) with a batch of {part}: a tensor at least")
        chosen = self._inputs(flat)
        size = flat.size(chosen)
        if size < 2:  # there is nothing to split
            return Batch(flat.leaves, flat.spec, [0] * len(flat.leaves), size)
        return flat.batch(chosen | self._targets(flat, chosen))

    def _inputs(self, flat: Flat) -> Leaves:
        """The leaves of the inputs that have an entry for each datum."""
        tensors, key = flat.tensors(INPUTS), (INPUTS, flat.key)
        if self._batched is not None:
            return self._as_stated(flat, INPUTS)
        if len(tensors) == 1:
            return frozenset(tensors)
        if key not in self._found:
            lengths = sorted({len(flat.leaves[i]) for i in tensors} - {0})
            guesses = [g for n in lengths for g in _subsets([i for i in tensors if len(flat.leaves[i]) == n])]
            fitting = [guess for guess in guesses if self._follows(flat, guess)]
            if fitting and all(flat.size(guess) == 1 for guess in fitting):
                return fitting[0]  # not stored: a larger batch may decide
            self._found[key] = self._only(flat, fitting, guesses, frozenset())
        return self._found[key]

    def _targets(self, flat: Flat, inputs: Leaves) -> Leaves:
        """The leaves of the targets that have an entry for each datum, given those of the inputs."""
        size, tensors, key = flat.size(inputs), flat.tensors(TARGETS), (TARGETS, flat.key)
        if self._batched is not None:
            return self._as_stated(flat, TARGETS)
        if key not in self._found:
            if len(tensors) == 1 and len(flat.leaves[tensors[0]]) == size:
                return frozenset(tensors)
            cut = [i for i in tensors if flat.divides(i, size)]
            if not cut:
                raise flat.uncut(tensors[0], size)
            guesses = _subsets(cut)
            fitting = [guess for guess in guesses if self._adds_up(flat, inputs | guess)]
            # only unflattened ones: lengths do not tell in which order targets were flattened
            whole = [guess for guess in guesses if all(len(flat.leaves[i]) == size for i in guess)]
            self._found[key] = self._only(flat, fitting, whole, inputs)
        return self._found[key]

    def _as_stated(self, flat: Flat, part: str) -> Leaves:
        flags = list(spread(self._batched, flat.pair))
        chosen = frozenset(i for i in flat.tensors(part) if flags[i])
        if not chosen:
            raise ArgumentError(f"batched={self._batched!r} has True for no tensor of the {part}")
        return chosen

    def _only(self, flat: Flat, fitting: list[Leaves], guesses: list[Leaves], inputs: Leaves) -> Leaves:
        """The only guess that fits, by itself or by the lengths over the loader; an error if there is none."""
        if len(fitting) != 1 and iter(self._loader) is not self._loader:
            fitting = self._varying(flat, fitting or guesses, inputs)
        if len(fitting) == 1:
            return fitting[0]
        tensors = listed((f"{flat.names[i]} {tuple(x.shape)}" for i, x in enumerate(flat.leaves) if has_length(x)), 9)
        example = pytree.tree_map(has_length, flat.pair)
        raise ArgumentError(
            f"it is ambiguous which of {tensors} have an entry for each datum; {HINT}, such as {example}"
        )

    def _varying(self, flat: Flat, guesses: list[Leaves], inputs: Leaves) -> list[Leaves]:
        """Of the guesses, those whose lengths vary together over the loader, with the lengths of `inputs`."""
        lengths = []
        for batch in self._loader:
            other = Flat.of(self._vnet, *pair(batch))
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
            except Exception:  # lengths that do not fit together
                return False
            if not _is_part(part, whole, index, size):
                return False
        return True

    def _adds_up(self, flat: Flat, guess: Leaves) -> bool:
        """Whether the batch's loss is the mean of the losses of its data."""
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
            warnings.simplefilter("ignore")  # a wrong guess leaves targets whole, and losses warn of their shape
            return loss_of(self._criterion, self._run(args, kwargs), targets)

    def _run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if self._network is None:
            self._network = self._vnet.sample_model().eval()
        with torch.no_grad():
            return output_of(self._network, args, kwargs)


def _subsets(indices: list[int]) -> list[Leaves]:
    """All subsets except the empty one; of many indices, only all and all but one."""
    n = len(indices)
    sizes = range(n, 0, -1) if n <= MOST_TRIED else (n, n - 1)
    return [frozenset(s) for s in chain.from_iterable(combinations(indices, size) for size in sizes)]


def _is_part(part: list[Tensor], whole: list[Tensor], index: list[int], size: int) -> bool:
    """Whether the outputs for a part of the batch are those of the data at `index`.

    Outputs of the same shape for part and whole belong to the batch as a whole; at least one must not.
    """
    if len(part) != len(whole):
        return False
    followed = False
    for p, w in zip(part, whole, strict=True):
        if p.shape == w.shape:
            continue
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
    """Whether they are equal up to rounding, which is larger in half precision, and on a GPU with TF32."""
    if not (b.is_floating_point() or b.is_complex()):
        return torch.equal(a, b)
    tolerance = max(1e-3, torch.finfo(b.dtype).eps ** 0.5)
    scale = b[b.isfinite()].abs().mean().nan_to_num().item()
    return torch.allclose(a, b.to(a.dtype), rtol=tolerance, atol=tolerance * scale, equal_nan=True)
