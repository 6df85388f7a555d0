"""The worked examples with Lightning and Hugging Face's Trainer run, learn, and count the divergence once."""

import functools
import math
from pathlib import Path
from unittest import mock

import pytest
import torch

import varify

pytest.importorskip("lightning", reason="lightning is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
# of the trainers, about their own code and about settings that a user would choose
pytestmark = pytest.mark.filterwarnings("ignore")


def test_lightning_learns_and_logs_the_divergence_once(tmp_path: Path) -> None:
    from tests.examples import with_lightning

    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
    trainer, module = with_lightning.main(6, enable_checkpointing=False, **quiet)
    told = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert told["accuracy"] > 0.85
    assert 0 < told["entropy"] < math.log(10)
    num_data = len(with_lightning.digits()[0])
    assert told["loss"] == pytest.approx(told["nll"] + 0.1 * told["kl"] / num_data, rel=1e-4)
    assert told["kl"] == pytest.approx(float(module.vnet.prior_loss()), rel=0.05)  # a mean over the last epoch
    trainer.save_checkpoint(tmp_path / "all.ckpt", weights_only=True)
    again = with_lightning.VariationalClassifier(module.vnet.mean_model())
    again.load_state_dict(torch.load(tmp_path / "all.ckpt", weights_only=True)["state_dict"])
    assert float(again.vnet.prior_loss()) == pytest.approx(float(module.vnet.prior_loss()), rel=1e-6)


def test_hugging_faces_trainer_learns_and_logs_the_divergence() -> None:
    from tests.examples import with_transformers

    trainer = with_transformers.main(300)
    assert trainer.evaluate()["eval_accuracy"] > 0.9
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(logs) == 15
    assert logs[-1]["kl"] == pytest.approx(float(trainer.vnet.prior_loss()), rel=0.01)
    tokens = with_transformers.Parity(8, 2).tokens
    prediction = trainer.vnet.predict(input_ids=tokens, n_samples=4)
    assert prediction.logits.probabilities().shape == (8, 2)
    assert isinstance(prediction.logits, varify.Prediction)


def test_hugging_faces_trainer_counts_the_divergence_once_also_when_it_accumulates() -> None:
    from tests.examples import with_transformers

    beta, found = 100.0, []  # the divergence outweighs the rest by far
    for accumulated in (1, 4):
        trainer = with_transformers.main(
            1, beta, gradient_accumulation_steps=accumulated, logging_steps=1, max_grad_norm=1e9
        )
        (entry,) = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
        assert entry["loss"] == pytest.approx(entry["nll"] + beta * entry["kl"] / 4000, rel=1e-3)
        found.append(entry["grad_norm"])
    assert found[1] == pytest.approx(found[0], rel=1e-2)


def resumed(folder: Path, steps: int, again: bool = False, **options: object) -> "varify.VariationalModule":
    from tests.examples import with_transformers

    class Trainer(with_transformers.VariationalTrainer):
        def train(self, **_: object) -> object:
            return super().train(resume_from_checkpoint=again or None)

    # drawn weights: the first call of a resumed network would draw them anyway, the estimators' later ones not
    drawn = functools.partial(varify.variationalize, estimator="weights")
    with_transformers.VariationalTrainer, kept = Trainer, with_transformers.VariationalTrainer
    try:
        settings = {
            "output_dir": str(folder),
            "save_strategy": "steps",
            "save_steps": 2,
            "lr_scheduler_type": "constant",
        }
        with mock.patch.object(varify, "variationalize", drawn):
            return with_transformers.main(steps, **{**settings, **options}).vnet
    finally:
        with_transformers.VariationalTrainer = kept


def test_training_goes_on_from_the_trainers_own_checkpoint(tmp_path: Path) -> None:
    whole = resumed(tmp_path / "whole", 4, max_steps=4)
    resumed(tmp_path / "parts", 2)
    torch.manual_seed(99)
    parts = resumed(tmp_path / "parts", 4, again=True)
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def small_bert(**options: object) -> torch.nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForMaskedLM(BertConfig(vocab_size=20, max_position_embeddings=16, **sizes))  # with tied weights


def language_trainer(folder: Path, vnet: torch.nn.Module, **options: object) -> "object":
    from transformers import TrainingArguments

    from varify.integrations import VariationalTrainer

    settings = {
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "use_cpu": True,
        "logging_steps": 1,
    }
    settings |= {"disable_tqdm": True, "max_grad_norm": 1e9, "save_strategy": "no", "eval_strategy": "no"}
    arguments = {
        key: options.pop(key) for key in list(options) if key in ("weight_decay", "gradient_accumulation_steps")
    }
    tokens = torch.arange(12).reshape(4, 3)
    data = [{"input_ids": row, "labels": row, "unknown": 1} for row in tokens]
    options = {"train_dataset": data, **options}
    return VariationalTrainer(vnet, args=TrainingArguments(str(folder), **settings, **arguments), **options)


def test_tied_weights_are_saved_and_unknown_columns_left_out(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    torch.manual_seed(0)
    vnet = varify.variationalize(small_bert())
    trainer = language_trainer(tmp_path, vnet)
    assert trainer.elbo.num_data == 4
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    again = varify.variationalize(small_bert(), prior="mixtgauss")
    again.load_state_dict(load_file(tmp_path / "saved/model.safetensors"))
    assert again.prior_loss().item() == vnet.prior_loss().item()
    assert again.posteriors["bert.embeddings.word_embeddings.weight"].prior.kind == "gaussian"


def test_the_divergence_counts_once_with_a_loss_that_is_summed_over_accumulated_batches(tmp_path: Path) -> None:
    def summed(outputs: object, labels: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:
        logits = outputs["logits"]
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return 1e-9 * losses / num_items_in_batch

    found = []
    for steps in (1, 2):
        torch.manual_seed(0)
        vnet = varify.variationalize(small_bert())
        options = {"gradient_accumulation_steps": steps, "beta": 1e3, "num_data": 12, "compute_loss_func": summed}
        trainer = language_trainer(tmp_path, vnet, **options)
        trainer.train()
        (entry,) = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
        found.append(entry["grad_norm"])
        assert entry["loss"] == pytest.approx(1e3 * entry["kl"] / 12, rel=1e-4)
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_rhos_have_a_rate_of_their_own_and_nothing_decays(tmp_path: Path) -> None:
    vnet = varify.variationalize(small_bert())
    optimizer = language_trainer(tmp_path, vnet, rho_lr=0.5).create_optimizer()
    by_id = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert {by_id[id(p)]["lr"] for p in vnet.rho.parameters()} == {0.5}
    assert {by_id[id(p)]["lr"] for p in vnet.module.parameters()} == {5e-5}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}


def test_trainers_refuse_what_would_go_wrong(tmp_path: Path) -> None:
    with pytest.raises(varify.ModelError, match="the BertForMaskedLM has no variational parts"):
        language_trainer(tmp_path, small_bert())
    vnet = varify.variationalize(small_bert())
    with pytest.raises(varify.ArgumentError, match=r"weight_decay=0\.01: the prior is the regularizer, set it to 0"):
        language_trainer(tmp_path, vnet, weight_decay=0.01)
    with pytest.raises(varify.ArgumentError, match="num_data must be given: there is no train_dataset"):
        language_trainer(tmp_path, vnet, train_dataset=None)
    with pytest.raises(varify.ArgumentError, match="beta must be 'auto'"):
        language_trainer(tmp_path, vnet, beta=-1)


def test_lightning_accumulates_and_predicts_by_draws(tmp_path: Path) -> None:
    import lightning
    from torch.utils.data import DataLoader, TensorDataset

    from varify.integrations import VariationalLightningModule

    data, found = TensorDataset(torch.zeros(8, 3), torch.zeros(8, 2)), []
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
    for batch, accumulated in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        likelihood = varify.GaussianLikelihood()
        module = VariationalLightningModule(varify.variationalize(torch.nn.Linear(3, 2)), likelihood, beta=3.0, lr=0.1)
        module.configure_optimizers = lambda m=module: torch.optim.SGD([m.vnet.rho.weight], lr=0.1)
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            accumulate_grad_batches=accumulated,
            enable_checkpointing=False,
            **quiet,
        )
        trainer.fit(module, DataLoader(data, batch), DataLoader(data, 8))
        assert module.elbo.num_data == 8
        assert "val_nll" in trainer.callback_metrics
        found.append(module.vnet.rho.weight.detach())
    torch.testing.assert_close(*found)  # inputs of 0: rho has the gradient of the divergence alone
    (prediction,) = trainer.predict(module, DataLoader(data, 8))
    assert prediction.samples.shape == (32, 8, 2)
    assert any(p is likelihood.rho for p in module.parameters())


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from varify import integrations

    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.delitem(sys.modules, "varify.integrations.with_lightning", raising=False)
    with pytest.raises(
        ImportError, match=r"varify\.integrations\.VariationalLightningModule needs: pip install lightning"
    ):
        integrations.VariationalLightningModule  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'; there are VariationalLightningModule, Var"):
        integrations.Trainer  # noqa: B018


def test_lightning_counts_the_data_of_this_fit_and_of_a_sampler(tmp_path: Path) -> None:
    import lightning
    from torch import nn
    from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, TensorDataset
    from torch.utils.data.distributed import DistributedSampler

    from varify.analysis.evidence import total_of
    from varify.integrations import VariationalLightningModule

    def data(n: int) -> TensorDataset:
        return TensorDataset(torch.randn(n, 3), torch.randn(n, 1))

    module = VariationalLightningModule(varify.variationalize(nn.Linear(3, 1)), nn.functional.mse_loss)
    fixed = VariationalLightningModule(varify.variationalize(nn.Linear(3, 1)), nn.functional.mse_loss, num_data=1000)
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
    }
    for loader, num_data in (
        (DataLoader(data(16), batch_size=8), 16),
        (DataLoader(data(48), batch_size=8), 48),
        (DataLoader(data(48), batch_size=8, sampler=SubsetRandomSampler(range(16))), 16),
    ):
        for trained, expected in ((module, num_data), (fixed, 1000)):
            trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, **quiet)
            trainer.fit(trained, loader)
            assert trained.elbo.num_data == expected
    everything = data(48)
    for sampler in (
        DistributedSampler(everything, num_replicas=4, rank=1),
        RandomSampler(everything, replacement=True, num_samples=500),
    ):
        assert total_of(module.vnet, DataLoader(everything, sampler=sampler)) == 48
