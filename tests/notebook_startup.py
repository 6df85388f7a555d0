"""What a notebook's kernel runs first, as `conftest.py` does before the tests."""

from tests import operators

operators.declare()
