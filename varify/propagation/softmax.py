"""Softmax and attention."""

import math
from typing import Any

import torch
from torch import Tensor

from varify.propagation.products import matmul
from varify.propagation.rules import Op, Uncertain, mean_of, refuse_unless, rule


@rule(torch.softmax, "softmax")
def softmax(op: Op, input: Uncertain, dim: int, dtype: torch.dtype | None = None) -> Uncertain:
    r"""Mean by the probit approximation, variance to first order there.

    Logits are divided by $\sqrt{1 + \pi v / 8}$ (MacKay 1992, Neural Computation 4; Lu et al. 2020, arXiv:2006.07584).
    """
    logits = input if dtype is None else Uncertain(input.mean.to(dtype), input.var.to(dtype))
    p = torch.softmax(logits.mean / torch.sqrt(1 + math.pi / 8 * logits.var), dim)
    return Uncertain(p, p.square() * _var_of_log(p, logits.var, dim))


def _var_of_log(p: Tensor, v: Tensor, dim: int) -> Tensor:
    """The variance of log softmax to first order: its derivative is δ_ij − p_j."""
    return (v * (1 - 2 * p) + (p.square() * v).sum(dim, keepdim=True)).clamp_min(0)


@rule(torch.log_softmax, "log_softmax")
def log_softmax(op: Op, input: Uncertain, dim: int, dtype: torch.dtype | None = None) -> Uncertain:
    """To first order in the logits' deviation from their means."""
    logits = input if dtype is None else Uncertain(input.mean.to(dtype), input.var.to(dtype))
    logs = torch.log_softmax(logits.mean, dim)
    return Uncertain(logs, _var_of_log(logs.exp(), logits.var, dim))


@rule(torch._C._nn.scaled_dot_product_attention)  # type: ignore[attr-defined]
def attention(
    op: Op,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Softmax(q kᵀ / √d) v, as the operations that it stands for; q, k and v are taken for independent."""
    refuse_unless(dropout_p == 0, "it drops at random, whatever the mode")
    refuse_unless(not enable_gqa, "heads that share keys (enable_gqa=True) are not foreseen")
    refuse_unless(not isinstance(attn_mask, Uncertain), "its mask is uncertain")
    q, k = mean_of(query), mean_of(key)
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    turned = Uncertain(k.mT, key.var.mT) if isinstance(key, Uncertain) else k.mT
    scores: Any = q @ turned if not isinstance(query, Uncertain) and isinstance(turned, Tensor) else None
    if scores is None:
        found = matmul(torch.matmul, query, turned)
        scores = Uncertain(found.mean * factor, found.var * factor**2)
    else:
        scores = scores * factor
    if is_causal:
        attn_mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    weights = _masked(scores, attn_mask)
    weights = softmax(op, weights, -1) if isinstance(weights, Uncertain) else weights.softmax(-1)
    if not isinstance(weights, Uncertain) and not isinstance(value, Uncertain):
        return weights @ value
    return matmul(torch.matmul, weights, value)


def _masked(scores: Any, mask: Any) -> Any:
    if mask is None:
        return scores
    added = torch.zeros_like(mask, dtype=mean_of(scores).dtype).masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else mask
    if not isinstance(scores, Uncertain):
        return scores + added
    return Uncertain(scores.mean + added, scores.var.masked_fill(added == -math.inf, 0.0))
