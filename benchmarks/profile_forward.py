# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
Where the time of one packed forward goes on a CUDA device: by class of kernel, and by kernel.

    python benchmarks/profile_forward.py --geometry large --patches 16384
"""

import argparse
from collections import defaultdict

import torch
from candidates import Candidates
from throughput import settings
from workloads import GEOMETRIES, fill, make_models, mixes


# The first class with a part of the kernel's name has it.
CLASSES = {
    "attention": ("flash", "sdpa", "fmha", "attention"),
    "norms": ("rms_norm",),
    "gate": ("silu",),
    "products": ("nvjet", "gemm", "cutlass", "splitk"),
}


def class_of(kernel: str) -> str:
    return next((name for name, parts in CLASSES.items() if any(part in kernel.lower() for part in parts)), "other")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="large")
    parser.add_argument("--mix", choices=mixes(), default="mixed")
    parser.add_argument("--patches", type=int, default=None, help="repeat the mix up to this many patches")
    parser.add_argument("--attn", default="sdpa")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rows", type=int, default=14)
    own = vars(parser.parse_args())
    args = settings(**own | {"device": "cuda", "layers": 24, "attn": [own["attn"]]})
    with torch.inference_mode():
        models = make_models(args, torch.bfloat16)
        candidates = Candidates(models, fill(mixes()[args.mix], args.patches), args)
        forward = candidates.forwards[f"packed {args.attn[0]}" + (" compiled" if args.compile else "")]
        for _ in range(6):
            next(forward())
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            next(forward())
            torch.cuda.synchronize()
    kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    first, last = min(event.time_range.start for event in kernels), max(event.time_range.end for event in kernels)
    times: dict[str, float] = defaultdict(float)
    for event in kernels:
        times[class_of(event.name)] += event.time_range.elapsed_us()
    times["nothing"] = last - first - sum(times.values())
    engine = models.packed.last_engine or "plain"
    print(f"{engine}, {len(candidates.patches)} patches: {(last - first) / 1e3:.2f} ms on the device")
    for name, time in sorted(times.items(), key=lambda item: -item[1]):
        print(f"  {name:10} {time / 1e3:8.2f} ms")
    print(profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=args.rows, max_name_column_width=70))


if __name__ == "__main__":
    main()
