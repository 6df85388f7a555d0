"""All variational modules within a network: it may be one, have one for its head, or hold several."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from varify.errors import ArgumentError, ModelError, listed
from varify.network.copies import copy_network
from varify.network.parameters import first_slots, is_variational
from varify.network.sharding import refuse_sharded


def variational_parts(network: nn.Module) -> list[Any]:
    """Each `VariationalModule` within `network`, itself too, in the order of `modules()`."""
    # a walk of its own, in less than half the time of `modules()`: a training step asks a dozen times
    found: list[Any] = []
    seen: set[nn.Module] = set()
    waiting: list[nn.Module | None] = [network]
    while waiting:
        module = waiting.pop()
        if module is not None and module not in seen:
            seen.add(module)
            if is_variational(module):
                found.append(module)
            waiting += list(module._modules.values())[::-1]
    return found


def required_parts(network: nn.Module) -> list[Any]:
    """`variational_parts`, of which there must be one.

    Raises:
        ModelError: there is none.
    """
    parts = variational_parts(network)
    if not parts:
        raise ModelError(
            f"the {type(network).__name__} has no variational parts, so there is no KL: "
            "vnet = varify.variationalize(network) makes one"
        )
    return parts


def check_variational(vnet: object, what: str) -> None:
    """Refuse what is no variational module.

    Raises:
        ModelError: `vnet` is none; `what` needs one.
    """
    if not isinstance(vnet, nn.Module) or not is_variational(vnet):
        raise ModelError(
            f"{what} needs a variational module, got a {type(vnet).__name__}: "
            "vnet = varify.variationalize(network) makes one"
        )


def prior_loss(network: nn.Module) -> Tensor:
    """Sum of KL(q‖p) over every variational module within `network`, scalar `()`, nats, differentiable.

    For a network of which only a part is variational, such as a Bayesian head on a plain body.
    """
    if torch.compiler.is_compiling():
        terms = [term for part in variational_parts(network) for term in part.kl_divergence().values()]
    else:
        terms = [term for part in variational_parts(network) for term in part.posteriors.total_kl(part.drawing)]
    if not terms:
        return torch.zeros(())
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()


def learns_undrawn(network: nn.Module) -> bool:
    """Whether gradients are on and yet a part that learns runs at its means: in eval mode, and not `sampling`."""
    return torch.is_grad_enabled() and any(
        not (part.training or part.drawing.always) and any(p.requires_grad for p in part.parameters())
        for part in variational_parts(network)
    )


def pairs_draws(network: Any) -> bool:
    """Whether two forwards can have opposite noise: a variational module that draws all weights, none of them fixed.

    Not variational parts within: one in a checkpoint draws again in backward, when nothing says that it was mirrored.
    """
    if torch.compiler.is_compiling() or variational_parts(network) != [network]:
        return False
    return network.drawing.noise is None and not network._settings.wants_estimators


@contextmanager
def sharing_sigma(network: nn.Module) -> Iterator[None]:
    """Within, sigma is computed once for draws and divergences of every variational module within `network`."""
    with ExitStack() as stack:
        for part in variational_parts(network) if not torch.compiler.is_compiling() else []:
            stack.enter_context(part.posteriors.sharing_sigma())
        yield


@contextmanager
def sampling(network: nn.Module) -> Iterator[None]:
    """Within, every variational module within `network` draws its weights, in eval mode as well."""
    with ExitStack() as stack:
        for part in variational_parts(network):
            stack.enter_context(part.drawing.sampling())
        yield


def means_of(vnet: Any) -> dict[str, Tensor]:
    """The means of all variational parameters of a `VariationalModule` by name, each in its network's dtype."""
    # not mu itself, which momentum may have moved where a weight is pruned
    return {name: q.mean.detach().to(q.mu.dtype) for name, q in vnet.posteriors.items()}


def refuse_nested(vnet: Any, what: str) -> None:
    """Raise an ArgumentError if `vnet` has a variational module within: `what` knows the weights of one."""
    nested = [name for name, part in vnet.module.named_modules() if is_variational(part)]
    if nested:
        raise ArgumentError(
            f"{what} needs a network without variational modules within, got one at {listed(map(repr, nested))}: "
            "variationalize the plain network as a whole, with where= for the parts that are to be random"
        )


def copied_children(vnet: nn.Module, memo: dict[int, Any]) -> dict[str, nn.Module]:
    """Copies of a module's children by name, for its `__deepcopy__`."""
    return {name: copy_network(child, memo) for name, child in vnet.named_children()}


@torch.no_grad()
def ordinary(vnet: Any, weights: Callable[[Any], Mapping[str, Tensor]], what: str) -> nn.Module:
    """A copy of the user's network with other weights, also in the variational modules within it.

    Args:
        vnet: a `VariationalModule`.
        weights: from one of these to its weights by name; of a name that is missing, the parameter.
        what: is asked for, in words.

    Raises:
        StructureError: the parameters are in parts (FSDP2).
    """
    refuse_sharded(vnet, what)
    new: nn.Module = copy_network(vnet.module)
    for copied, part in zip(variational_parts(new), variational_parts(vnet.module), strict=True):
        copied.drawing = part.drawing  # within `fixed_draw`
    slots = first_slots(new)
    for name, weight in weights(vnet).items():
        slots[name].parameter.copy_(weight)
    if is_variational(new):
        return ordinary(new, weights, what)
    nested = [(module, name, child) for module in new.modules() for name, child in module._modules.items()]
    made: dict[int, nn.Module] = {}  # one that is shared stays so
    for module, name, child in nested:
        if child is not None and is_variational(child):
            if id(child) not in made:
                made[id(child)] = ordinary(child, weights, what)
            module._modules[name] = made[id(child)]
    return new
