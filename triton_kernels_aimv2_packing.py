# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of an encoder: positions, norms, products, gate and up with what joins them, attention in segments."""

import logging
import math
from collections.abc import Sequence
from functools import cache, partial
from typing import NamedTuple

import torch


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    TensorDescriptor = None

logger = logging.getLogger(__name__)

# What older versions of Triton do by default, and newer ones warn of or do otherwise.
FUSED = {"enable_fp_fusion": True}

# Of attention; measured on an H100, docs/kernels.md.
BLOCK_ROWS, BLOCK_KEYS, WARPS, STAGES = 64, 64, 4, 3


class Tile(NamedTuple):
    """Rows, columns (of gate and of up) and hidden values of a tile; tiles of rows that share columns in the cache."""

    rows: int
    columns: int
    hidden: int
    group: int
    warps: int
    stages: int


# The time of a tile relative to the first; all write the same bits. Measured on an H100, docs/kernels.md.
SWIGLU_TILES = {Tile(128, 128, 64, 8, 8, 4): 1.0, Tile(64, 128, 64, 8, 4, 4): 0.53}
PRODUCT_TILES = {
    Tile(128, 128, 64, 8, 4, 4): 1.0,
    Tile(64, 128, 128, 8, 4, 3): 0.63,
    Tile(64, 64, 128, 8, 4, 4): 0.41,
    Tile(64, 32, 128, 8, 4, 5): 0.34,
}

if triton is not None:

    @triton.jit
    def add_rms_norm_kernel(
        residual, delta, weight, output, eps, size: tl.constexpr, block: tl.constexpr, add: tl.constexpr
    ):
        # 64 bits: a batch may hold more than 2**31 values.
        row = tl.program_id(0).to(tl.int64) * size
        columns = tl.arange(0, block)
        inside = columns < size
        values = tl.load(residual + row + columns, mask=inside, other=0.0)
        if add:
            added = tl.load(delta + row + columns, mask=inside, other=0.0).to(tl.float32)
            values = (values.to(tl.float32) + added).to(values.dtype)
            tl.store(residual + row + columns, values, mask=inside)
        wide = values.to(tl.float32)
        scale = tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
        weights = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(output + row + columns, (wide * scale * weights).to(values.dtype), mask=inside)

    @triton.jit
    def silu_mul_kernel(gate_up, output, size: tl.constexpr, block: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * block + tl.arange(0, block)
        inside = columns < size
        gate = tl.load(gate_up + row * 2 * size + columns, mask=inside, other=0.0)
        up = tl.load(gate_up + row * 2 * size + size + columns, mask=inside, other=0.0).to(tl.float32)
        wide = gate.to(tl.float32)
        tl.store(output + row * size + columns, (wide / (1 + tl.exp(-wide)) * up).to(gate.dtype), mask=inside)

    @triton.jit
    def corner_of(tile, row_tiles, column_tiles, group: tl.constexpr):
        # `group` tiles of rows share the columns' weights while those are in the L2 cache.
        first = tile // (group * column_tiles) * group
        height = tl.minimum(row_tiles - first, group)
        within = tile % (group * column_tiles)
        return first + within % height, within // height

    @triton.jit
    def product_kernel(
        hidden_states,
        weight,
        bias,
        output,
        patches,
        hidden_size: tl.constexpr,
        size: tl.constexpr,
        block_rows: tl.constexpr,
        block_columns: tl.constexpr,
        block_hidden: tl.constexpr,
        group: tl.constexpr,
        has_bias: tl.constexpr,
    ):
        row_tiles, column_tiles = tl.cdiv(patches, block_rows), tl.cdiv(size, block_columns)
        for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=True):
            row, column = corner_of(tile, row_tiles, column_tiles, group)
            row, column = row * block_rows, column * block_columns
            total = tl.zeros([block_rows, block_columns], tl.float32)
            for hidden in range(0, hidden_size, block_hidden):
                total = tl.dot(hidden_states.load([row, hidden]), weight.load([column, hidden]).T, total)
            if has_bias:
                columns = column + tl.arange(0, block_columns)
                total += tl.load(bias + columns, mask=columns < size, other=0.0).to(tl.float32)[None, :]
            output.store([row, column], total.to(output.dtype))

    @triton.jit
    def swiglu_kernel(
        hidden_states,
        gate_up_weight,
        output,
        patches,
        hidden_size: tl.constexpr,
        size: tl.constexpr,
        block_rows: tl.constexpr,
        block_columns: tl.constexpr,
        block_hidden: tl.constexpr,
        group: tl.constexpr,
    ):
        row_tiles, column_tiles = tl.cdiv(patches, block_rows), tl.cdiv(size, block_columns)
        # Flat, so that the next tile's first blocks are on their way while this one is finished.
        for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=True):
            row, column = corner_of(tile, row_tiles, column_tiles, group)
            row, column = row * block_rows, column * block_columns
            gate_up = tl.zeros([block_rows, 2 * block_columns], tl.float32)
            for hidden in range(0, hidden_size, block_hidden):
                block = hidden_states.load([row, hidden])
                weight = gate_up_weight.load([0, column, hidden]).reshape(2 * block_columns, block_hidden)
                gate_up = tl.dot(block, weight.T, gate_up)
            gate, up = gate_up.reshape(block_rows, 2, block_columns).permute(0, 2, 1).split()
            # sigmoid(gate) = root**2: the hardware has a fast inverse root, but no fast division.
            root = tl.rsqrt(1 + tl.math.exp2(gate * -1.4426950408889634))
            output.store([row, column], (gate * root * (up * root)).to(output.dtype))

    @triton.jit
    def locate_patches_kernel(segments, located, patches, has_frames: tl.constexpr, block: tl.constexpr):
        rows = tl.program_id(0) * block + tl.arange(0, block)
        count = tl.load(segments)
        cu_seqlens = segments + 1
        # The number of segments that begin at or before each row, by bisection.
        low = tl.zeros([block], tl.int32)
        high = tl.zeros([block], tl.int32) + count
        width = count
        while width > 0:
            middle = (low + high + 1) // 2
            before = tl.load(cu_seqlens + middle) <= rows
            low = tl.where(before, middle, low)
            high = tl.where(before, high, tl.maximum(middle - 1, low))
            width = width // 2
        inside = rows < patches
        own = low < count
        start = tl.load(cu_seqlens + low)
        # What follows the last segment is padding, a segment of its own.
        end = tl.load(cu_seqlens + low + 1, mask=own, other=2147483647)
        tl.store(located + rows, start, mask=inside)
        tl.store(located + patches + rows, tl.minimum(end, patches), mask=inside)
        if has_frames:
            frames = cu_seqlens + count + 1
            height = tl.load(frames + low, mask=own, other=1)
            width = tl.load(frames + count + low, mask=own, other=1)
            within = (rows - start) % (height * width)
            tl.store(located + 2 * patches + rows, within // width, mask=inside)
            tl.store(located + 3 * patches + rows, within % width, mask=inside)
            tl.store(located + 4 * patches + rows, height, mask=inside)
            tl.store(located + 5 * patches + rows, width, mask=inside)

    @triton.jit
    def native_positions_kernel(rows, columns, stride, frequencies, output, count: tl.constexpr, block: tl.constexpr):
        patch = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, block)
        inside = at < count
        frequency = tl.load(frequencies + at, mask=inside, other=0.0)
        across = tl.load(columns + patch * stride).to(tl.float64) * frequency
        down = tl.load(rows + patch * stride).to(tl.float64) * frequency
        output += patch * 4 * count + at
        # The model was trained with the column first. Through float32, as PyTorch converts.
        dtype = output.dtype.element_ty
        tl.store(output, tl.sin(across).to(tl.float32).to(dtype), mask=inside)
        tl.store(output + count, tl.cos(across).to(tl.float32).to(dtype), mask=inside)
        tl.store(output + 2 * count, tl.sin(down).to(tl.float32).to(dtype), mask=inside)
        tl.store(output + 3 * count, tl.cos(down).to(tl.float32).to(dtype), mask=inside)

    @triton.jit
    def cubic_weight(distance):
        # Keys' kernel with a = -0.75.
        near = (1.25 * distance - 2.25) * distance * distance + 1
        far = ((-0.75 * distance + 3.75) * distance - 6) * distance + 3
        return tl.where(distance <= 1, near, far)

    @triton.jit
    def learned_positions_kernel(
        located,
        indices,
        weights,
        table,
        output,
        patches,
        side: tl.constexpr,
        size: tl.constexpr,
        block: tl.constexpr,
        has_frames: tl.constexpr,
    ):
        patch = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, block)
        total = tl.zeros([block], tl.float32)
        if has_frames:
            row = tl.load(located + 2 * patches + patch).to(tl.float32)
            column = tl.load(located + 3 * patches + patch).to(tl.float32)
            # Half-pixel centres, as in F.interpolate.
            y = tl.div_rn((row + 0.5) * side, tl.load(located + 4 * patches + patch).to(tl.float32)) - 0.5
            x = tl.div_rn((column + 0.5) * side, tl.load(located + 5 * patches + patch).to(tl.float32)) - 0.5
            top, left = tl.floor(y), tl.floor(x)
        for tap in tl.static_range(16):
            if has_frames:
                i, j = tap // 4 - 1, tap % 4 - 1
                weight = cubic_weight(tl.abs(y - top - i)) * cubic_weight(tl.abs(x - left - j))
                line = tl.minimum(tl.maximum(top.to(tl.int32) + i, 0), side - 1) * side
                index = line + tl.minimum(tl.maximum(left.to(tl.int32) + j, 0), side - 1)
            else:
                weight = tl.load(weights + patch * 16 + tap)
                index = tl.load(indices + patch * 16 + tap)
            # NaN, not what lies outside the table.
            known = (at < size) & (index >= 0) & (index < side * side)
            total += weight * tl.load(table + index * size + at, mask=known, other=float("nan")).to(tl.float32)
        tl.store(output + patch * size + at, total.to(output.dtype.element_ty), mask=at < size)

    @triton.jit
    def attend_to_block(
        qkv,
        key_column,
        size: tl.constexpr,
        queries,
        scale,
        first,
        end,
        maxima,
        sums,
        attended,
        masked: tl.constexpr,
        block: tl.constexpr,
    ):
        key = qkv.load([first, key_column])
        scores = tl.dot(queries, key.T)
        value = qkv.load([first, key_column + size])
        if masked:
            inside = first + tl.arange(0, block) < end
            scores = tl.where(inside[None, :], scores, float("-inf"))
            # Zeros, not what follows the segment: a weight of 0 times a stranger's NaN would be NaN.
            value = tl.where(inside[:, None], value, 0.0)
        larger = tl.maximum(maxima, tl.max(scores, 1) * scale)
        weights = tl.math.exp2(scores * scale - larger[:, None])
        shrink = tl.math.exp2(maxima - larger)
        attended = tl.dot(weights.to(value.dtype), value, attended * shrink[:, None])
        return larger, sums * shrink + tl.sum(weights, 1), attended

    @triton.jit
    def segment_attention_kernel(
        qkv,
        query,
        output,
        located,
        scale,
        patches,
        size: tl.constexpr,
        head_dim: tl.constexpr,
        block_rows: tl.constexpr,
        block_keys: tl.constexpr,
    ):
        head = tl.program_id(1)
        rows = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
        inside = rows < patches
        row_starts = tl.load(located + rows, mask=inside, other=-1)
        row_ends = tl.load(located + patches + rows, mask=inside, other=0)
        at = rows.to(tl.int64)[:, None] * size + head * head_dim + tl.arange(0, head_dim)[None, :]
        out = output + at
        queries = tl.load(query + at + rows.to(tl.int64)[:, None] * 2 * size, mask=inside[:, None], other=0.0)
        key_column = size + head * head_dim
        first = tl.max(tl.where(rows == tl.program_id(0) * block_rows, row_starts, -1), 0)
        last = tl.max(row_ends, 0)
        # One segment after the other: the rows of others compute along, but nothing of theirs is kept.
        while first < last:
            own = row_starts == first
            end = tl.max(tl.where(own, row_ends, 0), 0)
            maxima = tl.zeros([block_rows], tl.float32) - float("inf")
            sums = tl.zeros([block_rows], tl.float32)
            attended = tl.zeros([block_rows, head_dim], tl.float32)
            whole = first + (end - first) // block_keys * block_keys
            for block in range(first, whole, block_keys):
                maxima, sums, attended = attend_to_block(
                    qkv, key_column, size, queries, scale, block, end, maxima, sums, attended, False, block_keys
                )
            if whole < end:
                maxima, sums, attended = attend_to_block(
                    qkv, key_column, size, queries, scale, whole, end, maxima, sums, attended, True, block_keys
                )
            tl.store(out, (attended / sums[:, None]).to(queries.dtype), mask=own[:, None])
            # Never backwards, whatever the bounds hold: a loop without end would hang the GPU.
            first = tl.maximum(end, first + 1)


def add_rms_norm(
    residual: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float, out: torch.Tensor
) -> None:
    """
    `residual += delta` in place, unless `delta` is `None`; then `out = residual / rms(residual) * weight`.

    Sums and norm are in float32, each result is rounded once: the sum as PyTorch's, the norm as `nn.RMSNorm`'s.

    Args:
        residual, delta, out (`torch.Tensor` of shape `(patches, size)`): Contiguous, of one dtype of at most 32 bits.
        weight (`torch.Tensor` of shape `(size,)`): Of the same dtype.
        eps (`float`): Added to the mean square.
    """
    (patches, size), added = residual.shape, residual if delta is None else delta
    block = triton.next_power_of_2(size)
    options = {"num_warps": max(1, min(8, block // 256)), **FUSED}
    add_rms_norm_kernel[(patches,)](residual, added, weight, out, eps, size, block, delta is not None, **options)


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """
    `out = silu(gate) * up`, in float32 and rounded once.

    Args:
        gate_up (`torch.Tensor` of shape `(patches, 2 * size)`): `gate` left of `up`; contiguous.
        out (`torch.Tensor` of shape `(patches, size)`): Contiguous, of the same dtype of at most 32 bits.
    """
    patches, size = out.shape
    silu_mul_kernel[(patches, triton.cdiv(size, 1024))](gate_up, out, size, 1024, num_warps=4, **FUSED)


def tiles_and_options(tile: Tile | None, times: dict[Tile, float], out: torch.Tensor) -> tuple[Tile, int, dict]:
    """The tile, by default the fastest of `times`; how many programs run at once; and how to compile them."""
    patches, size = out.shape
    processors = torch.cuda.get_device_properties(out.device).multi_processor_count if out.is_cuda else 1
    counts = {
        own: triton.cdiv(patches, own.rows) * triton.cdiv(size, own.columns)
        for own in times | ({} if tile is None else {tile: 1.0})
    }
    # Tiles run in waves of one per multiprocessor.
    tile = tile or min(times, key=lambda own: times[own] * triton.cdiv(counts[own], processors))
    return tile, min(counts[tile], processors), {"num_warps": tile.warps, "num_stages": tile.stages, **FUSED}


def product_in_order(
    states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, tile: Tile | None = None
) -> None:
    """
    `out = states @ weight.T + bias` in half precision: sums in float32, over the hidden values in their order,
    and one rounding. Each row of `out` depends on its own row of `states` only, bit for bit.

    Args:
        states (`torch.Tensor` of shape `(patches, hidden_size)`): Contiguous. `hidden_size` is a multiple of 8.
        weight (`torch.Tensor` of shape `(size, hidden_size)`): Contiguous.
        bias (`torch.Tensor` of shape `(size,)`, or `None`): Contiguous.
        out (`torch.Tensor` of shape `(patches, size)`): Rows of a multiple of 8 values apart.
        tile (`Tile`, *optional*): By default the fastest one.
    """
    tile, programs, options = tiles_and_options(tile, PRODUCT_TILES, out)
    rows = TensorDescriptor.from_tensor(states, [tile.rows, tile.hidden])
    weights = TensorDescriptor.from_tensor(weight, [tile.columns, tile.hidden])
    values = TensorDescriptor.from_tensor(out, [tile.rows, tile.columns])
    sizes, has_bias = (len(out), *weight.shape[::-1]), bias is not None
    added = bias if has_bias else weight
    product_kernel[(programs,)](rows, weights, added, values, *sizes, *tile[:4], has_bias, **options)


def blas_numerics() -> tuple:
    """The settings that say which of its kernels cuBLAS may take."""
    matmul = torch.backends.cuda.matmul
    return (
        *(matmul.fp32_precision, matmul.allow_fp16_accumulation, torch.backends.cuda.preferred_blas_library()),
        *(matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction),
    )


def multiply(
    states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, numerics: tuple | None
) -> None:
    """
    As `product_in_order`, by cuBLAS where that gives the same bits, or everywhere.

    Args:
        numerics (`tuple`, or `None`): What `blas_numerics` returns; `None` where bits do not matter.
    """
    if numerics is not None and not blas_keeps_order(states.shape, len(weight), bias is not None, out, numerics):
        product_in_order(states, weight, bias, out)
    elif bias is None:
        torch.mm(states, weight.t(), out=out)
    else:
        torch.addmm(bias, states, weight.t(), out=out)


def blas_keeps_order(
    shape: tuple[int, int], size: int, has_bias: bool, out: torch.Tensor, numerics: tuple, adds: bool = False
) -> bool:
    """
    Whether cuBLAS, set as `numerics` say, gives the bits of `product_in_order`, at every row; tried once for each kind.

    Args:
        shape (`tuple[int, int]`): Patches and hidden values.
        size (`int`): Columns.
        has_bias (`bool`): Whether there is a bias.
        out (`torch.Tensor`): What is written to, or one like it.
        adds (`bool`): Whether it is added to: the product is rounded, and then the sum.
    """
    return kind_keeps_order(*shape, size, has_bias, out.stride(0), out.dtype, out.device, adds, numerics)


@cache
def kind_keeps_order(patches, hidden_size, size, has_bias, stride, dtype, device, adds, numerics) -> bool:
    random = partial(torch.randn, generator=torch.Generator(device).manual_seed(0), dtype=dtype, device=device)
    with torch.inference_mode(False), torch.no_grad():
        states, weight = random(patches, hidden_size), random(size, hidden_size) * hidden_size**-0.5
        bias, before = random(size) if has_bias else None, random(patches, stride)[:, :size]
        ours, theirs = (torch.empty_strided(before.shape, (stride, 1), dtype=dtype, device=device) for _ in range(2))
        product_in_order(states, weight, bias, ours)
        if adds:
            return torch.equal(ours + before, theirs.copy_(before).addmm_(states, weight.t()))
        multiply(states, weight, bias, theirs, None)
        return torch.equal(ours, theirs)


@cache
def products_compile(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products can be Triton's: by a version of it that has tensor descriptors."""
    if TensorDescriptor is None:
        return False
    try:
        with torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
            rows = torch.ones(16, 64, dtype=dtype, device=device)
            for tile in SWIGLU_TILES:
                swiglu(rows, rows.new_ones(32, 64), out=rows.new_empty(16, 16), tile=tile)
            for tile in PRODUCT_TILES:
                product_in_order(rows, rows, None, rows.new_empty(16, 16), tile)
    except Exception as error:  # whatever a compiler raises
        logger.warning("Triton compiles no products here, which are cuBLAS's then: %s", error)
        return False
    return True


def swiglu(
    hidden_states: torch.Tensor, gate_up_weight: torch.Tensor, out: torch.Tensor, tile: Tile | None = None
) -> None:
    """
    `out = silu(hidden_states @ gate.T) * (hidden_states @ up.T)` in one kernel, in half precision: sums in float32, one
    rounding. Each row of `out` depends on its own row of `hidden_states` only, bit for bit.

    Args:
        hidden_states (`torch.Tensor` of shape `(patches, hidden_size)`): Contiguous. `hidden_size` is a multiple of 8.
        gate_up_weight (`torch.Tensor` of shape `(2 * size, hidden_size)`): `gate` above `up`; contiguous.
        out (`torch.Tensor` of shape `(patches, size)`): Contiguous. `size` is a multiple of 8.
        tile (`Tile`, *optional*): By default the faster one.
    """
    (patches, hidden_size), size = hidden_states.shape, out.shape[1]
    tile, programs, options = tiles_and_options(tile, SWIGLU_TILES, out)
    states = TensorDescriptor.from_tensor(hidden_states, [tile.rows, tile.hidden])
    pairs = gate_up_weight.view(2, size, hidden_size)
    weights = TensorDescriptor.from_tensor(pairs, [2, tile.columns, tile.hidden])
    values = TensorDescriptor.from_tensor(out, [tile.rows, tile.columns])
    swiglu_kernel[(programs,)](states, weights, values, patches, hidden_size, size, *tile[:4], **options)


def locate_patches(segments: torch.Tensor, patches: int, has_frames: bool) -> torch.Tensor:
    """
    Where each patch is, int32 of shape `(6, patches)`: the first patch of its segment and the patch after its last; and
    with frames its row and its column in its frame, the rows and the columns of that. Padding is a segment of its own.

    Args:
        segments (`torch.Tensor` of int32): The number of segments, `cu_seqlens`, then with frames the rows of the
            frames of each segment, and their columns.
        patches (`int`): Padding included, which is what follows the last segment.
        has_frames (`bool`): Whether the sizes of frames are there.
    """
    located, blocks = segments.new_empty(6, patches), triton.cdiv(patches, 128)
    locate_patches_kernel[(blocks,)](segments, located, patches, has_frames, 128, num_warps=4, **FUSED)
    return located


def native_positions(rows: torch.Tensor, columns: torch.Tensor, frequencies: torch.Tensor, out: torch.Tensor) -> None:
    """
    Position embeddings: sine and cosine of each column, then of each row, times each frequency; in float64.

    Args:
        rows, columns (`torch.Tensor` of integers of shape `(patches,)`): Of the same stride.
        frequencies (`torch.Tensor`, float64 of shape `(count,)`): Contiguous.
        out (`torch.Tensor` of shape `(patches, 4 * count)`): Contiguous.
    """
    sizes = (len(frequencies), triton.next_power_of_2(len(frequencies)))
    native_positions_kernel[(len(out),)](rows, columns, rows.stride(0), frequencies, out, *sizes, num_warps=2, **FUSED)


def learned_positions(
    located: torch.Tensor, given: Sequence[torch.Tensor], table: torch.Tensor, out: torch.Tensor
) -> None:
    """
    Position embeddings: sums of learned ones, in float32 and rounded once. Without `given`, those of the bicubic
    interpolation of `F.interpolate` to each frame, without antialiasing.

    Args:
        located (`torch.Tensor`, int32 of shape `(6, patches)`): What `locate_patches` returns.
        given (sequence of two `torch.Tensor`, int64 and float32 of shape `(patches, 16)`, or empty): Which learned
            positions, and how much of each; contiguous. One that is not in the table gives NaN.
        table (`torch.Tensor` of shape `(side * side, size)`): The learned positions; contiguous.
        out (`torch.Tensor` of shape `(patches, size)`): Contiguous.
    """
    patches, size = out.shape
    sizes = (patches, math.isqrt(len(table)), size, triton.next_power_of_2(size))
    indices, weights = given or (located, table)
    learned_positions_kernel[(patches,)](located, indices, weights, table, out, *sizes, not given, num_warps=4, **FUSED)


def segment_attention(qkv: torch.Tensor, located: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """
    Attention inside each segment, in half precision: scores and sums in float32, weights rounded before they meet the
    values, as in flash attention. No patch of another segment has a say, NaN or infinite as it may be.

    Args:
        qkv (`torch.Tensor` of shape `(patches, 3, heads, head_dim)`): Query, key and value; contiguous. `head_dim` is a
            power of two of at least 16.
        located (`torch.Tensor`, int32 of shape `(6, patches)`): What `locate_patches` returns.
        out (`torch.Tensor` of shape `(patches, heads, head_dim)`): Contiguous; what is returned.
    """
    patches, heads, head_dim = out.shape
    # exp2 is what the hardware has.
    scale, blocks = head_dim**-0.5 * math.log2(math.e), (triton.cdiv(patches, BLOCK_ROWS), heads)
    keys = TensorDescriptor.from_tensor(qkv.view(patches, -1), [BLOCK_KEYS, head_dim])
    sizes = (patches, heads * head_dim, head_dim, BLOCK_ROWS, BLOCK_KEYS)
    options = {"num_warps": WARPS, "num_stages": STAGES, **FUSED}
    segment_attention_kernel[blocks](keys, qkv, out, located, scale, *sizes, **options)
    return out
