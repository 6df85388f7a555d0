"""A conversion takes no more memory at its peak than one copy of the parameters beyond its result."""

import sys

import pytest

from tests.benchmarks.conversion_memory import copies


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
@pytest.mark.parametrize(
    ("name", "init", "most"),
    [  # the means and the rho's are two copies, an int8 mask of a padding row a quarter
        ("one matrix", "relative", 3.0),
        ("an embedding with a padding row", "zero_mean", 3.5),
        ("forty matrices", "relative", 2.1),
    ],
)
def test_peak_memory(name: str, init: str, most: float) -> None:
    found = copies(name, init)
    assert 1.9 < found < most + 0.1
