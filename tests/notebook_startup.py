"""What a notebook's kernel runs first, as `conftest.py` does before the tests."""

import warnings

from tests import operators

operators.declare()
# of transformers and peft, about packages that are not needed and about their own code
warnings.filterwarnings("ignore", message="IProgress not found")
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
