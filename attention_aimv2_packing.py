# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Attention inside each segment of a packed batch, and the choice of its kernel."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from .layout_aimv2_packing import Segments
from .linear_aimv2_packing import is_cpu_inference


# Scores that `blocked_attention_forward` holds at a time: 4 MiB in half precision. Fewer would pack keys more often.
SCORES_PER_BLOCK = 1 << 21

# Up to this many patches a segment's scores, written out, beat PyTorch's CPU flash attention in float32 too.
SHORT_LENGTH = 96


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention written out, on `(batch, heads, length, head_dim)`; the softmax is in float32."""
    scores = (query @ key.transpose(2, 3)) * scaling
    weights = F.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


def blocked_attention_forward(module, query, key, value, attention_mask, scaling, **kwargs):
    """
    `eager_attention_forward` without gradients or dropout, in blocks of scores that stay in a CPU's cache. In half
    precision scores and weights are rounded, but scaling and softmax are in float32 as there.
    """
    batch, heads, length, _ = query.shape
    # Strided keys would be packed anew for each block of queries.
    query, key, value = (x.reshape(batch * heads, -1, x.shape[-1]).contiguous() for x in (query, key, value))
    queries_per_block = max(1, min(length, SCORES_PER_BLOCK // key.shape[1]))
    heads_per_block = max(1, SCORES_PER_BLOCK // (queries_per_block * key.shape[1]))
    unused = query.new_zeros(1, 1, 1)
    attended = torch.empty_like(query)
    for first in range(0, batch * heads, heads_per_block):
        block = slice(first, first + heads_per_block)
        keys, values = key[block].transpose(1, 2), value[block]
        for queries, output in zip(
            query[block].split(queries_per_block, dim=1),
            attended[block].split(queries_per_block, dim=1),
            strict=True,
        ):
            scores = torch.baddbmm(unused, queries, keys, beta=0, alpha=scaling)
            torch.bmm(torch.softmax(scores, dim=-1, out=scores), values, out=output)
    return attended.unflatten(0, (batch, heads)).transpose(1, 2), None


def has_varlen_kernel(query: torch.Tensor) -> bool:
    """Whether PyTorch's own `varlen_attn`, a flash-attention kernel, takes this `(..., head_dim)` tensor."""
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def prefers_blocks(query: torch.Tensor, length: int) -> bool:
    """Whether `blocked_attention_forward` beats PyTorch's CPU kernel, slow in half precision and on short segments."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    return (half or length <= SHORT_LENGTH) and is_cpu_inference(query)


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    single_query: bool = False,
) -> torch.Tensor:
    """
    Attention inside each segment, by the kernel that `config._attn_implementation` names.

    Args:
        module (`nn.Module`): The caller, for its `config` and its `training`.
        query (`torch.Tensor` of shape `(total_patches, num_heads, head_dim)`): Or `(num_segments, ...)`, one query
            per segment, with `single_query`.
        key, value (`torch.Tensor` of shape `(total_patches, num_heads, head_dim)`): Packed like the patches.
        segments (`Segments`): Where the segments are.
        single_query (`bool`): Whether each segment has one query rather than one per patch.

    Returns:
        `torch.Tensor` of `query`'s shape.
    """
    cu_seqlens, max_seqlen, runs = segments
    if max_seqlen == 0:
        # No kernel takes an empty batch; the sum keeps the gradient of every projection defined.
        return query + key.sum(0) + value.sum(0)

    implementation = module.config._attn_implementation
    attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    dropout = module.config.attention_dropout if module.training else 0.0
    shared = {"scaling": query.shape[-1] ** -0.5, "dropout": dropout, "is_causal": False}
    num_segments = cu_seqlens.shape[0] - 1
    cu_seqlens_q, max_seqlen_q = cu_seqlens, max_seqlen
    if single_query:
        cu_seqlens_q, max_seqlen_q = torch.arange(num_segments + 1, dtype=torch.int32, device=query.device), 1

    if is_flash_attention_requested(module.config):
        output, _ = attention_interface(
            module,
            *(x.transpose(0, 1).unsqueeze(0) for x in (query, key, value)),
            attention_mask=None,
            cu_seq_lens_q=cu_seqlens_q,
            cu_seq_lens_k=cu_seqlens,
            max_length_q=max_seqlen_q,
            max_length_k=max_seqlen,
            **shared,
        )
        return output.squeeze(0)

    if implementation == "sdpa" and not dropout and has_varlen_kernel(query):
        if num_segments * max_seqlen != key.shape[0]:
            return varlen_attn(query, key, value, cu_seqlens_q, cu_seqlens, max_seqlen_q, max_seqlen)
        # All segments are of one length: the dense kernels are faster than the varlen one.
        runs = ((num_segments, max_seqlen),)

    keys_per_run = [count * length for count, length in runs]
    queries_per_run = [count for count, _ in runs] if single_query else keys_per_run
    packed = (query.split(queries_per_run), key.split(keys_per_run), value.split(keys_per_run))
    outputs = []
    for (count, length), *states in zip(runs, *packed, strict=True):
        queries, keys, values = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in states)
        in_blocks = implementation == "sdpa" and not dropout and prefers_blocks(query, length)
        forward = blocked_attention_forward if in_blocks else attention_interface
        output, _ = forward(module, queries, keys, values, attention_mask=None, **shared)
        outputs.append(output.flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
