# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
How a packed batch divides: pure functions of `grid_thw` and the configuration, which need no model.

Names and order of values are those of transformers' `vision_utils`, so that what either computes serves the other.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, pairwise
from operator import index
from typing import Any

import numpy as np
import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes
from transformers.utils import TransformersKwargs
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from .configuration_aimv2_packing import Aimv2PackingConfig


# Without a varlen kernel, neighbouring segments of equal length share one attention call up to this many patches:
# enough to fill the cores, few enough to bound the memory of the scores.
MAX_PATCHES_PER_CALL = 4096

# What one dimension of a CUDA grid holds; the attention kernels put a segment in each.
MAX_SEGMENTS_PER_CALL = 65_535

POSITIONS = ("position_ids", "interp_indices", "interp_weights")

# Under these names transformers' `vision_utils` computes them.
VISION_UTILS_NAMES = ("cu_seqlens", "max_seqlen", *POSITIONS)

# What attention of one's own segments is asked for by in transformers' language models.
NAMES_HERE = {
    **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), "cu_seqlens"),
    **dict.fromkeys(("max_length_q", "max_length_k"), "max_seqlen"),
}

INTEGER_DTYPES = {
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
}

INDEX_DTYPES = {"cu_seqlens": torch.int32, "position_ids": torch.int64, "interp_indices": torch.int64}


@dataclass(eq=False)
class PackedLayout:
    """
    How a packed batch divides, and where each patch is in its image: what [`packed_layout`] returns, and `forward`
    takes as `layout`. Trainer, pinned memory, pickling and torch.export carry it like a tensor.

    Attributes:
        runs (`tuple[tuple[int, int], ...]`, or `None`): Neighbouring segments of equal length as `(segments, length)`.
            `None` where the host does not know the lengths: in a program that takes `cu_seqlens` as an input.
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
        num_grid_per_side (`int`, or `None`): How many learned positions a side has whose indices were computed.
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
    num_grid_per_side: int | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Patches of each segment."""
        return tuple(length for segments, length in self.runs or () for _ in range(segments))

    def tensors(self) -> dict[str, torch.Tensor]:
        """The fields that are tensors, by name."""
        # By their names: a look at `runs` would bind a compiled program to them.
        values = {name: getattr(self, name) for name in ("cu_seqlens", "frame_sizes", *POSITIONS)}
        return {name: value for name, value in values.items() if value is not None}

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "PackedLayout":
        """The layout with its tensors on a device; itself where they are there."""
        device = torch.device(device)
        moved = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in self.tensors().items()
            if value.device != device
        }
        return replace(self, **moved) if moved else self

    def pin_memory(self) -> "PackedLayout":
        """The layout in pinned memory: what a [`~torch.utils.data.DataLoader`] with `pin_memory=True` asks for."""
        return replace(self, **{name: value.pin_memory() for name, value in self.tensors().items()})


torch.export.register_dataclass(PackedLayout)


def equal_length_runs(lengths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Neighbours of equal length as `(segments, length)`, up to `MAX_PATCHES_PER_CALL` patches where possible."""
    runs, segments, previous, per_call = [], 0, 0, 0
    for length in lengths:
        if length == previous and segments < per_call:
            segments += 1
            continue
        if segments:
            runs.append((segments, previous))
        segments, previous, per_call = 1, length, MAX_PATCHES_PER_CALL // length
    return (*runs, (segments, previous)) if segments else ()


def split_by_segments(layout: PackedLayout) -> Iterator[tuple[slice, slice, PackedLayout]]:
    """
    A layout in parts of at most `MAX_SEGMENTS_PER_CALL` segments, each with where its segments and its patches are in
    the whole. A part has no positions.
    """
    lengths = layout.lengths
    starts = list(accumulate(lengths, initial=0))
    for first in range(0, len(lengths), MAX_SEGMENTS_PER_CALL):
        last = min(first + MAX_SEGMENTS_PER_CALL, len(lengths))
        own = lengths[first:last]
        cu_seqlens = layout.cu_seqlens[first : last + 1] - layout.cu_seqlens[first]
        part = PackedLayout(equal_length_runs(own), cu_seqlens, max(own))
        yield slice(first, last), slice(starts[first], starts[last]), part


@torch.compiler.disable
def packed_layout(grid_thw: torch.Tensor, config: Aimv2PackingConfig, num_patches: int | None = None) -> PackedLayout:
    """
    What a forward derives from `grid_thw`, on the CPU and without a model: `forward` calls this itself. A data loader's
    worker can call it before, for `model(hidden_states, layout=layout)`.

    Args:
        grid_thw (`torch.Tensor` of integers of shape `(num_images, 3)`): Frames, rows and columns of patches.
        config (`Aimv2PackingConfig`): Of the model, for its `merge_temporal`.
        num_patches (`int`, *optional*): How many patches `grid_thw` has to describe.

    Raises:
        ValueError: `grid_thw` is not as above, holds a size below 1, or describes 2**31 patches or more.

    Example:

    ```python
    >>> packed_layout(torch.tensor([[1, 2, 3], [1, 4, 4]]), config).cu_seqlens
    tensor([ 0,  6, 22], dtype=torch.int32)
    ```
    """
    grids = validate_grid_thw(grid_thw, num_patches)
    if config.merge_temporal:
        frames, lengths = [(h, w) for _, h, w in grids], [t * h * w for t, h, w in grids]
    else:
        frames = [(h, w) for t, h, w in grids for _ in range(t)]
        lengths = [h * w for h, w in frames]
    rows, columns = [h for h, _ in frames], [w for _, w in frames]
    # One buffer, and one pass in C over plain integers: a tensor of a list is several times slower.
    values = torch.frombuffer(array("i", [*accumulate(lengths, initial=0), *rows, *columns]), dtype=torch.int32)
    return PackedLayout(
        runs=equal_length_runs(lengths),
        cu_seqlens=values[: len(lengths) + 1],
        max_seqlen=max(lengths, default=0),
        grids=grids,
        frame_sizes=values[len(lengths) + 1 :].view(2, -1) if lengths else values.new_empty(2, 0),
        num_positions=max(*rows, *columns) if lengths else 0,
    )


def with_positions(layout: PackedLayout, config: Aimv2PackingConfig) -> PackedLayout:
    """
    The layout with `position_ids`, or `interp_indices` and `interp_weights`, whichever a model of this configuration
    reads; computed from `grids` unless they are there, on the device of `cu_seqlens` and without waiting for it.

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
    ends = list(accumulate((t * h * w for t, h, w in layout.grids), initial=0))
    sides = [[h for _, h, _ in layout.grids], [w for _, _, w in layout.grids]]
    sizes = sorted({1, *sides[0], *sides[1]})
    # Where the rows of each size begin in a table of all sizes.
    starts = dict(zip(sizes, accumulate(sizes, initial=0), strict=False))
    of_each = [ends[:-1], *sides, *([starts[size] for size in own] for own in sides)]
    images = torch.tensor(of_each, dtype=torch.int64, device="cpu").to(device, non_blocking=True)
    patches = torch.arange(ends[-1], device=device)
    # No `repeat_interleave`, which wakes all cores for a few images, or waits for a GPU.
    image = torch.searchsorted(images[0], patches, right=True) - 1
    first, rows, columns, row_start, column_start = (own.index_select(0, image) for own in images.unbind(0))
    within = patches - first
    row, column = within // columns % rows, within % columns
    if config.is_native:
        return replace(layout, position_ids=torch.stack([row, column], dim=1))
    num_positions = config.image_size // config.patch_size
    tables = (np.concatenate(own) for own in zip(*(axis_taps(size, num_positions) for size in sizes), strict=True))
    taps, weights = (torch.from_numpy(table).to(device, non_blocking=True) for table in tables)
    row, column = row_start + row, column_start + column
    computed = {
        "interp_indices": (taps[row].unsqueeze(2) * num_positions + taps[column].unsqueeze(1)).flatten(1),
        "interp_weights": (weights[row].unsqueeze(2) * weights[column].unsqueeze(1)).flatten(1),
    }
    missing = {name: value for name, value in computed.items() if getattr(layout, name) is None}
    return replace(layout, num_grid_per_side=num_positions, **missing)


@lru_cache(maxsize=4096)
def axis_taps(size: int, num_positions: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Which of `num_positions` learned positions along an axis bicubic interpolation to `size` reads, and their weights,
    `(size, 4)` each: what transformers computes for an image whose other axis has as many patches as positions.
    """
    # Values, also where tensors are without: under torch.export, and in transforms of torch.func.
    with _disable_current_modes(), temporarily_clear_interpreter_stack():
        grid_thw = torch.tensor([[1, size, num_positions]], device="cpu")
        computed = get_vision_interpolation_indices_and_weights(grid_thw, num_positions, mode="bicubic")
        # There the second tap of the first column is position 0, and has all the weight.
        indices, weights = (own.view(size, num_positions, 4, 4)[:, 0, :, 1].numpy() for own in computed)
    return indices // num_positions, weights


@torch.compiler.disable
def whole_layout(grid_thw: torch.Tensor, config: Aimv2PackingConfig, num_patches: int) -> PackedLayout:
    """[`packed_layout`] and [`with_positions`], so that a compiled forward breaks once."""
    return with_positions(packed_layout(grid_thw, config, num_patches), config)


# Asked of Python: under `torch.compile` of torch 2.11, Dynamo itself answers that an export is going on.
@torch.compiler.assume_constant_result
def is_traced() -> bool:
    """Whether a program is recorded that will run on other batches: by `torch.export`, ONNX or `torch.jit.trace`."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def resolve_layout(
    hidden_states: torch.Tensor,
    grid_thw: torch.Tensor | None,
    layout: PackedLayout | None,
    given: dict[str, Any],
    config: Aimv2PackingConfig,
) -> PackedLayout:
    """
    The layout of a forward, its tensors where they were: `layout`, or what was computed before under the names of
    transformers' `vision_utils`, or else what follows from `grid_thw`.

    Raises:
        ValueError: one of them is not as it has to be, or they do not describe the patches.
    """
    num_patches = hidden_states.shape[0]
    given = {name: given[name] for name in VISION_UTILS_NAMES if given.get(name) is not None}
    if layout is not None:
        if given:
            raise ValueError(f"`layout` says all that {', '.join(map(repr, given))} would: give one or the other.")
        return validate_layout(layout, num_patches, config)
    validate_positions(given, num_patches)
    positions = in_own_dtypes({name: given[name] for name in POSITIONS if name in given})
    needed = {"position_ids"} if config.is_native else {"interp_indices", "interp_weights"}
    if positions and not positions.keys() & needed:
        raise ValueError(
            f"`{next(iter(positions))}` is not read by a model with {'sin-cos' if config.is_native else 'learned'} "
            f"positions: give {' and '.join(f'`{name}`' for name in sorted(needed))}."
        )
    if "cu_seqlens" in given and positions.keys() >= needed:
        return PackedLayout(**segments_from(given, num_patches), **positions)
    layout = (whole_layout if torch.compiler.is_compiling() else packed_layout)(grid_thw, config, num_patches)
    if positions:
        layout = replace(layout, num_positions=None, **positions)
    if "cu_seqlens" in given:
        # The caller's own segments need not be those of the frames.
        layout = replace(layout, frame_sizes=None, **segments_from(given, num_patches))
    elif "max_seqlen" in given and not torch.compiler.is_compiling():
        validate_max_seqlen(given["max_seqlen"], layout.max_seqlen)
    return layout


def segments_from(given: dict[str, Any], num_patches: int) -> dict[str, Any]:
    """`runs`, `cu_seqlens` and `max_seqlen` from what was given under the last two names."""
    cu_seqlens, max_seqlen = given["cu_seqlens"], given.get("max_seqlen")
    if (
        not is_dense(cu_seqlens)
        or cu_seqlens.dtype not in INTEGER_DTYPES
        or cu_seqlens.ndim != 1
        or cu_seqlens.shape[0] == 0
    ):
        raise ValueError(
            f"`cu_seqlens` must be a tensor of integers of shape (num_segments + 1,), got {kind_of(cu_seqlens)}."
        )
    segments = {"cu_seqlens": cu_seqlens.to(torch.int32)}
    if torch.compiler.is_compiling() or is_traced():
        return {**segments, "runs": None, "max_seqlen": num_patches if max_seqlen is None else int(max_seqlen)}
    return {**segments, **read_segments(cu_seqlens, max_seqlen, num_patches)}


@torch.compiler.disable
def read_segments(cu_seqlens: torch.Tensor, max_seqlen: int | None, num_patches: int) -> dict[str, Any]:
    """`runs` and `max_seqlen` from the values of `cu_seqlens`, which are copied to the host."""
    values = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(values)]
    if values[0] != 0 or min(lengths, default=1) < 1:
        raise ValueError("`cu_seqlens` must begin with 0 and rise from each value to the next.")
    if values[-1] != num_patches:
        raise ValueError(f"`cu_seqlens` describes {values[-1]} patches, but `hidden_states` holds {num_patches}.")
    longest = max(lengths, default=0)
    validate_max_seqlen(longest if max_seqlen is None else max_seqlen, longest)
    return {"runs": equal_length_runs(lengths), "max_seqlen": longest}


def with_runs(layout: PackedLayout, num_patches: int) -> PackedLayout:
    """The layout with the lengths of its segments known to the host."""
    return layout if layout.runs is not None else replace(layout, **read_segments(layout.cu_seqlens, None, num_patches))


def zero_if_of_one_length(cu_seqlens: torch.Tensor, num_patches: int) -> torch.Tensor:
    """
    0.0 of shape `(1,)` where all segments are of one length; where they are not, an index that is out of range ends the
    program. An assertion would not do: ONNX drops it.
    """
    num_segments = cu_seqlens.shape[0] - 1
    expected = torch.arange(num_segments + 1, device=cu_seqlens.device) * (num_patches // num_segments)
    differs = (cu_seqlens != expected).any().to(torch.int64).view(1)
    return torch.zeros(1, device=cu_seqlens.device).index_select(0, differs)


def segment_ids(cu_seqlens: torch.Tensor, num_patches: int) -> torch.Tensor:
    """The segment of each patch, int64 of shape `(num_patches,)`, by operations that every exporter has."""
    patches = torch.arange(num_patches, device=cu_seqlens.device)
    return (patches.unsqueeze(1) >= cu_seqlens).sum(1) - 1


def mean_over_segments(features: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """
    Mean over the patches of each segment, `(total_patches, hidden_size)` to `(num_segments, hidden_size)`, in the dtype
    of `features`.
    """
    lengths = cu_seqlens.diff().to(features.device, non_blocking=True)
    # In float32 at least: thousands of patches add up. Unsafe: the checks would wait for the device.
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    return torch.segment_reduce(wide, "mean", lengths=lengths, unsafe=True).to(features.dtype)


def unpack_features(features: torch.Tensor, grid_thw: torch.Tensor) -> list[torch.Tensor]:
    """
    Splits packed features into one map per image or video.

    Args:
        features (`torch.Tensor` of shape `(total_patches, ...)`): Such as `last_hidden_state`.
        grid_thw (`torch.Tensor` of integers of shape `(num_images, 3)`): What the model was called with.

    Returns:
        `list[torch.Tensor]`: Views of `features`, each of shape `(t, h, w, ...)`.

    Raises:
        ValueError: one of them is not as above, or `grid_thw` does not describe as many patches as `features` holds.
    """
    if not isinstance(features, torch.Tensor) or features.ndim == 0:
        raise ValueError(f"`features` must be a tensor of shape (total_patches, ...), got {kind_of(features)}.")
    grids = validate_grid_thw(grid_thw)
    lengths = [t * h * w for t, h, w in grids]
    if sum(lengths) != len(features):
        raise ValueError(f"`grid_thw` describes {sum(lengths)} patches, but `features` holds {len(features)}.")
    return [part.unflatten(0, grid) for part, grid in zip(features.split(lengths), grids, strict=True)]


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


def wants_attentions(kwargs: dict[str, Any], config: Aimv2PackingConfig) -> bool:
    """Whether a forward returns attention maps: what the call says, or where it says nothing, the configuration."""
    asked = kwargs.get("output_attentions")
    return bool(config.output_attentions if asked is None else asked)


def as_indices(name: str, given: Any) -> list[int]:
    """
    Raises:
        ValueError: not a sequence of integers.
    """
    try:
        return [index(each) for each in given]
    except TypeError:
        raise ValueError(f"`{name}` must be an int or a sequence of ints, got {given!r}.") from None


def validate_keyword_arguments(kwargs: dict[str, Any], config: Aimv2PackingConfig) -> None:
    """
    Refuses by name what a forward would ignore, but not what transformers, Trainer and PEFT pass to any model.

    Raises:
        ValueError: an argument of another model, or one that this model cannot serve.
        TypeError: an unknown name.
    """
    if kwargs.get("pixel_values") is not None:
        raise ValueError(
            "`pixel_values` is for `Aimv2VisionModel`: give packed patches, `hidden_states` and `grid_thw`, which the "
            "image processor of this repo returns (`AutoProcessor.from_pretrained`)."
        )
    if wants_attentions(kwargs, config) and config._attn_implementation != "eager":
        raise ValueError(
            "`output_attentions` needs `attn_implementation='eager'`: no other kernel writes the weights out, got "
            f"{config._attn_implementation!r}."
        )
    # `num_images_per_sample` is what `collate` tells its caller.
    for_others = ("num_images_per_sample", "num_items_in_batch", "use_cache")
    known = {*VISION_UTILS_NAMES, *for_others, "output_attentions", "output_hidden_states"}
    for name, value in kwargs.items():
        # Of a switch that others have, off changes nothing.
        off = value is None or (value is False and name in TransformersKwargs.__annotations__)
        if not off and name not in known:
            own = "grid_thw" if name.endswith("_grid_thw") else NAMES_HERE.get(name)
            hint = f" Its name here is `{own}`; leave out what is of a text." if own else ""
            raise TypeError(f"`{name}` is not an argument of `forward`.{hint}")


def validate_hidden_states(hidden_states: Any, config: Aimv2PackingConfig) -> None:
    """
    Raises:
        ValueError: not patches of this configuration.
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
            f"`hidden_states` must be a tensor of floating-point patches of shape (total_patches, {patch_dim}), as "
            f'`processor(images, return_tensors="pt")` makes them, got {kind_of(hidden_states)}.'
        )


def validate_grid_thw(grid_thw: Any, num_patches: int | None = None) -> tuple[tuple[int, int, int], ...]:
    """
    Checks `grid_thw` and returns its values: the only device-to-host copy of a forward, and none at all when it is on
    the CPU already.

    Raises:
        ValueError: not an integer tensor of shape `(num_images, 3)`, a size below 1, or not `num_patches` in all.
    """
    if not is_dense(grid_thw) or grid_thw.dtype not in INTEGER_DTYPES or grid_thw.ndim != 2 or grid_thw.shape[1] != 3:
        raise ValueError(
            "`grid_thw` must be a tensor of integers of shape (num_images, 3), one row (t, h, w) per image, as "
            f'`processor(images, return_tensors="pt")` makes it, got {kind_of(grid_thw)}.'
        )
    if grid_thw.is_meta:
        raise ValueError("`grid_thw` must hold sizes, got a tensor on the meta device.")
    if num_patches is not None and len(grid_thw) > num_patches:
        raise ValueError(
            f"`grid_thw` describes {len(grid_thw)} images of at least one patch, but `hidden_states` holds "
            f"{num_patches} patches."
        )
    grids = tuple(map(tuple, grid_thw.tolist()))
    if min(map(min, grids), default=1) < 1:
        image, sizes = next((image, sizes) for image, sizes in enumerate(grids) if min(sizes) < 1)
        raise ValueError(f"`grid_thw` must hold sizes of at least 1, got {sizes} for image {image}.")
    described = sum(t * h * w for t, h, w in grids)
    if num_patches is not None and described != num_patches:
        raise ValueError(f"`grid_thw` describes {described} patches, but `hidden_states` holds {num_patches}.")
    if described > torch.iinfo(torch.int32).max:
        raise ValueError(f"`grid_thw` must describe fewer than 2**31 patches, got {described}.")
    return grids


def validate_layout(layout: Any, num_patches: int, config: Aimv2PackingConfig) -> PackedLayout:
    """
    Raises:
        ValueError: not a `PackedLayout`, not of so many patches, or for a model with another `merge_temporal`.
    """
    if type(layout).__name__ == PackedLayout.__name__ and not isinstance(layout, PackedLayout):
        # transformers' loader makes a package of each file that it is asked for, so this file can be there twice.
        layout = PackedLayout(**vars(layout))
    if not isinstance(layout, PackedLayout):
        raise ValueError(f"`layout` must be a PackedLayout, what `packed_layout` returns, got {type(layout).__name__}.")
    if torch.compiler.is_compiling() or is_traced():
        # A guard on each length would compile anew for each mix.
        return layout
    layout = with_runs(layout, num_patches)
    runs = layout.runs or ()
    described = sum(segments * length for segments, length in runs)
    if described != num_patches:
        raise ValueError(f"`layout` describes {described} patches, but `hidden_states` holds {num_patches}.")
    num_segments = sum(segments for segments, _ in runs)
    if tuple(layout.cu_seqlens.shape) != (num_segments + 1,) or layout.cu_seqlens.dtype not in INTEGER_DTYPES:
        raise ValueError(
            f"`layout.cu_seqlens` must be of shape ({num_segments + 1},), one more than there are segments, and of "
            f"integers, got {kind_of(layout.cu_seqlens)}."
        )
    if layout.frame_sizes is not None and layout.grids is not None:
        expected = len(layout.grids) if config.merge_temporal else sum(frames for frames, _, _ in layout.grids)
        if num_segments != expected:
            raise ValueError(
                "`layout` must be computed with the model's configuration: with "
                f"`merge_temporal={config.merge_temporal}` there are {expected} segments, got {num_segments}."
            )
    longest = max((length for _, length in runs), default=0)
    validate_max_seqlen(layout.max_seqlen, longest)
    if not config.is_native and layout.num_grid_per_side not in (None, config.image_size // config.patch_size):
        side, own = layout.num_grid_per_side, config.image_size // config.patch_size
        raise ValueError(
            "`layout` must be computed with the model's configuration: it reads learned positions of a grid of "
            f"{side} x {side}, the model has {own} x {own}."
        )
    tensors = layout.tensors()
    validate_positions(tensors, num_patches)
    return replace(layout, max_seqlen=longest, **in_own_dtypes(tensors))


def in_own_dtypes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a layout by name, integers in the dtypes of its fields: few operations index by any other."""
    return {name: value.to(INDEX_DTYPES.get(name, value.dtype)) for name, value in tensors.items()}


def validate_max_seqlen(max_seqlen: Any, longest: int) -> None:
    try:
        bound = index(max_seqlen)
    except TypeError:
        raise ValueError(f"`max_seqlen` must be an int, got {max_seqlen!r}.") from None
    if bound < longest:
        raise ValueError(f"`max_seqlen` must be at least the longest segment, {longest} patches, got {max_seqlen}.")


def validate_positions(given: dict[str, Any], num_patches: int) -> None:
    for name, columns in (("position_ids", 2), ("interp_indices", 16), ("interp_weights", 16)):
        value, real = given.get(name), name == "interp_weights"
        if value is not None and (
            not is_dense(value)
            or tuple(value.shape) != (num_patches, columns)
            or not (value.is_floating_point() if real else value.dtype in INTEGER_DTYPES)
        ):
            raise ValueError(
                f"`{name}` must be a tensor of {'floating-point values' if real else 'integers'} of shape "
                f"({num_patches}, {columns}), one row per patch, got {kind_of(value)}."
            )


__all__ = ["PackedLayout", "packed_layout", "unpack_features", "with_positions"]
