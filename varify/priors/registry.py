"""The names that `set_prior` and checkpoints know priors by."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import distributions

from varify.errors import PriorError, listed
from varify.naming import is_same, named
from varify.weights.prior import Prior

P = TypeVar("P", bound=type[Prior])
# What `set_prior` and `variationalize` take for a prior: a name, a prior, or a factorized distribution.
PriorLike = str | Prior | distributions.Distribution
_BY_NAME: dict[str, type[Prior]] = {}


def register(name: str) -> Callable[[P], P]:
    """Decorate a `Prior` class that is to be known by a name: for `set_prior(name, ...)`, the command line, files.

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
    put = named(name, Prior, "varify.priors.Prior", _BY_NAME, PriorError)

    def decorate(prior_type: P) -> P:
        put(prior_type).kind = name
        return prior_type

    return decorate


def as_prior(prior: PriorLike, **hyperparameters: Any) -> Prior:
    """A prior from whatever a user may write: a name with hyper-parameters, a `Prior`, a torch distribution.

    Raises:
        PriorError: the name or a hyper-parameter is unknown, one is missing, or it has a value that can't be.
    """
    if isinstance(prior, distributions.Distribution):
        wrap: Callable[..., Prior] = _BY_NAME["distribution"]
        return wrap(prior, **hyperparameters)
    if isinstance(prior, Prior):
        if "_buffers" not in vars(prior):
            raise PriorError(f"{type(prior).__name__}.__init__ must call super().__init__() first")
        if hyperparameters:
            raise PriorError(f"{prior!r} has its hyper-parameters already; {listed(hyperparameters)} can't be added")
        return prior
    if isinstance(prior, type) and issubclass(prior, Prior):
        raise PriorError(f"prior={prior.__name__} is a class: pass an instance, {prior.__name__}(...)")
    if not isinstance(prior, str):
        raise PriorError(
            f"prior must be a name ({listed(names(), 9)}), a varify.priors.Prior or a "
            f"torch.distributions.Distribution, got {prior!r}"
        )
    if prior not in names():
        raise PriorError(f"unknown prior {prior!r}; there are {listed(names(), 99)}")
    try:
        inspect.signature(_BY_NAME[prior]).bind(**hyperparameters)
    except TypeError as error:
        takes = ", ".join(str(p) for p in inspect.signature(_BY_NAME[prior]).parameters.values())
        raise PriorError(f"prior {prior!r}: {error}; it takes {takes}") from None
    return _BY_NAME[prior](**hyperparameters)


def names() -> list[str]:
    """Of the priors that have one; a distribution is given itself, and not by name."""
    return [name for name in _BY_NAME if name != "distribution"]


# --- in checkpoints


def kind_of(prior_type: type[Prior]) -> str:
    """What a checkpoint calls a prior: its name, or module and class of one that is not registered."""
    registered = _BY_NAME.get(prior_type.kind)
    if registered is not None and is_same(registered, prior_type):
        return prior_type.kind
    return f"{prior_type.__module__}:{prior_type.__qualname__}"


def of_kind(kind: str) -> type[Prior] | None:
    """The class that a checkpoint's `kind` stands for; None if nothing that is imported defines it."""
    if kind in _BY_NAME:
        return _BY_NAME[kind]
    found = [t for t in _subclasses(Prior) if ":" in kind and f"{t.__module__}:{t.__qualname__}" == kind]
    return found[-1] if found else None


def known_kinds() -> list[str]:
    """All that `of_kind` finds."""
    others = [kind_of(t) for t in _subclasses(Prior) if not t.__module__.startswith("varify.")]
    return list(dict.fromkeys([*names(), *others]))


def _subclasses(base: type[Prior]) -> Iterator[type[Prior]]:
    for one in base.__subclasses__():
        yield one
        yield from _subclasses(one)
