# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""How a packed batch divides: the segments that attention stays inside, and the blocks that a CPU works through."""

from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F


# Where no varlen kernel exists, neighbouring segments of equal length share one attention call up to this many
# patches: enough to fill the cores, few enough to bound the memory of the scores.
MAX_PATCHES_PER_CALL = 4096

# On a CPU, patches per block: few enough that a layer's activations stay in the cache from one operation to the next,
# enough that its matrix products run at full speed.
PATCHES_PER_BLOCK = 2048

INTEGER_DTYPES = {
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
}


def equal_length_runs(lengths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Neighbours of equal length as `(segments, length)`, up to `MAX_PATCHES_PER_CALL` patches where possible."""
    runs = []
    for length, group in groupby(lengths):
        segments, per_call = len(list(group)), max(1, MAX_PATCHES_PER_CALL // length)
        runs += [(min(per_call, segments - first), length) for first in range(0, segments, per_call)]
    return tuple(runs)


class Segments(NamedTuple):
    """
    What lies in a packed sequence. Attention never crosses a segment: an image is one, a video is one per frame (or
    one in all with `config.merge_temporal`).

    Attributes:
        cu_seqlens (`torch.Tensor`, int32 of shape `(num_segments + 1,)`): Index of each segment's first patch, and
            last the number of patches.
        max_seqlen (`int`): Patches of the longest segment, 0 where there is none.
        runs (`tuple[tuple[int, int], ...]`): Neighbouring segments of equal length as `(segments, length)`, for
            attention without a varlen kernel.
    """

    cu_seqlens: torch.Tensor
    max_seqlen: int
    runs: tuple[tuple[int, int], ...]

    @classmethod
    def from_lengths(cls, lengths: Sequence[int]) -> "Segments":
        return cls(
            cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cpu"),
            max_seqlen=max(lengths, default=0),
            runs=equal_length_runs(lengths),
        )


class Block(NamedTuple):
    """
    Whole segments that go through the model together.

    Attributes:
        rows (`slice` or `torch.Tensor`, int64 of shape `(block_patches,)`): Where their patches are in the batch.
        padding (`int`): Patches that go with them to make up a number that recurs, the last segment.
        segments (`Segments`): How these patches, padding included, divide.
    """

    rows: slice | torch.Tensor
    padding: int
    segments: Segments


class PackedLayout(NamedTuple):
    """
    Everything that a forward needs to know of a packed batch, prepared once by [`Aimv2PackingModel.prepare_layout`].

    Attributes:
        segments (`Segments`): How the batch divides.
        blocks (`tuple[Block, ...]`): The same in parts, for a CPU; empty where the model is on another device.
        max_grid_side (`int`): Largest height or width, in patches.
        position_ids (`torch.Tensor`, int64): With native positions the `(column, row)` of each patch,
            `(total_patches, 2)`; with learned ones the 16 learned positions that bicubic interpolation reads,
            `(total_patches, 16)`.
        position_weights (`torch.Tensor`, float32 of shape `(total_patches, 16)`, or `None`): Weights of those 16.
        learned_side (`int`, or `None`): Side of the square of learned positions; `None` with native ones.
        merge_temporal (`bool`): Whether a video is one segment.
    """

    segments: Segments
    blocks: tuple[Block, ...]
    max_grid_side: int
    position_ids: torch.Tensor
    position_weights: torch.Tensor | None
    learned_side: int | None
    merge_temporal: bool

    def of(self, block: Block) -> "PackedLayout":
        """The layout of one block alone, its padding at any position."""
        position_ids, weights = self.position_ids[block.rows], self.position_weights
        padding = (0, 0, 0, block.padding)
        return self._replace(
            segments=block.segments,
            blocks=(),
            position_ids=F.pad(position_ids, padding),
            position_weights=None if weights is None else F.pad(weights[block.rows], padding),
        )

    def to(self, device: torch.device | str) -> "PackedLayout":
        """The same layout with what a forward reads on `device` moved there; never waits for the device."""
        weights = self.position_weights
        return self._replace(
            segments=self.segments._replace(cu_seqlens=self.segments.cu_seqlens.to(device, non_blocking=True)),
            position_ids=self.position_ids.to(device, non_blocking=True),
            position_weights=None if weights is None else weights.to(device, non_blocking=True),
        )


def recurring_size(patches: int) -> int:
    """
    `patches` rounded up to one of 32 sizes per doubling, at most 3 % more: oneDNN compiles its kernels for each number
    of patches anew, and keeps them.
    """
    step = max(1, (1 << (patches - 1).bit_length()) // 64)
    return -(-patches // step) * step


def plan_blocks(lengths: Sequence[int]) -> tuple[Block, ...]:
    """
    Blocks of at most `PATCHES_PER_BLOCK` patches, or of one longer segment. Segments stay in their order, unless
    ordering them by length leaves less than half the attention calls.
    """
    num_segments = len(lengths)
    in_order = 2 * len(set(lengths)) > sum(1 for _ in groupby(lengths))
    order = range(num_segments) if in_order else sorted(range(num_segments), key=lengths.__getitem__)
    starts = list(accumulate(lengths, initial=0))
    groups: list[list[int]] = []
    patches = PATCHES_PER_BLOCK
    for index in order:
        if patches + lengths[index] > PATCHES_PER_BLOCK:
            groups.append([])
            patches = 0
        groups[-1].append(index)
        patches += lengths[index]
    blocks = []
    for group in groups:
        rows: slice | torch.Tensor = slice(starts[group[0]], starts[group[-1] + 1])
        if not in_order:
            rows = torch.cat([torch.arange(starts[index], starts[index + 1], device="cpu") for index in group])
        own = [lengths[index] for index in group]
        padding = recurring_size(sum(own)) - sum(own)
        blocks.append(Block(rows, padding, Segments.from_lengths(own + [padding] * (padding > 0))))
    return tuple(blocks)


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
    cu_seqlens, max_seqlen, runs = layout.segments
    stated = (len(cu_seqlens) - 1, num_patches, max_seqlen)
    segments, patches = sum(count for count, _ in runs), sum(count * length for count, length in runs)
    in_runs = (segments, patches, max((length for _, length in runs), default=0))
    if stated != in_runs:
        raise ValueError(
            f"`layout` contradicts itself: (segments, patches, longest segment) are {stated}, but {in_runs} in `runs`."
        )
    in_blocks = sum(
        sum(count * length for count, length in block.segments.runs) - block.padding for block in layout.blocks
    )
    if layout.blocks and in_blocks != num_patches:
        raise ValueError(
            f"`layout` contradicts itself: it describes {num_patches} patches, but {in_blocks} in `blocks`."
        )
