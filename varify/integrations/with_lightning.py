"""A LightningModule around a variational network."""

from typing import Any

import lightning
import torch
from torch import Tensor, nn

from varify.analysis.evidence import total_of
from varify.any_network import predict
from varify.errors import ArgumentError
from varify.network.arguments import unpack
from varify.objective.elbo import ELBO, Criterion, parameter_groups
from varify.objective.schedules import Schedule
from varify.within import required_parts


class VariationalLightningModule(lightning.LightningModule):  # type: ignore[misc]
    """Trains by `varify.ELBO`, and predicts by draws. Batches are (inputs, targets), inputs as for `ELBO`.

    Subclass it for other steps or metrics. Lightning's checkpoints have rho's, priors and settings. `ModelCheckpoint`,
    accumulation, precision and devices are the Trainer's: the KL counts once a step with all of them. Logged are
    `loss`, `nll` and `kl` in training, mean over the epoch, and `val_nll`, of the means.

    Args:
        vnet: a variational module, or any network with variational parts.
        criterion: `(output, targets)` to a mean over the batch; a likelihood with parameters is trained along.
        num_data: size of the training set. Default: the length of the training loader's data set, or of a sampler that
            takes a part of it, read again in each `fit`.
        beta: weight of the KL, as for `ELBO`.
        n_samples: forwards a step, as for `ELBO`.
        lr: of the means, for `configure_optimizers`, which is Adam.
        rho_lr: of the rho's; default five times lr.
        n_draws: in `predict_step`.

    Raises:
        ModelError: nothing in `vnet` is variational.
        ArgumentError: at the first step, num_data was not given and the loader has no data set of known length.
    """

    def __init__(
        self,
        vnet: nn.Module,
        criterion: Criterion,
        *,
        num_data: int | None = None,
        beta: float | Schedule | str = "auto",
        n_samples: int = 1,
        lr: float = 1e-3,
        rho_lr: float | None = None,
        n_draws: int = 32,
    ) -> None:
        super().__init__()
        required_parts(vnet)
        self.vnet, self.criterion = vnet, criterion
        self.lr, self.rho_lr, self.n_draws = lr, rho_lr, n_draws
        self._objective: dict[str, Any] = {"beta": beta, "n_samples": n_samples}
        self._elbo = ELBO(num_data=1 if num_data is None else num_data, **self._objective)  # checks them now
        self._reads_num_data, self._knows_num_data = num_data is None, num_data is not None

    @property
    def elbo(self) -> ELBO:
        """The objective."""
        if not self._knows_num_data:
            try:
                num_data = total_of(self.vnet, self.trainer.train_dataloader)
            except (AttributeError, TypeError, ValueError, RuntimeError):
                num_data = None
            if num_data is None:
                raise ArgumentError(
                    "num_data must be given, the size of the training set: it can't be read off the training loader"
                )
            self._elbo = ELBO(num_data=num_data, **self._objective)
            self._knows_num_data = True
        return self._elbo

    def forward(self, *args: object, **kwargs: object) -> Any:
        """The network's: one draw in training, the means else."""
        return self.vnet(*args, **kwargs)

    def on_fit_start(self) -> None:
        """Has `num_data` read anew: a later fit may be to other data."""
        self._knows_num_data = not self._reads_num_data

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        inputs, targets = batch
        self.elbo.step = self.global_step
        terms = self.elbo(self.vnet, self.criterion, inputs, targets)
        self.log_dict(terms._asdict(), on_step=False, on_epoch=True, batch_size=_size(targets))
        return terms.loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs the criterion at the means."""
        inputs, targets = batch
        args, kwargs = unpack(inputs, self.vnet)
        self.log("val_nll", self.criterion(self.vnet(*args, **kwargs), targets), batch_size=_size(targets))

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """A `Prediction` of the inputs; of a batch that is a pair, its second is taken for the targets."""
        inputs = batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 2 else batch
        args, kwargs = unpack(inputs, self.vnet)
        return predict(self.vnet, *args, n_samples=self.n_draws, **kwargs)

    def configure_optimizers(self) -> Any:
        """Adam over `varify.parameter_groups`."""
        return torch.optim.Adam(parameter_groups(self, self.lr, self.rho_lr))


def _size(targets: object) -> int | None:
    return len(targets) if isinstance(targets, Tensor) and targets.dim() else None
