# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
What a corpus run costs beside the encoder: `extract_features.py`, in process and on Ray, against a plain loop over the
same packed batches and against the encoder alone, repetitions interleaved.

    python benchmarks/extract_features.py                        # AIMv2-L width, 6 layers, on the CPU
    python benchmarks/extract_features.py --images 310 --layers 2 --width 256      # small: start-up counts
    python benchmarks/extract_features.py --layers 24 --dtype bfloat16 --patches-per-batch 16384 \\
        --sides 0 512 1024 --cpus 8 16 --output corpus.json    # GPU, 2 minutes: against the encoder alone
    python benchmarks/extract_features.py --layers 24 --dtype bfloat16 --patches-per-batch 16384 \\
        --sides 0 --shards 2 --repetitions 2 --output shards.json    # two GPUs: a shard on each, against one

Rates leave start-up out: the command's is from its first batch to its last, the loop's begins when its model is loaded.
`total` is the time of everything but imports, in the same process for the loop and the command. With --sides, `middle`
is the rate between a fifth and nine tenths of the patches, and seconds tell what the main process did. With --shards,
each is a command of its own with its own GPU, and the rate of all together is taken while all are in their middles.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from workloads import REPO, packing_class

from conversion.local_code import local_class
from corpus.options import Options
from corpus.output import Counts
from corpus.progress import Progress
from corpus.run import run
from corpus.stages import Encoder


# Of a run of some seconds on a fast GPU, and those that differ: the others are links to them.
PATCHES_PER_RUN = 6_000_000
FILES = 192


def make_corpus(folder: Path, count: int, side: int = 0) -> None:
    """Parts of the bundled photographs, 150 to 500 pixels a side, or all of them near `side`."""
    generator = np.random.default_rng(0)
    photographs = [Image.open(file).convert("RGB") for file in sorted((REPO / "examples/photographs").glob("*.jpg"))]
    folder.mkdir()

    def save(index: int, box: tuple[int, ...] | None, size: tuple[int, ...]) -> None:
        photograph = photographs[index % len(photographs)]
        picture = photograph.resize(size, Image.Resampling.BICUBIC, box)  # type: ignore[arg-type]
        picture.save(folder / f"{index:06}.jpg", quality=90)

    with ThreadPoolExecutor() as pool:
        saved = []
        for index in range(count):
            photograph, box = photographs[index % len(photographs)], None
            if side:
                size = tuple(int(side * share) for share in generator.uniform(0.85, 1.05, 2))
            else:
                size = tuple(int(generator.integers(150, min(500, length))) for length in photograph.size)
                left, top = (
                    int(generator.integers(length - part)) for length, part in zip(photograph.size, size, strict=True)
                )
                # Of this size already: cut out.
                box = (left, top, left + size[0], top + size[1])
            saved.append(pool.submit(save, index, box, size))
        for each in saved:
            each.result()


def make_linked_corpus(folder: Path, model: Path, side: int, count: int | None, share: int = 1) -> float:
    """
    `FILES` pictures and links to them, `count` together or what is `share` times a run of some seconds. Gives the
    patches of one on average.
    """
    make_corpus(folder, FILES, side)
    processor = local_class("image_processing_aimv2_packing.Aimv2PackingImageProcessor").from_pretrained(model)
    sizes = [Image.open(file).size for file in folder.iterdir()]
    patches = sum(processor.get_number_of_image_patches(height, width) for width, height in sizes) / FILES
    for index in range(FILES, count or int(share * PATCHES_PER_RUN / patches)):
        os.link(folder / f"{index % FILES:06}.jpg", folder / f"{index:06}.jpg")
    return patches


def make_model(folder: Path, layers: int, width: int) -> None:
    model_class = packing_class()
    config = model_class.config_class(
        is_native=True,
        use_head=False,
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_attention_heads=max(1, width // 128),
    )
    model_class(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_bytes((REPO / "preprocessor_config.json").read_bytes())


class Loop:
    """What one writes by hand: read, preprocess, pack, encode, keep the means, write one file."""

    def __init__(self, model: Path, dtype: str, device: str, budget: int):
        self.processor = local_class("image_processing_aimv2_packing.Aimv2PackingImageProcessor").from_pretrained(model)
        model_class = packing_class()
        self.model = model_class.from_pretrained(model, dtype=getattr(torch, dtype)).to(device).eval()
        self.dtype, self.device, self.budget = getattr(torch, dtype), device, budget
        self.patches = 0

    @torch.inference_mode()
    def encode(self, hidden_states: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        features = self.model(hidden_states.to(self.device), grids).last_hidden_state.float()
        return torch.segment_reduce(features, "mean", lengths=grids.prod(1).to(self.device))

    def batches(self, files: list[Path]):
        batch: list = []
        room = self.budget
        for file in files:
            inputs = self.processor(Image.open(file), return_tensors="pt")
            if batch and len(inputs["hidden_states"]) > room:
                yield self.packed(batch)
                batch, room = [], self.budget
            batch.append(inputs)
            room -= len(inputs["hidden_states"])
        yield self.packed(batch)

    def packed(self, batch: list) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat([i["hidden_states"] for i in batch]).to(self.dtype), torch.cat([i["grid_thw"] for i in batch])

    def __call__(self, folder: Path, output: Path) -> None:
        files = sorted(folder.iterdir())
        vectors = []
        for hidden_states, grids in self.batches(files):
            vectors.append(self.encode(hidden_states, grids).cpu().numpy())
            self.patches += len(hidden_states)
        rows = pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(vectors).reshape(-1)), vectors[0].shape[1])
        pq.write_table(pa.table({"id": [file.name for file in files], "embedding": rows}), output)

    @torch.inference_mode()
    def encoder_rate(self, folder: Path, seconds: float = 10) -> float:
        """Patches per second of the model alone, on batches that are on the device already."""
        batches = []
        for hidden_states, grids in self.batches(sorted(folder.iterdir())[:2000]):
            batches.append((hidden_states.to(self.device), grids))
            if len(batches) == 8:
                break
        patches = sum(len(hidden_states) for hidden_states, _ in batches)
        for hidden_states, grids in batches:
            self.model(hidden_states, grids)
        rounds, start = 0, self.now()
        while rounds == 0 or self.now() - start < seconds:
            for hidden_states, grids in batches:
                self.model(hidden_states, grids)
            rounds += 1
        return patches * rounds / (self.now() - start)

    def now(self) -> float:
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()


def printed_rate(printed: str) -> float:
    found = re.search(r"([\d,]+) patches/s from the first batch", printed)
    return float(found[1].replace(",", "")) if found else float("nan")


class Watch:
    """When patches were encoded, and the seconds of the main process by what it did."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, int]] = []
        self.seconds: dict[str, float] = {}
        self.patches = 0

    def timed(self, name: str, method: Callable) -> Callable:
        def timing(*arguments, **options):
            start = time.perf_counter()
            try:
                return method(*arguments, **options)
            finally:
                self.seconds[name] = self.seconds.get(name, 0) + time.perf_counter() - start

        return timing

    def __enter__(self) -> "Watch":
        def add(progress: Progress, counts: Counts) -> None:
            self.patches += counts.patches
            self.samples.append((time.perf_counter(), self.patches))
            add_to_progress(progress, counts)

        Progress.add = add  # type: ignore[assignment, method-assign]
        Encoder.encode = self.timed("launch", encode)  # type: ignore[method-assign]
        Encoder.table_of = self.timed("table", table_of)  # type: ignore[method-assign]
        Encoder.finish = self.timed("wait for the device, and table", finish)  # type: ignore[method-assign]
        return self

    def __exit__(self, *exception: object) -> None:
        Progress.add, Encoder.encode = add_to_progress, encode  # type: ignore[method-assign]
        Encoder.table_of, Encoder.finish = table_of, finish  # type: ignore[method-assign]


def middle_rate(runs: list[list[tuple[float, int]]]) -> float:
    """Patches per second of some runs together, while each is between a fifth and nine tenths of its patches."""
    arrays = [np.array(samples).T for samples in runs]
    # Of (2, number of batches) each: times, and patches by then.
    begin = max(np.interp(patches[-1] * 0.2, patches, times) for times, patches in arrays)
    end = min(np.interp(patches[-1] * 0.9, patches, times) for times, patches in arrays)
    if end <= begin:
        return float("nan")
    between = [np.diff(np.interp([begin, end], times, patches)) for times, patches in arrays]
    return float(np.sum(between) / (end - begin))


add_to_progress, encode, table_of, finish = Progress.add, Encoder.encode, Encoder.table_of, Encoder.finish


def against_the_encoder(folder: Path, arguments: argparse.Namespace) -> list[dict]:
    """Of each size of images and number of CPUs: the command's rates over that of the encoder alone."""
    model, found = Path(folder, "model"), []
    cpus = sorted(os.sched_getaffinity(0))
    for side in arguments.sides:
        corpus = folder / f"corpus{side}"
        patches = make_linked_corpus(corpus, model, side, arguments.images)
        loop = Loop(model, arguments.dtype, arguments.device, arguments.patches_per_batch)
        encoder_rate = loop.encoder_rate(corpus, seconds=3)
        del loop
        for count in arguments.cpus:
            os.sched_setaffinity(0, cpus[:count])
            with contextlib.redirect_stdout(io.StringIO()) as printed, Watch() as watch:
                start = time.perf_counter()
                run(options_of(model, corpus, folder / f"out{side}-{count}", arguments))
                total = time.perf_counter() - start
            os.sched_setaffinity(0, cpus)
            rate, middle = printed_rate(printed.getvalue()), middle_rate([watch.samples])
            own = watch.samples[-1][0] - watch.samples[0][0]
            figures = {
                "side": side,
                "patches_per_image": round(patches),
                "cpus": len(cpus[:count]),
                "encoder": encoder_rate,
                "process": rate,
                "middle": middle,
                "process_over_encoder": rate / encoder_rate,
                "middle_over_encoder": middle / encoder_rate,
                "total_seconds": total,
                "batches": len(watch.samples),
                "seconds": {**watch.seconds, "first batch to last": own},
            }
            found.append(figures)
            print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in figures.items()}), flush=True)
    print(" pixels patches  CPUs    encoder    command           middle           seconds")
    for each in found:
        print(
            f"{each['side'] or '150-500':>7} {each['patches_per_image']:7,}  {each['cpus']:4}  {each['encoder']:9,.0f}"
            f"  {each['process']:9,.0f} ({each['process_over_encoder']:.2f})  "
            f"{each['middle']:9,.0f} ({each['middle_over_encoder']:.2f})  {each['total_seconds']:6.1f}"
        )
    return found


def run_shard(
    model: Path, corpus: Path, output: Path, index: int, arguments: argparse.Namespace
) -> list[tuple[float, int]]:
    """When patches of one shard were encoded, on the clock that all processes share."""
    shard = {"num_shards": arguments.shards, "shard_index": index}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), Watch() as watch:
        run(dataclasses.replace(options_of(model, corpus, output, arguments), **shard))
    return watch.samples


def against_one_shard(folder: Path, arguments: argparse.Namespace) -> list[dict]:
    """Of each size of images: the rate of one shard alone, and of all at once, in processes that see one GPU each."""
    model, found = folder / "model", []
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(arguments.shards)))
    with contextlib.ExitStack() as stack:
        processes = []
        for gpu in gpus.split(",")[: arguments.shards]:
            # What a process that is started has from its beginning.
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu
            process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
            processes.append(stack.enter_context(process))
            process.submit(os.getpid)
        for side in arguments.sides:
            corpus = folder / f"corpus{side}"
            patches = make_linked_corpus(corpus, model, side, arguments.images, arguments.shards)
            for repetition in range(arguments.repetitions):
                rates = {}
                # All warm up at once.
                for name, some in (("together", processes), ("alone", processes[:1])):
                    output = folder / f"{name}{side}-{repetition}"
                    runs = [
                        process.submit(run_shard, model, corpus, output, index, arguments)
                        for index, process in enumerate(some)
                    ]
                    rates[name] = middle_rate([each.result() for each in runs])
                figures = {
                    "side": side,
                    "patches_per_image": round(patches),
                    **rates,
                    "together_over_alone": rates["together"] / rates["alone"],
                }
                found.append(figures)
                print(
                    f"{side or '150-500'} pixels, {patches:,.0f} patches an image: one shard {rates['alone']:,.0f} "
                    f"patches/s, {arguments.shards} at once {rates['together']:,.0f}, "
                    f"{figures['together_over_alone']:.2f} times one",
                    flush=True,
                )
    return found


def options_of(model: Path, corpus: Path, output: Path, arguments: argparse.Namespace) -> Options:
    return Options(
        model=str(model),
        input=[str(corpus)],
        output=str(output),
        dtype=arguments.dtype,
        device=arguments.device,
        patches_per_batch=arguments.patches_per_batch,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, help="(192; with --sides as many as take some seconds)")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--patches-per-batch", type=int, default=4096)
    parser.add_argument("--ray-workers", type=int, default=1, help="0: without Ray")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--sides", type=int, nargs="+", help="pixels a side, 0 for 150 to 500: no loop, no Ray")
    parser.add_argument("--cpus", type=int, nargs="+", default=[os.cpu_count()], help="of the command, with --sides")
    parser.add_argument("--shards", type=int, help="with --sides: so many at once against one, each on its own GPU")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()

    runs = []
    with tempfile.TemporaryDirectory() as folder:
        model, corpus = Path(folder, "model"), Path(folder, "corpus")
        make_model(model, arguments.layers, arguments.width)
        if arguments.sides:
            measure = against_one_shard if arguments.shards else against_the_encoder
            write_figures(arguments, {"runs": measure(Path(folder), arguments)})
            return
        arguments.images = arguments.images or 192
        make_corpus(corpus, arguments.images)
        budget = arguments.patches_per_batch
        encoder_rate = Loop(model, arguments.dtype, arguments.device, budget).encoder_rate(corpus)
        print(f"encoder alone {encoder_rate:,.0f} patches/s", flush=True)
        for repetition in range(arguments.repetitions):
            start = time.perf_counter()
            loop = Loop(model, arguments.dtype, arguments.device, budget)
            loaded = time.perf_counter()
            loop(corpus, Path(folder, f"loop{repetition}.parquet"))
            end = time.perf_counter()
            figures = {"loop": loop.patches / (end - loaded), "loop_total": end - start}
            del loop

            with contextlib.redirect_stdout(io.StringIO()) as printed:
                start = time.perf_counter()
                run(options_of(model, corpus, Path(folder, f"process{repetition}"), arguments))
                figures["process_total"] = time.perf_counter() - start
            figures["process"] = printed_rate(printed.getvalue())

            if arguments.ray_workers:
                options = ["--model", model, "--input", corpus, "--output", Path(folder, f"ray{repetition}")]
                options += ["--dtype", arguments.dtype, "--patches-per-batch", budget]
                options += ["--num-workers", arguments.ray_workers]
                command = [sys.executable, str(REPO / "extract_features.py"), *map(str, options)]
                start = time.perf_counter()
                result = subprocess.run(command, check=True, capture_output=True, text=True)
                figures |= {"ray": printed_rate(result.stdout), "ray_total": time.perf_counter() - start}
            runs.append(figures)
            print(", ".join(f"{name} {value:,.1f}" for name, value in figures.items()), flush=True)

    medians = {name: statistics.median(figures[name] for figures in runs) for name in runs[0]}
    print(f"{arguments.images} images, {os.cpu_count()} CPUs, {arguments.device}; medians:")
    print(f"in process: {medians['process'] / medians['loop']:.3f} of the loop, ", end="")
    print(f"{medians['process'] / encoder_rate:.3f} of the encoder alone, ", end="")
    print(f"total {medians['process_total'] / medians['loop_total']:.2f} times the loop's")
    if arguments.ray_workers:
        rate = medians["ray"]
        print(f"on Ray: {rate / medians['loop']:.3f} of the loop, {rate / encoder_rate:.3f} of the encoder alone")
    write_figures(arguments, {"encoder": encoder_rate, "runs": runs})


def write_figures(arguments: argparse.Namespace, figures: dict) -> None:
    if arguments.output:
        setting = {"arguments": vars(arguments) | {"output": None}, "torch": torch.__version__}
        arguments.output.write_text(json.dumps({**setting, **figures}, indent=2))


if __name__ == "__main__":
    main()
