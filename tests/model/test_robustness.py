# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""What a model has to survive: long runs, threads, copies, other processes, and changes of dtype and mode."""

import copy
import gc
import io
import pickle
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import product
from multiprocessing import get_context

import psutil
import pytest
import torch
from reference import (
    ODD_GRIDS,
    pack,
    packed_layout,
    packing_model,
    random_images,
    random_mixes,
    reference_model,
)
from torch.utils.data import DataLoader, Dataset


CONFIGS = {"native": {"use_head": True}, "learned": {"use_head": True, "is_native": False}}


@pytest.fixture
def inputs():
    return pack(random_images(ODD_GRIDS))


def outputs_of(model, inputs: dict[str, torch.Tensor], **kwargs) -> list[torch.Tensor]:
    with torch.inference_mode():
        outputs = model(**inputs, **kwargs)
    return [outputs.last_hidden_state, outputs.pooler_output, *(outputs.hidden_states or ())]


def same_bits(ours: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ours, expected, strict=True))


def growth_in_a_long_run() -> tuple[int, int]:
    """Bytes and Python objects that 1,000 mixes leave behind, half of them with gradients."""
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 24, "patch_size": 2, "image_size": 8}
    models = [packing_model(reference_model(**config, **small)) for config in CONFIGS.values()]

    def run(count: int) -> tuple[int, int]:
        """Resident memory and Python objects after `count` forwards of each model."""
        for index in range(count):
            grid_thw = torch.randint(1, 7, (int(torch.randint(1, 4, ())), 3)).clamp(max=torch.tensor([2, 6, 6]))
            hidden_states = torch.randn(int(grid_thw.prod(1).sum()), 12)
            for model in models:
                with torch.set_grad_enabled(index % 2 == 0):
                    model(hidden_states, grid_thw, output_hidden_states=True)
        gc.collect()
        # Or what the allocator keeps for later counts too: megabytes, in a run that leaves nothing behind.
        psutil.heap_trim()
        return psutil.Process().memory_info().rss, len(gc.get_objects())

    # oneDNN keeps what it compiles for a number of patches: all that can come have been, before memory counts.
    for patches in range(1, 3 * 2 * 36 + 1):
        for model in models:
            with torch.inference_mode():
                model(torch.zeros(patches, 12), torch.tensor([(1, 1, patches)]))
    memory, objects = run(300)
    memory_after, objects_after = run(1000)
    return memory_after - memory, objects_after - objects


def test_a_long_run_leaves_nothing_behind():
    """No mix comes twice, so what is kept of each would show: 1,000 objects, or 4 MiB of 4 KiB each."""
    # In a process of its own: memory that other tests have left fragmented, and their threads, would count.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        memory, objects = pool.submit(growth_in_a_long_run).result()
    assert memory < 4 << 20
    assert objects < 100


def test_threads_do_not_see_each_other():
    """From the first forward on, in which transformers installs the hooks that record hidden states."""
    reference = reference_model(use_head=True)
    calls = [(inputs, {"output_hidden_states": index % 2 == 0}) for index, inputs in enumerate(random_mixes(24))]
    sequential, model = packing_model(reference), packing_model(reference)
    expected = [outputs_of(sequential, inputs, **kwargs) for inputs, kwargs in calls]
    with ThreadPoolExecutor(6) as pool:
        futures = [pool.submit(outputs_of, model, inputs, **kwargs) for _ in range(3) for inputs, kwargs in calls]
        for index, future in enumerate(futures):
            assert same_bits(future.result(), expected[index % len(calls)])


def saved_and_loaded(value, weights_only: bool = False):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=weights_only)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved_and_loaded])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_copy_gives_the_same_and_shares_nothing(name, copied, inputs):
    model = packing_model(reference_model(**CONFIGS[name]))
    expected = outputs_of(model, inputs)
    other = copied(model)
    assert same_bits(outputs_of(other, inputs), expected)

    reference = reference_model(**CONFIGS[name])
    other.load_state_dict(reference.state_dict())
    assert same_bits(outputs_of(other, inputs), outputs_of(packing_model(reference), inputs))
    assert same_bits(outputs_of(model, inputs), expected)


def test_outputs_are_saved_as_large_as_they_are(inputs):
    """Plain tensors over storage of their own: `torch.save` would write all of a shared one."""
    outputs = outputs_of(packing_model(reference_model(use_head=True)), inputs, output_hidden_states=True)
    assert same_bits(saved_and_loaded(outputs, weights_only=True), outputs)
    for tensor in outputs:
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


class Prepared(Dataset):
    """What a forward derives from a grid, and outputs to compare with, made in a data loader's worker."""

    def __init__(self, models: list, batches: list[dict[str, torch.Tensor]]):
        self.calls = list(product(models, batches))

    def __len__(self) -> int:
        return len(self.calls)

    def __getitem__(self, index: int):
        model, inputs = self.calls[index]
        return packed_layout(inputs["grid_thw"], model.config), outputs_of(model, inputs)


def test_shared_models_and_layouts_cross_to_a_spawned_worker_and_back():
    models = [packing_model(reference_model(**config)).share_memory() for config in CONFIGS.values()]
    dataset = Prepared(models, list(random_mixes(3)))
    loader = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    for (model, inputs), (layout, from_worker) in zip(dataset.calls, loader, strict=True):
        assert all(parameter.is_shared() for parameter in model.parameters())
        expected = outputs_of(model, inputs)
        assert same_bits(outputs_of(model, inputs, layout=layout), expected)
        # A worker has one thread, and may sum in another order.
        assert all((ours - theirs).abs().max() < 1e-5 for ours, theirs in zip(from_worker, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_change_of_dtype_leaves_nothing_behind(name, dtype, inputs):
    reference = reference_model(**CONFIGS[name])
    model = packing_model(reference)
    outputs_of(model, inputs)
    assert same_bits(outputs_of(model.to(dtype), inputs), outputs_of(packing_model(reference.to(dtype)), inputs))
    assert same_bits(outputs_of(model.float(), inputs), outputs_of(packing_model(reference.float()), inputs))


def test_a_backward_pass_leaves_nothing_behind(inputs):
    model = packing_model(reference_model(use_head=True))
    expected = outputs_of(model, inputs)
    outputs = model.train()(**inputs)
    outputs.last_hidden_state.sum().backward()
    model.zero_grad()
    assert same_bits(outputs_of(model, inputs), expected)
    assert same_bits(outputs_of(model.eval(), inputs), expected)
