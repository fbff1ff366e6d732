# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
silu(x @ gate.T) * (x @ up.T) on a Hopper GPU: one kernel, in several shapes, against cuBLAS and a kernel after it.

    python benchmarks/swiglu.py --output swiglu.json
    python benchmarks/swiglu.py --geometries large --patches 2048 16384 --candidates tile_128x128 warps_128x128
    python benchmarks/swiglu.py --compile    # no GPU needed: registers, spills and shared memory of each candidate

Each candidate is 20 calls in a CUDA graph, over four weights in turn, so that a small batch does not find its weights
in the cache; repetitions interleaved, medians. Errors are ‖x - exact‖ / ‖exact‖ against float64.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from throughput import GEOMETRIES
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from triton_kernels_aimv2_packing import silu_mul, swiglu


CALLS, WEIGHTS = 20, 4
MULTIPROCESSORS = 132
# Of one block of threads on Hopper.
SHARED_MEMORY = 227 * 1024


@triton.jit
def place(tile, row_tiles, column_tiles, group: tl.constexpr):
    first = tile // (group * column_tiles) * group
    height = tl.minimum(row_tiles - first, group)
    inside = tile % (group * column_tiles)
    return first + inside % height, inside // height


@triton.jit
def activate(gate, up, epilogue: tl.constexpr):
    if epilogue == "divide":
        return gate / (1 + tl.exp(-gate)) * up
    elif epilogue == "root":
        root = tl.rsqrt(1 + tl.math.exp2(gate * -1.4426950408889634))
        return gate * root * (up * root)
    else:
        # One root for two neighbours: 1 / a = b / (a * b). Bounded, so that the product is finite.
        sums = 1 + tl.math.exp2(tl.minimum(gate * -1.4426950408889634, 60.0))
        left, right = sums.reshape(gate.shape[0], gate.shape[1] // 2, 2).split()
        root = tl.rsqrt(left * right)
        square = root * root
        sigmoid = tl.join(right * square, left * square).reshape(gate.shape[0], gate.shape[1])
        return gate * sigmoid * up


@triton.jit
def tile_kernel(
    x,
    weight,
    output,
    patches,
    hidden_size: tl.constexpr,
    size: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    depth: tl.constexpr,
    group: tl.constexpr,
    flat: tl.constexpr,
    epilogue: tl.constexpr,
):
    """Gate and up in one block of weights: one wgmma of 2 * columns."""
    row_tiles, column_tiles = tl.cdiv(patches, rows), tl.cdiv(size, columns)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=flat):
        row, column = place(tile, row_tiles, column_tiles, group)
        gate_up = tl.zeros([rows, 2 * columns], tl.float32)
        for hidden in range(0, hidden_size, depth):
            block = x.load([row * rows, hidden])
            both = weight.load([0, column * columns, hidden]).reshape(2 * columns, depth)
            gate_up = tl.dot(block, both.T, gate_up)
        gate, up = gate_up.reshape(rows, 2, columns).permute(0, 2, 1).split()
        output.store([row * rows, column * columns], activate(gate, up, epilogue).to(output.dtype))


@triton.jit
def dots_kernel(
    x,
    weight,
    output,
    patches,
    hidden_size: tl.constexpr,
    size: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    depth: tl.constexpr,
    group: tl.constexpr,
    flat: tl.constexpr,
    epilogue: tl.constexpr,
    special: tl.constexpr,
):
    """Two accumulators: what `warp_specialize` can split."""
    row_tiles, column_tiles = tl.cdiv(patches, rows), tl.cdiv(size, columns)
    for tile in tl.range(
        tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=flat, warp_specialize=special
    ):
        row, column = place(tile, row_tiles, column_tiles, group)
        gate = tl.zeros([rows, columns], tl.float32)
        up = tl.zeros([rows, columns], tl.float32)
        for hidden in range(0, hidden_size, depth):
            block = x.load([row * rows, hidden])
            gate_weight = weight.load([column * columns, hidden])
            up_weight = weight.load([size + column * columns, hidden])
            gate = tl.dot(block, gate_weight.T, gate)
            up = tl.dot(block, up_weight.T, up)
        at_rows = row * rows + tl.arange(0, rows)
        at_columns = column * columns + tl.arange(0, columns)
        at = at_rows.to(tl.int64)[:, None] * size + at_columns[None, :]
        inside = (at_rows < patches)[:, None] & (at_columns < size)[None, :]
        tl.store(output + at, activate(gate, up, epilogue).to(x.dtype), mask=inside)


@triton.jit
def pointers_kernel(
    x,
    weight,
    output,
    patches,
    hidden_size: tl.constexpr,
    size: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    depth: tl.constexpr,
    group: tl.constexpr,
    flat: tl.constexpr,
    epilogue: tl.constexpr,
):
    """No descriptors. `hidden_size` is a multiple of `depth`."""
    row_tiles, column_tiles = tl.cdiv(patches, rows), tl.cdiv(size, columns)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=flat):
        row, column = place(tile, row_tiles, column_tiles, group)
        at_rows = row * rows + tl.arange(0, rows)
        both = tl.arange(0, 2 * columns)
        at_both = tl.minimum(column * columns + both % columns, size - 1) + both // columns * size
        deep = tl.arange(0, depth)
        blocks = x + tl.minimum(at_rows, patches - 1).to(tl.int64)[:, None] * hidden_size + deep[None, :]
        weights = weight + at_both[:, None] * hidden_size + deep[None, :]
        gate_up = tl.zeros([rows, 2 * columns], tl.float32)
        for _ in range(0, hidden_size, depth):
            gate_up = tl.dot(tl.load(blocks), tl.load(weights).T, gate_up)
            blocks += depth
            weights += depth
        gate, up = gate_up.reshape(rows, 2, columns).permute(0, 2, 1).split()
        at_columns = column * columns + tl.arange(0, columns)
        at = at_rows.to(tl.int64)[:, None] * size + at_columns[None, :]
        inside = (at_rows < patches)[:, None] & (at_columns < size)[None, :]
        tl.store(output + at, activate(gate, up, epilogue).to(output.dtype.element_ty), mask=inside)


@gluon.jit
def produce(
    x,
    weight,
    x_blocks,
    weight_blocks,
    full,
    empty,
    row_tiles,
    column_tiles,
    hidden_size: gl.constexpr,
    columns: gl.constexpr,
    depth: gl.constexpr,
    stages: gl.constexpr,
    group: gl.constexpr,
):
    step = 0
    for tile in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        row, column = place(tile, row_tiles, column_tiles, group)
        for hidden in range(0, hidden_size, depth):
            stage = step % stages
            # A new barrier passes for the phase before its first.
            mbarrier.wait(empty.index(stage), (step // stages & 1) ^ 1)
            ready = full.index(stage)
            mbarrier.expect(ready, (128 + 2 * columns) * depth * 2)
            tma.async_copy_global_to_shared(x, [row * 128, hidden], ready, x_blocks.index(2 * stage))
            tma.async_copy_global_to_shared(x, [row * 128 + 64, hidden], ready, x_blocks.index(2 * stage + 1))
            tma.async_copy_global_to_shared(weight, [0, column * columns, hidden], ready, weight_blocks.index(stage))
            step += 1


@gluon.jit
def consume(
    half: gl.constexpr,
    output,
    x_blocks,
    weight_blocks,
    out_blocks,
    full,
    empty,
    row_tiles,
    column_tiles,
    hidden_size: gl.constexpr,
    columns: gl.constexpr,
    depth: gl.constexpr,
    stages: gl.constexpr,
    group: gl.constexpr,
):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * columns, 16])
    steps: gl.constexpr = (hidden_size + depth - 1) // depth
    step = 0
    staged = out_blocks.index(half)
    for tile in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        row, column = place(tile, row_tiles, column_tiles, group)
        gate_up = gl.zeros([64, 2 * columns], gl.float32, layout)
        for index in range(steps):
            stage = step % stages
            mbarrier.wait(full.index(stage), step // stages & 1)
            both = weight_blocks.index(stage).reshape([2 * columns, depth]).permute((1, 0))
            gate_up = warpgroup_mma(x_blocks.index(2 * stage + half), both, gate_up, use_acc=index > 0, is_async=True)
            gate_up = warpgroup_mma_wait(1, deps=(gate_up,))
            # Now the block before has been read.
            mbarrier.arrive(empty.index((step + stages - 1) % stages), count=1, pred=index > 0)
            step += 1
        gate_up = warpgroup_mma_wait(0, deps=(gate_up,))
        mbarrier.arrive(empty.index((step + stages - 1) % stages), count=1)
        gate, up = gl.split(gl.permute(gl.reshape(gate_up, [64, 2, columns]), (0, 2, 1)))
        root = gl.rsqrt(1 + gl.exp2(gate * -1.4426950408889634))
        tma.store_wait(0)
        staged.store((gate * root * (up * root)).to(output.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(output, [row * 128 + half * 64, column * columns], staged)
    tma.store_wait(0)


@gluon.jit
def warps_kernel(
    x,
    weight,
    output,
    patches,
    hidden_size: gl.constexpr,
    size: gl.constexpr,
    columns: gl.constexpr,
    depth: gl.constexpr,
    stages: gl.constexpr,
    group: gl.constexpr,
    registers: gl.constexpr,
):
    """One warp loads, two groups of four multiply 64 rows each: while one finishes its tile, the other multiplies."""
    x_blocks = gl.allocate_shared_memory(x.dtype, [2 * stages, 64, depth], x.layout)
    weight_blocks = gl.allocate_shared_memory(x.dtype, [stages, 2, columns, depth], weight.layout)
    out_blocks = gl.allocate_shared_memory(x.dtype, [2, 64, columns], output.layout)
    full = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(stages):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    row_tiles = (patches + 127) // 128
    column_tiles = (size + columns - 1) // columns
    gl.warp_specialize(
        [
            (
                consume,
                (
                    gl.constexpr(0),
                    output,
                    x_blocks,
                    weight_blocks,
                    out_blocks,
                    full,
                    empty,
                    row_tiles,
                    column_tiles,
                    hidden_size,
                    columns,
                    depth,
                    stages,
                    group,
                ),
            ),
            (
                consume,
                (
                    gl.constexpr(1),
                    output,
                    x_blocks,
                    weight_blocks,
                    out_blocks,
                    full,
                    empty,
                    row_tiles,
                    column_tiles,
                    hidden_size,
                    columns,
                    depth,
                    stages,
                    group,
                ),
            ),
            (
                produce,
                (
                    x,
                    weight,
                    x_blocks,
                    weight_blocks,
                    full,
                    empty,
                    row_tiles,
                    column_tiles,
                    hidden_size,
                    columns,
                    depth,
                    stages,
                    group,
                ),
            ),
        ],
        [4, 1],
        [registers, 24],
    )


@dataclass(frozen=True)
class Candidate:
    """
    Attributes:
        kernel (`str`): `tile`, `dots`, `pointers` or `warps`.
        blocks (`int`): Blocks of threads per multiprocessor, each over many tiles; 0 for a block for each tile.
        least, most (`int`): Numbers of patches that it is measured for.
    """

    kernel: str = "tile"
    rows: int = 128
    columns: int = 128
    depth: int = 64
    stages: int = 4
    warps: int = 8
    group: int = 8
    blocks: int = 1
    flat: bool = True
    epilogue: str = "root"
    special: bool = False
    registers: int = 232
    least: int = 0
    most: int = 1 << 30

    def constants(self) -> dict[str, Any]:
        if self.kernel == "warps":
            names = ["columns", "depth", "stages", "group", "registers"]
        else:
            names = ["rows", "columns", "depth", "group", "flat", "epilogue"]
            names += ["special"] if self.kernel == "dots" else []
        return {name: getattr(self, name) for name in names}

    def options(self) -> dict[str, int]:
        if self.kernel == "warps":
            return {"num_warps": 4}
        return {"num_warps": self.warps, "num_stages": self.stages}

    def programs(self, patches: int, size: int) -> int:
        tiles = triton.cdiv(patches, self.rows) * triton.cdiv(size, self.columns)
        return min(tiles, self.blocks * MULTIPROCESSORS) if self.blocks else tiles

    def arguments(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> tuple:
        rows, columns, depth, size = self.rows, self.columns, self.depth, out.shape[1]
        halves = weight.view(2, size, -1)
        if self.kernel == "tile":
            return (
                TensorDescriptor.from_tensor(x, [rows, depth]),
                TensorDescriptor.from_tensor(halves, [2, columns, depth]),
                TensorDescriptor.from_tensor(out, [rows, columns]),
            )
        if self.kernel == "dots":
            return (
                TensorDescriptor.from_tensor(x, [rows, depth]),
                TensorDescriptor.from_tensor(weight, [columns, depth]),
                out,
            )
        if self.kernel == "pointers":
            return x, weight, out
        flat, deep = (gl.NVMMASharedLayout(128, 16, rank=rank) for rank in (2, 3))
        return (
            GluonDescriptor.from_tensor(x, [64, depth], flat),
            GluonDescriptor.from_tensor(halves, [2, columns, depth], deep),
            GluonDescriptor.from_tensor(out, [64, columns], flat),
        )

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        patches, hidden_size, size = len(x), x.shape[1], out.shape[1]
        KERNELS[self.kernel][(self.programs(patches, size),)](
            *self.arguments(x, weight, out), patches, hidden_size, size, **self.constants(), **self.options()
        )

    def signature(self, dtype: str) -> dict[str, str]:
        rows, columns, depth = self.rows, self.columns, self.depth
        if self.kernel == "pointers":
            return {"x": f"*{dtype}", "weight": f"*{dtype}", "output": f"*{dtype}"}
        if self.kernel == "warps":
            flat, deep = (repr(gl.NVMMASharedLayout(128, 16, rank=rank)) for rank in (2, 3))
            return {
                "x": f"tensordesc<{dtype}[64, {depth}],{flat}>",
                "weight": f"tensordesc<{dtype}[2, {columns}, {depth}],{deep}>",
                "output": f"tensordesc<{dtype}[64, {columns}],{flat}>",
            }
        dots = self.kernel == "dots"
        return {
            "x": f"tensordesc<{dtype}[{rows}, {depth}]>",
            "weight": f"tensordesc<{dtype}[{'' if dots else '2, '}{columns}, {depth}]>",
            "output": f"*{dtype}" if dots else f"tensordesc<{dtype}[{rows}, {columns}]>",
        }


KERNELS = {"tile": tile_kernel, "dots": dots_kernel, "pointers": pointers_kernel, "warps": warps_kernel}
CANDIDATES = {
    "tile_128x128": Candidate(),
    "tile_128x128_each": Candidate(blocks=0),
    "tile_128x128_not_flat": Candidate(flat=False),
    "tile_128x128_divide": Candidate(epilogue="divide", least=16384),
    "tile_128x128_pairs": Candidate(epilogue="pairs", least=2048),
    "tile_128x128_three": Candidate(stages=3, least=2048),
    "tile_128x128_group16": Candidate(group=16, least=16384),
    "tile_256x64": Candidate(rows=256, columns=64, least=2048),
    # Two blocks of threads fit: while one finishes its tile, the other multiplies.
    "tile_128x64_two": Candidate(columns=64, stages=3, warps=4, blocks=2),
    "tile_128x64_each": Candidate(columns=64, stages=3, warps=4, blocks=0),
    "tile_128x64_wide": Candidate(columns=64, warps=8, blocks=1, most=2048),
    "tile_64x128": Candidate(rows=64, warps=4, blocks=1, most=2048),
    "tile_64x64_each": Candidate(rows=64, columns=64, stages=4, warps=4, blocks=0, most=2048),
    "dots_128x128": Candidate("dots", flat=False, least=2048),
    "dots_128x128_special": Candidate("dots", stages=3, warps=4, flat=False, special=True, least=2048),
    "pointers_128x128": Candidate("pointers", stages=3, flat=False, blocks=0, least=2048),
    "warps_128x128": Candidate("warps"),
    "warps_128x128_group16": Candidate("warps", group=16, least=8192),
    "warps_128x64": Candidate("warps", columns=64, stages=6, registers=168),
}


def compile_only(name: str, candidate: Candidate, geometry: str, dtype: str) -> None:
    """Prints what ptxas says of one candidate."""
    signature = {**candidate.signature(dtype), "patches": "i32"}
    hidden_size, size, _ = GEOMETRIES[geometry]
    constants = {"hidden_size": hidden_size, "size": size, **candidate.constants()}
    aligned = [(place,) for place, kind in enumerate(signature.values()) if kind[0] == "*" or kind == "i32"]
    signature |= dict.fromkeys(constants, "constexpr")
    source = GluonASTSource if candidate.kernel == "warps" else ASTSource
    attributes = {place: [["tt.divisibility", 16]] for place in aligned}
    source = source(KERNELS[candidate.kernel], signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=candidate.options())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(compiled.asm["ptx"])
        command = [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", path, "-o", path.with_suffix(".cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    numbers = {
        "registers": r"Used (\d+) registers",
        "spilled bytes": r"(\d+) bytes spill stores",
    }
    found = {what: re.findall(pattern, said)[0] for what, pattern in numbers.items()}
    products = sorted(set(re.findall(r"wgmma\.mma_async\S*(m\d+n\d+k\d+)", compiled.asm["ptx"])))
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    complaint = " TOO MUCH SHARED MEMORY" if shared > SHARED_MEMORY else ""
    complaint += " SERIALIZED" if "serialized" in said else ""
    print(f"{name:24} {found}, shared {shared}, warps {warps}, {'/'.join(products)}{complaint}")


Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


def graph_of(run: Run, x: torch.Tensor, weights: list[torch.Tensor], out: torch.Tensor) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in range(CALLS):
            run(x, weights[call % WEIGHTS], out)
    return graph


def microseconds(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / CALLS


class Shape:
    """Tensors of one shape, and what the exact values of the first and last 1024 rows are."""

    def __init__(self, patches: int, hidden_size: int, size: int, dtype: torch.dtype):
        generator = torch.Generator("cuda").manual_seed(0)
        options: dict[str, Any] = {"generator": generator, "device": "cuda", "dtype": torch.float32}
        self.x = torch.randn(patches, hidden_size, **options).to(dtype)
        self.weights = [
            (torch.randn(2 * size, hidden_size, **options) * hidden_size**-0.5).to(dtype) for _ in range(WEIGHTS)
        ]
        self.wide = self.x.new_empty(patches, 2 * size)
        self.out = self.x.new_empty(patches, size)
        gate, up = (self.ends(self.x).double() @ self.weights[0].double().T).chunk(2, dim=1)
        self.exact = torch.nn.functional.silu(gate) * up

    def ends(self, rows: torch.Tensor) -> torch.Tensor:
        return rows if len(rows) <= 2048 else torch.cat([rows[:1024], rows[-1024:]])

    def error(self, run: Run) -> float:
        self.out.fill_(float("nan"))
        run(self.x, self.weights[0], self.out)
        if not self.out.isfinite().all():
            return float("nan")
        return ((self.ends(self.out) - self.exact).norm() / self.exact.norm()).item()

    def product(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        torch.mm(x, weight.t(), out=self.wide)

    def product_and_gate(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        torch.mm(x, weight.t(), out=self.wide)
        silu_mul(self.wide, out)


def measure(geometry: str, patches: int, runs: dict[str, Run], dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    hidden_size, size, _ = GEOMETRIES[geometry]
    shape = Shape(patches, hidden_size, size, dtype)
    limit = shape.error(shape.product_and_gate)
    all_runs: dict[str, Run] = {"cublas": shape.product, "cublas + silu_mul": shape.product_and_gate, **runs}
    errors, graphs = {"cublas + silu_mul": limit}, {}
    # Names of candidates by what they wrote: whether a row's bits depend on the shape of a tile.
    bits: dict[tuple, list[str]] = {}
    for name, run in all_runs.items():
        try:
            if name in runs:
                errors[name] = shape.error(run)
                if not errors[name] < limit:
                    print(f"  {name} is wrong: error {errors[name]:.5f}, that of the two kernels {limit:.5f}")
                    continue
                bits.setdefault(tuple(shape.ends(shape.out).view(torch.int16).double().sum(0).tolist()), []).append(
                    name
                )
            graphs[name] = graph_of(run, shape.x, shape.weights, shape.out)
        except Exception as error:  # whatever a compiler raises
            print(f"  {name} does not run: {type(error).__name__}: {' '.join(str(error).split())[-200:]}")
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for repeat in range(repeats + 1):
        for name, graph in graphs.items():
            elapsed = microseconds(graph)
            if repeat:
                times[name].append(elapsed)
    medians = {name: statistics.median(measured) for name, measured in times.items()}
    fused = sorted((medians[name], name) for name in runs if name in medians)
    base, floor = medians["cublas + silu_mul"], medians["cublas"]
    best = f"{fused[0][1]} {fused[0][0]:.1f} ({base / fused[0][0]:.2f}x)" if fused else "none runs"
    everyone = ", ".join(f"{name} {time:.1f}" for time, name in fused)
    product = f"two kernels {base:.1f} us, product alone {floor:.1f}"
    print(f"{geometry} {patches}: {product}; best {best} | {everyone}", flush=True)
    return {
        "geometry": geometry,
        "patches": patches,
        "microseconds": medians,
        "errors": errors,
        "bit-equal": list(bits.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometries", nargs="+", choices=GEOMETRIES, default=["large", "3B"])
    parser.add_argument("--patches", nargs="+", type=int, help="instead of 256 to 65536, and 2048 and 16384 of 3B")
    parser.add_argument("--candidates", nargs="+", choices=[*CANDIDATES, "swiglu"], help="all but those left out")
    parser.add_argument("--without", nargs="+", default=[], help="beginnings of names of candidates to leave out")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="compile for Hopper, measure nothing")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    left_out = tuple(args.without)
    chosen = {
        name: candidate
        for name, candidate in CANDIDATES.items()
        if (args.candidates is None or name in args.candidates) and not (left_out and name.startswith(left_out))
    }
    if args.compile:
        for geometry in args.geometries:
            print(geometry)
            for name, candidate in chosen.items():
                try:
                    compile_only(name, candidate, geometry, "bf16" if args.dtype == "bfloat16" else "fp16")
                except Exception as error:  # whatever a compiler raises
                    print(f"{name:24} {type(error).__name__}: {' '.join(str(error).split())[-200:]}")
        return
    start, results = time.perf_counter(), []
    print(torch.cuda.get_device_name(), torch.__version__, triton.__version__)
    for geometry in args.geometries:
        default = [256, 512, 1024, 2048, 4096, 8192, 16384, 65536] if geometry == "large" else [2048, 16384]
        for patches in args.patches or default:
            runs: dict[str, Run] = {
                name: candidate
                for name, candidate in chosen.items()
                if candidate.least <= patches <= candidate.most or args.candidates is not None
            }
            if args.candidates is None or "swiglu" in args.candidates:
                runs["swiglu"] = swiglu
            results.append(measure(geometry, patches, runs, getattr(torch, args.dtype), args.repeats))
            if args.output is not None:
                args.output.write_text(json.dumps(results, indent=1))
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
