# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
One rank of a training step under each strategy in turn: `torchrun --nproc-per-node=2 distributed_worker.py MODEL
OUTPUT [DEVICE]`. Rank 0 leaves the gradients, the trained checkpoint and what it held in OUTPUT/STRATEGY.
"""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from reference import ODD_GRIDS, Aimv2PackingModel, pack, random_images
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.distributed import DistributedConfig


STRATEGIES = (
    *("fsdp", "fsdp_checkpointing", "fsdp_empty", "fsdp_accelerate", "fsdp_config"),
    *("tp", "ddp_empty", "ddp_lora"),
)
LEARNING_RATE = 0.1


def join(device: str) -> torch.device:
    """Joins the processes of torchrun; each has a device of its own."""
    if device == "cpu":
        dist.init_process_group("gloo")
        return torch.device("cpu")
    own = torch.device(device, int(os.environ["LOCAL_RANK"]))
    torch.accelerator.set_device_index(own.index)
    dist.init_process_group("nccl", device_id=own, timeout=timedelta(minutes=2))
    return own


def batch_of(rank: int) -> dict[str, torch.Tensor]:
    """Another batch on every rank: other images, and another number of them."""
    torch.manual_seed(100 + rank)
    return pack(random_images(ODD_GRIDS if rank == 0 else ODD_GRIDS[3:6]))


def empty_batch() -> dict[str, torch.Tensor]:
    return {"hidden_states": torch.empty(0, 588), "grid_thw": torch.empty(0, 3, dtype=torch.int64)}


def loss_of(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    output = model(**{**batch, "hidden_states": batch["hidden_states"].to(next(model.parameters()).device)})
    features = output.last_hidden_state
    precision = torch.promote_types(features.dtype, torch.float32)
    probe = torch.arange(features.shape[1]).cos().to(features.device, precision)
    outputs = (features, output.pooler_output) if output.pooler_output is not None else (features,)
    return torch.stack([torch.tanh(each.to(precision) @ probe).sum() for each in outputs]).sum()


def add_lora(model: torch.nn.Module) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(7)
    targets = ["q_proj", "v_proj", "gate_proj"]
    # The default start, where the adapters are the identity, would hide half of the gradients.
    return get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))


def full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone().contiguous()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Whole gradients by the name of their parameter; a parameter without one is missing."""
    return {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def shard(model: torch.nn.Module) -> torch.nn.Module:
    for layer in model.encoder.layers:
        fully_shard(layer)
    return fully_shard(model)


def shard_by_accelerate(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """As `accelerate launch --use_fsdp --fsdp_version 2` and Trainer do, which on a CPU would run DDP."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", is_main_process=True, device=device
    )
    return fsdp2_prepare_model(accelerator, model)


def batches_of(strategy: str) -> list[dict[str, torch.Tensor]]:
    """The batch of each rank; under tensor parallelism all work on one."""
    if strategy == "tp":
        return [batch_of(0)]
    return [batch_of(0), empty_batch() if strategy.endswith("_empty") else batch_of(1)]


def train_in_one_process(model: torch.nn.Module, batches: list[dict]) -> tuple[dict, dict]:
    """The gradient of the mean of the batches' losses, and the parameters after one step of plain descent."""
    model.train()
    (torch.stack([loss_of(model, batch) for batch in batches]).sum() / len(batches)).backward()
    torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=LEARNING_RATE).step()
    return gradients(model), {name: p.detach() for name, p in model.named_parameters()}


def train(
    strategy: str, folder: str | Path, output: Path, device: torch.device, dtype: torch.dtype = torch.float32
) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    batches = batches_of(strategy)
    batch = batches[rank % len(batches)]
    state_dict = None
    by_config = strategy in ("fsdp_config", "tp")
    by_torch = strategy in ("fsdp", "fsdp_checkpointing", "fsdp_empty", "fsdp_accelerate")

    if by_config:
        axis = "tp_size" if strategy == "tp" else "fsdp_size"
        config = DistributedConfig(**{axis: size})
        model = Aimv2PackingModel.from_pretrained(folder, dtype=dtype, distributed_config=config)
    else:
        model = Aimv2PackingModel.from_pretrained(folder, dtype=dtype).to(device)
    model.train()
    if strategy == "fsdp_checkpointing":
        model.gradient_checkpointing_enable()
    if strategy == "fsdp_accelerate":
        shard_by_accelerate(model, device)
    elif by_torch:
        shard(model)
    if strategy == "ddp_lora":
        model = add_lora(model)
    wrapped = DistributedDataParallel(model) if strategy.startswith("ddp") else model

    # One parameter at a time: under tensor parallelism some are sharded and some are not.
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=LEARNING_RATE, foreach=False)
    loss_of(wrapped, batch).backward()
    grads = gradients(model)
    optimizer.step()

    if by_torch:
        state_dict = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    # Every rank takes part: transformers gathers what it has sharded itself, and writes on the first rank.
    if by_config or rank == 0:
        model.save_pretrained(output / "checkpoint", state_dict=state_dict)
    if rank == 0:
        save_file(grads, output / "gradients.safetensors")
        held = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in model.parameters())
        units = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
        (output / "state.json").write_text(json.dumps({"held": held, "units": units}))


def main() -> None:
    device = join(sys.argv[3] if len(sys.argv) > 3 else "cpu")
    for strategy in STRATEGIES:
        output = Path(sys.argv[2]) / strategy
        output.mkdir(exist_ok=True)
        train(strategy, sys.argv[1], output, device)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
