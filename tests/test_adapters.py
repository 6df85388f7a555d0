"""Adapters of PEFT: Bayes by backprop on LoRA's A, one draw a generated text, files of their own, no merging."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import varify
from tests.zoo.entries import tokens

peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # of both, about their own code


class Tokens(nn.Module):
    """A linear layer on each token."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def lora(network: nn.Module, *targets: str, **options: Any) -> nn.Module:
    settings = peft.LoraConfig(r=3, target_modules=list(targets), init_lora_weights=False, **options)
    adapted: nn.Module = peft.get_peft_model(network, settings)
    return adapted


def language_model() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    network = transformers.GPT2LMHeadModel(config)
    return lora(network, "c_attn", task_type="CAUSAL_LM", fan_in_fan_out=True)


def classifier() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=50, num_labels=3, **sizes)
    return lora(transformers.BertForSequenceClassification(config), "query", "value", task_type="SEQ_CLS")


A = "*lora_A*"


def test_flipout_has_signs_for_a_sequence_and_not_for_a_token() -> None:
    torch.manual_seed(0)
    vnet = varify.variationalize(lora(Tokens(), "fc"), where=A, estimator="flipout", init=varify.inits.Constant(0.3))
    x = torch.randn(1, 1, 5).expand(6, 7, 5).contiguous()  # all tokens of all sequences are the same
    for _ in range(3):  # the first call is recorded
        output = vnet.train()(x)
    assert {row.estimator for row in vnet.summary().rows if "lora_A" in row.names[0]} == {"flipout"}
    torch.testing.assert_close(output, output[:, :1].expand_as(output))  # within a sequence
    between = (output[:, 0] - output[:1, 0]).abs().amax(-1)
    assert between.max() > 1e-3  # all six have the same signs in 1 of 2^15 seeds, by those of A's three outputs alone


def test_only_the_adapter_is_variational_and_learns() -> None:
    vnet = varify.variationalize(classifier(), where=A, estimator="flipout")
    assert all("lora_A" in name for name in vnet.posteriors)
    x, y = tokens(12, 5), torch.arange(12) % 3
    elbo = varify.ELBO(num_data=12, beta=0.0)
    optimizer = torch.optim.Adam(varify.parameter_groups(vnet, lr=0.05))
    vnet.train()
    for _ in range(30):
        optimizer.zero_grad()
        terms = elbo(vnet, lambda out, y: F.cross_entropy(out.logits, y), {"input_ids": x}, y)
        terms.loss.backward()
        optimizer.step()
    prediction = vnet.predict(input_ids=x, n_samples=8).logits
    assert prediction.nll(y) < 0.8  # log 3 = 1.1 knows nothing
    frozen = dict(classifier().named_parameters())
    for name, p in vnet.module.named_parameters():
        if not p.requires_grad:
            assert torch.equal(p, frozen[name]), name


def test_generate_has_one_draw_for_all_tokens() -> None:
    vnet = varify.variationalize(language_model(), where=A, init=varify.inits.Constant(0.5)).eval()
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    ids, found = tokens(2, 4), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with vnet.sampling():
            found.append(torch.stack(varify.generate(vnet, input_ids=ids, **options).logits))
    torch.manual_seed(1)
    expected = torch.stack(vnet.sample_model().generate(input_ids=ids, **options).logits)
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(found[1], expected)
    assert not torch.allclose(found[2], expected)
    means = torch.stack(vnet.mean_model().generate(input_ids=ids, **options).logits)
    torch.testing.assert_close(torch.stack(varify.generate(vnet, input_ids=ids, **options).logits), means)
    with pytest.raises(varify.ModelError, match=r"the Linear within has no generate\(\)"):
        varify.generate(varify.variationalize(nn.Linear(2, 2)))
    with pytest.raises(varify.ModelError, match=r"varify\.generate needs a variational module"):
        varify.generate(language_model())


def test_tfbs_rule_widens_the_adapter_alone() -> None:
    vnet = varify.variationalize(classifier(), where=A)
    before = {name: q.sigma.detach() for name, q in vnet.posteriors.items()}
    x, y = tokens(12, 5), torch.arange(12) % 3
    loader = [({"input_ids": x}, y)]
    t = varify.fit_temperature(vnet, loader, lambda out, y: F.cross_entropy(out.logits, y), n_samples=4, rule="tfb")
    for name, q in vnet.posteriors.items():
        torch.testing.assert_close(q.sigma, t**0.5 * before[name], rtol=1e-4, atol=1e-8)


# --- files


@pytest.mark.parametrize("only", ["variational", "trained"])
def test_an_adapters_file_is_small_and_loads_onto_the_base(only: str, tmp_path: Path) -> None:
    vnet = varify.variationalize(classifier(), where=A, prior=varify.priors.Gaussian(std=0.3), estimator="flipout")
    trained = {n: p for n, p in vnet.named_parameters() if p.requires_grad and (only == "trained" or "lora_A" in n)}
    with torch.no_grad():
        for p in trained.values():
            p.add_(torch.randn_like(p))
    varify.save(vnet, tmp_path / "all.safetensors")
    varify.save(vnet, tmp_path / "adapter.safetensors", only=only)
    whole, part = ((tmp_path / f"{name}.safetensors").stat().st_size for name in ("all", "adapter"))
    assert part < whole / 2
    again = varify.load(tmp_path / "adapter.safetensors", classifier())
    assert again.prior_loss().item() == vnet.prior_loss().item()
    x = tokens(4, 5)
    torch.testing.assert_close(again.eval()(input_ids=x).logits, vnet.eval()(input_ids=x).logits)
    assert again.posteriors.settings.estimators == vnet.posteriors.settings.estimators
    requires = {name for name, p in again.named_parameters() if p.requires_grad}
    assert requires == {name for name, p in vnet.named_parameters() if p.requires_grad}


def test_a_tied_weight_and_pruned_weights_are_in_a_part_as_well(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.body = nn.Embedding(6, 4), nn.Linear(4, 4)
            self.head = nn.Linear(4, 6, bias=False)
            self.head.weight = self.embedding.weight

    vnet = varify.variationalize(Tied(), where="embedding*")
    varify.prune(vnet, 0.5)
    varify.save(vnet, tmp_path / "a.safetensors", only="variational")
    torch.manual_seed(5)
    base = Tied()
    again = varify.load(tmp_path / "a.safetensors", base)
    assert torch.equal(again.module.head.weight, vnet.module.embedding.weight)
    assert torch.equal(again.module.body.weight, base.body.weight)
    assert torch.equal(again.posteriors["embedding.weight"].fixed, vnet.posteriors["embedding.weight"].fixed)


def test_parts_that_can_not_be_are_refused(tmp_path: Path) -> None:
    vnet = varify.variationalize(classifier(), where=A)
    with pytest.raises(varify.ArgumentError, match="only must be one of 'variational', 'trained', got 'adapter'"):
        varify.save(vnet, tmp_path / "a.safetensors", only="adapter")
    nested = varify.variationalize(nn.Sequential(varify.variationalize(nn.Linear(2, 2)), nn.Linear(2, 2)), where="1.*")
    with pytest.raises(
        varify.ArgumentError, match=r"varify\.save\(only='trained'\) needs a network without variational"
    ):
        varify.save(nested, tmp_path / "a.safetensors", only="trained")
    assert not list(tmp_path.iterdir())
    varify.save(vnet, tmp_path / "a.safetensors", only="trained")
    with pytest.raises(varify.StructureError, match=r"this Peft.* has no "):
        varify.load(tmp_path / "a.safetensors", language_model())


# --- merging


def test_a_merged_adapter_has_no_posterior() -> None:
    vnet = varify.variationalize(classifier(), where=A)
    x = tokens(4, 5)
    vnet.eval()
    plain = vnet(input_ids=x).logits
    vnet.module.merge_adapter()
    torch.testing.assert_close(vnet(input_ids=x).logits, plain)  # the means are merged
    for call in (lambda: vnet.predict(input_ids=x), lambda: vnet.train()(input_ids=x), vnet.prior_loss):
        with pytest.raises(
            varify.StructureError, match=r"is merged.*not Gaussian.*unmerge_adapter\(\), or merge the means"
        ):
            call()
    vnet.module.unmerge_adapter()
    assert vnet.predict(input_ids=x).logits.std.min() > 0
    merged = vnet.eval().mean_model().merge_and_unload()
    torch.testing.assert_close(merged(input_ids=x).logits, plain)
