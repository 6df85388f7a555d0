"""All posteriors of a network."""

from collections.abc import Iterator, Mapping

from varify.errors import listed
from varify.weights.posterior import GaussianPosterior


class Posteriors(Mapping[str, GaussianPosterior]):
    """Posterior by parameter name; iterates over first names, finds the others too."""

    def __init__(self, posteriors: dict[str, GaussianPosterior], first_names: dict[str, str]) -> None:
        self._posteriors, self._first_names = posteriors, first_names

    def __getitem__(self, name: str) -> GaussianPosterior:
        first = self._first_names.get(name, name)
        if first not in self._posteriors:
            raise KeyError(f"{name!r} has no posterior; there are {listed(self._posteriors)}")
        return self._posteriors[first]

    def __iter__(self) -> Iterator[str]:
        return iter(self._posteriors)

    def __len__(self) -> int:
        return len(self._posteriors)

    def __repr__(self) -> str:
        return f"Posteriors({listed(self._posteriors)})"
