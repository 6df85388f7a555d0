"""The outputs of many draws of one network's weights."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from varify.errors import ArgumentError, positive_int
from varify.network.parameters import Slot
from varify.network.signature import call_signature, has_hooks, takes
from varify.network.view import Views
from varify.prediction.linearizing import Linearized
from varify.prediction.vectorizing import Draws, Theta, autocast_acts, many

# What users write for `n_samples`.
_OTHER_NAMES = frozenset({"num_samples", "n_sample", "samples", "num_draws", "n_draws", "mc_samples"})


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
        # of calls that were seen to keep nothing, and to return the same vectorized and by themselves
        self._vectorized: set[Any] = set()

    def outputs(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        draw: Callable[[], Theta],
        n_samples: int,
        vectorize: bool | None,
        within: Callable[[nn.Module], AbstractContextManager[None]],
        means: Theta | None = None,
    ) -> Draws:
        """What the network returns in eval mode for each draw. What it sets is forgotten.

        Args:
            args: of the network, as are `kwargs`.
            kwargs: likewise.
            draw: gives one draw.
            n_samples: number of draws.
            vectorize: whether to run several at once; None: where it is expected to be faster.
            within: from the network that is to run to a context for its call.
            means: the network is taken for a linear function of its weights, that which it is like at these; None: as
                it is.
        """
        n_samples = positive_int("n_samples", n_samples)
        for name in _OTHER_NAMES & kwargs.keys():
            if not takes(self._views.network, name):
                raise ArgumentError(f"the number of draws is n_samples, got {name}={kwargs[name]!r}")
        network, signature = self._views.network, call_signature(args, kwargs)
        # copied here and not in the first call, which is watched for tensors that stay alive
        buffers: dict[int, Tensor] = {id(buffer): buffer.clone() for buffer in network.buffers()}

        def call(network: nn.Module) -> Any:
            with within(network):
                return network(*args, **kwargs)

        def run(theta: Theta) -> Any:
            # a linear function is the same for each draw, and so are the buffers that its network starts with
            held = buffers if means is None else {i: buffer.clone() for i, buffer in buffers.items()}
            return self._views.run(call, theta, training=False, buffers=held)

        one: Callable[[Theta], Any] = run
        if means is not None:
            one, signature = Linearized(run, means), ("linearized", signature)
        slow = self._slow() or signature in self._sequential or has_hooks(network) or autocast_acts()
        watch = signature not in self._vectorized
        draws = many(one, draw, n_samples, vectorize, slow=slow, watch=watch)
        if draws.agrees:
            self._vectorized.add(signature)
        if not (slow or draws.vectorized or draws.keeps) and vectorize is None and n_samples > 1:
            self._sequential.add(signature)  # it would fail again
        return draws

    def _slow(self) -> bool:
        # Convolutions with a weight for each draw become grouped ones, which are two to four times slower on a CPU.
        slots = self._slots.values()
        return any(isinstance(s.owner, nn.modules.conv._ConvNd) and s.parameter.device.type == "cpu" for s in slots)
