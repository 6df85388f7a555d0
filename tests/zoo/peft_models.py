"""Adapters of PEFT over small transformers: the base is frozen, the adapter becomes variational."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from torch import nn

from tests.zoo import transformers_models
from tests.zoo.entries import Entry, Zoo

BASES: dict[str, tuple[str, list[str], list[str]]] = {  # task, what LoRA adapts, what IA3 does as feed-forward
    "BertForSequenceClassification": ("SEQ_CLS", ["query", "value"], ["output.dense"]),
    "GPT2LMHeadModel": ("CAUSAL_LM", ["c_attn"], ["mlp.c_proj"]),
    "LlamaForCausalLM": ("CAUSAL_LM", ["q_proj", "v_proj"], ["down_proj"]),
}


def adapted(peft: Any, method: str, base: str) -> nn.Module:
    task, targets, feedforward = BASES[base]
    if method == "IA3":
        everything = [*targets, *feedforward]
        settings = peft.IA3Config(
            task_type=task, target_modules=everything, feedforward_modules=feedforward, init_ia3_weights=False
        )
    else:
        settings = peft.LoraConfig(
            task_type=task,
            target_modules=targets,
            r=4,
            use_dora=method == "DoRA",
            init_lora_weights=False,  # with B of 0, as by default, A has no gradient
            fan_in_fan_out=base == "GPT2LMHeadModel",
        )
    if method == "IA3":
        settings.fan_in_fan_out = base == "GPT2LMHeadModel"
    network: nn.Module = peft.get_peft_model(transformers_models.entries()[base].make(), settings)
    return network


def entries() -> Zoo:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    make: Callable[..., nn.Module] = partial(adapted, peft)
    calls = transformers_models.entries()
    return {
        f"{method} of {base}": Entry(partial(make, method, base), calls[base].call)
        for method in ("LoRA", "DoRA", "IA3")
        for base in BASES
    }
