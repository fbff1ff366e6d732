# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
examples/serve.py under open load: requests of pictures of many sizes arrive at random moments, however long the answers
take. Against the same server with one image a forward, and with padded batches of transformers' model.

    python benchmarks/serving.py --rates 10 20 --layers 2 --width 256                            # CPU
    python benchmarks/serving.py --device cuda --dtype bfloat16 --rates 100 200 400 800 1600

Each server is a process of its own, with the same weights, and has the load alone; clients are processes, too, with
requests that are written before. Latency is from the moment at which a request was due to its whole answer. Prints a
table: requests answered per second, and the p50 and p99 of their latency. `--output` has more, as JSON.
"""

import argparse
import asyncio
import base64
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
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
# At once, before anything is measured: on a GPU forwards of many sizes are compiled and captured.
WARM_UP = (256, 64, 16, 4, 1, 1)


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


def serve(kind: str, checkpoint: str, device: str, dtype: str, max_requests: int, descriptor: int) -> None:
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
    config = uvicorn.Config(example.create_app(encoder, "aimv2", limits), log_level="error")
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=descriptor)])


def make_requests(count: int) -> list[bytes]:
    """Of the bundled photographs, resized to 150 to 500 pixels a side."""
    generator = np.random.default_rng(0)
    photographs = [Image.open(file).convert("RGB") for file in sorted((REPO / "examples/photographs").glob("*.jpg"))]
    requests = []
    for index in range(count):
        width, height = generator.integers(150, 501, 2).tolist()
        file = BytesIO()
        photographs[index % len(photographs)].resize((width, height)).save(file, "JPEG", quality=90)
        url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}]
        wanted = {"messages": [{"role": "user", "content": content}], "encoding_format": "base64"}
        body = json.dumps(wanted).encode()
        head = f"POST /v1/embeddings HTTP/1.1\r\nHost: here\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        requests.append(head.encode() + body)
    return requests


async def ask(port: int, request: bytes) -> int:
    """The status of the answer, and 0 where there is none."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(request)
            return int((await reader.read()).split(maxsplit=2)[1])
        finally:
            writer.close()
    except (OSError, IndexError):
        return 0


async def ask_when_due(port: int, requests: list[bytes], due: list[float]) -> list[tuple[int, float, float, float]]:
    """Of each request its status, and when it was due, sent and answered: seconds since the epoch."""

    async def one(request: bytes, moment: float) -> tuple[int, float, float, float]:
        await asyncio.sleep(moment - time.time())
        sent = time.time()
        return await ask(port, request), moment, sent, time.time()

    return await asyncio.gather(*(one(requests[i % len(requests)], moment) for i, moment in enumerate(due)))


def client(port: int, requests: list[bytes], due: list[float]) -> list[tuple[int, float, float, float]]:
    return asyncio.run(ask_when_due(port, requests, due))


def open_load(clients: ProcessPoolExecutor, count: int, port: int, requests: list[bytes], delays: np.ndarray) -> dict:
    """Requests that are due so long from now, divided among processes."""
    start = time.time() + 0.3
    jobs = [
        clients.submit(client, port, requests[part::count], (start + delays[part::count]).tolist())
        for part in range(count)
    ]
    answers = np.array([answer for job in jobs for answer in job.result()])
    statuses, due, sent, ends = answers.T
    latencies = (ends - due)[statuses == 200] * 1e3
    return {
        "requests": len(answers),
        "answered": len(latencies),
        "refused": int((statuses == 503).sum()),
        "failed": int((~np.isin(statuses, (200, 503))).sum()),
        "answered_per_second": len(latencies) / (ends.max() - start),
        "p50_ms": float(np.quantile(latencies, 0.5)) if len(latencies) else None,
        "p99_ms": float(np.quantile(latencies, 0.99)) if len(latencies) else None,
        "sent_late_p99_ms": float(np.quantile(sent - due, 0.99) * 1e3),
    }


def started(kind: str, checkpoint: Path, args: argparse.Namespace) -> tuple[subprocess.Popen, int]:
    """A server and its port, which is bound here: until the server listens, no other process can take it."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        own = ["--serve", kind, "--socket", bound.fileno(), "--checkpoint", checkpoint]
        own += ["--device", args.device, "--dtype", args.dtype, "--max-requests", args.max_requests]
        command = [sys.executable, __file__, *map(str, own)]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        return subprocess.Popen(command, env=environment, pass_fds=[bound.fileno()]), bound.getsockname()[1]


def wait_until_up(server: subprocess.Popen, port: int, request: bytes) -> None:
    while (status := asyncio.run(ask(port, request))) != 200:
        if status:
            raise SystemExit(f"error: the server answers with {status}.")
        if server.poll() is not None:
            raise SystemExit(f"error: the server ended with {server.returncode}.")
        time.sleep(0.2)


def resident(server: subprocess.Popen) -> int | None:
    """Most bytes that the process has had in memory."""
    status = Path(f"/proc/{server.pid}/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)


def measure(checkpoint: Path, args: argparse.Namespace) -> list[dict]:
    requests = make_requests(256)
    servers = {kind: started(kind, checkpoint, args) for kind in args.kinds}
    rows = []
    try:
        with ProcessPoolExecutor(args.clients, multiprocessing.get_context("fork")) as clients:
            for server, port in servers.values():
                wait_until_up(server, port, requests[0])
            for kind, (server, port) in servers.items():
                for burst in WARM_UP[-2:] if args.device == "cpu" else WARM_UP:
                    open_load(clients, args.clients, port, requests, np.zeros(max(burst, args.clients)))
                for rate in args.rates:
                    generator = np.random.default_rng(0)
                    delays = np.cumsum(generator.exponential(1 / rate, max(args.clients, round(rate * args.seconds))))
                    row = {"server": kind, "rate": rate}
                    row |= open_load(clients, args.clients, port, requests, delays)
                    rows.append(row | {"peak_bytes": resident(server)})
                    print(json.dumps(rows[-1]), file=sys.stderr)
    finally:
        for server, _ in servers.values():
            server.terminate()
        for server, _ in servers.values():
            server.wait()
    return rows


def table_of(rows: list[dict], kinds: list[str], rates: list[float]) -> str:
    def cell(row: dict) -> str:
        if not row["answered"]:
            return "none answered"
        failed = f", {row['failed']} failed" if row["failed"] else ""
        return f"{row['answered_per_second']:.0f}/s, {row['p50_ms']:.0f} and {row['p99_ms']:.0f} ms{failed}"

    found = {(row["server"], row["rate"]): cell(row) for row in rows}
    lines = [["asked", *kinds], ["---"] * (len(kinds) + 1)]
    lines += [[f"{rate:g}/s", *(found[kind, rate] for kind in kinds)] for rate in rates]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--checkpoint", help="a converted checkpoint instead of random weights")
    parser.add_argument("--rates", nargs="+", type=float, default=[5], help="requests per second")
    parser.add_argument("--seconds", type=float, default=3, help="of load at each rate (%(default)s)")
    parser.add_argument("--clients", type=int, default=4, help="processes that ask (%(default)s)")
    parser.add_argument("--max-requests", type=int, default=256, help="in the server at once (%(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--serve", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--socket", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve, args.checkpoint, args.device, args.dtype, args.max_requests, args.socket)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = args.checkpoint or make_checkpoint(Path(folder), args.layers, args.width, args.dtype)
        rows = measure(Path(checkpoint), args)
    print(table_of(rows, args.kinds, args.rates))
    if args.output:
        device = torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu"
        setting = {name: value for name, value in vars(args).items() if name not in ("output", "serve", "socket")}
        args.output.write_text(json.dumps({"device": device, "settings": setting, "rows": rows}, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
