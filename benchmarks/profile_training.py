# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
Whether a training step of the packed model waits for the host:

    python benchmarks/profile_training.py --device cuda
    python benchmarks/profile_training.py --geometry large --layers 2 --patches 512 --repeats 2

Per mix of images and way, a line of JSON, milliseconds being medians of runs that took turns:

- step_ms: a whole step; returned_ms: until its call returns, which a full queue of kernels delays
- host_ms: a step on the same images with sides of an eighth, which leave a GPU idle: what the host takes
- kernels_ms, kernels: the sum of the kernels' times, and how many there are; null and 0 without a GPU
- operators: how many the host runs; and those with the most time of their own there, as [milliseconds, calls], under
  the profiler, which slows them
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from typing import Any

import torch
from throughput import settings
from timing import seconds, synchronize
from torch.profiler import ProfilerActivity, profile
from training import WAYS, Step, packed_models, packed_step
from workloads import GEOMETRIES, Grid, fill, make_models, mixes


ROWS = 10


def returned_and_step(run: Step, device: str) -> tuple[float, float]:
    """Milliseconds until the call returns, and until the device is done."""
    synchronize(device)
    start = time.perf_counter()
    run()
    returned = time.perf_counter()
    synchronize(device)
    return 1e3 * (returned - start), 1e3 * (time.perf_counter() - start)


def profiled(run: Step, device: str, activity: ProfilerActivity) -> list:
    with profile(activities=[activity]) as profiler:
        run()
        synchronize(device)
    return list(profiler.events() or [])


def kernels_of(run: Step, device: str) -> tuple[float | None, int]:
    """Milliseconds in which a kernel runs, and how many run. Recorded alone: operators beside them slow the host."""
    if not device.startswith("cuda"):
        return None, 0
    events = profiled(run, device, ProfilerActivity.CUDA)
    kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(event.time_range.elapsed_us() for event in kernels) / 1e3, len(kernels)


def operators_of(run: Step, device: str) -> tuple[int, dict[str, list]]:
    """How many operators run, and of those with the most time of their own `[milliseconds, calls]`."""
    times: dict[str, list[float]] = defaultdict(list)
    for event in profiled(run, device, ProfilerActivity.CPU):
        times[event.name].append(event.self_cpu_time_total / 1e3)
    largest = sorted(times, key=lambda name: -sum(times[name]))[:ROWS]
    calls = sum(len(values) for name, values in times.items() if name.startswith("aten::"))
    return calls, {name: [round(sum(times[name]), 2), len(times[name])] for name in largest}


def inputs(grids: list[Grid], config: Any, args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    total = sum(height * width for height, width in grids)
    patches = torch.randn(total, config.num_channels * config.patch_size**2, device=args.device)
    return patches.to(getattr(torch, args.dtype)), torch.tensor([(1, *grid) for grid in grids])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--geometry", choices=GEOMETRIES, default="large")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--mixes", nargs="+", choices=mixes(), default=["uniform_224", "mixed"])
    parser.add_argument("--patches", type=int, default=16384)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["plain", "checkpointed", "compiled layers"])
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    chosen = settings(device=args.device, geometry=args.geometry, layers=args.layers)
    reference = make_models(chosen, getattr(torch, args.dtype)).reference
    config = reference.config
    models = packed_models(reference, args.ways)
    for mix in args.mixes:
        grids = fill(mixes()[mix], args.patches)
        small = [(max(1, height // 8), max(1, width // 8)) for height, width in grids]
        patches, grid_thw = inputs(grids, config, args)
        of_small = inputs(small, config, args)
        runs = {way: packed_step(model, patches, grid_thw) for way, model in models.items()}
        small_runs = {way: packed_step(model, *of_small) for way, model in models.items()}
        for run in (*runs.values(), *small_runs.values()):
            for _ in range(3):
                run()
        times: dict[str, list[tuple[float, ...]]] = {way: [] for way in runs}
        for _ in range(args.repeats):
            for way, run in runs.items():
                host = 1e3 * seconds(small_runs[way], args.device)
                times[way].append((*returned_and_step(run, args.device), host))
        for way, run in runs.items():
            returned, step, host = map(statistics.median, zip(*times[way], strict=True))
            busy, kernels = kernels_of(run, args.device)
            operators, largest = operators_of(run, args.device)
            line = {"mix": mix, "way": way, "patches": len(patches), "step_ms": step, "returned_ms": returned}
            line |= {"host_ms": host, "kernels_ms": busy, "kernels": kernels, "operators": operators}
            print(json.dumps(line | {"largest_on_the_host": largest}), flush=True)


if __name__ == "__main__":
    main()
