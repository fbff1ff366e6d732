# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""The ready-made tower of the examples, against the hidden states of transformers' model on each image alone."""

import sys

import numpy as np
import PIL.Image
import pytest
import torch
from reference import ODD_GRIDS, REPO, TINY, packing_model, random_images, reference_model
from transformers import AutoModelForCausalLM, Qwen2Config
from transformers.models.auto.image_processing_auto import AutoImageProcessor


BLOCKS = 3
GEOMETRY = {**TINY, "num_hidden_layers": BLOCKS}


@pytest.fixture(scope="module")
def tower_class():
    sys.path.insert(0, str(REPO / "examples"))
    from llava_tower import LlavaTower

    sys.path.remove(str(REPO / "examples"))
    return LlavaTower


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(0)
    return reference_model(**GEOMETRY)


@pytest.fixture(scope="module")
def image_processor():
    return AutoImageProcessor.from_pretrained(REPO, trust_remote_code=True, min_patches=1)


@torch.no_grad()
def expected_maps(reference, images, layer):
    """Before the final norm, as LLaVA takes them."""
    maps = []
    for image in images:
        states = reference(image[None], output_hidden_states=True).hidden_states[layer][0]
        maps.append(states.view(image.shape[1] // 14, image.shape[2] // 14, -1))
    return maps


@pytest.mark.parametrize("patch_layout", ["channels_first", "channels_last"])
@pytest.mark.parametrize("layer", [*range(1, BLOCKS + 1), *range(-BLOCKS, 0)])
def test_images_of_odd_sizes_give_the_layer_that_llava_asks_for(tower_class, reference, layer, patch_layout):
    model = packing_model(reference, patch_layout=patch_layout)
    images = random_images(ODD_GRIDS)
    maps = tower_class(model, None, select_layer=layer)(images)
    assert [tuple(features.shape[:2]) for features in maps] == ODD_GRIDS
    for features, expected in zip(maps, expected_maps(reference, images, layer), strict=True):
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


def test_a_normalised_batch_is_its_images(tower_class, reference):
    tower = tower_class(packing_model(reference), None)
    batch = torch.randn(4, 3, 56, 42)
    maps = tower(batch)
    assert [tuple(features.shape) for features in maps] == [(4, 3, tower.hidden_size)] * 4
    for features, expected in zip(maps, expected_maps(reference, batch, -2), strict=True):
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


def test_pictures_are_what_the_processor_makes_of_them(tower_class, reference, image_processor, tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (100, 150, 3), dtype=np.uint8)
    PIL.Image.fromarray(values).save(tmp_path / "image.png")
    tower = tower_class(packing_model(reference), image_processor)
    pixels = (
        torch.from_numpy(values).permute(2, 0, 1),
        PIL.Image.fromarray(values),
        values,
        str(tmp_path / "image.png"),
    )
    inputs = image_processor(PIL.Image.fromarray(values), return_tensors="pt")
    expected = tower.model(**inputs, output_hidden_states=True).hidden_states[-2]
    for features in tower(pixels):
        assert tuple(features.shape[:2]) == tuple(inputs["grid_thw"][0, 1:])
        torch.testing.assert_close(features.flatten(0, 1), expected, rtol=1e-5, atol=1e-5)


def test_examples_without_images(tower_class, reference):
    tower = tower_class(packing_model(reference).to(torch.bfloat16), None)
    assert tower([]) == []
    assert torch.equal(tower.dummy_feature, torch.zeros(1, GEOMETRY["hidden_size"], dtype=torch.bfloat16))


@pytest.mark.parametrize("frozen", [True, False])
def test_a_small_llava_trains_around_it_or_with_it(tower_class, reference, frozen):
    torch.manual_seed(0)
    tower = tower_class(packing_model(reference), None, frozen=frozen)
    language = AutoModelForCausalLM.from_config(
        Qwen2Config(
            vocab_size=20, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2,
        )
    )  # fmt: skip
    llava = torch.nn.ModuleDict(
        {"tower": tower, "projector": torch.nn.Linear(tower.hidden_size, 32), "language": language}
    ).train()
    assert tower.model.training is not frozen
    before = {name: weight.clone() for name, weight in tower.named_parameters()}
    images, words = random_images([(2, 3), (5, 1)]), torch.tensor([[3, 4], [5, 6]])
    optimizer = torch.optim.AdamW([weight for weight in llava.parameters() if weight.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = torch.zeros(())
        for features, tokens in zip(tower(images), words, strict=True):
            patches = llava["projector"](features.flatten(0, 1))
            embeddings = torch.cat([patches, language.get_input_embeddings()(tokens)])[None]
            labels = torch.cat([torch.full((len(patches),), -100), tokens])[None]
            loss = loss + language(inputs_embeds=embeddings, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    changed = {name for name, weight in tower.named_parameters() if not torch.equal(weight, before[name])}
    # The last block and the final norm come after the chosen layer.
    later = {name for name in before if name.startswith(("model.encoder.layers.2.", "model.rms_norm."))}
    assert changed == (set() if frozen else set(before) - later)


def test_what_cannot_be_is_refused(tower_class, reference, image_processor):
    model = packing_model(reference)
    for layer in (0, BLOCKS + 1, -BLOCKS - 1):
        with pytest.raises(ValueError, match=f"from 1 to 3 or from -3 to -1, with 3 blocks, got {layer}"):
            tower_class(model, image_processor, select_layer=layer)
    tower = tower_class(model, image_processor)
    with pytest.raises(ValueError, match=r"all normalised pixels.* or none, got both"):
        tower([torch.randn(3, 28, 28), PIL.Image.new("RGB", (28, 28))])
    for shape in ((3, 28, 27), (3, 15, 28), (28, 28), (3, 0, 28)):
        with pytest.raises(ValueError, match=r"multiples of the patch size 14, got \("):
            tower([torch.randn(shape)])
