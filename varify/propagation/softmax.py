"""Softmax and attention."""

import math
from typing import Any

import torch
from torch import Tensor

from varify.propagation.products import product
from varify.propagation.rules import Op, Operand, Uncertain, mean_of, refuse_unless, rule

_N: Any = torch._C._nn  # where torch has what `F` hands on


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


@rule(_N.scaled_dot_product_attention)
def attention(
    op: Op,
    query: Operand,
    key: Operand,
    value: Operand,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Operand:
    """Softmax(q kᵀ / √d) v, as the operations that it stands for; q, k and v are taken for independent."""
    refuse_unless(dropout_p == 0, "it drops at random, whatever the mode")
    refuse_unless(not enable_gqa, "heads that share keys (enable_gqa=True) are not foreseen")
    refuse_unless(not isinstance(attn_mask, Uncertain), "its mask is uncertain")
    q, k = mean_of(query), mean_of(key)
    if is_causal:
        attn_mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = product(lambda a, b: a @ b.mT, query, key)
    if isinstance(scores, Uncertain):
        scores = Uncertain(scores.mean * factor, scores.var * factor**2)
        weights: Operand = softmax(op, _masked(scores, attn_mask), -1)
    else:
        weights = mean_of(_masked(scores * factor, attn_mask)).softmax(-1)
    return product(torch.matmul, weights, value)


def _masked(scores: Operand, mask: Tensor | None) -> Any:
    """The scores plus a mask, or without those where it is False."""
    if mask is None:
        return scores
    mean = mean_of(scores)
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=mean.dtype, device=mean.device).masked_fill(~mask, -math.inf)
    if not isinstance(scores, Uncertain):
        return mean + mask
    return Uncertain(mean + mask, scores.var.masked_fill(mask == -math.inf, 0.0))
