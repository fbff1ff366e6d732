# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
Packed AIMv2 against the ways people run it otherwise, in one process: same weights (timm: its own), same images,
repetitions of all candidates interleaved, ratios per repetition, medians of those.

    python benchmarks/throughput.py                              # CPU, float32 and bfloat16, AIMv2-L width, 4 layers
    python benchmarks/throughput.py --device cuda --dtype bfloat16 --layers 24 --patches 16384 --best
    python benchmarks/throughput.py --train                      # forward and backward

On a GPU `--best` measures the peers as fast as they get, too: with compiled blocks, and timm's of one size in a CUDA
graph of this one batch, whose inputs need not even be copied; the others' cannot be captured. The limit is the
layers' products, query, key and value merged and gate and up merged, and the fastest attention kernel for these images,
with nothing between them. There, a turn of a candidate is a call that is not timed, one that is waited for (`seconds`),
and ten one after the other that are waited for together (`stream_seconds`, of each).

Writes one JSON file and one PNG plot per run to `--output`.
"""

import argparse
import gc
import json
import platform
import shlex
import statistics
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from candidates import PEERS, Candidates, step
from limits import PRODUCTS, limit, matrix_products, matrix_rate
from throughput_report import plot, print_results
from timing import peak_memory, ratio, seconds
from workloads import GEOMETRIES, REPO, Grid, Models, fill, make_models, mixes, model_flops


# Of one turn on a GPU.
STREAM_CALLS = 10


def repeat(run: Callable[[], object], calls: int) -> None:
    for _ in range(calls):
        run()


def measure_mix(name: str, grids: list[Grid], models: Models, args: argparse.Namespace, rate: float) -> dict:
    packed = models.packed
    gc.collect()  # the graphs of the mix before
    candidates = Candidates(models, grids, args)
    runs = {candidate: step(forward, args.train) for candidate, forward in candidates.forwards.items()}
    kernels: dict[str, float] = {}
    limited = args.device.startswith("cuda") and not args.train and packed.dtype in (torch.bfloat16, torch.float16)
    if limited:
        runs["limit"], kernels = limit(packed, candidates)
    shared = args.device == "cpu" and not args.train
    if shared:
        for library in PRODUCTS:
            runs[library] = matrix_products(packed, candidates, onednn=library == "products by oneDNN")
    for run in runs.values():
        for _ in range(5 if args.device.startswith("cuda") else 1):
            run()  # warms up, compiles, captures
    times: dict[str, list[float]] = {candidate: [] for candidate in runs}
    streams: dict[str, list[float]] = {candidate: [] for candidate in runs}
    for _ in range(args.repeats):
        for candidate, run in runs.items():
            if args.device.startswith("cuda"):
                run()  # so that no candidate starts from what another has left behind
                streams[candidate].append(seconds(partial(repeat, run, STREAM_CALLS), args.device) / STREAM_CALLS)
            times[candidate].append(seconds(run, args.device))
    flops, total = model_flops(packed, grids) * (3 if args.train else 1), len(candidates.patches)
    difference = candidates.largest_difference()
    result: dict = {"mix": name, "images": len(grids), "patches": total, "candidates": {}, "attention": kernels}
    if limited:
        result["limit"] = statistics.median(times["limit"])
        result["stream_limit"] = statistics.median(streams["limit"])
    for candidate in candidates.forwards:
        median = statistics.median(times[candidate])
        row: dict = {
            "seconds": median,
            "patches_per_second": total / median,
            "peak_bytes": peak_memory(runs[candidate], args.device),
            "flops_utilisation": flops / median / rate,
        }
        peers = [peer for peer in candidates.forwards if not peer.startswith("packed")]
        if streams[candidate]:
            row["stream_seconds"] = statistics.median(streams[candidate])
        if candidate.startswith("packed"):
            if candidate in difference:
                row["max_difference_to_loop"] = difference[candidate]
            row["speedup_over"] = {peer: ratio(times[peer], times[candidate]) for peer in peers}
            if streams[candidate]:
                row["stream_speedup_over"] = {peer: ratio(streams[peer], streams[candidate]) for peer in peers}
            if limited:
                row["limit_share"] = ratio(times["limit"], times[candidate])
                row["stream_limit_share"] = ratio(streams["limit"], streams[candidate])
            if shared:
                row["matrix_product_share"] = {library: ratio(times[library], times[candidate]) for library in PRODUCTS}
        result["candidates"][candidate] = row
    return result


def measure_growth(models: Models, args: argparse.Namespace) -> list[dict]:
    """Time and memory of ever more images of 256 patches, repetitions of all sizes interleaved."""
    runs = {}
    for images in args.growth:
        candidates = Candidates(models, [(16, 16)] * images, args)
        runs[images * 256] = step(candidates.forwards[f"packed {args.attn[0]}"], args.train)
    peaks = {patches: peak_memory(run, args.device) for patches, run in runs.items()}  # warms up
    times: dict[int, list[float]] = {patches: [] for patches in runs}
    for _ in range(min(args.repeats, 3)):
        for patches, run in runs.items():
            times[patches].append(seconds(run, args.device) / patches)
    return [
        {
            "patches": patches,
            "seconds_per_patch": statistics.median(times[patches]),
            "seconds_per_patch_over_fewest": statistics.median(
                own / fewest for own, fewest in zip(times[patches], times[min(runs)], strict=True)
            ),
            "peak_bytes": peaks[patches],
        }
        for patches in runs
    ]


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--attn", nargs="+", default=["sdpa"], help="attn_implementation of the packed model")
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile of the packed model")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS)
    parser.add_argument("--best", action="store_true", help="on a GPU, also measure the peers compiled and in graphs")
    parser.add_argument("--against", type=Path, help="also measure the packed model of this other checkout")
    parser.add_argument("--train", action="store_true", help="measure forward and backward")
    parser.add_argument("--geometry", choices=GEOMETRIES, default="large")
    parser.add_argument("--positions", choices=["native", "learned"], default="native")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--checkpoint", help="an Aimv2VisionModel checkpoint instead of random weights")
    parser.add_argument("--mixes", nargs="+", choices=mixes(), default=list(mixes())[:6])
    parser.add_argument("--patches", type=int, help="repeat each mix up to this many patches")
    parser.add_argument("--max-padding", type=float, default=8, help="skip a padded batch over this many times larger")
    parser.add_argument("--growth", nargs="*", type=int, default=[4, 8, 32, 128, 256], help="numbers of images")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=REPO / "build" / "throughput")
    return parser.parse_args(arguments)


def settings(**changes) -> argparse.Namespace:
    """The default arguments with these changes, and without peers."""
    return argparse.Namespace(**vars(parse_args([])) | {"peers": [], "max_padding": 0} | changes)


def main() -> None:
    args = parse_args()
    results: dict = {
        "command": shlex.join(["python", "benchmarks/throughput.py", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "runs": [],
    }
    with torch.set_grad_enabled(args.train):
        for dtype_name in args.dtype:
            dtype = getattr(torch, dtype_name)
            models = make_models(args, dtype)
            rate = matrix_rate(args.device, dtype)
            chosen = {name: fill(mixes()[name], args.patches) for name in args.mixes}
            results["runs"].append(
                {
                    "dtype": dtype_name,
                    "matrix_rate": rate,
                    "mixes": [measure_mix(name, grids, models, args, rate) for name, grids in chosen.items()],
                    "growth": measure_growth(models, args),
                }
            )
    print_results(results)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "throughput.json").write_text(json.dumps(results, indent=2) + "\n")
    if find_spec("matplotlib"):
        plot(results, args.output / "throughput.png")
    print(f"\nWritten to {args.output}")


if __name__ == "__main__":
    main()
