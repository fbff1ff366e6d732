# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Attention inside each segment of a packed batch: how the batch divides, and the kernels that take it."""

from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested


# Where no varlen kernel exists, neighbouring segments of equal length share one attention call up to this many
# patches: enough to fill the cores, few enough to bound the memory of the scores.
MAX_PATCHES_PER_CALL = 4096

# Scores that `blocked_attention_forward` holds at a time: 4 MiB in float32.
SCORES_PER_BLOCK = 1 << 20

INTEGER_DTYPES = {
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
}


class PackedLayout(NamedTuple):
    """
    How a packed batch divides, prepared once per forward by [`Aimv2PackingModel.prepare_layout`]. Attention never
    crosses a segment: an image is one, a video is one per frame (or one in all with `config.merge_temporal`).

    Attributes:
        cu_seqlens (`torch.Tensor`, int32 of shape `(num_segments + 1,)`): Index of each segment's first patch, and
            last the number of patches.
        max_seqlen (`int`): Patches of the longest segment, 0 for an empty batch.
        runs (`tuple[tuple[int, int], ...]`): Neighbouring segments of equal length as `(segments, length)`, for
            attention without a varlen kernel.
        max_grid_side (`int`): Largest height or width, in patches.
        position_ids (`torch.Tensor`, int64): With native positions the `(row, column)` of each patch,
            `(total_patches, 2)`; with learned ones the 16 learned positions that bicubic interpolation reads,
            `(total_patches, 16)`.
        position_weights (`torch.Tensor`, float32 of shape `(total_patches, 16)`, or `None`): Weights of those 16.
        learned_side (`int`, or `None`): Side of the square of learned positions; `None` with native ones.
        merge_temporal (`bool`): Whether a video is one segment.
    """

    cu_seqlens: torch.Tensor
    max_seqlen: int
    runs: tuple[tuple[int, int], ...]
    max_grid_side: int
    position_ids: torch.Tensor
    position_weights: torch.Tensor | None
    learned_side: int | None
    merge_temporal: bool

    def to(self, device: torch.device | str) -> "PackedLayout":
        """The same layout with its tensors on `device`; never waits for the device."""
        weights = self.position_weights
        return self._replace(
            cu_seqlens=self.cu_seqlens.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            position_weights=None if weights is None else weights.to(device, non_blocking=True),
        )


def equal_length_runs(lengths: list[int]) -> tuple[tuple[int, int], ...]:
    """Neighbours of equal length as `(segments, length)`, up to `MAX_PATCHES_PER_CALL` patches where possible."""
    runs = []
    for length, group in groupby(lengths):
        segments, per_call = len(list(group)), max(1, MAX_PATCHES_PER_CALL // length)
        runs += [(min(per_call, segments - first), length) for first in range(0, segments, per_call)]
    return tuple(runs)


def is_dense(value: object) -> bool:
    """Whether `value` is a tensor with strides and one size per dimension: not sparse, not nested."""
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_nested


def describe(value: object) -> str:
    """What was given, for the message that refuses it."""
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    if not is_dense(value):
        return f"a {'nested' if value.is_nested else value.layout} tensor"
    return f"{value.dtype} of shape {tuple(value.shape)}"


def validate_grid_thw(grid_thw: torch.Tensor, num_patches: int | None = None) -> torch.Tensor:
    """
    Checks `grid_thw` and returns it as int64 on the CPU: the only device-to-host copy of a forward, and none at all
    when it is there already.

    Raises:
        ValueError: not an integer tensor of shape `(num_images, 3)`, a size below 1, or not `num_patches` in all.
    """
    if not is_dense(grid_thw) or grid_thw.dtype not in INTEGER_DTYPES or grid_thw.ndim != 2 or grid_thw.shape[1] != 3:
        raise ValueError(
            "`grid_thw` must be a tensor of integers of shape (num_images, 3), one row (t, h, w) per image, got "
            f"{describe(grid_thw)}."
        )
    if grid_thw.is_meta:
        raise ValueError("`grid_thw` must hold sizes, got a tensor on the meta device.")
    if num_patches is not None and len(grid_thw) > num_patches:
        raise ValueError(
            f"`grid_thw` describes {len(grid_thw)} images of at least one patch, but `hidden_states` holds "
            f"{num_patches} patches."
        )
    grid_thw = grid_thw.detach().cpu()
    described = 0
    for index, (t, h, w) in enumerate(grid_thw.tolist()):
        if min(t, h, w) < 1:
            raise ValueError(f"`grid_thw` must hold sizes of at least 1, got {(t, h, w)} for image {index}.")
        described += t * h * w
    if num_patches is not None and described != num_patches:
        raise ValueError(f"`grid_thw` describes {described} patches, but `hidden_states` holds {num_patches}.")
    if described > torch.iinfo(torch.int32).max:
        raise ValueError(f"`grid_thw` must describe fewer than 2**31 patches, got {described}.")
    return grid_thw.to(torch.int64)


def validate_layout(layout: PackedLayout, num_patches: int, learned_side: int | None, merge_temporal: bool) -> None:
    """
    Checks that `layout` is one of `num_patches` for this kind of model. What its tensors hold is not read: they may be
    on a device, and reading them would wait for it.

    Raises:
        ValueError: not a layout, one of other patches or of another kind of model, or one that contradicts itself.
    """
    # By its fields: a layout of the same code, loaded from another model repo, is of another class.
    if getattr(layout, "_fields", None) != PackedLayout._fields:
        raise ValueError(f"`layout` must be a `PackedLayout`, made by `prepare_layout`, got {describe(layout)}.")
    if len(layout.position_ids) != num_patches:
        raise ValueError(
            f"`layout` describes {len(layout.position_ids)} patches, but `hidden_states` holds {num_patches}."
        )
    if (layout.learned_side, layout.merge_temporal) != (learned_side, merge_temporal):
        raise ValueError(
            "`layout` must come from a model with the same side of learned positions (`None`: native) and "
            f"`merge_temporal`, here {(learned_side, merge_temporal)}, got "
            f"{(layout.learned_side, layout.merge_temporal)}."
        )
    # A compiled graph would be one for these runs alone.
    if torch.compiler.is_compiling():
        return
    stated = (len(layout.cu_seqlens) - 1, num_patches, layout.max_seqlen)
    segments, patches = sum(count for count, _ in layout.runs), sum(count * length for count, length in layout.runs)
    in_runs = (segments, patches, max((length for _, length in layout.runs), default=0))
    if stated != in_runs:
        raise ValueError(
            f"`layout` contradicts itself: (segments, patches, longest segment) are {stated}, but {in_runs} in `runs`."
        )


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention written out, on `(batch, heads, length, head_dim)`; the softmax is in float32."""
    scores = (query @ key.transpose(2, 3)) * scaling
    weights = F.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


def blocked_attention_forward(module, query, key, value, attention_mask, scaling, **kwargs):
    """`eager_attention_forward` without gradients or dropout, in blocks of scores that stay in a CPU's cache."""
    batch, heads, length, _ = query.shape
    query, key, value = (x.flatten(0, 1) for x in (query, key, value))
    queries_per_block = max(1, min(length, SCORES_PER_BLOCK // key.shape[1]))
    heads_per_block = max(1, SCORES_PER_BLOCK // (queries_per_block * key.shape[1]))
    outputs = []
    for first in range(0, batch * heads, heads_per_block):
        block = slice(first, first + heads_per_block)
        keys, values = key[block].transpose(1, 2), value[block]
        attended = []
        for queries in query[block].split(queries_per_block, dim=1):
            scores = torch.bmm(queries, keys).float().mul_(scaling)
            attended.append(torch.bmm(torch.softmax(scores, dim=-1, out=scores).to(query.dtype), values))
        outputs.append(torch.cat(attended, dim=1))
    return torch.cat(outputs).unflatten(0, (batch, heads)).transpose(1, 2), None


def has_varlen_kernel(query: torch.Tensor) -> bool:
    """Whether PyTorch's own `varlen_attn`, a flash-attention kernel, takes this `(..., head_dim)` tensor."""
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def prefers_blocks(query: torch.Tensor) -> bool:
    """Whether `blocked_attention_forward` beats PyTorch's CPU kernel, which is slow in half precision."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    return query.device.type == "cpu" and half and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PackedLayout,
    single_query: bool = False,
) -> torch.Tensor:
    """
    Attention inside each segment, by the kernel that `config._attn_implementation` names.

    Args:
        module (`nn.Module`): The caller, for its `config` and its `training`.
        query (`torch.Tensor` of shape `(total_patches, num_heads, head_dim)`): Or `(num_segments, ...)`, one query
            per segment, with `single_query`.
        key, value (`torch.Tensor` of shape `(total_patches, num_heads, head_dim)`): Packed like the patches.
        layout (`PackedLayout`): Where the segments are.
        single_query (`bool`): Whether each segment has one query rather than one per patch.

    Returns:
        `torch.Tensor` of `query`'s shape.
    """
    if layout.max_seqlen == 0:
        # No kernel takes an empty batch; the sum keeps the gradient of every projection defined.
        return query + key.sum(0) + value.sum(0)

    implementation = module.config._attn_implementation
    attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    dropout = module.config.attention_dropout if module.training else 0.0
    shared = {"scaling": query.shape[-1] ** -0.5, "dropout": dropout, "is_causal": False}
    num_segments = len(layout.cu_seqlens) - 1
    cu_seqlens_q, max_seqlen_q = layout.cu_seqlens, layout.max_seqlen
    if single_query:
        cu_seqlens_q, max_seqlen_q = torch.arange(num_segments + 1, dtype=torch.int32, device=query.device), 1

    if is_flash_attention_requested(module.config):
        output, _ = attention_interface(
            module,
            *(x.transpose(0, 1).unsqueeze(0) for x in (query, key, value)),
            attention_mask=None,
            cu_seq_lens_q=cu_seqlens_q,
            cu_seq_lens_k=layout.cu_seqlens,
            max_length_q=max_seqlen_q,
            max_length_k=layout.max_seqlen,
            **shared,
        )
        return output.squeeze(0)

    runs = layout.runs
    if implementation == "sdpa" and not dropout and has_varlen_kernel(query):
        if num_segments * layout.max_seqlen != len(key):
            return varlen_attn(query, key, value, cu_seqlens_q, layout.cu_seqlens, max_seqlen_q, layout.max_seqlen)
        # All segments are of one length: the dense kernels are faster than the varlen one.
        runs = ((num_segments, layout.max_seqlen),)
    elif implementation == "sdpa" and prefers_blocks(query):
        attention_interface = blocked_attention_forward

    keys_per_run = [segments * length for segments, length in runs]
    queries_per_run = [segments for segments, _ in runs] if single_query else keys_per_run
    packed = (query.split(queries_per_run), key.split(keys_per_run), value.split(keys_per_run))
    outputs = []
    for (segments, _), *states in zip(runs, *packed, strict=True):
        batched = (x.unflatten(0, (segments, -1)).transpose(1, 2) for x in states)
        output, _ = attention_interface(module, *batched, attention_mask=None, **shared)
        outputs.append(output.flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
