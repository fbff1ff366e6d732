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
import copy
import gc
import json
import platform
import shlex
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path

import torch
import transformers
from torch.nn.attention.varlen import varlen_attn
from transformers import Aimv2VisionConfig, Aimv2VisionModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module


REPO = Path(__file__).resolve().parent.parent
Grid = tuple[int, int]
Forward = Callable[[], Iterator]

PEERS = ["looped", "grouped", "padded", "naflex", "timm"]

# Of one turn on a GPU.
STREAM_CALLS = 10

PRODUCTS = ("products by mm", "products by oneDNN")

# hidden_size, intermediate_size, num_attention_heads
GEOMETRIES = {"large": (1024, 2816, 8), "huge": (1536, 4096, 12), "1B": (2048, 5632, 16), "3B": (3072, 8192, 24)}


def mixes() -> dict[str, list[Grid]]:
    """Grids `(height, width)` in patches, in the random order in which images arrive."""
    generator = torch.Generator().manual_seed(0)

    def sides(low: int, high: int) -> Grid:
        height, width = torch.randint(low, high + 1, (2,), generator=generator).tolist()
        return height, width

    small = [sides(4, 8) for _ in range(48)]
    return {
        "small": small,
        "mixed": [(11, 11), (32, 32), (16, 22), (27, 18), (12, 30), (24, 24), (14, 19), (20, 29)],
        "uniform_224": [(16, 16)] * 8,
        "uniform_448": [(32, 32)] * 4,
        "huge_among_small": [*small[:24], (64, 64), *small[24:]],
        "thumbnails": [sides(2, 5) for _ in range(512)],
        "one_224": [(16, 16)],
        "two_224": [(16, 16)] * 2,
        "four_mixed": [(11, 11), (32, 32), (16, 22), (27, 18)],
    }


def fill(grids: list[Grid], patches: int | None) -> list[Grid]:
    """The mix over and over until it holds `patches` patches."""
    if patches is None:
        return grids
    filled: list[Grid] = []
    while sum(height * width for height, width in filled) < patches:
        filled.append(grids[len(filled) % len(grids)])
    return filled


def make_models(args: argparse.Namespace, dtype: torch.dtype):
    """The original, the packed model and, on request, its compiled twin and an older one, all with the same weights."""
    if args.checkpoint:
        reference = Aimv2VisionModel.from_pretrained(args.checkpoint)
    else:
        hidden_size, intermediate_size, heads = GEOMETRIES[args.geometry]
        torch.manual_seed(0)
        config = Aimv2VisionConfig(
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_attention_heads=heads,
            num_hidden_layers=args.layers,
            is_native=args.positions == "native",
            use_head=False,
        )
        with torch.device(args.device):
            reference = Aimv2VisionModel(config)
    reference = reference.to(args.device, dtype).eval()
    fields = reference.config.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "dtype"):
        fields.pop(name, None)

    def packed(repo: Path = REPO) -> torch.nn.Module:
        packing_class = get_class_from_dynamic_module("modeling_aimv2_packing.Aimv2PackingModel", str(repo))
        with torch.device("meta"):
            model = packing_class(packing_class.config_class(**fields))
        model.load_state_dict(reference.state_dict(), strict=True, assign=True)
        return model.eval()

    compiled = packed() if args.compile else None
    for layer in compiled.encoder.layers if compiled is not None else ():
        layer.compile(fullgraph=True, dynamic=True)
    return reference, packed(), compiled, packed(args.against) if args.against else None


def patchify(pixels: torch.Tensor, patch_size: int) -> torch.Tensor:
    channels, height, width = pixels.shape
    patches = pixels.reshape(channels, height // patch_size, patch_size, width // patch_size, patch_size)
    return patches.permute(1, 3, 0, 2, 4).reshape(-1, channels * patch_size**2)


class Candidates:
    """Forwards over the same images, one per way of running them; each yields its outputs as it makes them."""

    def __init__(self, models, grids: list[Grid], args: argparse.Namespace):
        reference, packed, compiled, older = models
        patch_size = reference.config.patch_size
        self.reference, self.packed = reference, packed
        self.grids = grids
        self.images = [
            torch.randn(3, height * patch_size, width * patch_size, device=args.device, dtype=reference.dtype)
            for height, width in grids
        ]
        self.patches = torch.cat([patchify(image, patch_size) for image in self.images])
        self.grid_thw = torch.tensor([(1, height, width) for height, width in grids])
        by_grid = defaultdict(list)
        for grid, image in zip(grids, self.images, strict=True):
            by_grid[grid].append(image)
        self.groups = [torch.stack(images) for images in by_grid.values()]

        self.forwards: dict[str, Forward] = {}
        for attn in args.attn:
            self.forwards[f"packed {attn}"] = self.packed_forward(packed, attn)
            if args.device.startswith("cuda"):
                self.forwards[f"packed {attn} ahead"] = self.packed_forward(packed, attn, ahead=True)
            if compiled is not None:
                self.forwards[f"packed {attn} compiled"] = self.packed_forward(compiled, attn)
            if args.train:
                self.forwards[f"packed {attn} checkpointed"] = self.packed_forward(packed, attn, checkpointing=True)
            if older is not None:
                self.forwards[f"older {attn}"] = self.packed_forward(older, attn)
        side = reference.config.image_size // patch_size
        # With learned positions the original takes one size.
        self.reference_runs = reference.config.is_native or set(grids) == {(side, side)}
        if self.reference_runs:
            self.forwards["looped"] = lambda: (reference(image[None]) for image in self.images)
            self.forwards["grouped"] = lambda: (reference(images) for images in self.groups)
        tall, wide = max(height for height, _ in grids), max(width for _, width in grids)
        if self.reference_runs and tall * wide * len(grids) <= args.max_padding * len(self.patches):
            self.padded = torch.zeros(
                len(grids), 3, tall * patch_size, wide * patch_size, device=args.device, dtype=reference.dtype
            )
            for index, image in enumerate(self.images):
                self.padded[index, :, : image.shape[1], : image.shape[2]] = image
            self.forwards["padded"] = lambda: (reference(images) for images in (self.padded,))
        if find_spec("timm") and find_spec("torchvision"):
            if len(self.groups) == 1 and grids[0][0] == grids[0][1]:
                self.timm_size = grids[0][0] * patch_size
                self.forwards["timm"] = self.timm_forward(self.timm_size)
            longest = max(height * width for height, width in grids)
            if longest * len(grids) <= args.max_padding * len(self.patches):
                self.forwards["naflex"] = self.naflex_forward(grids)
        self.forwards = {
            name: run for name, run in self.forwards.items() if name.split()[0] in ("packed", "older", *args.peers)
        }
        if args.best:
            self.add_best_peers()

    def add_best_peers(self) -> None:
        """The same with compiled blocks; timm's model of one size, which allows it, also in a CUDA graph."""
        torch._dynamo.reset()
        compiled = copy.deepcopy(self.reference)
        for block in compiled.encoder.layers:
            block.compile()
        if "grouped" in self.forwards:
            self.forwards["grouped compiled"] = lambda: (compiled(images) for images in self.groups)
        if "padded" in self.forwards:
            self.forwards["padded compiled"] = lambda: (compiled(images) for images in (self.padded,))
        if "naflex" in self.forwards:
            self.forwards["naflex compiled"] = self.naflex_forward(self.grids, compiled=True)
        if "timm" in self.forwards:
            self.forwards["timm graph"] = in_graph(self.forwards["timm"])
            self.forwards["timm compiled graph"] = in_graph(self.timm_forward(self.timm_size, compiled=True))

    def packed_forward(self, packed, attn: str, checkpointing: bool = False, ahead: bool = False) -> Forward:
        """With `ahead` the layout lies on the device already, as the peers' images and NaFlex's coordinates do."""
        layout = {}
        if ahead:
            package = type(packed).__module__.rpartition(".")[0]
            resolve_layout = sys.modules[f"{package}.layout_aimv2_packing"].resolve_layout
            layout = resolve_layout(self.grid_thw, {}, packed.config, self.patches)._asdict()

        def run():
            packed.config._attn_implementation = attn
            packed.train(checkpointing)
            if checkpointing:
                packed.gradient_checkpointing_enable({"use_reentrant": False})
            yield packed(self.patches, self.grid_thw, **layout)

        return run

    def timm_forward(self, size: int, compiled: bool = False) -> Forward:
        import timm

        config = self.reference.config
        model = timm.create_model(
            "aimv2_large_patch14_224",
            img_size=size,
            embed_dim=config.hidden_size,
            depth=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            mlp_ratio=config.intermediate_size / config.hidden_size,
            num_classes=0,
        )
        model = model.to(self.patches.device, self.reference.dtype).eval()
        for block in model.blocks if compiled else ():
            block.compile()
        return lambda: (model.forward_features(images) for images in self.groups)

    def naflex_forward(self, grids: list[Grid], compiled: bool = False) -> Forward:
        """timm's NaFlex ViT in AIMv2's geometry: patches of all images in one batch, padded to the most, and masked."""
        from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

        config = self.reference.config
        geometry = NaFlexVitCfg(
            patch_size=config.patch_size,
            embed_dim=config.hidden_size,
            depth=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            mlp_ratio=config.intermediate_size / config.hidden_size,
            swiglu_mlp=True,
            qkv_bias=False,
            norm_layer="rmsnorm",
            act_layer="silu",
            pos_embed="factorized",
            global_pool="",
            use_key_only_attn_mask=True,
        )
        model = NaFlexVit(geometry, num_classes=0).to(self.patches.device, self.reference.dtype).eval()
        for block in model.blocks if compiled else ():
            block.compile()
        pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        patches = self.patches.split([height * width for height, width in grids])
        coordinates = [
            torch.cartesian_prod(torch.arange(height), torch.arange(width)).to(self.patches.device)
            for height, width in grids
        ]
        batch = {
            "patches": pad(patches),
            "patch_coord": pad(coordinates),
        }
        if len({height * width for height, width in grids}) > 1:
            batch["patch_valid"] = pad([torch.ones_like(row[:, 0], dtype=torch.bool) for row in coordinates])
        return lambda: (model.forward_features(**batch)["patches"] for _ in range(1))

    def largest_difference(self) -> dict[str, float]:
        """Per packed candidate, max |difference| to the loop, over all images; where there is one."""
        if not self.reference_runs:
            return {}
        with torch.inference_mode():
            expected = torch.cat([self.reference(image[None]).last_hidden_state[0] for image in self.images])
            return {
                name: (next(forward()).last_hidden_state - expected).abs().max().item()
                for name, forward in self.forwards.items()
                if name.startswith("packed")
            }


def in_graph(forward: Forward) -> Forward:
    """The whole forward as one CUDA graph over this batch, where it lies."""
    for _ in range(3):
        outputs = list(forward())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = list(forward())

    def run():
        graph.replay()
        yield from outputs

    return run


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds(run: Callable[[], object], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def repeat(run: Callable[[], object], calls: int) -> None:
    for _ in range(calls):
        run()


def ratio(numerators: list[float], denominators: list[float]) -> float:
    return statistics.median(above / below for above, below in zip(numerators, denominators, strict=True))


def step(forward: Forward, train: bool) -> Callable[[], None]:
    """Runs all of a forward, and in training the backward pass of each output as soon as it is there."""

    def run() -> None:
        for outputs in forward():
            if train:
                features = outputs if isinstance(outputs, torch.Tensor) else outputs.last_hidden_state
                features.float().square().sum().backward()

    return run


def peak_memory(run: Callable[[], object], device: str) -> int | None:
    """Bytes that one run adds at its peak, over what lies in memory before it."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        return None
    clear.write_text("5")  # resets the kernel's high-water mark

    def kilobytes(field: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field))

    before = kilobytes("VmRSS")
    run()
    return (kilobytes("VmHWM") - before) * 1024


def matrix_products(packed, candidates: Candidates, onednn: bool) -> Callable[[], None]:
    """
    The layers' matrix products alone, attention's included, those of images of equal length together: by `torch.mm`
    into buffers that exist already, or by the oneDNN kernel that torch.compile calls on a CPU.
    """
    config, lengths = packed.config, candidates.grid_thw.prod(1).tolist()
    like = {"device": candidates.patches.device, "dtype": packed.dtype}
    total, heads = len(candidates.patches), config.num_attention_heads
    head_dim = config.hidden_size // heads
    hidden = torch.randn(total, config.hidden_size, **like)
    wide = torch.randn(total, config.intermediate_size, **like)
    hidden_out, wide_out = torch.empty_like(hidden), torch.empty_like(wide)
    attention = []
    for length, segments in Counter(lengths).items():
        query = torch.randn(segments * heads, length, head_dim, **like)
        scores = torch.empty(segments * heads, length, length, **like)
        attention.append((query, query.transpose(1, 2), scores, torch.empty_like(query)))

    def linear(states: torch.Tensor, module: torch.nn.Linear, out: torch.Tensor) -> None:
        if onednn:
            torch.ops.mkldnn._linear_pointwise(states, module.weight, None, "none", [], "")
        else:
            torch.mm(states, module.weight.T, out=out)

    def run() -> None:
        for layer in packed.encoder.layers:
            for projection in (layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj):
                linear(hidden, projection, hidden_out)
            for query, key, scores, output in attention:
                torch.bmm(query, key, out=scores)
                torch.bmm(scores, query, out=output)
            linear(hidden, layer.attention.out_proj, hidden_out)
            linear(hidden, layer.ffn.gate_proj, wide_out)
            linear(hidden, layer.ffn.up_proj, wide_out)
            linear(wide, layer.ffn.down_proj, hidden_out)

    return run


def attention_kernels(candidates: Candidates, packed) -> dict[str, Callable[[], torch.Tensor]]:
    """What computes one layer's attention of these images on a GPU: PyTorch's kernels and the engine's own."""
    heads, lengths = packed.config.num_attention_heads, candidates.grid_thw.prod(1).tolist()
    total, segments, longest = sum(lengths), len(lengths), max(lengths)
    head_dim = packed.config.hidden_size // heads
    states = torch.randn(total, 3, heads, head_dim, device=candidates.patches.device, dtype=packed.dtype).unbind(1)
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=candidates.patches.device)
    package = type(packed).__module__.rpartition(".")[0]
    own = sys.modules[f"{package}.triton_kernels_aimv2_packing"]
    places = own.patch_places(cu_seqlens, cu_seqlens.new_ones(2, segments), total)
    kernels = {
        "varlen": lambda: varlen_attn(*states, cu_seqlens, cu_seqlens, longest, longest),
        "own": lambda: own.segment_attention(*states, places),
    }
    if segments * longest == total:
        dense = [x.unflatten(0, (segments, longest)).transpose(1, 2) for x in states]
        kernels["flash"] = lambda: torch.ops.aten._scaled_dot_product_flash_attention(*dense)[0]
        kernels["cudnn"] = lambda: torch.ops.aten._scaled_dot_product_cudnn_attention(*dense, None, False)[0]
    return kernels


def limit(packed, candidates: Candidates) -> tuple[Callable[[], None], dict[str, float]]:
    """All layers' products, merged, and the fastest attention kernel, in a CUDA graph; and seconds of each kernel."""
    config, total = packed.config, len(candidates.patches)
    like = {"device": candidates.patches.device, "dtype": packed.dtype}
    hidden, wide = torch.randn(total, config.hidden_size, **like), torch.randn(total, config.intermediate_size, **like)
    hidden_out = torch.empty_like(hidden)
    merged = {"qkv": torch.empty(total, 3 * config.hidden_size, **like)}
    merged["gate_up"] = torch.empty(total, 2 * config.intermediate_size, **like)
    weights = []
    for layer in packed.encoder.layers:
        attention, ffn = layer.attention, layer.ffn
        qkv = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        gate_up = torch.cat([ffn.gate_proj.weight, ffn.up_proj.weight])
        weights.append((qkv.T, attention.out_proj.weight.T, gate_up.T, ffn.down_proj.weight.T))
    kernels = attention_kernels(candidates, packed)
    times = {}
    for name, kernel in kernels.items():
        graph = torch.cuda.CUDAGraph()
        kernel()
        with torch.cuda.graph(graph):
            for _ in range(20):
                kernel()
        times[name] = statistics.median(seconds(graph.replay, "cuda") / 20 for _ in range(7))
    attend = kernels[min(times, key=times.__getitem__)]

    def forward() -> None:
        for qkv, out, gate_up, down in weights:
            torch.mm(hidden, qkv, out=merged["qkv"])
            attend()
            torch.mm(hidden, out, out=hidden_out)
            torch.mm(hidden, gate_up, out=merged["gate_up"])
            torch.mm(wide, down, out=hidden_out)

    forward()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward()
    # What the graph reads has to live as long.
    return lambda kept=(hidden, wide, hidden_out, merged, weights, attend): graph.replay(), times


def model_flops(packed, grids: list[Grid]) -> int:
    """Floating-point operations of one forward: two per multiply-add, matrix products only."""
    config = packed.config
    patch_dim = config.num_channels * config.patch_size**2
    per_patch = config.num_hidden_layers * (
        4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
    )
    total = 0
    for height, width in grids:
        patches = height * width
        total += 2 * patches * (per_patch + patch_dim * config.hidden_size)
        total += 2 * config.num_hidden_layers * 2 * patches**2 * config.hidden_size
    return total


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Operations per second of one large square product, the median of ten."""
    size = 8192 if device.startswith("cuda") else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    return 2 * size**3 / statistics.median(seconds(lambda: a @ b, device) for _ in range(10))


def measure_mix(name: str, grids: list[Grid], models, args: argparse.Namespace, rate: float) -> dict:
    packed = models[1]
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


def measure_growth(models, args: argparse.Namespace) -> list[dict]:
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


def print_results(results: dict) -> None:
    for run in results["runs"]:
        print(f"\n{run['dtype']}, matrix rate {run['matrix_rate'] / 1e12:.2f} TFLOP/s")
        for mix in run["mixes"]:
            print(f"  {mix['mix']}: {mix['images']} images, {mix['patches']} patches")
            for name, row in mix["candidates"].items():
                memory = "" if row["peak_bytes"] is None else f", {row['peak_bytes'] / 2**20:.0f} MiB"
                line = f"    {name:32} {row['seconds'] * 1e3:8.2f} ms{memory}"
                line += f", {row['patches_per_second']:.0f} patches/s"
                line += f", {row['flops_utilisation']:.0%} of the rate"
                if row.get("speedup_over"):
                    line += "; " + ", ".join(f"{peer} x{ratio:.2f}" for peer, ratio in row["speedup_over"].items())
                if "stream_seconds" in row:
                    line += f"; in a stream {row['stream_seconds'] * 1e3:.2f} ms"
                if row.get("stream_speedup_over"):
                    ratios = row["stream_speedup_over"].items()
                    line += ": " + ", ".join(f"{peer} x{ratio:.2f}" for peer, ratio in ratios)
                if "limit_share" in row:
                    line += f"; {row['limit_share']:.3f} of the limit, {row['stream_limit_share']:.3f} in a stream"
                if "matrix_product_share" in row:
                    shares = row["matrix_product_share"].items()
                    line += "; share of " + ", ".join(f"{library} {share:.3f}" for library, share in shares)
                if "max_difference_to_loop" in row:
                    line += f"; max diff {row['max_difference_to_loop']:.1e}"
                print(line)
        for row in run["growth"]:
            memory = "" if row["peak_bytes"] is None else f", {row['peak_bytes'] / 2**20:.0f} MiB"
            line = f"  {row['patches']:6} patches: {row['seconds_per_patch'] * 1e6:.2f} us per patch"
            print(f"{line}, x{row['seconds_per_patch_over_fewest']:.3f} of the fewest{memory}")


def plot(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = results["runs"]
    figure, axes = pyplot.subplots(len(runs), 2, figsize=(11, 3.4 * len(runs)), squeeze=False)
    for (bars, growth), run in zip(axes, runs, strict=True):
        names = [mix["mix"] for mix in run["mixes"]]
        packed = next(iter(run["mixes"][0]["candidates"]))
        for index, peer in enumerate(PEERS):
            ratios = [mix["candidates"][packed]["speedup_over"].get(peer, 0) for mix in run["mixes"]]
            if any(ratios):
                bars.bar([position + 0.17 * index for position in range(len(names))], ratios, 0.15, label=peer)
        bars.axhline(1, color="black", linewidth=0.8)
        bars.set_xticks([position + 0.34 for position in range(len(names))], names, rotation=20, fontsize=8)
        bars.set_ylabel("times as fast as")
        bars.set_title(f"{packed}, {run['dtype']}", fontsize=10)
        bars.legend(fontsize=8)
        if run["growth"]:
            patches = [row["patches"] for row in run["growth"]]
            growth.plot(patches, [row["seconds_per_patch"] * 1e6 for row in run["growth"]], "o-")
            growth.set_xscale("log", base=2)
            growth.set_ylim(bottom=0)
            growth.set_xlabel("patches in the batch, images of 256")
            growth.set_ylabel("microseconds per patch")
        else:
            growth.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


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
