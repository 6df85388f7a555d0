"""The names that `set_prior` and checkpoints know priors by."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributions

from varify.errors import PriorError, listed
from varify.weights.prior import Prior

P = TypeVar("P", bound=type[Prior])
KINDS: dict[str, type[Prior]] = {}


def register(kind: str) -> Callable[[P], P]:
    """Make a `Prior` class known by name, for `set_prior(kind, ...)` and for checkpoints.

    ```python
    @varify.priors.register("cauchy")
    class Cauchy(varify.priors.Prior):
        def __init__(self, scale, n_mc_samples=1):
            super().__init__(n_mc_samples)
            self.keep_positive(scale=scale)     # checked, and kept as self.scale

        def log_prob(self, w):                  # the log density of the whole tensor, scalar ()
            return torch.distributions.Cauchy(0.0, self.scale).log_prob(w).sum()
    ```

    Raises:
        PriorError: the name is that of another class.
    """

    def decorate(prior_type: P) -> P:
        former = KINDS.get(kind)
        if former is not None and former.__qualname__ != prior_type.__qualname__:
            raise PriorError(f"the name {kind!r} is taken by {former.__qualname__}; choose another")
        prior_type.kind = kind
        KINDS[kind] = prior_type
        return prior_type

    return decorate


def as_prior(kind: Any, **hyperparameters: Any) -> "Prior":
    """A prior from whatever a user may write: a name with hyper-parameters, a `Prior`, a torch distribution.

    Raises:
        PriorError: the name or a hyper-parameter is unknown, one is missing, or it has a value that can't be.
    """
    if isinstance(kind, distributions.Distribution):
        wrap: Callable[..., Prior] = KINDS["distribution"]
        return wrap(kind, **hyperparameters)
    if isinstance(kind, Prior):
        if hyperparameters:
            raise PriorError(f"{kind!r} has its hyper-parameters already; {listed(hyperparameters)} can't be added")
        return kind
    if isinstance(kind, type) and issubclass(kind, Prior):
        raise PriorError(f"prior={kind.__name__} is a class: pass an instance, {kind.__name__}(...)")
    if not isinstance(kind, str):
        raise PriorError(
            f"prior={kind!r}: a name ({listed(KINDS, 9)}), a varify.priors.Prior or a "
            "torch.distributions.Distribution is needed"
        )
    if kind not in KINDS:
        raise PriorError(f"unknown prior {kind!r}; there are {listed(KINDS, 99)}")
    try:
        inspect.signature(KINDS[kind]).bind(**hyperparameters)
    except TypeError as error:
        takes = ", ".join(str(p) for p in inspect.signature(KINDS[kind]).parameters.values())
        raise PriorError(f"prior {kind!r}: {error}; it takes {takes}") from None
    return KINDS[kind](**hyperparameters)
