"""Running a module of the user's own with other weights in the place of its parameters."""

import threading
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

# While weights are swapped in, another thread would see them: whoever reads a network's parameters takes this.
SWAPPED = threading.RLock()


def run_with(module: nn.Module, weights: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call `module` with `weights` (by name within it) in the place of its parameters; as it was afterwards."""
    with SWAPPED:
        try:
            return functional_call(module, weights, args, kwargs)
        finally:
            for part in module.modules():
                if isinstance(part, nn.RNNBase):  # else it keeps the drawn weights in its list of flat ones
                    part._init_flat_weights()
