"""The outputs of many draws of one network's weights."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from varify.errors import ArgumentError, positive_int
from varify.network.parameters import Slot
from varify.network.signature import call_signature, copied, has_hooks, takes
from varify.network.view import Views
from varify.prediction.linearizing import Linearized
from varify.prediction.many import Draws, Source, many
from varify.prediction.vectorizing import Cost, Stack, Theta, autocast_acts

# What users write for `n_samples`.
_OTHER_NAMES = frozenset(
    {"num_samples", "num_sample", "n_sample", "nsamples", "nsample", "N_samples", "samples", "num_draws", "n_draws"}
    | {"ndraws", "draws", "mc_samples", "n_mc_samples"}
)
# So many shapes of calls are remembered.
MOST_SHAPES = 1000


class StandIns(NamedTuple):
    """What takes the place of some parameters in each run, and is random by itself.

    Attributes:
        make: by parameter name; its argument tells whether they are to be certain, those of sigma 0.
        names: of the parameters.
    """

    make: Callable[[bool], Theta]
    names: set[str]


class Sampler:
    """Runs a network with many draws, vectorized where that works and is faster, and remembers where it does.

    Args:
        views: of the network, such that what forward sets is forgotten.
        slots: of the parameters that are drawn.
    """

    def __init__(self, views: Views, slots: Mapping[str, Slot]) -> None:
        self._views, self._slots = views, slots
        # signatures of calls whose draws were found not to run vectorized
        self._sequential: set[Any] = set()
        # what a draw costs, by signature and shapes, in calls that were seen to keep nothing, and to return the same
        # vectorized and by themselves
        self._costs: dict[Any, Cost] = {}

    def outputs(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        take: Callable[[int], list[Theta] | Stack],
        n_samples: int,
        vectorize: bool | None,
        within: Callable[[nn.Module, Theta], AbstractContextManager[None]],
        means: Theta | None = None,
        stand_ins: StandIns | None = None,
    ) -> Draws:
        """What the network returns in eval mode for each draw. What it sets is forgotten.

        Args:
            args: of the network, as are `kwargs`.
            kwargs: likewise.
            take: gives so many new draws.
            n_samples: number of draws.
            vectorize: whether to run several at once; None: where it is expected to be faster.
            within: from the network that is to run, and a draw, to a context for its call.
            means: the network is taken for a linear function of its weights, that which it is like at these; None: as
                it is.
            stand_ins: what has no draws of `take`.
        """
        n_samples = positive_int("n_samples", n_samples)
        network, signature = self._views.network, call_signature(args, kwargs)
        check_arguments(network, args, kwargs)
        # copied here and not in the first call, which is watched for tensors that stay alive
        buffers: dict[int, Tensor] = {id(buffer): buffer.clone() for buffer in network.buffers()}

        def run(theta: Theta, certain: bool = False) -> Any:
            # a linear function is the same for each draw, and so are the buffers that its network starts with
            held = buffers if means is None else {i: buffer.clone() for i, buffer in buffers.items()}
            weights = theta if stand_ins is None else theta | stand_ins.make(certain)

            def call(network: nn.Module) -> Any:
                with within(network, weights):
                    own, named = copied(args, kwargs)
                    return network(*own, **named)

            return self._views.run(call, weights, training=False, buffers=held)

        one: Callable[[Theta], Any] = run
        if means is not None:
            one, signature = Linearized(run, means), ("linearized", signature)
        served = set() if stand_ins is None else stand_ins.names
        if stand_ins is not None:
            signature = "separate", signature
        unfit = signature in self._sequential or has_hooks(network) or autocast_acts()
        way = False if unfit and vectorize is None else vectorize
        key = signature, shapes_of(args, kwargs)
        draws = many(
            one,
            self._source(take, served),
            n_samples,
            way,
            cost=self._costs.get(key),
            certain=None if stand_ins is None else partial(run, certain=True),
        )
        if draws.cost is not None:
            if len(self._costs) >= MOST_SHAPES:
                self._costs.clear()
            self._costs[key] = draws.cost
        if draws.fails and vectorize is None:
            self._sequential.add(signature)  # it would fail again
        return draws

    def _source(self, take: Callable[[int], list[Theta] | Stack], served: set[str]) -> Source:
        return Source(take, self._bytes_without(served), {slot.parameter.device for slot in self._slots.values()})

    def _bytes_without(self, served: set[str]) -> int:
        """Of one draw, but for these parameters."""
        parameters = [slot.parameter for name, slot in self._slots.items() if name not in served]
        return sum(p.numel() * p.element_size() for p in parameters)


def check_arguments(network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments of `predict` that are not meant for the network.

    Raises:
        ArgumentError: a loader, or another name for n_samples.
    """
    if any(isinstance(arg, DataLoader) for arg in args):
        raise ArgumentError(
            "predict takes the inputs of one call, got a DataLoader: "
            "vnet.ensemble(n_samples).predict_loader(loader) goes through one"
        )
    for name in _OTHER_NAMES & kwargs.keys():
        if not takes(network, name):
            raise ArgumentError(f"the number of draws is n_samples, got {name}={kwargs[name]!r}")


def shapes_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """The shapes of the tensors in a call."""
    leaves = pytree.tree_leaves((args, dict(kwargs)))
    return tuple(tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_nested)
