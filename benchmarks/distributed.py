# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
The model on several GPUs of one host against one:

    torchrun --standalone --nproc-per-node=2 --max-restarts=6 benchmarks/distributed.py --output distributed.json
    torchrun --standalone --nproc-per-node=2 benchmarks/distributed.py --output distributed.json --device cpu --small

- correctness: a training step under each strategy, gradients and saved checkpoint, against the same step in one process
- training: rate of a training step, and what batches of equal work are worth against batches of as many images
- tensor_parallel: latency of one batch
- encoding: rate of a copy of the model per process

The parts of training and encoding run before those of tensor parallelism. Each is written when it is done. One that
fails, or runs past its time, ends the processes: torchrun starts them again, and they go on with the next part.
"""

import argparse
import faulthandler
import gc
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from agreement import agreement
from timing import seconds
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from transformers.distributed import DistributedConfig
from workloads import GEOMETRIES, REPO

from conversion.local_code import local_class


sys.path[1:1] = [str(REPO / "tests"), str(REPO / "tests" / "model")]

from distributed_worker import batches_of, join, shard, train, train_in_one_process  # noqa: E402
from reference import Aimv2PackingAcceleratedModel, Aimv2PackingConfig, random_weights  # noqa: E402
from safetensors.torch import load_file  # noqa: E402


PatchBudgetBatchSampler = local_class("batching_aimv2_packing.PatchBudgetBatchSampler")

STRATEGIES = ("ddp", "ddp_empty", "fsdp", "fsdp_checkpointing", "fsdp_empty", "fsdp_accelerate", "fsdp_config", "tp")
# Hidden size, intermediate size, heads; as GEOMETRIES.
NARROW, TINY = (256, 704, 4), (64, 96, 2)

Batch = dict[str, torch.Tensor]


def make_model(
    geometry: tuple[int, int, int], layers: int, device: torch.device, dtype: torch.dtype, use_head: bool = False
) -> nn.Module:
    """With random weights, the same on every process."""
    hidden_size, intermediate_size, heads = geometry
    config = Aimv2PackingConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        use_head=use_head,
        is_native=True,
    )
    torch.manual_seed(0)
    with device:
        return random_weights(Aimv2PackingAcceleratedModel(config)).to(dtype)


def empty_cache() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def median_seconds(function: Callable, repeats: int, together: bool) -> float:
    """Median time of a call, after one that is not timed; that of the slowest process if they work `together`."""
    times, device = [], "cuda" if torch.cuda.is_available() else "cpu"
    for _ in range(1 + repeats):
        if together:
            dist.barrier()
        times.append(seconds(function, device))
    median = statistics.median(times[1:])
    return max(gather(median)) if together else median


def gather(value) -> list:
    """The value of each process."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_first(function: Callable):
    """What the function returns on the first process, while the others wait."""
    value = function() if dist.get_rank() == 0 else None
    dist.barrier()
    return value


# Parts


def correctness(dtype: torch.dtype, device: torch.device, args: argparse.Namespace) -> dict:
    """Gradients and trained weights of a step, against those of one process in `dtype` and in float64."""

    def in_one_process(strategy: str, folder: str, dtype: torch.dtype) -> tuple[dict, dict]:
        model = Aimv2PackingAcceleratedModel.from_pretrained(folder, dtype=dtype).to(device)
        return train_in_one_process(model, batches_of(strategy))

    def compare(strategy: str, folder: str) -> dict:
        output = Path(folder, strategy)
        grads, weights = in_one_process(strategy, folder, dtype)
        exact_grads, exact_weights = in_one_process(strategy, folder, torch.float64)
        trained = load_file(output / "checkpoint" / "model.safetensors")
        return {
            "gradients": agreement(load_file(output / "gradients.safetensors"), grads, exact_grads),
            "checkpoint": agreement(trained, weights, exact_weights),
            "held_by_one_process": json.loads((output / "state.json").read_text())["held"],
            "parameters": sum(weight.numel() for weight in weights.values()),
        }

    with tempfile.TemporaryDirectory() as own:
        folder = gather(own)[0]
        on_first(lambda: make_model(NARROW, 4, device, torch.float32, use_head=True).save_pretrained(folder))
        result = {}
        for strategy in STRATEGIES:
            on_first(Path(folder, strategy).mkdir)
            train(strategy, folder, Path(folder, strategy), device, dtype)
            dist.barrier()
            result[strategy] = on_first(partial(compare, strategy, folder))
    return result


def image_grids(count: int, largest: int) -> torch.Tensor:
    """`(1, height, width)` of images whose sides are log-uniform from 8 to 64 patches, or fewer to fit."""
    longest = min(64, math.isqrt(largest))
    sides = torch.rand(count, 2, generator=torch.Generator().manual_seed(0)) * math.log(longest / 8)
    return torch.cat([torch.ones(count, 1), 8 * sides.exp()], dim=1).round().to(torch.int64)


def make_batches(kind: str, patches: int, steps: int, device: torch.device, patch_dim: int = 588) -> list[Batch]:
    """The batches of this process: of at most so many `patches`, or of the number of `images` that have as many."""
    rank, size = dist.get_rank(), dist.get_world_size()
    grids = image_grids(4 * math.ceil(patches / 700) * steps * size, patches)
    lengths = grids.prod(1)
    if kind == "patches":
        batches = list(PatchBudgetBatchSampler(lengths.tolist(), patches, shuffle=True, num_replicas=size, rank=rank))
    else:
        images = max(1, round(patches / lengths.float().mean().item()))
        batches = torch.arange(len(grids)).split(images)[rank::size]
    batches = [grids[indices] for indices in batches[:steps]]
    values = torch.randn(max(int(grid.prod(1).sum()) for grid in batches), patch_dim, device=device).bfloat16()
    return [{"hidden_states": values[: int(grid.prod(1).sum())], "grid_thw": grid} for grid in batches]


def training(
    geometry: tuple[int, int, int], wrap: Callable, checkpointing: bool, device: torch.device, args: argparse.Namespace
) -> dict:
    batches = {kind: make_batches(kind, args.patches, args.steps, device) for kind in ("patches", "images")}
    model = make_model(geometry, args.layers, device, torch.bfloat16).train()
    if checkpointing:
        model.gradient_checkpointing_enable()

    def rate(model: nn.Module, kind: str, together: bool) -> dict:
        """Patches per second over some steps, and how the work was divided."""
        optimizer = AdamW(model.parameters(), lr=1e-5, fused=True)

        def steps() -> None:
            for batch in batches[kind]:
                model(**batch).last_hidden_state.float().square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()

        elapsed = median_seconds(steps, args.repeats, together)
        work = [len(batch["hidden_states"]) for batch in batches[kind]]
        of_each = gather(work) if together else [work]
        return {
            "patches_per_second": sum(map(sum, of_each)) / elapsed,
            "seconds_per_step": elapsed / args.steps,
            "patches": of_each,
            "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        }

    one = on_first(lambda: rate(model, "patches", together=False))
    empty_cache()
    model = wrap(model)
    result = {}
    for kind in batches:
        result[kind] = rate(model, kind, together=True)
        empty_cache()
    if one is None:
        return {}
    many = result["patches"]["patches_per_second"]
    return {
        "one": one,
        "by_patches": result["patches"],
        "by_images": result["images"],
        "efficiency": many / one["patches_per_second"] / dist.get_world_size(),
        "balance_is_worth": many / result["images"]["patches_per_second"],
    }


@torch.no_grad()
def tensor_parallel(geometry: tuple[int, int, int], device: torch.device, args: argparse.Namespace) -> dict:
    batch = make_batches("patches", args.patches, 1, device)[0]
    batch = dict(zip(batch, gather_tensors(list(batch.values())), strict=True))

    def measure(model: nn.Module, together: bool) -> tuple[dict, torch.Tensor]:
        elapsed = median_seconds(lambda: model(**batch), 2 + args.repeats, together)
        return {"seconds": elapsed, "engine": model.last_engine}, model(**batch).last_hidden_state.float()

    def in_one_process() -> tuple[dict, torch.Tensor]:
        model = make_model(geometry, args.layers, device, torch.bfloat16)
        model.save_pretrained(folder)
        best, features = measure(model, together=False)
        model.use_engines = False
        plain, plain_features = measure(model, together=False)
        rounding = ((features - plain_features).norm() / plain_features.norm()).item()
        return {"one": best, "one_plain": plain, "one_difference_to_plain": rounding}, plain_features

    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as own:
        folder = gather(own)[0]
        one = on_first(in_one_process)
        empty_cache()
        config = DistributedConfig(tp_size=dist.get_world_size())
        model = Aimv2PackingAcceleratedModel.from_pretrained(
            folder, dtype=torch.bfloat16, distributed_config=config
        ).eval()
        dist.barrier()
    many, features = measure(model, together=True)
    if one is None:
        return {}
    result, expected = one
    difference = ((features - expected).norm() / expected.norm()).item()
    speedup = result["one_plain"]["seconds"] / many["seconds"]
    return {**result, "many": many, "difference_to_plain": difference, "speedup_over_plain": speedup}


def gather_tensors(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Those of the first process, each on the device of this one's."""
    sent = gather([tensor.cpu() for tensor in tensors])[0]
    return [theirs.to(own.device) for theirs, own in zip(sent, tensors, strict=True)]


@torch.no_grad()
def encoding(geometry: tuple[int, int, int], device: torch.device, args: argparse.Namespace) -> dict:
    """From patches in memory of the host to the mean feature of each image, there."""
    model = make_model(geometry, args.layers, device, torch.bfloat16).eval()
    batches = make_batches("patches", args.patches, args.steps, torch.device("cpu"))
    if device.type == "cuda":
        batches = [{**batch, "hidden_states": batch["hidden_states"].pin_memory()} for batch in batches]

    def encode() -> list[torch.Tensor]:
        means = []
        for batch in batches:
            patches = batch["hidden_states"].to(device, non_blocking=True)
            features = model(patches, batch["grid_thw"]).last_hidden_state.float()
            means.append(torch.segment_reduce(features, "mean", lengths=batch["grid_thw"].prod(1).to(device)).cpu())
        return means

    work = sum(len(batch["hidden_states"]) for batch in batches)
    one = on_first(lambda: work / median_seconds(encode, args.repeats, together=False))
    many = sum(gather(work)) / median_seconds(encode, args.repeats, together=True)
    if one is None:
        return {}
    size = dist.get_world_size()
    return {"one": one, "many": many, "efficiency": many / one / size, "engine": model.last_engine}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The model on several GPUs of one host against one.")
    parser.add_argument("--output", required=True, type=Path, help="JSON file; parts that it has are not run again")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models and batches, to try this script")
    parser.add_argument("--patches", type=int, help="per process and batch (16384, small: 4096)")
    parser.add_argument("--layers", type=int, help="(24, small: 2)")
    parser.add_argument("--steps", type=int, default=4, help="timed at once (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="(%(default)s)")
    args = parser.parse_args()
    args.patches = args.patches or (4096 if args.small else 16384)
    args.layers = args.layers or (2 if args.small else 24)
    return args


def main() -> None:
    args = parse_arguments()
    results = json.loads(args.output.read_text()) if args.output.exists() else {"parts": {}}
    # From here on the first process writes: none gets past the joining before all have read.
    device = join(args.device)
    large, huge = [TINY, TINY] if args.small else [GEOMETRIES["large"], GEOMETRIES["3B"]]
    # A step uses every weight, and in the same order: the buckets never change.
    ddp = partial(DistributedDataParallel, gradient_as_bucket_view=True, static_graph=True)
    parts: dict[str, tuple[float, Callable]] = {
        "correctness_float32": (60, partial(correctness, torch.float32)),
        "training_large": (40, partial(training, large, ddp, False)),
        "encoding_large": (30, partial(encoding, large)),
        "training_3B": (75, partial(training, huge, shard, True)),
        "correctness_bfloat16": (30, partial(correctness, torch.bfloat16)),
        "tensor_parallel_large": (30, partial(tensor_parallel, large)),
        "tensor_parallel_3B": (60, partial(tensor_parallel, huge)),
    }
    results |= {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "processes": dist.get_world_size(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "settings": {name: value for name, value in vars(args).items() if name != "output"},
    }

    def write(name: str, part: dict) -> None:
        results["parts"][name] = part
        if dist.get_rank() == 0:
            args.output.write_text(json.dumps(results, indent=1) + "\n")

    for name, (limit, function) in parts.items():
        if name in results["parts"]:
            continue
        write(name, {"failed": True})
        faulthandler.dump_traceback_later(limit, exit=True)
        start = time.perf_counter()
        part = function(device, args)
        faulthandler.cancel_dump_traceback_later()
        write(name, {"part_seconds": time.perf_counter() - start, **part})
        if dist.get_rank() == 0:
            print(f"{name}: {json.dumps(results['parts'][name])}", flush=True)
        empty_cache()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
