# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""How a packed batch divides: the segments that attention stays inside, and the blocks that a CPU works through."""

from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import NamedTuple

import torch


# Where no varlen kernel exists, neighbouring segments of equal length share one attention call up to this many
# patches: enough to fill the cores, few enough to bound the memory of the scores.
MAX_PATCHES_PER_CALL = 4096

# On a CPU, patches per block: few enough that a layer's activations stay in the cache from one operation to the next,
# enough that its matrix products run at full speed.
PATCHES_PER_BLOCK = 2048


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
            cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
            max_seqlen=max(lengths, default=0),
            runs=equal_length_runs(lengths),
        )


class Block(NamedTuple):
    """
    Whole segments that go through an encoder layer together.

    Attributes:
        rows (`slice` or `torch.Tensor`, int64 of shape `(block_patches,)`): Where their patches are in the batch.
        segments (`Segments`): How these patches divide.
    """

    rows: slice | torch.Tensor
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
    """

    segments: Segments
    blocks: tuple[Block, ...]
    max_grid_side: int
    position_ids: torch.Tensor
    position_weights: torch.Tensor | None

    def to(self, device: torch.device | str) -> "PackedLayout":
        """The same layout with what a forward reads on `device` moved there; never waits for the device."""
        weights = self.position_weights
        return self._replace(
            segments=self.segments._replace(cu_seqlens=self.segments.cu_seqlens.to(device, non_blocking=True)),
            position_ids=self.position_ids.to(device, non_blocking=True),
            position_weights=None if weights is None else weights.to(device, non_blocking=True),
        )


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
            rows = torch.cat([torch.arange(starts[index], starts[index + 1]) for index in group])
        blocks.append(Block(rows, Segments.from_lengths([lengths[index] for index in group])))
    return tuple(blocks)


def validate_grid_thw(grid_thw: torch.Tensor, num_patches: int | None = None) -> torch.Tensor:
    """
    Checks `grid_thw` and returns it as int64 on the CPU: the only device-to-host copy of a forward, and none at all
    when it is there already.

    Raises:
        ValueError: not an integer tensor of shape `(num_images, 3)`, a size below 1, or not `num_patches` in all.
    """
    if not isinstance(grid_thw, torch.Tensor) or grid_thw.dtype.is_floating_point or grid_thw.dtype.is_complex:
        given = grid_thw.dtype if isinstance(grid_thw, torch.Tensor) else type(grid_thw).__name__
        raise ValueError(f"`grid_thw` must be a tensor of integers, got {given}.")
    if grid_thw.ndim != 2 or grid_thw.shape[1] != 3 or grid_thw.dtype == torch.bool:
        raise ValueError(
            "`grid_thw` must be integers of shape (num_images, 3), one row (t, h, w) per image, got "
            f"{grid_thw.dtype} of shape {tuple(grid_thw.shape)}."
        )
    grid_thw = grid_thw.detach().to("cpu", torch.int64)
    described = 0
    for index, (t, h, w) in enumerate(grid_thw.tolist()):
        if min(t, h, w) < 1:
            raise ValueError(f"`grid_thw` must hold sizes of at least 1, got {(t, h, w)} for image {index}.")
        described += t * h * w
    if num_patches is not None and described != num_patches:
        raise ValueError(f"`grid_thw` describes {described} patches, but `hidden_states` holds {num_patches}.")
    if described > torch.iinfo(torch.int32).max:
        raise ValueError(f"`grid_thw` must describe fewer than 2**31 patches, got {described}.")
    return grid_thw
