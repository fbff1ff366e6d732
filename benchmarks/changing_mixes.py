# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
Batches that never repeat, on a GPU: how far a forward is above the median of its budget once all graphs are captured,
and the memory that graphs, buffers and merged weights take. Each forward is waited for.

    python benchmarks/changing_mixes.py
"""

import argparse
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import torch
from throughput import make_models, parse_args, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixes", type=int, default=500)
    parser.add_argument("--patches", type=int, nargs=2, default=[256, 4096], help="fewest and most of a batch")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    def mix() -> torch.Tensor:
        """Images of 1 to 32 patches a side, up to a number of patches of its own."""
        patches, rows = number(*options.patches), []
        while patches:
            height = min(number(1, 32), patches)
            width = min(number(1, 32), patches // height)
            rows.append((1, height, width))
            patches -= height * width
        return torch.tensor(rows)

    with torch.inference_mode():
        _, packed, _, _ = make_models(parse_args(["--device", "cuda", "--layers", "24"]), torch.bfloat16)
        package = type(packed).__module__.rpartition(".")[0]
        engine = sys.modules[f"{package}.cuda_inference_aimv2_packing"]
        mixes = [mix() for _ in range(options.mixes)]
        patches = torch.randn(options.patches[1], 588, device="cuda", dtype=torch.bfloat16)

        def forward(grid_thw: torch.Tensor) -> None:
            packed(patches[: int(grid_thw.prod(1).sum())], grid_thw)

        before = torch.cuda.memory_allocated()
        sizes = [engine.padded_size(int(grid_thw.prod(1).sum())) for grid_thw in mixes]
        for size in sorted(set(sizes)):
            engine.capture(packed, [size])
        for grid_thw in mixes[:20]:
            forward(grid_thw)
        after = torch.cuda.memory_allocated()
        times: dict[int, list[float]] = defaultdict(list)
        for size, grid_thw in zip(sizes, mixes, strict=True):
            times[size].append(seconds(lambda grid_thw=grid_thw: forward(grid_thw), "cuda"))
        grown = torch.cuda.memory_allocated() - after
    above = [time / statistics.median(own) for own in times.values() for time in own]
    result = {
        "device": torch.cuda.get_device_name(),
        "path": packed.path,
        "budgets": len(times),
        "mib": (after - before) / 2**20,
        "mib_grown": grown / 2**20,
        "largest_over_median": max(above),
        "over_twice_the_median": sum(ratio > 2 for ratio in above),
        "seconds": {size: statistics.median(own) for size, own in sorted(times.items())},
    }
    print({name: value for name, value in result.items() if name != "seconds"})
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
