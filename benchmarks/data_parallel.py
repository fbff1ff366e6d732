# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
What a training step under DDP loses to one process, and which setting gives some of it back; all take turns:

    torchrun --standalone --nproc-per-node=2 benchmarks/data_parallel.py
    torchrun --standalone --nproc-per-node=2 benchmarks/data_parallel.py --patches 2048
    torchrun --standalone --nproc-per-node=2 benchmarks/data_parallel.py --device cpu --small

A line of JSON for each way, milliseconds of a step on the slowest process, and the time of `alone` over it, which is
its efficiency where all batches are equal:

- alone: the first process, while the others wait
- beside: every process, without DDP: what they take from each other on the host
- DDP, no_sync: DDP's hooks, without its communication
- the rest: DDP by these settings. All but the last two have the optimizer in one kernel, and gradients set to `None`.
"""

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from distributed import TINY, gather, join, make_batches, make_model
from timing import ratio, seconds
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from workloads import GEOMETRIES


VIEWS = {"gradient_as_bucket_view": True}
STATIC = {**VIEWS, "static_graph": True}
# Of DDP; `None`: without it.
WAYS: dict[str, dict[str, Any] | None] = {
    "alone": None,
    "beside": None,
    "DDP, no_sync": VIEWS,
    "DDP": {},
    "views": VIEWS,
    "views, static": STATIC,
    "views, static, buckets of 5 MB": {**STATIC, "bucket_cap_mb": 5},
    "views, static, buckets of 100 MB": {**STATIC, "bucket_cap_mb": 100},
    "views, static, gradients zeroed": STATIC,
    "views, static, optimizer by foreach": STATIC,
}


def step_of(way: str, model: nn.Module, batches: list[dict[str, torch.Tensor]], waits: bool) -> Callable[[], None]:
    if waits:
        return lambda: None
    settings = WAYS[way]
    wrapped = model if settings is None else DistributedDataParallel(model, **settings)
    by_kernel = {"foreach": True} if way.endswith("foreach") else {"fused": True}
    optimizer = AdamW(model.parameters(), lr=1e-5, **by_kernel)

    def run() -> None:
        for batch in batches:
            wrapped(**batch).last_hidden_state.float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=not way.endswith("zeroed"))

    def without_communication() -> None:
        with wrapped.no_sync():
            run()

    return without_communication if way.endswith("no_sync") else run


def measure(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """A line for each way."""
    geometry, layers, patches = (TINY, 2, 4096) if args.small else (GEOMETRIES["large"], 24, 16384)
    batches = make_batches("patches", args.patches or patches, args.steps, device)
    model = make_model(geometry, layers, device, torch.bfloat16).train()
    ways = ["alone", *(way for way in args.ways if way != "alone")]
    runs = {way: step_of(way, copy.deepcopy(model), batches, way == "alone" and dist.get_rank() > 0) for way in ways}
    times: dict[str, list[float]] = {way: [] for way in runs}
    for _ in range(2 + args.repeats):
        for way, run in runs.items():
            dist.barrier()
            times[way].append(max(gather(seconds(run, args.device))))
    measured = {way: values[2:] for way, values in times.items()}
    return [
        {
            "way": way,
            "step_ms": 1e3 * statistics.median(values) / len(batches),
            "efficiency": ratio(measured["alone"], values),
        }
        for way, values in measured.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny model and batches, to try this script")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--patches", type=int, help="per process and batch (16384, small: 4096)")
    parser.add_argument("--steps", type=int, default=4, help="timed at once (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="(%(default)s)")
    args = parser.parse_args()
    device = join(args.device)
    # The models end before their group: torch 2.13's gloo joins its threads with the GIL held if DDP has the last hold.
    lines = measure(args, device)
    if dist.get_rank() == 0:
        print("\n".join(map(json.dumps, lines)), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
