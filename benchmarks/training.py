# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
A training step, forward and backward, of the packed model in every way and of its peers, taking turns:

    python benchmarks/training.py --device cuda --output training.json
    python benchmarks/training.py --geometry large --layers 2 --patches 512 --mixes mixed --output training.json

For each mix of images: time, memory, how often the compiler ran, and the share that matrix products and attention
alone, in a CUDA graph, have of a step. Then the error of each way's gradients against float32, and the losses of some
steps. Liger's kernels, which nothing here ships, are measured where the package is installed. Each part is written when
it is done.
"""

import argparse
import copy
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
from candidates import Candidates, step
from throughput import settings
from timing import captured, peak_memory, ratio, seconds
from torch import nn
from workloads import GEOMETRIES, Grid, Models, fill, make_models, mixes, packing_class

from conversion.local_code import hub_module


Step = Callable[[], object]

WAYS = ["plain", "checkpointed", "checkpointed, states saved", "compiled layers", "compiled encoder", "liger"]
PEERS = ["looped", "grouped", "padded", "naflex", "timm"]


def packed_models(reference: nn.Module, names: list[str]) -> dict[str, nn.Module]:
    """The packed model in each way, all with the weights of `reference`, each with gradients of its own."""
    fields = reference.config.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "dtype"):
        fields.pop(name, None)
    model_class = packing_class()
    models = {}
    for name in names:
        with torch.device("meta"):
            model = model_class(model_class.config_class(**fields))
        model.load_state_dict(reference.state_dict(), strict=True, assign=True)
        if name.startswith("checkpointed"):
            saved = {"preserve_rng_state": True} if name.endswith("states saved") else {}
            model.gradient_checkpointing_enable({"use_reentrant": False, **saved})
        elif name == "compiled layers":
            for layer in model.encoder.layers:
                layer.compile(fullgraph=True, dynamic=True)
        elif name == "compiled encoder":
            model.encoder.compile(fullgraph=True, dynamic=True)
        elif name == "liger":
            put_liger_in(model)
        models[name] = model.train()
    return models


def put_liger_in(model: nn.Module) -> None:
    """Liger's norms and gated products instead of torch's."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    from liger_kernel.transformers.rms_norm import LigerRMSNorm

    def norm_like(own: nn.RMSNorm) -> nn.Module:
        norm = LigerRMSNorm(*own.normalized_shape, eps=own.eps)
        norm.weight = own.weight
        return norm

    def gated(ffn: nn.Module, states: torch.Tensor) -> torch.Tensor:
        return ffn.down_proj(LigerSiLUMulFunction.apply(ffn.gate_proj(states), ffn.up_proj(states)))

    for layer in model.encoder.layers:
        layer.rms_norm1, layer.rms_norm2 = norm_like(layer.rms_norm1), norm_like(layer.rms_norm2)
        layer.ffn.forward = partial(gated, layer.ffn)


def products_and_attention(model: nn.Module, grids: list[Grid], device: str) -> Step:
    """What a step cannot do without, and nothing else: on a GPU in a CUDA graph."""
    config, lengths = model.config, [height * width for height, width in grids]
    total, heads = sum(lengths), config.num_attention_heads
    like = {"device": device, "dtype": model.dtype}
    sizes = (config.hidden_size, config.intermediate_size)
    states = {size: torch.randn(total, size, **like) for size in sizes}
    outputs = {size: torch.empty(total, size, **like) for size in sizes}
    layout = hub_module("layout").packed_layout(torch.tensor([(1, *grid) for grid in grids]), config).to(device)
    query, key, value = (torch.randn(total, heads, sizes[0] // heads, requires_grad=True, **like) for _ in range(3))
    gradient = torch.randn_like(query)
    layers = [
        [each.weight.detach() for each in layer.modules() if isinstance(each, nn.Linear)]
        for layer in model.encoder.layers
    ]
    weight_gradients = {weight.shape: torch.empty_like(weight) for weight in layers[0]}

    segment_attention = hub_module("modeling").segment_attention

    def run() -> None:
        for weights in layers:
            for weight in weights:
                torch.mm(states[weight.shape[1]], weight.T, out=outputs[weight.shape[0]])
            attended = segment_attention(model.encoder.layers[0].attention, query, key, value, layout)
            torch.autograd.grad(attended, (query, key, value), gradient)
            for weight in weights:
                torch.mm(states[weight.shape[0]], weight, out=outputs[weight.shape[1]])
                torch.mm(states[weight.shape[0]].T, states[weight.shape[1]], out=weight_gradients[weight.shape])

    if not device.startswith("cuda"):
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = captured(run)

    def replay(kept: Step = run) -> None:
        graph.replay()

    return replay


def packed_step(model: nn.Module, patches: torch.Tensor, grid_thw: torch.Tensor) -> Step:
    return step(lambda: iter([model(patches, grid_thw)]), train=True)


def measure(
    name: str, grids: list[Grid], reference: nn.Module, ways: list[str], peers: list[str], args: argparse.Namespace
) -> dict:
    """Each way and peer on these images: seconds, memory, and ratios of the runs that took turns."""
    torch._dynamo.reset()
    models = packed_models(reference, ways)
    chosen = settings(device=args.device, train=True, peers=peers, best=args.best, attn=[], max_padding=4)
    candidates = Candidates(Models(reference, models["plain"]), grids, chosen)
    runs = {way: packed_step(model, candidates.patches, candidates.grid_thw) for way, model in models.items()}
    runs |= {peer: step(forward, train=True) for peer, forward in candidates.forwards.items()}
    runs["products and attention"] = products_and_attention(models["plain"], grids, args.device)
    compilations = {}
    for each, run in list(runs.items()):
        torch._dynamo.utils.counters.clear()
        try:
            for _ in range(2):
                run()
        except Exception as error:  # a peer's fault is a result
            print(f"{each}: {type(error).__name__}: {error}"[:300], flush=True)
            del runs[each]
        compilations[each] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    peaks = {each: peak_memory(run, args.device) for each, run in runs.items()}
    times: dict[str, list[float]] = {each: [] for each in runs}
    for _ in range(args.repeats):
        for each, run in runs.items():
            times[each].append(seconds(run, args.device))
    fastest_peer = min(
        (each for each in runs if each.split()[0] in PEERS), key=lambda each: min(times[each]), default=None
    )
    return {
        "mix": name,
        "images": len(grids),
        "patches": len(candidates.patches),
        "steps": {
            each: {
                "seconds": statistics.median(times[each]),
                "over_plain": ratio(times[each], times["plain"]),
                "peak_bytes": peaks[each],
                "compilations": compilations[each],
            }
            for each in runs
        },
        "share_of_products_and_attention": ratio(times["products and attention"], times["plain"]),
        "fastest_peer": fastest_peer,
        "best_packed_against_it": fastest_peer
        and max(ratio(times[fastest_peer], times[way]) for way in ways if way in runs),
    }


def gradients_of(run: Step, model: nn.Module) -> torch.Tensor:
    model.zero_grad()
    run()
    return torch.cat([parameter.grad.float().flatten() for _, parameter in sorted(model.named_parameters())])


def gradient_errors(reference: nn.Module, ways: list[str], args: argparse.Namespace) -> dict[str, float]:
    """‖g - g32‖ / ‖g32‖ of the gradients of all weights together, each way's and the original's, image by image."""
    torch._dynamo.reset()
    grids = mixes()["mixed"]
    models = packed_models(reference, ways)
    candidates = Candidates(Models(reference, models["plain"]), grids, settings(device=args.device, attn=[]))
    patches, grid_thw = candidates.patches, candidates.grid_thw

    def looped(model: nn.Module) -> Step:
        return step(lambda: (model(image[None].to(model.dtype)) for image in candidates.images), train=True)

    exact_model = type(reference)(reference.config).to(args.device, torch.float32)
    exact_model.load_state_dict(reference.state_dict())
    exact = gradients_of(looped(exact_model), exact_model)
    of_each = {"original": gradients_of(looped(reference), reference)}
    for way, model in models.items():
        of_each[way] = gradients_of(packed_step(model, patches, grid_thw), model)
    return {name: ((own - exact).norm() / exact.norm()).item() for name, own in of_each.items()}


def losses(model: nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]], steps: int) -> list[float]:
    """Of learning to tell the batches apart, by AdamW on weights in float32 under autocast."""
    model = model.float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    values = []
    for index in range(steps):
        patches, grid_thw = batches[index % len(batches)]
        with torch.autocast(patches.device.type, torch.bfloat16):
            features = model(patches, grid_thw).last_hidden_state
        target = index % len(batches) / len(batches)
        loss = (features.float().mean(1) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.detach())
    return torch.stack(values).tolist()


def losses_of_each(reference: nn.Module, ways: list[str], args: argparse.Namespace) -> dict:
    """The losses of each way, and their largest difference from the plain model's, over the mean loss."""
    torch._dynamo.reset()
    dimension = reference.config.num_channels * reference.config.patch_size**2
    batches = []
    for name in ("mixed", "small", "uniform_224"):
        grid_thw = torch.tensor([(1, *grid) for grid in mixes()[name]])
        patches = torch.randn(int(grid_thw.prod(1).sum()), dimension, device=args.device)
        batches.append((patches, grid_thw))
    curves = {}
    for way in ways:
        # Trained in place: a copy of the weights each.
        model = packed_models(copy.deepcopy(reference), [way])[way]
        curves[way] = losses(model, batches, args.steps)
        del model
        gc.collect()
    plain = torch.tensor(curves["plain"])
    differences = {
        way: ((torch.tensor(curve) - plain).abs().max() / plain.mean()).item() for way, curve in curves.items()
    }
    return {"largest_difference": differences, "plain": curves["plain"]}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="JSON file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--geometry", choices=GEOMETRIES, default="large")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--mixes", nargs="+", choices=mixes(), default=["mixed", "uniform_224"])
    parser.add_argument("--patches", nargs="+", type=int, default=[16384, 2048])
    parser.add_argument("--ways", nargs="+", choices=WAYS[1:], default=WAYS[1:])
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS)
    parser.add_argument("--best", action="store_true", help="also measure the peers compiled")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--steps", type=int, default=50, help="whose losses are compared; 0: no losses, no gradients (50)"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    ways = ["plain", *(way for way in args.ways if way != "liger" or find_spec("liger_kernel"))]
    chosen = settings(
        device=args.device, geometry=args.geometry, layers=args.layers, compile=False, against=None, checkpoint=None
    )
    reference = make_models(chosen, getattr(torch, args.dtype)).reference
    results: dict = {
        "command": shlex.join(["python", "benchmarks/training.py", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor() or "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "runs": [],
    }

    def write(**part) -> None:
        results.update(part)
        args.output.write_text(json.dumps(results, indent=1) + "\n")

    for patches in args.patches:
        for name in args.mixes:
            run = measure(name, fill(mixes()[name], patches), reference, ways, args.peers, args)
            write(runs=[*results["runs"], run])
            times = ", ".join(f"{each} {of['seconds'] * 1e3:.1f}" for each, of in run["steps"].items())
            print(f"{name}, {run['patches']} patches, ms: {times}", flush=True)
            reference.zero_grad()
            gc.collect()
    if args.steps == 0:
        return
    write(gradient_errors=gradient_errors(reference, ways, args))
    print(results["gradient_errors"], flush=True)
    write(losses=losses_of_each(reference, ways, args))
    print(results["losses"]["largest_difference"], flush=True)


if __name__ == "__main__":
    main()
