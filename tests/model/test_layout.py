# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""A layout goes where tensors go: through Trainer, accelerate, pinned memory, pickling, DDP and torch.export."""

import dataclasses
import itertools
import pickle
import shutil

import pytest
import torch
from reference import (
    ODD_GRIDS,
    REPO,
    Aimv2PackingConfig,
    hub_module,
    pack,
    packed_layout,
    packing_model,
    random_images,
    reference_model,
    with_positions,
)
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory
from transformers.dynamic_module_utils import get_class_from_dynamic_module


PackedLayout = hub_module("layout").PackedLayout


@pytest.fixture
def inputs():
    return pack(random_images(ODD_GRIDS))


@pytest.fixture(params=[True, False], ids=["native", "learned"])
def packed(request):
    return packing_model(reference_model(use_head=True, is_native=request.param))


@pytest.fixture
def layout(packed, inputs):
    return with_positions(packed_layout(inputs["grid_thw"], packed.config), packed.config)


def same(ours, expected) -> bool:
    return type(ours) is type(expected) and all(
        torch.equal(value, getattr(ours, name)) if isinstance(value, torch.Tensor) else value == getattr(ours, name)
        for name, value in vars(expected).items()
    )


def test_trainer_prepares_it(layout, inputs, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="needs requirements-scale.txt")
    arguments = transformers.TrainingArguments(tmp_path, use_cpu=True, report_to=[])
    trainer = transformers.Trainer(nn.Linear(1, 1), arguments)
    prepared = trainer._prepare_inputs({"hidden_states": inputs["hidden_states"], "layout": layout})
    assert same(prepared["layout"], layout)


def test_accelerate_moves_it(layout):
    operations = pytest.importorskip("accelerate.utils.operations", reason="needs requirements-scale.txt")
    moved = operations.send_to_device({"layout": layout}, torch.device("meta"), non_blocking=True)["layout"]
    assert isinstance(moved, PackedLayout)
    assert {value.device.type for value in moved.tensors().values()} == {"meta"}
    assert moved.runs == layout.runs
    assert set(moved.tensors()) == set(layout.tensors())


def test_a_data_loader_pins_it(layout, monkeypatch):
    """By the function that its pinning thread calls; without a GPU the copy is stood in for."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, device=None: self + 0)
    pinned = pin_memory({"layout": layout})["layout"]
    assert same(pinned, layout)
    for name, value in layout.tensors().items():
        assert getattr(pinned, name).data_ptr() != value.data_ptr()


def test_it_is_pickled_also_between_processes(layout):
    assert same(pickle.loads(pickle.dumps(layout)), layout)
    (from_worker,) = DataLoader([layout], batch_size=None, num_workers=1)
    assert same(from_worker, layout)


def test_ddp_takes_it(packed, inputs, layout, tmp_path):
    def step():
        """DDP ends with it, before its group does."""
        wrapped = nn.parallel.DistributedDataParallel(packed)
        ours = wrapped(inputs["hidden_states"], layout=layout).last_hidden_state
        ours.sum().backward()
        return ours.detach()

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ours = step()
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(ours, packed(**inputs).last_hidden_state)


def test_it_is_an_input_of_an_exported_program(packed, inputs, layout):
    """For these lengths, which are part of the program; its tensors are inputs."""
    program = torch.export.export(packed, (inputs["hidden_states"],), {"layout": layout}).module()
    other = pack(random_images(ODD_GRIDS))
    with torch.no_grad():
        ours = program(other["hidden_states"], layout=layout)["last_hidden_state"]
        assert (ours - packed(**other).last_hidden_state).abs().max() < 1e-5


def test_to_the_device_where_it_is_copies_nothing(layout):
    assert layout.to(layout.cu_seqlens.device) is layout
    assert layout.to("cpu") is layout


def test_it_has_no_dtype_to_change(layout):
    """Boundaries in half precision would be rounded."""
    with pytest.raises(TypeError):
        layout.to(torch.float16)


def test_layouts_are_compared_by_identity(layout):
    assert layout == layout  # noqa: PLR0124
    assert layout != dataclasses.replace(layout)


def test_one_of_another_copy_of_the_file_is_taken(packed, inputs, tmp_path):
    """As transformers' loader makes it, which puts each file that it is asked for into a package of its own."""
    for file in REPO.glob("*_aimv2_packing.py"):
        shutil.copy(file, tmp_path)
    other = get_class_from_dynamic_module("layout_aimv2_packing.packed_layout", tmp_path)
    layout = other(inputs["grid_thw"], packed.config)
    assert not isinstance(layout, PackedLayout)
    with torch.no_grad():
        ours, expected = packed(inputs["hidden_states"], layout=layout), packed(**inputs)
    assert torch.equal(ours.last_hidden_state, expected.last_hidden_state)


@pytest.mark.parametrize("side", [1, 2, 7, 10, 45, 64, 70])
def test_equal_neighbours_share_a_call_as_long_as_it_is_small(side):
    """As many as make 4,096 patches, or one that is larger; then the memory of the scores has a bound."""
    grid_thw = torch.tensor([(1, 1, side)] * 5 + [(1, side, side)] * 300 + [(3, side, side)] + [(1, 1, side)] * 2)
    layout = packed_layout(grid_thw, Aimv2PackingConfig())
    lengths = [side] * 5 + [side * side] * 303 + [side] * 2
    assert layout.lengths == tuple(lengths)
    expected = []
    for length, group in itertools.groupby(lengths):
        count, most = len(list(group)), max(1, 4096 // length)
        expected += [(most, length)] * (count // most) + [(count % most, length)] * (count % most > 0)
    assert list(layout.runs) == expected
    assert dataclasses.replace(layout, runs=None).lengths == ()
