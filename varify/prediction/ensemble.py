"""Networks drawn from a posterior once, and used for every call."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from varify.errors import ArgumentError, nonnegative_int
from varify.network.arguments import unpack
from varify.network.parameters import is_variational
from varify.prediction.gather import gather
from varify.prediction.joining import join, with_progress
from varify.prediction.vectorizing import Stack, Theta

# What draws may take in memory by default, in bytes.
MEMORY = 2**30


class Ensemble:
    """Several networks drawn from a posterior, the same ones for every call; made by `VariationalModule.ensemble`.

    Each draw's noise comes of a seed of its own, by the CPU's generator, so that it is the same on any device. What
    fits into memory is drawn once; other draws are made again in each call. `ensemble[i]` is draw i as an ordinary copy
    of the user's network, in eval mode; iterating gives one after another. `varify.save` and `varify.load_ensemble`
    keep it in a file.

    Args:
        vnet: a variational module for itself alone: the posteriors are those of now.
        seeds: one for each draw.
        memory: bytes that draws may take; 0 keeps none.

    Attributes:
        vnet: the variational module, in eval mode.
        seeds: as given, as is `memory`.
        n_kept: number of draws that are in memory, the first ones.
    """

    def __init__(self, vnet: Any, seeds: Sequence[int], memory: int = MEMORY) -> None:
        self.vnet, self.seeds, self.memory = vnet.eval(), list(seeds), nonnegative_int("memory", memory)
        nested = [(path, part) for path, part in vnet.module.named_modules() if is_variational(part)]
        # a draw of one that is within the network is known by its noise, under a name that no parameter can have
        self._parts: list[tuple[str, Any]] = [("", vnet), *((f"{path}..", part) for path, part in nested)]
        first = self._theta(0)
        self._bytes = sum(tensor.numel() * tensor.element_size() for tensor in first.values())
        self.n_kept = min(len(self.seeds), self.memory // max(1, self._bytes))
        self._kept = self._drawn(first)

    def _drawn(self, first: Theta) -> Stack:
        try:
            kept = Stack({name: t.new_empty((self.n_kept, *t.shape)) for name, t in first.items()}, self.n_kept)
        except RuntimeError as error:  # torch.OutOfMemoryError is one; on a CPU there is no other sign
            raise ArgumentError(
                f"{self.n_kept} draws of {self._bytes:,} bytes don't fit into memory ({str(error)[:99]}): give the "
                "bytes that they may take, such as memory=2**28; draws beyond are made again in each call"
            ) from error
        for i in range(self.n_kept):
            for name, tensor in (first if i == 0 else self._theta(i)).items():
                kept.tensors[name][i] = tensor
        return kept

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: int) -> nn.Module:
        if not hasattr(index, "__index__"):
            raise ArgumentError(
                f"ensemble[i] is one network, so that i must be an integer, got {index!r}; several are "
                "[ensemble[i] for i in range(1, 3)]"
            )
        noise = self._noise(self.seeds[index])
        with _fixed(self._parts, noise):
            network: nn.Module = self.vnet.sample_model()
        return network

    def __iter__(self) -> Iterator[nn.Module]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return (
            f"Ensemble({len(self)} draws of a {type(self.vnet.module).__name__}, {self._bytes:,} bytes each, "
            f"{self.n_kept} in memory)"
        )

    def to(self, device: torch.device | str) -> "Ensemble":
        """The same networks on another device; this object."""
        self.vnet.to(device)
        self._kept = Stack({name: tensor.to(device) for name, tensor in self._kept.tensors.items()}, self.n_kept)
        return self

    # --- predictions

    def predict(
        self,
        *args: object,
        outputs: str = "logits",
        class_dim: int = -1,
        vectorize: bool | None = None,
        gradients: bool = False,
        **kwargs: object,
    ) -> Any:
        """Outputs of all networks; see `VariationalModule.predict`. Gradients are those by the inputs."""
        position = 0

        def take(number: int) -> list[Theta] | Stack:
            nonlocal position
            begin, position = position, position + number
            if position <= self.n_kept:
                return self._kept.part(begin, position)
            return [self._kept.draw(i) if i < self.n_kept else self._theta(i) for i in range(begin, position)]

        with torch.set_grad_enabled(gradients):
            sampler = self.vnet.engine.sampler
            found = sampler.outputs(args, kwargs, take, len(self), vectorize, _within)
            return gather(found.outputs, outputs, class_dim, found.vectorized)

    def predict_loader(
        self,
        loader: Iterable[Any],
        keep: Callable[[Any], Any] | None = None,
        *,
        inputs: Callable[[Any], Any] | None = None,
        dim: int = 0,
        progress: bool | None = None,
        outputs: str = "logits",
        class_dim: int = -1,
        vectorize: bool | None = None,
    ) -> Any:
        """`predict` for each batch of a loader, joined.

        Memory: the draws, the outputs of all draws for one batch a few times, and what is kept, twice at the end. So
        10,000 inputs with 100 draws of 1,000 classes take 8 GB if all samples are kept, and below 1 GB with
        `keep=lambda prediction: (prediction.mean, prediction.std, prediction.entropy())` in batches of at most 200.
        Quantiles are exact as well, since all draws of a batch are there at once: `prediction.interval(0.9)`, or
        `prediction.quantile(q)` of one q each (of several they would be joined along the levels). Sorting takes three
        times the outputs of a batch meanwhile.

        Args:
            loader: of batches. Tensors are moved to the network's device.
            keep: what to keep of a batch's prediction, in any structure of tensors with an entry for each datum; by
                default the prediction itself, that is, all samples.
            inputs: from a batch to the network's inputs: one, a tuple of several, or a dict by name. By default the
                batch itself or, of a pair (inputs, targets), the first.
            dim: the dimension of an output that counts data.
            progress: whether to show a bar, by tqdm; by default on a terminal, if it is installed.
            outputs: see `VariationalModule.predict`, as for `class_dim` and `vectorize`.
            class_dim: likewise.
            vectorize: likewise.

        Returns:
            What `keep` returns, of all data: a `Prediction`, or the structure that the network returns, by default.

        Raises:
            ArgumentError: an empty loader, or a tensor; batches of different structure or shape; `keep` returns
                scalars.
        """
        if isinstance(loader, Tensor):
            raise ArgumentError(
                f"loader must give batches, got a tensor of shape {tuple(loader.shape)}, whose rows would be taken for "
                "these: ensemble.predict(x) takes it as one batch, DataLoader(x, batch_size=...) cuts it"
            )
        device = next(iter(self.vnet.parameters())).device
        parts = []
        for batch in with_progress(loader, progress):
            given = inputs(batch) if inputs is not None else inputs_of(batch)
            args, kwargs = unpack(given, self.vnet)
            args, kwargs = pytree.tree_map_only(Tensor, lambda x: x.to(device), (tuple(args), dict(kwargs)))
            found = self.predict(*args, outputs=outputs, class_dim=class_dim, vectorize=vectorize, **kwargs)
            parts.append(found if keep is None else keep(found))
        return join(parts, dim)

    # --- draws

    def _noise(self, seed: int) -> list[Theta]:
        """Eps by part and parameter name."""
        generator = torch.Generator().manual_seed(seed)
        return [
            {
                name: torch.randn(q.rho.shape, generator=generator, dtype=q.rho.dtype).to(q.rho.device)
                for name, q in part.posteriors.items()
            }
            for _, part in self._parts
        ]

    @torch.no_grad()
    def _theta(self, i: int) -> Theta:
        """Draw i: weights by name, and the noise of variational modules within the network."""
        own, *others = self._noise(self.seeds[i])
        theta = {name: tensor.detach() for name, tensor in self.vnet.posteriors.draw(own).items()}
        for (prefix, _), noise in zip(self._parts[1:], others, strict=True):
            theta |= {prefix + name: eps for name, eps in noise.items()}
        return theta


def inputs_of(batch: Any) -> Any:
    """The network's inputs in a batch: the first of (inputs, targets) or (inputs,), or all of it.

    Raises:
        ArgumentError: a tuple or list of more than two.
    """
    if not isinstance(batch, (tuple, list)) or hasattr(batch, "_fields"):
        return batch
    if len(batch) > 2 or not batch:
        raise ArgumentError(
            f"a batch of {len(batch)} parts may be inputs and targets in several ways: inputs=lambda batch: ... says "
            "which are the network's inputs, a tuple if there are several"
        )
    return batch[0]


@contextmanager
def _fixed(parts: Iterable[tuple[str, Any]], noise: Iterable[Theta]) -> Iterator[None]:
    """Within, these parts draw with this noise."""
    with ExitStack() as stack:
        for (_, part), eps in zip(parts, noise, strict=True):
            stack.enter_context(part.drawing.sampling())
            stack.enter_context(part.drawing.fixed(eps))
        yield


def _within(network: nn.Module, theta: Theta) -> Any:
    """Context for a call of the network, in which the variational modules within it have the noise in theta."""
    parts = [(f"{path}..", part) for path, part in network.named_modules() if is_variational(part)]
    noise = [{name: theta[prefix + name] for name in part.posteriors} for prefix, part in parts]
    return _fixed(parts, noise)
