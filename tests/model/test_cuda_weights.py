# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Weights side by side in memory: every writer and saver finds them as before, and the engine never an old value."""

import copy
import io
import logging

import pytest
import torch
from cuda_models import (
    DEVICE,
    SHALLOW,
    accelerated,
    cuda_engine,
    cuda_graphs,
    distance,
    features,
    gpu,
    inputs_of,
    is_merged,
    model_of,
    plain_features,
)
from reference import ODD_GRIDS, Aimv2PackingAcceleratedModel, packing_model, reference_model
from torch import nn


lay_side_by_side, are_adjacent, whole_of = (
    cuda_graphs.lay_side_by_side,
    cuda_graphs.are_adjacent,
    cuda_graphs.whole_of,
)
WEIGHT = "encoder.layers.1.attention.k_proj.weight"


def three(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(rows, 8, device=DEVICE, dtype=dtype)) for rows in (4, 2, 6)]


def lay_all(packed) -> None:
    """What happens by itself on a GPU, on whatever device this is."""
    for parameters in cuda_engine.merged_parameters(packed):
        assert are_adjacent(parameters) or lay_side_by_side(parameters) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_keep_values_and_a_storage_each(dtype):
    parameters = three(dtype)
    before = [parameter.detach().clone() for parameter in parameters]
    assert lay_side_by_side(parameters) is None
    assert are_adjacent(parameters)
    assert all(torch.equal(parameter, value) for parameter, value in zip(parameters, before, strict=True))
    assert all(parameter.untyped_storage().nbytes() == parameter.nbytes for parameter in parameters)
    assert all(parameter.storage_offset() == 0 and parameter.is_leaf for parameter in parameters)
    assert torch.equal(whole_of(parameters), torch.cat(before))


def write_by_optimizer(parameters, **options):
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(parameters, lr=0.1, **options).step()


def average(parameters):
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(parameter * 0.9 + 0.1)


WRITERS = {
    "fused optimizer": lambda parameters: write_by_optimizer(parameters, fused=True),
    "foreach optimizer": lambda parameters: write_by_optimizer(parameters, foreach=True),
    "data": lambda parameters: [parameter.data.mul_(2) for parameter in parameters],
    "average": average,
    "memory": lambda parameters: [parameter.detach().view(-1)[:3].fill_(7) for parameter in parameters],
}


@pytest.mark.parametrize("write", WRITERS)
def test_whoever_writes_writes_to_the_one_place_there_is(write):
    parameters = three()
    assert lay_side_by_side(parameters) is None
    whole = whole_of(parameters)
    before = whole.clone()
    WRITERS[write](parameters)
    assert torch.equal(whole, torch.cat([parameter.detach() for parameter in parameters]))
    assert not torch.equal(whole, before)


def test_memory_is_freed_with_the_last_of_them():
    parameters = three()
    assert lay_side_by_side(parameters) is None
    view = whole_of(parameters)
    storage = torch.multiprocessing.reductions.StorageWeakRef(parameters[0].untyped_storage())
    del view
    assert not storage.expired()
    for parameter in parameters:
        parameter.data = parameter.data.clone()
    assert storage.expired()
    assert not are_adjacent(parameters)


def shared() -> list[nn.Parameter]:
    return [nn.Parameter(part) for part in torch.randn(3, 4, 8, device=DEVICE).unbind()]


def with_alias() -> list:
    parameters = three()
    return [*parameters, parameters[1].detach()]


class Quantized(nn.Parameter):
    pass


def kept_apart() -> dict[str, tuple[list, str]]:
    whole, same, tied = three(), three(), three()
    tied[2] = nn.Parameter(tied[0])
    return {
        "dtypes": ([whole[0], nn.Parameter(whole[1].half())], "differ in dtype"),
        "widths": ([whole[0], nn.Parameter(torch.ones(4, 6, device=DEVICE))], "differ in dtype, device or shape"),
        "same parameter": ([same[0], same[0]], "used twice"),
        "tied": (tied, "shares its storage"),
        "views of one storage": (shared(), "shares its storage"),
        "other class": ([whole[0], Quantized(whole[1].detach().clone())], "is a Quantized"),
        "meta": ([nn.Parameter(torch.ones(4, 8, device="meta"))] * 2, "meta"),
        "transposed": ([nn.Parameter(torch.ones(8, 8, device=DEVICE).t())], "not contiguous"),
        "integers": ([nn.Parameter(torch.ones(4, 8, dtype=torch.int8), requires_grad=False)], "floating-point"),
        "misaligned": ([nn.Parameter(torch.ones(3, 3, device=DEVICE))], "16 bytes"),
        "empty": ([nn.Parameter(torch.ones(0, 8, device=DEVICE))], "16 bytes"),
    }


@pytest.mark.parametrize("case", kept_apart())
def test_what_keeps_them_apart_is_said_and_moves_nothing(case):
    parameters, reason = kept_apart()[case]
    before = [parameter.data_ptr() for parameter in parameters if not parameter.is_meta]
    assert reason in lay_side_by_side(parameters)
    assert [parameter.data_ptr() for parameter in parameters if not parameter.is_meta] == before


def test_an_alias_of_the_callers_keeps_them_apart():
    *parameters, alias = with_alias()
    assert "shares its storage" in lay_side_by_side(parameters)
    with torch.no_grad():
        parameters[1].fill_(3)
    assert (alias == 3).all()


@pytest.mark.skipif(DEVICE == "cuda", reason="CUDA memory is always shared")
def test_shared_memory_keeps_them_apart():
    parameters = three()
    parameters[1].share_memory_()
    assert "shared" in lay_side_by_side(parameters)


def test_adjacent_views_of_one_buffer_are_merged_without_moving():
    parameters = shared()
    assert are_adjacent(parameters)
    whole = whole_of(parameters)
    assert whole.data_ptr() == parameters[0].data_ptr() and whole.shape == (12, 8)
    assert not are_adjacent(parameters[::-1])


def test_laid_in_inference_mode_they_can_be_trained():
    packed = packing_model(reference_model())
    with torch.inference_mode():
        moved = packed.double()
        lay_all(moved)
    assert not any(parameter.is_inference() for own in cuda_engine.merged_parameters(moved) for parameter in own)
    parameters = [parameter for own in cuda_engine.merged_parameters(moved) for parameter in own]
    sum(parameter.square().sum() for parameter in parameters).backward()
    torch.optim.SGD(parameters, lr=0.1).step()


def test_products_are_one_where_weights_and_biases_are_adjacent():
    linears = [nn.Linear(8, rows, device=DEVICE) for rows in (8, 4, 12)]
    products_of = cuda_engine.products_of
    states = torch.randn(5, 8, device=DEVICE)
    expected = torch.cat([linear(states) for linear in linears], dim=1)

    def computed() -> torch.Tensor:
        out = torch.zeros(5, 24, device=DEVICE)
        for product in products_of(*linears):
            out[:, product.columns] = states @ product.weight.T + product.bias
        return out

    assert len(products_of(*linears)) == 3
    assert (computed() - expected).abs().max() < 1e-5
    assert lay_side_by_side([linear.weight for linear in linears]) is None
    assert len(products_of(*linears)) == 3
    assert lay_side_by_side([linear.bias for linear in linears]) is None
    assert len(products_of(*linears)) == 1
    assert (computed() - expected).abs().max() < 1e-5
    linears[1].bias = None
    assert [product.bias is None for product in products_of(*linears)] == [False, True, False]


@pytest.mark.parametrize(
    "change",
    [
        lambda packed: packed.double(),
        lambda packed: setattr(packed.rms_norm, "weight", nn.Parameter(packed.rms_norm.weight.clone())),
        lambda packed: setattr(packed.encoder.layers[0].ffn.up_proj.weight, "data", torch.zeros(96, 64)),
        lambda packed: setattr(packed.get_parameter(WEIGHT), "data", packed.get_parameter(WEIGHT).data.t()),
    ],
    ids=["moved", "parameter_replaced", "data_exchanged", "transposed"],
)
def test_an_engine_is_given_up_with_the_memory_that_it_reads(change):
    packed = packing_model(reference_model())
    state = accelerated.current_state(packed)
    engine = state.engines["cuda"] = cuda_engine.Engine(packed, state.weights())
    assert cuda_engine.known_engine(accelerated.current_state(packed)) is engine
    change(packed)
    assert cuda_engine.known_engine(accelerated.current_state(packed)) is None


SAVERS = ["state_dict", "whole model", "save_pretrained", "save_model", "save_torch_state_dict", "accelerator"]


@pytest.mark.parametrize("saver", SAVERS)
def test_files_are_those_of_a_model_that_was_never_laid(saver, tmp_path):
    """Values, names and sizes."""
    packed = packing_model(reference_model(use_head=True)).to(DEVICE)
    apart = packing_model(reference_model(use_head=True), plain=True).to(DEVICE)
    apart.load_state_dict(packed.state_dict())
    lay_all(packed)
    assert is_merged(packed)
    saved = [save(saver, model, tmp_path / name) for name, model in (("ours", packed), ("theirs", apart))]
    assert saved[0] == saved[1]
    assert all(torch.equal(value, apart.state_dict()[name]) for name, value in packed.state_dict().items())


def save(saver: str, model, folder) -> dict[str, int]:
    """Saves the model and returns the files that hold weights, and their sizes."""
    from huggingface_hub import save_torch_state_dict
    from safetensors.torch import save_model

    folder.mkdir()
    if saver == "state_dict":
        torch.save(model.state_dict(), folder / "model.pt")
    elif saver == "whole model":
        buffer = io.BytesIO()
        torch.save(model.encoder, buffer)
        # Names of classes differ in length.
        return {"model.pt": len(buffer.getvalue())}
    elif saver == "save_pretrained":
        model.save_pretrained(folder)
    elif saver == "save_model":
        save_model(model, str(folder / "model.safetensors"))
    elif saver == "save_torch_state_dict":
        save_torch_state_dict(model.state_dict(), folder)
    else:
        accelerate = pytest.importorskip("accelerate", reason="needs requirements-scale.txt")
        accelerate.Accelerator(cpu=DEVICE == "cpu").save_model(model, folder)
    return {path.name: path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".pt")}


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_loads_into_them(assign):
    packed, other = packing_model(reference_model()).to(DEVICE), packing_model(reference_model()).to(DEVICE)
    with torch.no_grad():
        other.get_parameter(WEIGHT).mul_(2)
    lay_all(packed)
    packed.load_state_dict(other.state_dict(), assign=assign)
    assert is_merged(packed) or assign
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in packed.state_dict().items())


# On a GPU

GRIDS = [*ODD_GRIDS, (16, 16)]


@pytest.fixture
def packed():
    return model_of(torch.bfloat16, **SHALLOW)


@pytest.fixture
def inputs():
    return inputs_of(GRIDS)


def agree(packed, inputs) -> float:
    """How far the engine is from the plain model, from its third forward on, which is a graph's."""
    return distance(features(packed, inputs, times=3), plain_features(packed, inputs))


@gpu
def test_they_are_laid_as_they_arrive_and_not_later(tmp_path):
    packed = packing_model(reference_model(torch.bfloat16))
    assert not is_merged(packed)
    packed.cuda()
    assert is_merged(packed)
    addresses = [parameter.data_ptr() for parameter in packed.parameters()]
    packed.cuda().eval().to(torch.bfloat16)
    assert [parameter.data_ptr() for parameter in packed.parameters()] == addresses
    assert is_merged(copy.deepcopy(packed))
    assert is_merged(packed.half()) and is_merged(packed.cpu().cuda())
    packed.save_pretrained(tmp_path)
    assert is_merged(Aimv2PackingAcceleratedModel.from_pretrained(tmp_path, device_map="cuda"))
    holder = nn.ModuleDict({"tower": packing_model(reference_model())})
    assert is_merged(holder.cuda()["tower"])


@gpu
def test_those_that_others_may_know_stay_where_they_are(caplog):
    packed = packing_model(reference_model()).cuda()
    key = packed.encoder.layers[1].attention.k_proj
    key.weight = nn.Parameter(key.weight.detach().clone())
    address = key.weight.data_ptr()
    packed.cuda()
    assert key.weight.data_ptr() == address and not is_merged(packed)
    inputs = inputs_of(ODD_GRIDS)
    assert distance(features(packed, inputs, times=3), plain_features(packed, inputs)) < 1e-5
    alias = key.weight.detach()
    with caplog.at_level(logging.DEBUG):
        cuda_engine.lay_weights(packed)
    assert "stay apart: one shares its storage" in caplog.text
    assert alias.data_ptr() == key.weight.data_ptr()


@gpu
@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"capturable": True}], ids=str)
def test_after_an_optimizers_step_features_are_the_new_ones(packed, inputs, options):
    before = agree(packed, inputs)
    old = features(packed, inputs)
    for name, parameter in packed.named_parameters():
        parameter.grad = torch.randn_like(parameter) if "norm" not in name else torch.zeros_like(parameter)
    torch.optim.AdamW(packed.parameters(), lr=1e-2, **options).step()
    assert distance(features(packed, inputs), old) > 0.05
    assert agree(packed, inputs) <= 1.2 * before


def broadcast(packed):
    import torch.distributed as dist

    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for parameter in packed.parameters():
            dist.broadcast(parameter.data, 0)
            parameter.data.mul_(0.9)
    finally:
        dist.destroy_process_group()


GPU_WRITERS = {
    "data": lambda packed: packed.get_parameter(WEIGHT).data.mul_(-2),
    "broadcast": broadcast,
    "average": lambda packed: average(packed.parameters()),
    "load_state_dict": lambda packed: packed.load_state_dict(
        {name: value * 0.9 for name, value in packed.state_dict().items()}
    ),
    "assign": lambda packed: packed.load_state_dict(
        {name: value * 0.9 for name, value in packed.state_dict().items()}, assign=True
    ),
    "exchanged data": lambda packed: setattr(
        packed.get_parameter(WEIGHT), "data", packed.get_parameter(WEIGHT).data * -2
    ),
    "half": lambda packed: packed.half(),
    "to the CPU and back": lambda packed: average(packed.cpu().cuda().parameters()),
    "transposed": lambda packed: setattr(packed.get_parameter(WEIGHT), "data", packed.get_parameter(WEIGHT).data.t()),
}


@gpu
@pytest.mark.parametrize("write", GPU_WRITERS)
def test_whatever_writes_to_weights_is_seen(packed, inputs, write):
    before = agree(packed, inputs)
    old = features(packed, inputs)
    GPU_WRITERS[write](packed)
    assert not torch.equal(features(packed, inputs).float(), old.float())
    assert agree(packed, inputs) <= 1.2 * before


@gpu
def test_after_an_adapter_is_merged_and_unmerged_features_are_the_new_ones(packed, inputs):
    peft = pytest.importorskip("peft", reason="needs requirements-scale.txt")
    before, old = agree(packed, inputs), features(packed, inputs)
    lora = peft.LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"])
    adapted = peft.get_peft_model(packed, lora)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.merge_adapter()
    adapted.unmerge_adapter()
    merged = adapted.merge_and_unload()
    assert distance(features(merged, inputs), old) > 0.05
    assert agree(merged, inputs) <= 1.2 * before


def requested() -> int:
    """Bytes of GPU memory that are asked for; blocks may be larger."""
    torch.cuda.synchronize()
    return torch.cuda.memory_stats()["requested_bytes.all.current"]


@gpu
def test_the_engine_holds_no_memory_but_buffers_and_graphs(packed, inputs):
    features(packed, inputs, times=3)
    packed.release_cuda_graphs()
    weights, before = sum(parameter.nbytes for parameter in packed.parameters()), requested()
    features(packed, inputs, times=3)
    assert requested() > before
    packed.release_cuda_graphs()
    assert requested() <= before
    packed.cpu()
    assert requested() <= before - weights
    packed.cuda()
    assert requested() <= before


@gpu
def test_weights_are_freed_with_the_model(inputs):
    features(model_of(torch.bfloat16, **SHALLOW), inputs, times=3)
    before = requested()
    packed = model_of(torch.bfloat16, **SHALLOW)
    features(packed, inputs, times=3)
    del packed
    assert requested() <= before


@gpu
def test_data_parallel_training_and_sharding_read_and_write_them(packed, inputs):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        before = agree(packed, inputs)
        parallel = DistributedDataParallel(packed)
        parallel(**inputs).last_hidden_state.float().square().mean().backward()
        torch.optim.AdamW(parallel.parameters(), lr=1e-2, fused=True).step()
        assert is_merged(packed)
        assert agree(packed, inputs) <= 1.2 * before
        expected = plain_features(packed, inputs)
        sharded = fully_shard(packed, mesh=init_device_mesh("cuda", (1,)))
        with torch.no_grad():
            ours = [sharded(**inputs).last_hidden_state for _ in range(4)]
        assert all(distance(own, expected) < 0.02 for own in ours)
    finally:
        dist.destroy_process_group()


@gpu
def test_accelerate_saves_and_loads_its_state(packed, inputs, tmp_path):
    accelerator = pytest.importorskip("accelerate", reason="needs requirements-scale.txt").Accelerator()
    prepared = accelerator.prepare(packed)
    expected = features(packed, inputs, times=3)
    accelerator.save_state(str(tmp_path))
    average(prepared.parameters())
    assert not torch.equal(features(packed, inputs), expected)
    accelerator.load_state(str(tmp_path))
    assert torch.equal(features(packed, inputs), expected)
