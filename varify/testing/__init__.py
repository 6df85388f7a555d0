"""Contract tests for a custom prior, initialization or estimator's rule: subclass one in your tests.

```python
class TestCauchy(varify.testing.PriorContract):
    def make(self):
        return Cauchy(scale=0.5)
```

pytest finds the tests of the subclass; each can also be called by hand. They run on the CPU with a seed of their own
and leave the random state alone. A failure is an AssertionError that says what to do.
"""

from varify.testing.inits import InitContract
from varify.testing.priors import PriorContract
from varify.testing.rules import RuleContract

__all__ = ["InitContract", "PriorContract", "RuleContract"]
