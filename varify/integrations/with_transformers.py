"""Hugging Face's Trainer with the KL in its loss."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import find_labels

from varify.errors import ArgumentError
from varify.network.parameters import is_variational
from varify.objective.elbo import ELBO, parameter_groups
from varify.objective.schedules import Schedule
from varify.within import prior_loss, required_parts


class VariationalTrainer(Trainer):  # type: ignore[misc]
    """A `transformers.Trainer` that minimizes nll + beta·KL/num_data, the nll being the loss of the network itself.

    The KL counts once a step, also with accumulated batches, with a `compute_loss_func`, and on several devices. Rho's
    have a rate of their own and nothing has weight decay, unless `optimizers=` says otherwise. Logs have the last
    batch's `nll` and `kl`. Evaluation is at the means; `vnet.predict` draws. The Trainer's own checkpoints have rho's
    and priors as well, and training goes on from them; `varify.save(vnet, path)` writes one file to share.

    Args:
        vnet: a variational module, or any network with variational parts.
        num_data: what the network's loss is a mean over, in the whole training set: sequences, or for a language model
            labelled tokens. Default: the length of `train_dataset`.
        beta: weight of the KL, as for `varify.ELBO`; a schedule is asked by optimizer step.
        rho_lr: rate of the rho's; default five times `args.learning_rate`.
        options: of `transformers.Trainer`.

    Attributes:
        vnet: as given.
        terms: `nll` and `kl` of the last training batch.

    Raises:
        ModelError: nothing in `vnet` is variational.
        ArgumentError: num_data is not given and the training set has no length; or `args.weight_decay` is not 0.
    """

    _signature_columns: list[str] | None
    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        vnet: nn.Module,
        *,
        num_data: int | None = None,
        beta: float | Schedule | str = "auto",
        rho_lr: float | None = None,
        **options: Any,
    ) -> None:
        required_parts(vnet)
        decay = getattr(options.get("args"), "weight_decay", 0)
        if decay and not any(options.get("optimizers", (None,))):
            raise ArgumentError(
                f"args.weight_decay={decay}: the prior is the regularizer, set it to 0; its std is "
                "varify.priors.Gaussian(std=...)"
            )
        if num_data is None:
            try:
                num_data = len(options["train_dataset"])
            except (KeyError, TypeError):
                raise ArgumentError(
                    "num_data must be given: there is no train_dataset, or it has no length; it is the size of the "
                    "training set"
                ) from None
        self.elbo = ELBO(num_data=num_data, beta=beta)
        self.vnet, self.rho_lr = vnet, rho_lr
        self.terms: dict[str, Tensor] = {}
        super().__init__(vnet, **options)
        # The Trainer divides the loss by the number of accumulated batches, unless it believes that the network did,
        # as it would of any that takes **kwargs.
        self.model_accepts_loss_kwargs = False
        if self.args.label_names is None:
            self.label_names = find_labels(type(self._plain))

    @property
    def _plain(self) -> nn.Module:
        """The network whose forward says what it takes."""
        network: Any = self.vnet
        while is_variational(network):
            network = network.module
        return network  # type: ignore[no-any-return]

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:  # those of a variational module's forward would be args and kwargs
            taken = inspect.signature(self._plain.forward).parameters
            self._signature_columns = [*taken, "label", "label_ids", *self.label_names]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, over `varify.parameter_groups`."""
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.vnet)
            own = {"params", "model", "optimizer_dict"} & options.keys()  # of optimizers that choose parameters
            if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and not own:
                groups = parameter_groups(self.vnet, self.args.learning_rate, self.rho_lr)
                self.optimizer = kind([group for group in groups if group["params"]], **options)
        return super().create_optimizer(*args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The Trainer's loss; in training, with the KL."""
        nll, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = nll
        if model.training:
            kl = prior_loss(self.vnet).to(nll.device)
            self.elbo.step = self.state.global_step
            share = self.elbo.weight(self.vnet) / self.elbo.num_data
            if self.compute_loss_func is not None:  # whose losses are summed over the accumulated batches as they are
                share /= getattr(self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps)
            loss = nll + share * kl
            self.terms = {"nll": nll.detach(), "kl": kl.detach()}
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """With the terms of the last batch."""
        terms = {name: term.item() for name, term in self.terms.items()} if "loss" in logs else {}
        super().log({**logs, **terms}, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # safetensors refuses tensors that share memory, as those of tied weights do
        state, seen = {}, set()
        for name, value in (self.model.state_dict() if state_dict is None else state_dict).items():
            place = value.untyped_storage().data_ptr() if isinstance(value, Tensor) else 0
            state[name] = value.clone() if place and place in seen else value
            seen.add(place)
        super()._save(output_dir, state)
