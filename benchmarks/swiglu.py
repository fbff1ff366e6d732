# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
silu(x @ gate.T) * (x @ up.T) on a Hopper GPU: one kernel, with either of its tiles, against cuBLAS and one after it.

    python benchmarks/swiglu.py

Each candidate is 20 calls in a CUDA graph, over four weights in turn, so that a small batch does not find its weights
in the cache; repetitions interleaved, medians. Errors are ‖x - exact‖ / ‖exact‖ against float64.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import captured
from workloads import GEOMETRIES

from conversion.local_code import hub_module


kernels = hub_module("triton_kernels")
CALLS, WEIGHTS = 20, 4
TILES = dict(zip(("tall tile", "low tile"), kernels.SWIGLU_TILES, strict=True))

Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


def graph_of(run: Run, x: torch.Tensor, weights: list[torch.Tensor], out: torch.Tensor) -> torch.cuda.CUDAGraph:
    def calls() -> None:
        for call in range(CALLS):
            run(x, weights[call % WEIGHTS], out)

    return captured(calls)


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
        return ((self.ends(self.out) - self.exact).norm() / self.exact.norm()).item()

    def product(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        torch.mm(x, weight.t(), out=self.wide)

    def product_and_gate(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        torch.mm(x, weight.t(), out=self.wide)
        kernels.silu_mul(self.wide, out)


def measure(geometry: str, patches: int, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    hidden_size, size, _ = GEOMETRIES[geometry]
    shape = Shape(patches, hidden_size, size, dtype)
    gated: dict[str, Run] = {
        "two kernels": shape.product_and_gate,
        **{name: partial(kernels.swiglu, tile=tile) for name, tile in TILES.items()},
    }
    errors = {name: shape.error(run) for name, run in gated.items()}
    graphs = {
        name: graph_of(run, shape.x, shape.weights, shape.out)
        for name, run in {"product alone": shape.product, **gated}.items()
    }
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for repeat in range(repeats + 1):
        for name, graph in graphs.items():
            elapsed = microseconds(graph)
            if repeat:
                times[name].append(elapsed)
    medians = {name: statistics.median(measured) for name, measured in times.items()}
    print(f"{geometry} {patches}: " + ", ".join(f"{name} {time:.1f} us" for name, time in medians.items()), flush=True)
    return {"geometry": geometry, "patches": patches, "microseconds": medians, "errors": errors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="large")
    parser.add_argument("--patches", nargs="+", type=int, default=[256, 512, 1024, 2048, 4096, 16384])
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), torch.__version__, kernels.triton.__version__)
    dtype = getattr(torch, args.dtype)
    results = [measure(args.geometry, patches, dtype, args.repeats) for patches in args.patches]
    if args.output is not None:
        args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
