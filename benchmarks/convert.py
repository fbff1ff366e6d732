# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
Time and peak memory of a conversion, side by side with `cp` of the same bytes: `cp` alone, and `cp` followed by the
forcing to disk that a conversion includes. Needs disk space for three checkpoints (33 GB for the 3B geometry).

    python benchmarks/convert.py --geometry 3B --folder /path/on/a/large/disk
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import Aimv2VisionConfig, Aimv2VisionModel
from workloads import GEOMETRIES, REPO


def make_source(folder: Path, geometry: str, checkpoint_format: str) -> Path:
    """A float32 checkpoint of the geometry at 448 pixels, written block by block, of values near zero."""
    hidden_size, intermediate_size, heads = GEOMETRIES[geometry]
    config = Aimv2VisionConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_attention_heads=heads,
        image_size=448,
        use_head=False,
    )
    with torch.device("meta"):
        shapes = {name: list(tensor.shape) for name, tensor in Aimv2VisionModel(config).state_dict().items()}
    if checkpoint_format == "apple":
        shapes = apple_shapes(shapes)
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    block = torch.randn(1 << 22).numpy().tobytes()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for position in range(0, end, len(block)):
            file.write(block[: end - position])
    fields = config.to_dict() | {"use_bias": False}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder / "model.safetensors"


def apple_shapes(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """The same in Apple's checkpoint format, where query, key and value have to be split."""
    renamed = {}
    for name, shape in shapes.items():
        part = name.split(".")
        if name.startswith("encoder.layers."):
            module = {
                "attention.q_proj": "attn.qkv",
                "attention.out_proj": "attn.proj",
                "ffn.gate_proj": "mlp.fc1",
                "ffn.down_proj": "mlp.fc2",
                "ffn.up_proj": "mlp.fc3",
                "rms_norm1": "norm_1",
                "rms_norm2": "norm_2",
            }.get(".".join(part[3:-1]))
            if module:
                fused = [3 * shape[0], *shape[1:]] if module == "attn.qkv" else shape
                renamed[f"trunk.blocks.{part[2]}.{module}.{part[-1]}"] = fused
        else:
            new_name = (
                name.replace("embeddings.patch_embed", "preprocessor.patchifier.proj")
                .replace("embeddings.rms_norm", "preprocessor.patchifier.norm")
                .replace("embeddings.position_embedding.weight", "preprocessor.pos_embed")
            )
            renamed["trunk.post_trunk_norm.weight" if name == "rms_norm.weight" else new_name] = shape
    return renamed


def timed(command: list[str]) -> tuple[float, float, float]:
    """Seconds that a command took, seconds of processor time, and the most memory that it had resident, in GB."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ended, code, usage = 0, 0, None
    while not ended:
        # The peak that the system counts; that of `wait4` includes this process before it became the command.
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = max([peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))])
        time.sleep(0.01)
        ended, code, usage = os.wait4(process.pid, os.WNOHANG)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(code)
    if process.returncode or usage is None:
        raise subprocess.CalledProcessError(process.returncode, command)
    return seconds, usage.ru_utime + usage.ru_stime, peak * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="large")
    parser.add_argument("--checkpoint-format", choices=("apple", "transformers"), default="apple")
    parser.add_argument("--max-shard-size", nargs="+", default=["1GB", "5GB", "50GB"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", help="where to work (default: the system's temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        weights = make_source(Path(scratch), options.geometry, options.checkpoint_format)
        size = f"{weights.stat().st_size / 1e9:.2f} GB"
        print(f"{options.geometry} geometry, checkpoint format {options.checkpoint_format}, float32: {size}")
        copy, output = Path(scratch, "copy"), Path(scratch, "output")
        converter = [sys.executable, str(REPO / "convert_weights.py"), str(weights), str(output)]
        commands = {
            "cp": ["cp", str(weights), str(copy)],
            "cp and sync": ["sh", "-c", f"cp '{weights}' '{copy}' && sync '{copy}'"],
        }
        commands |= {f"convert, shards of {x}": [*converter, "--max-shard-size", x] for x in options.max_shard_size}
        commands["import of the converter"] = [sys.executable, str(REPO / "convert_weights.py"), "--help"]
        commands["convert to bfloat16"] = [*converter, "--dtype", "bfloat16"]
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        processor: dict[str, list[float]] = {name: [] for name in commands}
        memory: dict[str, float] = dict.fromkeys(commands, 0.0)
        for _ in range(options.repeats):
            for name, command in commands.items():
                subprocess.run(["rm", "-rf", str(copy), str(output)], check=True)
                # What earlier runs left to be written must not be paid for by this one.
                os.sync()
                taken, busy, peak = timed(command)
                seconds[name].append(taken)
                processor[name].append(busy)
                memory[name] = max(memory[name], peak)
        print(
            "| command | seconds (median) | times `cp` | times `cp` and `sync` | processor seconds | peak memory, GB |"
        )
        print("|---|---|---|---|---|---|")
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        for name, median in medians.items():
            ratios = " | ".join(f"{median / medians[base]:.2f}" for base in ("cp", "cp and sync"))
            busy = statistics.median(processor[name])
            print(f"| {name} | {median:.1f} | {ratios} | {busy:.1f} | {memory[name]:.2f} |")


if __name__ == "__main__":
    main()
