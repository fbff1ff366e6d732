# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
examples/finetune.py with the model divided by accelerate or by Trainer, and what came of it:

    accelerate launch --use_fsdp --fsdp_version 2 --num_processes 2 benchmarks/finetune_sharded.py --output OUTPUT
    torchrun --nproc-per-node 2 benchmarks/finetune_sharded.py --trainer-fsdp --output OUTPUT
    python benchmarks/finetune_sharded.py --compare EXPECTED OUTPUT...     # trained weights, of two folders or more

Other arguments are those of examples/finetune.py. The first process leaves OUTPUT/sharding.json.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file


REPO = Path(__file__).resolve().parent.parent


def report(finetune) -> type:
    """The callback of the example, which also writes what this process held."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    class Report(finetune.NewOrderEachEpoch):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            parameters = list(model.parameters())
            result = {
                "parameters": sum(p.numel() for p in parameters),
                "held": sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in parameters),
                "units": [name for name, module in model.named_modules() if isinstance(module, FSDPModule)],
                "losses": [entry["loss"] for entry in state.log_history if "loss" in entry],
                "processes": args.world_size,
            }
            if state.is_world_process_zero:
                Path(args.output_dir, "sharding.json").write_text(json.dumps(result, indent=1) + "\n")

    return Report


def compare(expected: Path, *others: Path) -> None:
    """
    Prints how far the trained weights are from `expected`, over how far training has moved them, and whether the repo
    loads with them.
    """
    from transformers import AutoModel

    def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
        if one.keys() != other.keys():
            raise ValueError(f"other tensors: {sorted(one.keys() ^ other.keys())}")
        return sum((one[name].double() - other[name].double()).square().sum().item() for name in one) ** 0.5

    for folder in others:
        try:
            sharding = json.loads((folder / "sharding.json").read_text())
            start, trained, other = (
                load_file(path / "model.safetensors") for path in (expected / "initial", expected, folder)
            )
            difference = distance(other, trained) / distance(trained, start)
            model = AutoModel.from_pretrained(folder, trust_remote_code=True)
            loads = all(torch.equal(value, other[f"vision_model.{name}"]) for name, value in model.state_dict().items())
        except (OSError, ValueError, KeyError) as error:
            print(json.dumps({"folder": folder.name, "error": str(error)}))
            continue
        print(json.dumps({"folder": folder.name, "difference": difference, "loads": loads, **sharding}))


def main() -> None:
    if "--compare" in sys.argv:
        return compare(*map(Path, sys.argv[2:]))
    sys.path.insert(0, str(REPO / "examples"))
    import finetune

    finetune.NewOrderEachEpoch = report(finetune)
    if "--trainer-fsdp" in sys.argv:
        sys.argv.remove("--trainer-fsdp")
        finetune.TrainingArguments = partial(finetune.TrainingArguments, fsdp=True, fsdp_config={"version": 2})
    return finetune.main()


if __name__ == "__main__":
    main()
