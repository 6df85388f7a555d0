"""The worked examples with Lightning and Hugging Face's Trainer run, learn, and count the divergence once."""

import math
from pathlib import Path

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
    again = with_lightning.VariationalClassifier(module.vnet.mean_model(), num_data)
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
