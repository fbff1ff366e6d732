# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of an encoder: positions, norms, products, gate and up with what joins them, attention in segments."""

import math
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
        residual,
        output,
        patches,
        hidden_size: tl.constexpr,
        size: tl.constexpr,
        block_rows: tl.constexpr,
        block_columns: tl.constexpr,
        block_hidden: tl.constexpr,
        group: tl.constexpr,
        add_bias: tl.constexpr,
        add_residual: tl.constexpr,
    ):
        row_tiles, column_tiles = tl.cdiv(patches, block_rows), tl.cdiv(size, block_columns)
        for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=True):
            row, column = corner_of(tile, row_tiles, column_tiles, group)
            row, column = row * block_rows, column * block_columns
            # What is added to comes first, as in cuBLAS.
            if add_residual:
                total = residual.load([row, column]).to(tl.float32)
            else:
                total = tl.zeros([block_rows, block_columns], tl.float32)
            for hidden in range(0, hidden_size, block_hidden):
                total = tl.dot(hidden_states.load([row, hidden]), weight.load([column, hidden]).T, total)
            if add_bias:
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
    def weighted_positions_kernel(
        indices, weights, table, output, learned, taps: tl.constexpr, size: tl.constexpr, block: tl.constexpr
    ):
        patch = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, block)
        inside = at < size
        total = tl.zeros([block], tl.float32)
        for tap in tl.static_range(taps):
            index = tl.load(indices + patch * taps + tap)
            weight = tl.load(weights + patch * taps + tap)
            # NaN, not what lies outside the table.
            known = inside & (index >= 0) & (index < learned)
            total += weight * tl.load(table + index * size + at, mask=known, other=float("nan")).to(tl.float32)
        tl.store(output + patch * size + at, total.to(output.dtype.element_ty), mask=inside)

    @triton.jit
    def cubic_weight(distance):
        # Keys' kernel with a = -0.75.
        near = (1.25 * distance - 2.25) * distance * distance + 1
        far = ((-0.75 * distance + 3.75) * distance - 6) * distance + 3
        return tl.where(distance <= 1, near, far)

    @triton.jit
    def learned_positions_kernel(
        located, table, output, patches, side: tl.constexpr, size: tl.constexpr, block: tl.constexpr
    ):
        patch = tl.program_id(0)
        row = tl.load(located + 2 * patches + patch).to(tl.float32)
        column = tl.load(located + 3 * patches + patch).to(tl.float32)
        height = tl.load(located + 4 * patches + patch).to(tl.float32)
        width = tl.load(located + 5 * patches + patch).to(tl.float32)
        # Half-pixel centres, as in F.interpolate.
        y = tl.div_rn((row + 0.5) * side, height) - 0.5
        x = tl.div_rn((column + 0.5) * side, width) - 0.5
        top, left = tl.floor(y), tl.floor(x)
        at = tl.arange(0, block)
        inside = at < size
        total = tl.zeros([block], tl.float32)
        for i in tl.static_range(-1, 3):
            vertical = cubic_weight(tl.abs(y - top - i))
            line = tl.minimum(tl.maximum(top.to(tl.int32) + i, 0), side - 1) * side
            for j in tl.static_range(-1, 3):
                weight = vertical * cubic_weight(tl.abs(x - left - j))
                learned = line + tl.minimum(tl.maximum(left.to(tl.int32) + j, 0), side - 1)
                total += weight * tl.load(table + learned * size + at, mask=inside, other=0.0).to(tl.float32)
        output += patch.to(tl.int64) * size
        tl.store(output + at, total.to(output.dtype.element_ty), mask=inside)

    @triton.jit
    def attend_to_block(
        query,
        keys,
        values,
        stride,
        scale,
        first,
        end,
        maxima,
        sums,
        attended,
        masked: tl.constexpr,
        block: tl.constexpr,
        head_dim: tl.constexpr,
    ):
        rows = first + tl.arange(0, block)
        at = rows.to(tl.int64)[:, None] * stride + tl.arange(0, head_dim)[None, :]
        inside = rows < end
        # Zeros, not what follows the segment: a weight of 0 times a stranger's NaN would be NaN.
        if masked:
            key = tl.load(keys + at, mask=inside[:, None], other=0.0)
            value = tl.load(values + at, mask=inside[:, None], other=0.0)
        else:
            key = tl.load(keys + at)
            value = tl.load(values + at)
        scores = tl.dot(query, tl.trans(key))
        if masked:
            scores = tl.where(inside[None, :], scores, float("-inf"))
        larger = tl.maximum(maxima, tl.max(scores, 1) * scale)
        weights = tl.math.exp2(scores * scale - larger[:, None])
        shrink = tl.math.exp2(maxima - larger)
        attended = tl.dot(weights.to(value.dtype), value, attended * shrink[:, None])
        return larger, sums * shrink + tl.sum(weights, 1), attended

    @triton.jit
    def segment_attention_kernel(
        query,
        keys,
        values,
        output,
        starts,
        ends,
        scale,
        stride,
        patches,
        head_dim: tl.constexpr,
        block_rows: tl.constexpr,
        block_keys: tl.constexpr,
    ):
        head = tl.program_id(1)
        rows = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
        inside = rows < patches
        row_starts = tl.load(starts + rows, mask=inside, other=-1)
        row_ends = tl.load(ends + rows, mask=inside, other=0)
        dims = tl.arange(0, head_dim)
        at = rows.to(tl.int64)[:, None] * stride + head * head_dim + dims[None, :]
        queries = tl.load(query + at, mask=inside[:, None], other=0.0)
        keys += head * head_dim
        values += head * head_dim
        out = rows.to(tl.int64)[:, None] * (tl.num_programs(1) * head_dim) + head * head_dim + dims[None, :]
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
                    queries,
                    keys,
                    values,
                    stride,
                    scale,
                    block,
                    end,
                    maxima,
                    sums,
                    attended,
                    False,
                    block_keys,
                    head_dim,
                )
            if whole < end:
                maxima, sums, attended = attend_to_block(
                    queries, keys, values, stride, scale, whole, end, maxima, sums, attended, True, block_keys, head_dim
                )
            tl.store(output + out, (attended / sums[:, None]).to(queries.dtype), mask=own[:, None])
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
    patches, size = residual.shape
    block = triton.next_power_of_2(size)
    add_rms_norm_kernel[(patches,)](
        residual,
        residual if delta is None else delta,
        weight,
        out,
        eps,
        size,
        block,
        delta is not None,
        num_warps=max(1, min(8, block // 256)),
        enable_fp_fusion=True,
    )


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """
    `out = silu(gate) * up`, in float32 and rounded once.

    Args:
        gate_up (`torch.Tensor` of shape `(patches, 2 * size)`): `gate` left of `up`; contiguous.
        out (`torch.Tensor` of shape `(patches, size)`): Contiguous, of the same dtype of at most 32 bits.
    """
    patches, size = out.shape
    silu_mul_kernel[(patches, triton.cdiv(size, 1024))](gate_up, out, size, 1024, num_warps=4, enable_fp_fusion=True)


def tiles(tile: Tile, patches: int, size: int) -> int:
    return triton.cdiv(patches, tile.rows) * triton.cdiv(size, tile.columns)


def fastest_tile(times: dict[Tile, float], patches: int, size: int, processors: int) -> Tile:
    """By `times` of one tile. Tiles run in waves of one per multiprocessor."""
    return min(times, key=lambda tile: times[tile] * triton.cdiv(tiles(tile, patches, size), processors))


def processors_of(tensor: torch.Tensor) -> int:
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 1


def product(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> None:
    """
    `out = hidden_states @ weight.T + bias + residual` in half precision: sums in float32, over the hidden values in
    their order, and one rounding. Each row of `out` depends on its own rows only, bit for bit.

    Args:
        hidden_states (`torch.Tensor` of shape `(patches, hidden_size)`): Contiguous. `hidden_size` is a multiple of 8.
        weight (`torch.Tensor` of shape `(size, hidden_size)`): Contiguous.
        out (`torch.Tensor` of shape `(patches, size)`): Rows of a multiple of 8 values apart.
        bias (`torch.Tensor` of shape `(size,)`, *optional*): Contiguous.
        residual (`torch.Tensor` of shape `(patches, size)`, *optional*): May be `out`.
        tile (`Tile`, *optional*): By default the fastest one.
    """
    (patches, hidden_size), size, processors = hidden_states.shape, out.shape[1], processors_of(out)
    tile = tile or fastest_tile(PRODUCT_TILES, patches, size, processors)
    values = TensorDescriptor.from_tensor(out, [tile.rows, tile.columns])
    product_kernel[(min(tiles(tile, patches, size), processors),)](
        TensorDescriptor.from_tensor(hidden_states, [tile.rows, tile.hidden]),
        TensorDescriptor.from_tensor(weight, [tile.columns, tile.hidden]),
        weight if bias is None else bias,
        values if residual is None else TensorDescriptor.from_tensor(residual, [tile.rows, tile.columns]),
        values,
        patches,
        hidden_size,
        size,
        *tile[:4],
        bias is not None,
        residual is not None,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )


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
    (patches, hidden_size), size, processors = hidden_states.shape, out.shape[1], processors_of(out)
    tile = tile or fastest_tile(SWIGLU_TILES, patches, size, processors)
    swiglu_kernel[(min(tiles(tile, patches, size), processors),)](
        TensorDescriptor.from_tensor(hidden_states, [tile.rows, tile.hidden]),
        TensorDescriptor.from_tensor(gate_up_weight.view(2, size, hidden_size), [2, tile.columns, tile.hidden]),
        TensorDescriptor.from_tensor(out, [tile.rows, tile.columns]),
        patches,
        hidden_size,
        size,
        *tile[:4],
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )


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
    located = segments.new_empty(6 if has_frames else 2, patches)
    locate_patches_kernel[(triton.cdiv(patches, 128),)](
        segments, located, patches, has_frames, 128, num_warps=4, enable_fp_fusion=True
    )
    return located


def native_positions(rows: torch.Tensor, columns: torch.Tensor, frequencies: torch.Tensor, out: torch.Tensor) -> None:
    """
    Position embeddings: sine and cosine of each column, then of each row, times each frequency; in float64.

    Args:
        rows, columns (`torch.Tensor` of integers of shape `(patches,)`): Of the same stride.
        frequencies (`torch.Tensor`, float64 of shape `(count,)`): Contiguous.
        out (`torch.Tensor` of shape `(patches, 4 * count)`): Contiguous.
    """
    count = len(frequencies)
    native_positions_kernel[(len(out),)](
        rows,
        columns,
        rows.stride(0),
        frequencies,
        out,
        count,
        triton.next_power_of_2(count),
        num_warps=2,
        enable_fp_fusion=True,
    )


def learned_positions(located: torch.Tensor, table: torch.Tensor, out: torch.Tensor) -> None:
    """
    Position embeddings: `table` resampled to each frame by the bicubic interpolation of `F.interpolate`, without
    antialiasing; summed in float32 and rounded once.

    Args:
        located (`torch.Tensor`, int32 of shape `(6, patches)`): What `locate_patches` returns.
        table (`torch.Tensor` of shape `(side * side, size)`): The learned positions; contiguous.
        out (`torch.Tensor` of shape `(patches, size)`): Contiguous.
    """
    patches, size = out.shape
    learned_positions_kernel[(patches,)](
        located,
        table,
        out,
        patches,
        math.isqrt(len(table)),
        size,
        triton.next_power_of_2(size),
        num_warps=4,
        enable_fp_fusion=True,
    )


def weighted_positions(indices: torch.Tensor, weights: torch.Tensor, table: torch.Tensor, out: torch.Tensor) -> None:
    """
    Position embeddings: sums of learned ones, in float32 and rounded once; NaN where an index is not in the table.

    Args:
        indices, weights (`torch.Tensor`, int64 and float32 of shape `(patches, taps)`): Which, and how much of each;
            contiguous.
        table (`torch.Tensor` of shape `(learned, size)`): The learned positions; contiguous.
        out (`torch.Tensor` of shape `(patches, size)`): Contiguous.
    """
    patches, size = out.shape
    weighted_positions_kernel[(patches,)](
        indices,
        weights,
        table,
        out,
        len(table),
        indices.shape[1],
        size,
        triton.next_power_of_2(size),
        num_warps=4,
        enable_fp_fusion=True,
    )


def segment_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, located: torch.Tensor, out: torch.Tensor
) -> None:
    """
    Attention inside each segment, in half precision: scores and sums in float32, weights rounded before they meet the
    values, as in flash attention. No patch of another segment has a say, NaN or infinite as it may be.

    Args:
        query, key, value (`torch.Tensor` of shape `(patches, heads, head_dim)`): Parts of one tensor of shape
            `(patches, 3, heads, head_dim)`. `head_dim` is a power of two of at least 16.
        located (`torch.Tensor`, int32 of shape `(2 or 6, patches)`): What `locate_patches` returns.
        out (`torch.Tensor` of `query`'s shape): Contiguous.
    """
    patches, heads, head_dim = query.shape
    # exp2 is what the hardware has.
    scale = head_dim**-0.5 * math.log2(math.e)
    segment_attention_kernel[(triton.cdiv(patches, BLOCK_ROWS), heads)](
        query,
        key,
        value,
        out,
        located[0],
        located[1],
        scale,
        query.stride(0),
        patches,
        head_dim,
        BLOCK_ROWS,
        BLOCK_KEYS,
        num_warps=WARPS,
        num_stages=STAGES,
        enable_fp_fusion=True,
    )
