"""The contract of an estimator's rule."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from varify.estimators.rules import Rule, find_rule
from varify.testing.checks import DRAWS, assert_same_mean, fixed_seed, or_else
from varify.variationalize import variationalize
from varify.weights.moments import Examples, Moments


class RuleContract:
    """What varify asks of an estimator's rule. Subclass it, set `estimator` and `operation`, define `arguments`.

    Attributes:
        estimator: as given to `varify.estimators.rule`.
        operation: likewise.
        example_dim: the dimension of the operation's input and output that counts examples; None if there is one alone.
    """

    estimator: str
    operation: Any
    example_dim: int | None = 0

    def arguments(self) -> Sequence[Any]:
        """The operation's, by position. An `nn.Parameter` has a posterior: the rule is given its moments instead."""
        raise NotImplementedError(
            f"{type(self).__name__} must define arguments(self): return the operation's arguments"
        )

    @fixed_seed()
    def test_mean_and_variance_are_those_of_drawn_weights(self) -> None:
        """Of each output; of flipout covariances within examples too, also of kept noise, and none between examples."""
        arguments = self._arguments(torch.float64)
        examples = self._examples(arguments)
        with torch.no_grad():
            drawn = self._by_example([self._of_operation(_drawn(arguments)) for _ in range(DRAWS)])
            for keeps in (False, True) if self.estimator == "flipout" else (False,):
                given = (_keeping(arguments, examples) if keeps else arguments for _ in range(DRAWS))
                found = self._by_example([self._of_rule(each, examples) for each in given])
                assert_same_mean(found, drawn, "the mean of the rule's outputs is not that of drawn weights")
                apart, drawn_apart = found - found.mean(0), drawn - drawn.mean(0)
                text = "the variance of the rule's outputs is not that of drawn weights: is sigma taken for sigma²?"
                assert_same_mean(apart.square(), drawn_apart.square(), text)
                if self.estimator == "flipout":
                    text = "covariances within an example are not those of drawn weights: flip all axes by Moments.flip"
                    assert_same_mean(_products(apart, apart), _products(drawn_apart, drawn_apart), text)
                if self.estimator == "flipout" and examples.number > 1:
                    one, other = apart[:, :1], apart[:, 1:2]  # for reference, of different draws: independent
                    text = "outputs of two examples are correlated: give each its signs, by Moments.flip"
                    assert_same_mean(_products(one, other), _products(one, other.roll(1, 0)), text)

    @fixed_seed()
    def test_one_noise_is_kept_for_several_uses(self) -> None:
        """With flipout, uses of a weight in one call share the noise that its moments keep."""
        if self.estimator == "flipout":
            arguments = self._arguments(torch.float64)
            examples = self._examples(arguments)
            kept = _keeping(arguments, examples)
            text = "\ntwo uses of one weight have two noises: take it from Moments.perturbation() and Moments.flip(...)"
            assert_close(self._of_rule(kept, examples), self._of_rule(kept, examples), msg=lambda m: m + text)

    @fixed_seed()
    def test_without_sigma_it_is_the_operation(self) -> None:
        """With sigma = 0 the output is op(x, mu), and gradients are finite."""
        arguments = [
            Moments(a.mu, torch.zeros_like(a.sigma).requires_grad_()) if isinstance(a, Moments) else a
            for a in self._arguments(torch.float64)
        ]
        found, expected = self._of_rule(arguments), self._of_operation(_drawn(arguments))
        assert_close(found, expected, msg=lambda m: f"{m}\nwith sigma = 0, the output must be that of the means")
        found.square().sum().backward()
        for moments in _moments(arguments):
            for name, value in (("mu", moments.mu), ("sigma", moments.sigma)):
                finite = value.grad is None or bool(value.grad.isfinite().all())
                assert finite, f"with sigma = 0, the gradient of {name} is {value.grad}: mind the slope of sqrt at 0"

    @fixed_seed()
    def test_gradients_reach_mu_and_sigma(self) -> None:
        """Of every posterior among the arguments, finite and not all 0."""
        arguments = self._arguments(torch.float64)
        self._of_rule(arguments).square().sum().backward()
        for moments in _moments(arguments):
            for name, value in (("mu", moments.mu), ("sigma", moments.sigma)):
                assert value.grad is not None, f"no gradient reaches {name}: a rule must not detach it"
                assert value.grad.isfinite().all(), f"the gradient of {name} is {value.grad}"
                assert value.grad.any(), f"the gradient of {name} is 0 everywhere"

    @fixed_seed()
    def test_the_output_has_shape_and_type_of_the_operations(self) -> None:
        """In single and double precision."""
        for dtype in (torch.float32, torch.float64):
            arguments = self._arguments(dtype)
            found, expected = self._of_rule(arguments), self._of_operation(_drawn(arguments))
            assert found.shape == expected.shape, (
                f"the output has shape {tuple(found.shape)}, the operation's {tuple(expected.shape)}"
            )
            assert found.dtype == expected.dtype, f"the output of {expected.dtype} is {found.dtype}: cast the noise"

    @fixed_seed()
    def test_a_network_meets_it(self) -> None:
        """A network that does this operation alone trains by the rule."""
        arguments = self.arguments()
        number = self._examples(self._arguments(torch.float64)).number
        given = [self._is_input(a, number) for a in arguments]
        network = _Operation(self._callable, arguments, given)
        options: dict[str, Any] = {"estimator": self.estimator, "strict": True, "batch_dim": self.example_dim or 0}
        vnet = variationalize(network, where="*", **options)
        inputs = [a for a, is_input in zip(arguments, given, strict=True) if is_input]
        with or_else(f"The estimator {self.estimator!r} must take these arguments: see rule's `of=` and `refuses=`"):
            expected = vnet(*inputs)  # which is recorded, with drawn weights
            found = vnet(*inputs)
        used = {row.estimator for row in vnet.summary().rows}
        assert used == {self.estimator}, f"the network trains by {used}: {vnet.summary()}"
        assert found.shape == expected.shape

    @property
    def _callable(self) -> Any:
        return getattr(torch, self.operation) if isinstance(self.operation, str) else self.operation

    def _rule(self) -> Rule:
        rule = find_rule(self.estimator, self.operation)
        assert rule is not None, (
            f"{self.estimator!r} has no rule for {self.operation}: decorate one with varify.estimators.rule, and "
            "import the file it is in"
        )
        return rule

    def _arguments(self, dtype: torch.dtype) -> list[Any]:
        """Those of the operation in this precision, moments for parameters."""
        made: list[Any] = []
        for a in self.arguments():
            value = a.detach().to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a
            if isinstance(a, nn.Parameter):
                sigma = 0.3 + torch.rand(a.shape, dtype=dtype)
                value = Moments(value.clone().requires_grad_(), sigma.requires_grad_())
            made.append(value)
        assert _moments(made), "none of arguments() is an nn.Parameter: make one of what has a posterior"
        return made

    def _examples(self, arguments: list[Any]) -> Examples:
        if self.example_dim is None:
            return Examples()
        return Examples(self._of_operation(_drawn(arguments)).shape[self.example_dim], self.example_dim)

    def _of_rule(self, arguments: list[Any], examples: Examples | None = None) -> Tensor:
        return self._rule().function(examples or self._examples(arguments), *arguments)

    def _of_operation(self, arguments: list[Any]) -> Tensor:
        output: Tensor = self._callable(*arguments)
        return output

    def _is_input(self, argument: object, number: int) -> bool:
        """Whether the network is given it with each batch; else it has it."""
        if not isinstance(argument, Tensor) or isinstance(argument, nn.Parameter):
            return False
        return self.example_dim is None or argument.shape[self.example_dim : self.example_dim + 1] == (number,)

    def _by_example(self, outputs: list[Tensor]) -> Tensor:
        """`(draws, examples, outputs of each)`."""
        stacked = torch.stack(outputs)
        if self.example_dim is None:
            return stacked.flatten(1).unsqueeze(1)
        return stacked.movedim(self.example_dim + 1, 1).flatten(2)


class _Operation(nn.Module):
    """Calls an operation with its own parameters in their places among the inputs."""

    def __init__(self, operation: Callable[..., Any], arguments: Sequence[Any], given: list[bool]) -> None:
        super().__init__()
        self.operation, self.given = operation, given
        self.names = [f"argument_{i}" for i in range(len(arguments))]
        for name, value, is_input in zip(self.names, arguments, given, strict=True):
            setattr(self, name, None if is_input else value)

    def forward(self, *inputs: Tensor) -> Any:
        rest = iter(inputs)
        places = zip(self.names, self.given, strict=True)
        return self.operation(*(next(rest) if given else getattr(self, name) for name, given in places))


def _moments(arguments: list[Any]) -> list[Moments]:
    return [a for a in arguments if isinstance(a, Moments)]


def _drawn(arguments: list[Any]) -> list[Any]:
    return [a.mu + a.sigma * torch.randn_like(a.sigma) if isinstance(a, Moments) else a for a in arguments]


def _keeping(arguments: list[Any], examples: Examples) -> list[Any]:
    return [a.keeping(examples.number) if isinstance(a, Moments) else a for a in arguments]


def _products(one: Tensor, other: Tensor) -> Tensor:
    """`(draws, examples, outputs, outputs)`, of each output with each."""
    return one.unsqueeze(-1) * other.unsqueeze(-2)
