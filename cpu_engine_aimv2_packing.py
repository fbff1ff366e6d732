# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
The CPU inference engine: what `Aimv2PackingModel` computes, block by block through all layers.

A block is whole segments of about 2,048 patches: its activations stay in the cache from one operation to the next. A
product and what follows it are one oneDNN kernel, where there is one; norms and attention take fewer passes.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .batching_aimv2_packing import pack_in_order
from .layout_aimv2_packing import PackedLayout, equal_length_runs, with_positions


# Few enough that a layer's activations stay in the cache, enough that its matrix products run at full speed.
PATCHES_PER_BLOCK = 2048

# Scores that `attention_in_parts` holds at a time: 4 MiB in half precision. Fewer would pack keys more often.
SCORES_PER_PART = 1 << 21

# Up to this many patches a segment's scores, written out, beat PyTorch's CPU flash attention in float32 too.
SHORT_LENGTH = 96

HALF = (torch.bfloat16, torch.float16)


def refusal(model: nn.Module, hidden_states: torch.Tensor, layout: PackedLayout, state: Any) -> str | None:
    """Why this engine cannot run a forward that no hook, wrapper or gradient speaks against, or `None`."""
    if model.config._attn_implementation != "sdpa":
        return f"attn_implementation is {model.config._attn_implementation}"
    return None


def encode(
    model: nn.Module, hidden_states: torch.Tensor, layout: PackedLayout, state: Any, depths: Sequence[int], last: bool
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
    """
    Patches `(total_patches, patch_dim)` to the states after `depths` blocks, before the final norm, and with `last` the
    features after it, `(total_patches, hidden_size)` each. Blocks run as far as they are needed.
    """
    layers = model.encoder.layers if last else model.encoder.layers[: max(depths)]
    wanted: list[torch.Tensor] = []
    layout = with_positions(layout.to(hidden_states.device), model.config)
    for block in plan_blocks(layout.lengths):
        own = hidden_states[block.rows]
        # With ones, because not every dtype has a zero.
        patches = F.pad(own, (0, 0, 0, block.padding), value=1.0) if block.padding else own
        states = model.embeddings(patches, positions_of(block, layout))
        outputs = [states] if 0 in depths else []
        for depth, layer in enumerate(layers, start=1):
            states = states + attention(layer.attention, rms_norm(layer.rms_norm1, states), block.runs)
            states = states + ffn(layer.ffn, rms_norm(layer.rms_norm2, states))
            if depth in depths:
                outputs.append(states)
        if last:
            outputs.append(rms_norm(model.rms_norm, states))
        if not wanted:
            wanted = [states.new_empty(len(hidden_states), states.shape[1]) for _ in outputs]
        for whole, part in zip(wanted, outputs, strict=True):
            whole[block.rows] = part[: len(own)]
    return tuple(wanted[: len(depths)]), wanted[-1] if last else None


# Blocks


class Block(NamedTuple):
    """
    Whole segments that go through the model together.

    Attributes:
        rows (`slice` or `torch.Tensor`, int64 of shape `(block_patches,)`): Where their patches are in the batch.
        padding (`int`): Patches that go with them to make up a number that recurs; the last segment.
        runs (`tuple[tuple[int, int], ...]`): Neighbours of equal length, padding included, as `(segments, length)`.
    """

    rows: slice | torch.Tensor
    padding: int
    runs: tuple[tuple[int, int], ...]


def plan_blocks(lengths: Sequence[int]) -> list[Block]:
    """
    Blocks of at most `PATCHES_PER_BLOCK` patches, or of one longer segment. Segments stay in their order, unless
    ordering them by length leaves less than half the attention calls.
    """
    num_segments = len(lengths)
    in_order = 2 * len(set(lengths)) > sum(1 for _ in groupby(lengths))
    order = range(num_segments) if in_order else sorted(range(num_segments), key=lengths.__getitem__)
    starts = list(accumulate(lengths, initial=0))
    blocks = []
    for group in pack_in_order(order, lengths.__getitem__, PATCHES_PER_BLOCK):
        rows: slice | torch.Tensor = slice(starts[group[0]], starts[group[-1] + 1])
        if not in_order:
            rows = torch.cat([torch.arange(starts[index], starts[index + 1], device="cpu") for index in group])
        own = [lengths[index] for index in group]
        padding = recurring_size(sum(own)) - sum(own)
        blocks.append(Block(rows, padding, equal_length_runs(own + [padding] * (padding > 0))))
    return blocks


def recurring_size(patches: int) -> int:
    """
    `patches` rounded up to one of 32 sizes per doubling, at most 3 % more: oneDNN compiles its kernels for each number
    of patches anew, and keeps them.
    """
    step = max(1, (1 << (patches - 1).bit_length()) // 64)
    return -(-patches // step) * step


def positions_of(block: Block, layout: PackedLayout) -> PackedLayout:
    """The layout with the positions of one block's patches, its padding at any position."""
    own = {
        name: F.pad(value[block.rows], (0, 0, 0, block.padding))
        for name in ("position_ids", "interp_indices", "interp_weights")
        if (value := getattr(layout, name)) is not None
    }
    return replace(layout, **own)


# Layers


def attention(module: nn.Module, hidden_states: torch.Tensor, runs: Sequence[tuple[int, int]]) -> torch.Tensor:
    query, key, value = (
        linear(projection, hidden_states).unflatten(-1, (-1, module.head_dim))
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    scaling, patches = module.head_dim**-0.5, [segments * length for segments, length in runs]
    outputs = []
    for (count, length), *states in zip(
        runs, query.split(patches), key.split(patches), value.split(patches), strict=True
    ):
        queries, keys, values = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in states)
        if query.dtype in HALF or length <= SHORT_LENGTH:
            output = attention_in_parts(queries, keys, values, scaling)
        else:
            output = F.scaled_dot_product_attention(queries, keys, values, scale=scaling)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    attended = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return linear(module.out_proj, attended.flatten(1))


def attention_in_parts(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """
    Attention on `(batch, heads, length, head_dim)`, in parts of scores that stay in the cache. In half precision scores
    and weights are rounded, but scaling and softmax are in float32.
    """
    batch, heads, length, _ = query.shape
    # Strided keys would be packed anew for each part of the queries.
    query, key, value = (x.reshape(batch * heads, -1, x.shape[-1]).contiguous() for x in (query, key, value))
    queries_per_part = max(1, min(length, SCORES_PER_PART // key.shape[1]))
    heads_per_part = max(1, SCORES_PER_PART // (queries_per_part * key.shape[1]))
    unused = query.new_zeros(1, 1, 1)
    attended = torch.empty_like(query)
    for first in range(0, batch * heads, heads_per_part):
        part = slice(first, first + heads_per_part)
        keys, values = key[part].transpose(1, 2), value[part]
        for queries, output in zip(
            query[part].split(queries_per_part, dim=1), attended[part].split(queries_per_part, dim=1), strict=True
        ):
            scores = torch.baddbmm(unused, queries, keys, beta=0, alpha=scaling)
            torch.bmm(torch.softmax(scores, dim=-1, out=scores), values, out=output)
    return attended.unflatten(0, (batch, heads))


def ffn(module: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    if is_silu(module.act_fn):
        gate = linear(module.gate_proj, hidden_states, "swish")
    else:
        gate = module.act_fn(linear(module.gate_proj, hidden_states))
    return linear(module.down_proj, linear(module.up_proj, hidden_states, times=gate))


def is_silu(activation: Callable) -> bool:
    return type(activation).__name__ in ("SiLU", "SiLUActivation")


def linear(
    module: nn.Linear, hidden_states: torch.Tensor, activation: str = "none", times: torch.Tensor | None = None
) -> torch.Tensor:
    """The product, then the activation (`"none"` or `"swish"`) of it, then `times` it."""
    kernel = onednn_kernel(hidden_states.dtype) if torch.backends.mkldnn.enabled else None
    if kernel is None:
        output = F.linear(hidden_states, module.weight, module.bias)
        output = F.silu(output) if activation == "swish" else output
        return output if times is None else times * output
    # Rounded once, after the activation or the product with `times`.
    if times is None:
        return kernel(hidden_states, module.weight, module.bias, activation, [], "")
    return kernel.binary(hidden_states, times, module.weight, module.bias, "mul")


@cache
def onednn_kernel(dtype: torch.dtype) -> Any:
    """What torch.compile calls on a CPU for a product and what follows it; `None` where this torch or CPU lacks it."""
    try:
        supported = torch.backends.mkldnn.is_available() and (
            dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        )
        return torch.ops.mkldnn._linear_pointwise if supported and torch.ops.mkldnn._linear_pointwise.binary else None
    except AttributeError:
        return None


def rms_norm(module: nn.RMSNorm, hidden_states: torch.Tensor) -> torch.Tensor:
    """The norm by fewer passes over the patches than `nn.RMSNorm` takes on a CPU."""
    eps = torch.finfo(hidden_states.dtype).eps if module.eps is None else module.eps
    wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
    mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / hidden_states.shape[-1]
    return (wide * (mean_square + eps).rsqrt()).mul_(module.weight).to(hidden_states.dtype)
