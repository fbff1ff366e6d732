# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
Converts an AIMv2 checkpoint, verifies it on photographs of different shapes, and encodes them in one forward pass.

    python examples/demo.py
    python examples/demo.py --source apple/aimv2-large-patch14-native

What it makes stays in build/demo; the next run replaces it. Without --source it needs no network.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from loading import PHOTOGRAPHS, REPO, load, run  # first: it says what is not installed


# isort: split
import torch
from PIL import Image
from safetensors.torch import save_file


OUTPUT = Path(REPO, "build", "demo")
# A sixtieth of AIMv2-Large, with its head size, so that the demo takes seconds.
SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 2}


def make_checkpoint(folder: Path) -> Path:
    """A native-resolution checkpoint in Apple's original layout, with random weights."""
    hidden_size, intermediate_size = SMALL["hidden_size"], SMALL["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "preprocessor.patchifier.proj.weight": (hidden_size, 3, 14, 14),
        "preprocessor.patchifier.proj.bias": (hidden_size,),
        "preprocessor.patchifier.norm.weight": (hidden_size,),
        "trunk.post_trunk_norm.weight": (hidden_size,),
    }
    for index in range(SMALL["num_hidden_layers"]):
        shapes |= {
            f"trunk.blocks.{index}.attn.qkv.weight": (3 * hidden_size, hidden_size),
            f"trunk.blocks.{index}.attn.proj.weight": (hidden_size, hidden_size),
            f"trunk.blocks.{index}.mlp.fc1.weight": (intermediate_size, hidden_size),
            f"trunk.blocks.{index}.mlp.fc2.weight": (hidden_size, intermediate_size),
            f"trunk.blocks.{index}.mlp.fc3.weight": (intermediate_size, hidden_size),
            f"trunk.blocks.{index}.norm_1.weight": (hidden_size,),
            f"trunk.blocks.{index}.norm_2.weight": (hidden_size,),
        }
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        fan_in = torch.Size(shape[1:]).numel()
        tensors[name] = 1 + 0.1 * noise if "norm" in name else noise / fan_in**0.5
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    config = {**SMALL, "model_type": "aimv2", "patch_size": 14, "num_channels": 3, "qkv_bias": False, "use_bias": False}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--source", help="what to convert: a Hub id, folder or file (default: a small one with random weights)"
    )
    source = parser.parse_args().source
    if source is None:
        source_folder = OUTPUT / "aimv2-small-random"
        shutil.rmtree(source_folder, ignore_errors=True)
        source = str(make_checkpoint(source_folder))
        print("Step 1. A small AIMv2 checkpoint with random weights, in Apple's original layout, has been made:")
        print(f"  {source}")
    else:
        print(f"Step 1. The checkpoint is {source}.")

    converted = OUTPUT / "aimv2-packed"
    shutil.rmtree(converted, ignore_errors=True)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    command = ["convert_weights.py", source, str(converted), "--verify"]
    print(f"\nStep 2. Convert it, and compare with the original model image by image:\n  python {' '.join(command)}")
    sys.stdout.flush()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"} if Path(source).exists() else None
    if code := subprocess.run(
        [sys.executable, f"{REPO}/{command[0]}", *command[1:]], check=False, env=environment
    ).returncode:
        # The command has said why.
        sys.exit(code)
    print("\nThe model repo it made, ready to be loaded or pushed to the Hub:")
    for path in sorted(converted.iterdir()):
        print(f"  {path.name:40} {path.stat().st_size:>12,} bytes")

    print("\nStep 3. Load it with AutoModel and encode photographs of different shapes in one forward pass.")
    processor, model = load(str(converted))
    paths = sorted(PHOTOGRAPHS.glob("*.jpg"))
    inputs = processor([Image.open(path) for path in paths], return_tensors="pt")
    with torch.no_grad():
        features = model(inputs["hidden_states"].to(model.device), inputs["grid_thw"]).last_hidden_state
    maps = processor.unpack_features(features, inputs["grid_thw"])
    print(f"  patches of all images   {tuple(inputs['hidden_states'].shape)}")
    print(f"  features of all images  {tuple(features.shape)}")
    for path, grid, feature_map in zip(paths, inputs["grid_thw"].tolist(), maps, strict=True):
        with Image.open(path) as image:
            size = f"{image.width} x {image.height}"
        print(f"  {path.name:22}  {size:>9} pixels, {grid[1]:>2} x {grid[2]:>2} patches, {tuple(feature_map.shape)}")
    print(f"\nThe model repo stays in {converted}, and the other examples take it:")
    print(f"  python examples/image_retrieval.py --checkpoint {converted}")


if __name__ == "__main__":
    run(main)
