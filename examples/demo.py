# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
Converts an AIMv2 checkpoint, verifies it on photographs of different shapes, and encodes them in one forward pass.

    python examples/demo.py
    python examples/demo.py --checkpoint apple/aimv2-large-patch14-native
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor


REPO = Path(__file__).resolve().parent.parent
# A twentieth of AIMv2-Large, with its head size, so that the demo takes seconds.
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
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = {**SMALL, "model_type": "aimv2", "patch_size": 14, "num_channels": 3, "qkv_bias": False, "use_bias": False}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="Hub id, folder or file (default: a small one with random weights)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = options.checkpoint
        if checkpoint is None:
            checkpoint = str(make_checkpoint(Path(folder, "aimv2-small-random")))
            print("Step 1. A small AIMv2 checkpoint with random weights, in Apple's original layout, has been made.")
        else:
            print(f"Step 1. The checkpoint is {checkpoint}.")

        converted = Path(folder, "aimv2-packed")
        command = ["convert_weights.py", checkpoint, str(converted), "--verify"]
        print(
            f"\nStep 2. Convert it, and compare with the original model image by image:\n  python {' '.join(command)}"
        )
        sys.stdout.flush()
        subprocess.run([sys.executable, str(REPO / command[0]), *command[1:]], check=True)
        print("\nThe model repo it made, ready to be loaded or pushed to the Hub:")
        for path in sorted(converted.iterdir()):
            print(f"  {path.name:40} {path.stat().st_size:>12,} bytes")

        print("\nStep 3. Load it with AutoModel and encode photographs of different shapes in one forward pass.")
        processor = AutoProcessor.from_pretrained(converted, trust_remote_code=True)
        model = AutoModel.from_pretrained(converted, trust_remote_code=True)
        paths = sorted((REPO / "examples" / "photographs").glob("*.jpg"))
        inputs = processor([Image.open(path) for path in paths], return_tensors="pt")
        with torch.no_grad():
            features = model(**inputs).last_hidden_state
        lengths = inputs["grid_thw"].prod(dim=1).tolist()
        print(f"  patches of all images   {tuple(inputs['hidden_states'].shape)}")
        print(f"  features of all images  {tuple(features.shape)}")
        for path, grid, feature in zip(paths, inputs["grid_thw"].tolist(), features.split(lengths), strict=True):
            with Image.open(path) as image:
                size = f"{image.width} x {image.height}"
            print(f"  {path.name:22}  {size:>9} pixels, {grid[1]:>2} x {grid[2]:>2} patches, {tuple(feature.shape)}")


if __name__ == "__main__":
    main()
