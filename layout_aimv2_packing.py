# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
How a packed batch divides: pure functions of `grid_thw` and the configuration, which need no model.

Names and order of values are those of transformers' `vision_utils`, so that what either computes serves the other.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from operator import index
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers.utils import TransformersKwargs
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from .configuration_aimv2_packing import Aimv2PackingConfig


# Without a varlen kernel, neighbouring segments of equal length share one attention call up to this many patches:
# enough to fill the cores, few enough to bound the memory of the scores.
MAX_PATCHES_PER_CALL = 4096

# What one dimension of a CUDA grid holds; the attention kernels put a segment in each.
MAX_SEGMENTS_PER_CALL = 65_535

POSITIONS = ("position_ids", "num_positions", "interp_indices", "interp_weights")

INTEGER_DTYPES = {
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
}


class PackedLayout(NamedTuple):
    """
    How a packed batch divides, and where each patch is in its image. Each field is a keyword argument of
    [`Aimv2PackingModel.forward`], under the name that transformers' `vision_utils` gives it, where it has one.

    Attributes:
        runs (`tuple[tuple[int, int], ...]`, or `None`): Neighbouring segments of equal length as `(segments, length)`.
            `None` in a traced forward, whose segments are then of one length.
        cu_seqlens (`torch.Tensor`, int32 of shape `(num_segments + 1,)`): Index of each segment's first patch, and last
            the number of patches.
        max_seqlen (`int`): Patches of the longest segment, or a larger number.
        grids (`tuple[tuple[int, int, int], ...]`, or `None`): Frames, rows and columns of each image.
        frame_sizes (`torch.Tensor`, int32 of shape `(2, num_segments)`, or `None`): Rows, and columns, of the frames of
            each segment.
        num_positions (`int`, or `None`): A number above every row and column, where it is known on the host.
        position_ids (`torch.Tensor`, int64 of shape `(total_patches, 2)`, or `None`): Row and column of each patch;
            `None` with learned positions, and until [`with_positions`] has computed them.
        interp_indices (`torch.Tensor`, int64 of shape `(total_patches, 16)`, or `None`): The learned positions that
            bicubic interpolation reads; `None` with native positions, and until [`with_positions`] has computed them.
        interp_weights (`torch.Tensor`, float32 of shape `(total_patches, 16)`, or `None`): Their weights.
    """

    runs: tuple[tuple[int, int], ...] | None
    cu_seqlens: torch.Tensor
    max_seqlen: int
    grids: tuple[tuple[int, int, int], ...] | None = None
    frame_sizes: torch.Tensor | None = None
    num_positions: int | None = None
    position_ids: torch.Tensor | None = None
    interp_indices: torch.Tensor | None = None
    interp_weights: torch.Tensor | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Patches of each segment."""
        return tuple(length for segments, length in self.runs or () for _ in range(segments))


def equal_length_runs(lengths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Neighbours of equal length as `(segments, length)`, up to `MAX_PATCHES_PER_CALL` patches where possible."""
    runs, segments, previous, per_call = [], 0, 0, 0
    for length in lengths:
        if length == previous and segments < per_call:
            segments += 1
            continue
        if segments:
            runs.append((segments, previous))
        segments, previous, per_call = 1, length, max(1, MAX_PATCHES_PER_CALL // length)
    return (*runs, (segments, previous)) if segments else ()


def segment_lengths(grids: Sequence[tuple[int, int, int]], config: Aimv2PackingConfig) -> list[int]:
    """Patches of each frame, or with `merge_temporal` of each image or video."""
    if config.merge_temporal:
        return [t * h * w for t, h, w in grids]
    return [h * w for t, h, w in grids for _ in range(t)]


@torch.compiler.disable
def packed_layout(grid_thw: torch.Tensor, config: Aimv2PackingConfig, num_patches: int | None = None) -> PackedLayout:
    """
    What a forward derives from `grid_thw`, on the CPU and without a model: `forward` calls this itself. A data loader's
    worker can call it ahead, for `model(hidden_states, grid_thw, **layout._asdict())`.

    Args:
        grid_thw (`torch.Tensor` of integers of shape `(num_images, 3)`): Frames, rows and columns of patches.
        config (`Aimv2PackingConfig`): Of the model, for its `merge_temporal`.
        num_patches (`int`, *optional*): How many patches `grid_thw` has to describe.

    Raises:
        ValueError: `grid_thw` is not as above, holds a size below 1, or describes 2**31 patches or more.
    """
    grid_thw, grids = validate_grid_thw(grid_thw, num_patches)
    lengths, frame_sizes = segment_lengths(grids, config), grid_thw[:, 1:]
    if not config.merge_temporal:
        frame_sizes = frame_sizes.repeat_interleave(grid_thw[:, 0], dim=0)
    return PackedLayout(
        runs=equal_length_runs(lengths),
        cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cpu"),
        max_seqlen=max(lengths, default=0),
        grids=grids,
        frame_sizes=frame_sizes.T.to(torch.int32).contiguous(),
        num_positions=int(grid_thw[:, 1:].max()) if grids else 0,
    )


def with_positions(layout: PackedLayout, config: Aimv2PackingConfig) -> PackedLayout:
    """
    The layout with `position_ids`, or `interp_indices` and `interp_weights`, whichever a model of this configuration
    reads; computed on the CPU from `grids` unless they are there, and on the device of `cu_seqlens`.

    Raises:
        ValueError: neither they nor `grids` are in the layout.
    """
    own = (layout.position_ids,) if config.is_native else (layout.interp_indices, layout.interp_weights)
    return compute_positions(layout, config) if any(value is None for value in own) else layout


@torch.compiler.disable
def compute_positions(layout: PackedLayout, config: Aimv2PackingConfig) -> PackedLayout:
    if layout.grids is None:
        raise ValueError("`grids` must be in a layout whose positions are to be computed, got None.")
    device = layout.cu_seqlens.device
    grid_thw = torch.tensor(layout.grids, dtype=torch.int64, device="cpu").reshape(-1, 3)
    if config.is_native:
        frames = grid_thw[:, 1:].repeat_interleave(grid_thw[:, 0], dim=0)
        sizes = frames.prod(dim=1)
        within = torch.arange(int(sizes.sum()), device="cpu") - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        widths = frames[:, 1].repeat_interleave(sizes)
        position_ids = torch.stack([within // widths, within % widths], dim=1)
        return layout._replace(position_ids=position_ids.to(device, non_blocking=True))
    # One more image of one patch, cut off again, makes an empty batch valid.
    indices, weights = get_vision_interpolation_indices_and_weights(
        F.pad(grid_thw, (0, 0, 0, 1), value=1), config.image_size // config.patch_size, mode="bicubic"
    )
    computed = {"interp_indices": indices[:-1], "interp_weights": weights[:-1]}
    return layout._replace(
        **{
            name: value.to(device, non_blocking=True)
            for name, value in computed.items()
            if getattr(layout, name) is None
        }
    )


def resolve_layout(
    grid_thw: torch.Tensor | None, given: dict[str, Any], config: Aimv2PackingConfig, hidden_states: torch.Tensor
) -> PackedLayout:
    """
    The layout of a forward: from what was computed ahead (fields of a [`PackedLayout`] by name), or else from
    `grid_thw`; its tensors on the device of the patches.

    Raises:
        ValueError: one of them is not as it has to be, or they do not describe the patches.
    """
    num_patches, device = hidden_states.shape[0], hidden_states.device
    segments = validate_segments(given, num_patches) if "cu_seqlens" in given else {}
    validate_positions(given, num_patches)
    positions = {name: given[name] for name in POSITIONS if name in given}
    needed = {"position_ids"} if config.is_native else {"interp_indices", "interp_weights"}
    if segments and "grids" in given:
        layout = PackedLayout(**segments, **positions | validate_frames(given | segments, num_patches, config))
    elif segments and positions.keys() >= needed:
        layout = PackedLayout(**segments, **positions)
    else:
        layout = packed_layout(grid_thw, config, num_patches)
        if segments or positions:
            # The caller's own segments or positions need not be those of the frames.
            layout = layout._replace(**{"frame_sizes": None, "num_positions": None, **segments, **positions})
    # From a device to the CPU the copy has to be waited for.
    moved = {
        name: value.to(device, non_blocking=value.device.type == "cpu")
        for name, value in layout._asdict().items()
        if isinstance(value, torch.Tensor)
    }
    return layout._replace(**moved)


def sincos(positions: torch.Tensor, num_frequencies: int) -> torch.Tensor:
    """
    Sine and cosine of each position, float64 of shape `(*positions.shape, 2 * num_frequencies)`. The frequencies
    `10000 ** (-i / num_frequencies)` are those of "Attention Is All You Need", section 3.5.
    """
    dtype = torch.float32 if positions.device.type == "mps" else torch.float64
    exponents = torch.arange(num_frequencies, dtype=dtype, device=positions.device) / num_frequencies
    angles = positions.to(dtype).unsqueeze(-1) * 10000**-exponents
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def is_dense(value: object) -> bool:
    """Whether `value` is a tensor with strides and one size per dimension: not sparse, not nested."""
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_nested


def kind_of(value: object) -> str:
    """What was given, for the message that refuses it."""
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    if not is_dense(value):
        return f"a {'nested' if value.is_nested else value.layout} tensor"
    return f"{value.dtype} of shape {tuple(value.shape)}"


def validate_keyword_arguments(kwargs: dict[str, Any], config: Aimv2PackingConfig) -> None:
    """
    Refuses by name what a forward would ignore; lets through what transformers, Trainer and PEFT pass to any model.

    Raises:
        ValueError: an argument of another model, or one that this model cannot serve.
        TypeError: an unknown name.
    """
    if kwargs.get("pixel_values") is not None:
        raise ValueError(
            "`pixel_values` is for `Aimv2VisionModel`: give packed patches, `hidden_states` and `grid_thw`, which the "
            "image processor of this repo returns (`AutoProcessor.from_pretrained`)."
        )
    if kwargs.get("output_attentions") or config.output_attentions:
        raise ValueError("`output_attentions` is not supported: the maps of a packed batch have no one shape.")
    known = {*PackedLayout._fields, *TransformersKwargs.__annotations__, "use_cache"}
    for name in (name for name, value in kwargs.items() if value is not None and name not in known):
        raise TypeError(f"`{name}` is not an argument of `forward`.")


def validate_hidden_states(hidden_states: Any, config: Aimv2PackingConfig, device: torch.device) -> None:
    """
    Raises:
        ValueError: not patches of this configuration, or without values though the model has some.
    """
    patch_dim = config.num_channels * config.patch_size**2
    if (
        not is_dense(hidden_states)
        or not hidden_states.is_floating_point()
        or hidden_states.dtype == torch.float4_e2m1fn_x2  # two values per element
        or hidden_states.ndim != 2
        or hidden_states.shape[1] != patch_dim
    ):
        raise ValueError(
            f"`hidden_states` must be a tensor of floating-point patches of shape (total_patches, {patch_dim}), got "
            f"{kind_of(hidden_states)}."
        )
    if hidden_states.is_meta and device.type != "meta":
        raise ValueError(f"`hidden_states` is on the meta device, but the model is on {device}.")


def validate_grid_thw(
    grid_thw: Any, num_patches: int | None = None
) -> tuple[torch.Tensor, tuple[tuple[int, int, int], ...]]:
    """
    Checks `grid_thw` and returns it as int64 on the CPU, and its values: the only device-to-host copy of a forward, and
    none at all when it is there already.

    Raises:
        ValueError: not an integer tensor of shape `(num_images, 3)`, a size below 1, or not `num_patches` in all.
    """
    if not is_dense(grid_thw) or grid_thw.dtype not in INTEGER_DTYPES or grid_thw.ndim != 2 or grid_thw.shape[1] != 3:
        raise ValueError(
            "`grid_thw` must be a tensor of integers of shape (num_images, 3), one row (t, h, w) per image, got "
            f"{kind_of(grid_thw)}."
        )
    if grid_thw.is_meta:
        raise ValueError("`grid_thw` must hold sizes, got a tensor on the meta device.")
    if num_patches is not None and len(grid_thw) > num_patches:
        raise ValueError(
            f"`grid_thw` describes {len(grid_thw)} images of at least one patch, but `hidden_states` holds "
            f"{num_patches} patches."
        )
    grid_thw = grid_thw.detach().cpu()
    grids = tuple(map(tuple, grid_thw.tolist()))
    described = count_patches("grid_thw", grids, num_patches)
    if described > torch.iinfo(torch.int32).max:
        raise ValueError(f"`grid_thw` must describe fewer than 2**31 patches, got {described}.")
    return grid_thw.to(torch.int64), grids


def count_patches(name: str, grids: Sequence[tuple[int, int, int]], num_patches: int | None) -> int:
    """
    The patches of all images.

    Raises:
        ValueError: a size below 1, or not `num_patches` in all.
    """
    if min(map(min, grids), default=1) < 1:
        image, sizes = next((image, sizes) for image, sizes in enumerate(grids) if min(sizes) < 1)
        raise ValueError(f"`{name}` must hold sizes of at least 1, got {sizes} for image {image}.")
    described = sum(t * h * w for t, h, w in grids)
    if num_patches is not None and described != num_patches:
        raise ValueError(f"`{name}` describes {described} patches, but `hidden_states` holds {num_patches}.")
    return described


def validate_segments(given: dict[str, Any], num_patches: int) -> dict[str, Any]:
    """Checks a `cu_seqlens` computed ahead, and derives from it what was not given with it."""
    cu_seqlens = given["cu_seqlens"]
    if (
        not is_dense(cu_seqlens)
        or cu_seqlens.dtype not in INTEGER_DTYPES
        or cu_seqlens.ndim != 1
        or cu_seqlens.shape[0] == 0
    ):
        raise ValueError(
            f"`cu_seqlens` must be a tensor of integers of shape (num_segments + 1,), got {kind_of(cu_seqlens)}."
        )
    segments = {"cu_seqlens": cu_seqlens.to(torch.int32), "max_seqlen": given.get("max_seqlen", num_patches)}
    runs = given.get("runs")
    if runs is None and (torch.compiler.is_compiling() or torch.jit.is_tracing()):
        return {**segments, "runs": None}
    if runs is None:
        values = cu_seqlens.tolist()
        lengths = [end - start for start, end in pairwise(values)]
        if values[0] != 0 or min(lengths, default=1) < 1:
            raise ValueError("`cu_seqlens` must begin with 0 and rise from each value to the next.")
        runs = equal_length_runs(lengths)
        segments["max_seqlen"] = given.get("max_seqlen", max(lengths, default=0))
    described = sum(segments * length for segments, length in runs)
    longest = max((length for _, length in runs), default=0)
    if described != num_patches:
        raise ValueError(f"`cu_seqlens` describes {described} patches, but `hidden_states` holds {num_patches}.")
    if segments["max_seqlen"] < longest:
        raise ValueError(
            f"`max_seqlen` must be at least the longest segment, {longest} patches, got {segments['max_seqlen']}."
        )
    return {**segments, "runs": runs}


def validate_frames(given: dict[str, Any], num_patches: int, config: Aimv2PackingConfig) -> dict[str, Any]:
    """Checks `grids` and `frame_sizes` computed ahead; drops the latter where the segments are not those of frames."""
    try:
        grids = tuple((index(t), index(h), index(w)) for t, h, w in given["grids"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"`grids` must hold (t, h, w) of each image, got {given['grids']!r:.100}.") from error
    count_patches("grids", grids, num_patches)
    frames: dict[str, Any] = {"grids": grids, "num_positions": max((max(h, w) for _, h, w in grids), default=0)}
    if "frame_sizes" in given and given["runs"] == equal_length_runs(segment_lengths(grids, config)):
        sizes, num_segments = given["frame_sizes"], given["cu_seqlens"].shape[0] - 1
        if not is_dense(sizes) or sizes.dtype not in INTEGER_DTYPES or tuple(sizes.shape) != (2, num_segments):
            raise ValueError(
                f"`frame_sizes` must be a tensor of integers of shape (2, {num_segments}), one column per segment, got "
                f"{kind_of(sizes)}."
            )
        frames["frame_sizes"] = sizes.to(torch.int32).contiguous()
    return frames


def validate_positions(given: dict[str, Any], num_patches: int) -> None:
    for name, columns in (("position_ids", 2), ("interp_indices", 16), ("interp_weights", 16)):
        value = given.get(name)
        if value is not None and (not is_dense(value) or tuple(value.shape) != (num_patches, columns)):
            raise ValueError(
                f"`{name}` must be a tensor of shape ({num_patches}, {columns}), one row per patch, got "
                f"{kind_of(value)}."
            )


__all__ = ["PackedLayout", "packed_layout", "with_positions"]
