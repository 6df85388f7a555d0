"""A variational network in Hugging Face's Trainer: a small BERT, the divergence in the loss once, and in the log."""

import tempfile
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

import varify
from varify.integrations import VariationalTrainer


class Parity(Dataset[dict[str, Tensor]]):
    """Sequences of twelve tokens; the label tells which of two tokens comes first."""

    def __init__(self, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(4, 20, (size, 12), generator=generator)
        places = torch.stack([torch.randperm(12, generator=generator)[:2] for _ in range(size)])
        self.tokens[torch.arange(size), places[:, 0]] = 2
        self.tokens[torch.arange(size), places[:, 1]] = 3
        self.labels = (places[:, 0] < places[:, 1]).long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


def main(steps: int = 300, beta: float = 0.01, **options: Any) -> VariationalTrainer:
    """Trains; `options` are those of `TrainingArguments`."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=20, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    vnet = varify.variationalize(BertForSequenceClassification(config), init=varify.inits.Constant(0.003))
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {
            "output_dir": folder,
            "max_steps": steps,
            "per_device_train_batch_size": 32,
            "learning_rate": 1e-3,
            "use_cpu": True,
            "logging_steps": 20,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        trainer = VariationalTrainer(
            vnet,
            beta=beta,
            args=TrainingArguments(**{**settings, **options}),
            train_dataset=Parity(4000, 0),
            eval_dataset=Parity(200, 1),
            compute_metrics=lambda told: {"accuracy": float((told.predictions.argmax(-1) == told.label_ids).mean())},
        )
        trainer.train()
        return trainer


if __name__ == "__main__":
    print(main().evaluate())
