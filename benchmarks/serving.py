# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
examples/serve.py under open load: requests of pictures of many sizes arrive at random moments, however long the answers
take. Against the same server with one image a forward, and with padded batches of transformers' model.

    python benchmarks/serving.py --rates 20 50 --layers 2 --width 256 --seconds 10               # CPU
    python benchmarks/serving.py --device cuda --dtype bfloat16 --rates 100 200 400 800 1600

Each server is a process of its own, with the same weights; this one asks. Latency is from the moment at which a request
was due to its whole answer. Prints a table; `--output` has the same as JSON.
"""

import argparse
import asyncio
import base64
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import Aimv2VisionConfig, Aimv2VisionModel
from workloads import REPO

from conversion.features import pixels


KINDS = ("packed", "one image a forward", "padded")
PORT = 8765


def make_checkpoint(folder: Path, layers: int, width: int, dtype: str) -> Path:
    """A converted checkpoint of random weights."""
    torch.manual_seed(0)
    config = Aimv2VisionConfig(
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_attention_heads=max(1, width // 128),
        num_hidden_layers=layers,
        is_native=True,
        use_head=False,
    )
    Aimv2VisionModel(config).to(getattr(torch, dtype)).save_pretrained(folder / "original")
    command = [sys.executable, str(REPO / "convert_weights.py"), str(folder / "original"), str(folder / "converted")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder / "converted"


def serve(kind: str, checkpoint: str, device: str, dtype: str, max_requests: int) -> None:
    sys.path.insert(0, str(REPO / "examples"))
    import serve as example
    import uvicorn

    class Padded(example.Encoder):
        """transformers' model on one tensor of all images, each padded to the largest; means of its own patches."""

        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.original = Aimv2VisionModel.from_pretrained(checkpoint, dtype=self.model.dtype).to(self.model.device)

        def prepare(self, data: bytes, max_pixels: int) -> tuple[dict, int]:
            features, patches = super().prepare(data, max_pixels)
            (states,) = (value for value in features.values() if torch.is_tensor(value) and value.is_floating_point())
            (grid,) = (value for name, value in features.items() if "grid_thw" in name)
            image = pixels({"hidden_states": states, "grid_thw": grid}, self.model[0].config)[0]
            return {"image": image.to(self.original.dtype), "grid": grid[0]}, patches

        @torch.inference_mode()
        def __call__(self, samples: list) -> list[torch.Tensor]:
            tall, wide = (max(sample["image"].shape[side] for sample in samples) for side in (1, 2))
            batch = torch.zeros(len(samples), 3, tall, wide, dtype=self.original.dtype)
            for index, sample in enumerate(samples):
                batch[index, :, : sample["image"].shape[1], : sample["image"].shape[2]] = sample["image"]
            side = self.original.config.patch_size
            states = self.original(batch.to(self.original.device)).last_hidden_state
            maps = states.unflatten(1, (tall // side, wide // side))
            means = [
                feature[: int(sample["grid"][1]), : int(sample["grid"][2])].flatten(0, 1).float().mean(0)
                for feature, sample in zip(maps, samples, strict=True)
            ]
            return list(torch.stack(means).cpu())

    limits = example.Limits(requests=max_requests)
    if kind == "one image a forward":
        limits = replace(limits, patches_per_forward=1, wait_seconds=0)
    encoder = (Padded if kind == "padded" else example.Encoder)(checkpoint, device, dtype)
    uvicorn.run(example.create_app(encoder, "aimv2", limits), port=PORT, log_level="error")


def make_requests(count: int) -> list[bytes]:
    """Of parts of the bundled photographs, 112 to 500 pixels a side."""
    generator = np.random.default_rng(0)
    photographs = [Image.open(file).convert("RGB") for file in sorted((REPO / "examples/photographs").glob("*.jpg"))]
    requests = []
    for index in range(count):
        width, height = generator.integers(112, 500, 2).tolist()
        file = BytesIO()
        photographs[index % len(photographs)].resize((width, height)).save(file, "JPEG", quality=90)
        url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}]
        wanted = {"messages": [{"role": "user", "content": content}], "encoding_format": "base64"}
        body = json.dumps(wanted).encode()
        head = f"POST /v1/embeddings HTTP/1.1\r\nHost: here\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        requests.append(head.encode() + body)
    return requests


async def ask(request: bytes) -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
    try:
        writer.write(request)
        answer = await reader.read()
        return int(answer.split(maxsplit=2)[1])
    finally:
        writer.close()


async def open_load(requests: list[bytes], rate: float, seconds: float, seed: int = 0) -> dict:
    """Requests at the moments of a Poisson process."""
    generator = np.random.default_rng(seed)
    due = np.cumsum(generator.exponential(1 / rate, max(1, round(rate * seconds))))
    start = time.perf_counter()
    ends: list[tuple[int, float, float]] = []

    async def one(index: int) -> None:
        await asyncio.sleep(max(0.0, start + due[index] - time.perf_counter()))
        try:
            status = await ask(requests[index % len(requests)])
        except (OSError, IndexError):
            status = 0
        now = time.perf_counter() - start
        ends.append((status, now - due[index], now))

    await asyncio.gather(*map(one, range(len(due))))
    latencies = np.array([latency for status, latency, _ in ends if status == 200] or [np.nan]) * 1e3
    answered = sum(status == 200 for status, *_ in ends)
    return {
        "rate": rate,
        "requests": len(due),
        "answered": answered,
        "refused": sum(status == 503 for status, *_ in ends),
        "failed": sum(status not in (200, 503) for status, *_ in ends),
        "answered_per_second": answered / max(end for *_, end in ends),
        "p50_ms": float(np.quantile(latencies, 0.5)),
        "p99_ms": float(np.quantile(latencies, 0.99)),
    }


async def wait_until_up(process: subprocess.Popen, request: bytes) -> None:
    while True:
        if process.poll() is not None:
            raise SystemExit(f"error: the server ended with {process.returncode}.")
        try:
            await ask(request)
            return
        except OSError:
            await asyncio.sleep(0.2)


def resident(process: subprocess.Popen) -> int | None:
    """Most bytes that the process has had in memory."""
    status = Path(f"/proc/{process.pid}/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)


def measure(kind: str, checkpoint: Path, requests: list[bytes], args: argparse.Namespace) -> list[dict]:
    own = ["--serve", kind, "--checkpoint", checkpoint, "--device", args.device, "--dtype", args.dtype]
    command = [sys.executable, __file__, *map(str, own), "--max-requests", str(args.max_requests)]
    process = subprocess.Popen(command, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})
    try:
        asyncio.run(wait_until_up(process, requests[0]))
        asyncio.run(open_load(requests, args.rates[0], min(3.0, args.seconds), seed=1))  # warms up
        rows = []
        for rate in args.rates:
            row = {
                "server": kind,
                **asyncio.run(open_load(requests, rate, args.seconds)),
                "peak_bytes": resident(process),
            }
            rows.append(row)
            print(
                f"| {kind} | {rate:g} | {row['answered_per_second']:.1f} | {row['p50_ms']:.0f} | {row['p99_ms']:.0f} | "
                f"{row['refused'] / row['requests']:.0%} | {row['failed']} |",
                flush=True,
            )
        return rows
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--checkpoint", help="a converted checkpoint instead of random weights")
    parser.add_argument("--rates", nargs="+", type=float, default=[5], help="requests per second")
    parser.add_argument("--seconds", type=float, default=20, help="of load at each rate (%(default)s)")
    parser.add_argument("--max-requests", type=int, default=256, help="in the server at once (%(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--serve", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve, args.checkpoint, args.device, args.dtype, args.max_requests)
    requests = make_requests(256)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = args.checkpoint or make_checkpoint(Path(folder), args.layers, args.width, args.dtype)
        print("| server | asked per second | answered per second | p50, ms | p99, ms | 503 | failed |")
        print("|---|---|---|---|---|---|---|")
        rows = [row for kind in args.kinds for row in measure(kind, Path(checkpoint), requests, args)]
    if args.output:
        device = torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu"
        setting = {name: value for name, value in vars(args).items() if name not in ("output", "serve")}
        args.output.write_text(json.dumps({"device": device, "settings": setting, "rows": rows}, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
