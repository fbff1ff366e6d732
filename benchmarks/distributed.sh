#!/bin/bash
# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
# All of the benchmark of two GPUs: benchmarks/distributed.sh OUTPUT [--device cpu --small]
# A part that fails or hangs costs its own time. Leaves distributed.json, finetune.jsonl and a log of each command.
set -u
output=$1
shift
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 OMP_NUM_THREADS=4 HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
work=$(mktemp -d)
export HF_HOME="$work/cache"
trap 'rm -rf "$work"' EXIT
torchrun="python3 -m torch.distributed.run --standalone --nproc-per-node 2"

# Copies the model's code into the cache, before several processes want to.
timeout 60 python3 -c "import sys; sys.path[:0] = ['tests', 'examples']; import reference, finetune" || exit

timeout "${BENCHMARK_SECONDS:-170}" $torchrun --max-restarts 6 benchmarks/distributed.py \
    --output "$output/distributed.json" "$@" 2>&1 | tee "$output/distributed.log"

# A small model: all at once. Two are the example as it is, two divide the model by accelerate.
finetune() { # NAME COMMAND...
    name=$1
    shift
    timeout 75 "$@" --output "$work/$name" --steps 8 >"$output/$name.log" 2>&1 || echo "$name: failed with $?"
}
script=benchmarks/finetune_sharded.py
finetune ddp $torchrun $script &
finetune config_fsdp $torchrun $script --fsdp &
finetune trainer_fsdp $torchrun $script --trainer-fsdp &
finetune accelerate_fsdp python3 -m accelerate.commands.launch --use_fsdp --fsdp_version 2 \
    --fsdp_state_dict_type FULL_STATE_DICT --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP --num_processes 2 \
    --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 29611 $script &
wait
timeout 60 python3 $script --compare "$work"/{ddp,ddp,config_fsdp,trainer_fsdp,accelerate_fsdp} | tee "$output/finetune.jsonl"
