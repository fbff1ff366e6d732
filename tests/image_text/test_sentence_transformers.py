# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""A converted repo as a Sentence Transformers model: one line gives what the model gives, whatever the batch."""

import json
import random

import numpy as np
import PIL.Image
import pytest
import torch
from image_text_checkpoints import TEXTS, reference_image_text_model, save_image_text_repo, save_vision_repo
from reference import reference_model
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor


KINDS = ["native", "fixed", "head", "image-text"]


def odd_images(count: int, longest: int = 90) -> list[PIL.Image.Image]:
    generator = np.random.default_rng(0)
    sizes = generator.integers(10, longest, (count, 2))
    return [PIL.Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


@pytest.fixture(scope="module")
def repos(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("repos")
    return {
        "native": save_vision_repo(folder / "native", reference_model()),
        "fixed": save_vision_repo(folder / "fixed", reference_model(is_native=False)),
        "head": save_vision_repo(folder / "head", reference_model(is_native=False, use_head=True)),
        "image-text": save_image_text_repo(folder / "image-text", reference_image_text_model()),
    }


def load(repo) -> SentenceTransformer:
    return SentenceTransformer(str(repo), trust_remote_code=True, device="cpu")


def patches_per_forward(encoder: SentenceTransformer) -> list[int]:
    """Filled as the encoder runs."""
    seen: list[int] = []
    tower = getattr(encoder[0].model, "vision_model", encoder[0].model)
    # Sentence Transformers calls `forward` itself, past the hooks of the model.
    tower.embeddings.patch_embed.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    return seen


@torch.no_grad()
def vector(model, inputs) -> torch.Tensor:
    """Of the only image in `inputs`."""
    if hasattr(model, "get_text_features"):
        return model.get_image_features(**inputs).pooler_output[0]
    outputs = model(**inputs)
    return outputs.last_hidden_state.mean(dim=0) if outputs.pooler_output is None else outputs.pooler_output[0]


@pytest.mark.parametrize("image_size", [None, 56])
@pytest.mark.parametrize("kind", KINDS)
def test_encode_gives_what_the_model_gives_in_any_order_and_batch(repos, kind, image_size):
    model = AutoModel.from_pretrained(repos[kind], trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(repos[kind], trust_remote_code=True)
    images = odd_images(50)
    arguments = {"image": {"image_size": image_size}}
    expected = torch.stack(
        [
            vector(model, processor(images=image, return_tensors="pt", images_kwargs=arguments["image"]))
            if kind == "image-text"
            else vector(model, processor(image, return_tensors="pt", image_size=image_size))
            for image in images
        ]
    )
    encoder = load(repos[kind])
    order = list(range(50))
    for batch_size in (1, 7, 50):
        random.Random(batch_size).shuffle(order)
        vectors = encoder.encode(
            [images[index] for index in order],
            batch_size=batch_size,
            convert_to_tensor=True,
            processing_kwargs=arguments,
        )
        assert vectors.shape == (50, encoder.get_embedding_dimension())
        torch.testing.assert_close(vectors, expected[order], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_have_length_1_on_request(repos, kind):
    encoder = load(repos[kind])
    images = odd_images(5)
    plain = encoder.encode(images)
    lengths = np.linalg.norm(plain, axis=1, keepdims=True)
    assert (np.abs(lengths - 1) > 0.01).any()
    np.testing.assert_allclose(encoder.encode(images, normalize_embeddings=True), plain / lengths, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_batch_is_divided_by_patches(repos, kind):
    encoder = load(repos[kind])
    images = odd_images(20)
    arguments = {"image": {"image_size": None}}
    expected = encoder.encode(images, processing_kwargs=arguments)
    encoder[0].patches_per_forward = 30
    seen = patches_per_forward(encoder)
    vectors = encoder.encode(images, processing_kwargs=arguments)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    lengths = encoder.preprocess(images, processing_kwargs=arguments)["image_grid_thw"].prod(dim=1)
    assert len(seen) > 1
    assert sum(seen) == lengths.sum()
    assert max(seen) <= max(30, lengths.max())


def test_32_large_pictures_go_through_in_several_forwards(tmp_path):
    narrow = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    encoder = load(save_vision_repo(tmp_path, reference_model(**narrow)))
    images = [PIL.Image.new("RGB", (896, 896), (index, 2 * index, 255 - index)) for index in range(32)]
    seen = patches_per_forward(encoder)
    vectors = encoder.encode(images)
    assert vectors.shape == (32, encoder.get_embedding_dimension())
    assert seen == [16384] * 8


def test_paths_arrays_and_one_image(repos, tmp_path):
    encoder = load(repos["head"])
    image = odd_images(1)[0]
    image.save(tmp_path / "image.png")
    expected = encoder.encode(image)
    assert expected.shape == (encoder.get_embedding_dimension(),)
    np.testing.assert_allclose(encoder.encode([str(tmp_path / "image.png")])[0], expected, atol=1e-6)
    np.testing.assert_allclose(encoder.encode([np.asarray(image)])[0], expected, atol=1e-6)


@torch.no_grad()
def test_texts_and_similarity_are_those_of_the_model(repos):
    repo = repos["image-text"]
    encoder = load(repo)
    model = AutoModel.from_pretrained(repo, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
    images = odd_images(6)
    outputs = model(**processor(images=images, text=TEXTS, padding=True, return_tensors="pt"))

    texts, pictures = encoder.encode(TEXTS), encoder.encode(images)
    scale = model.logit_scale.exp()
    torch.testing.assert_close(encoder.similarity(texts, pictures), outputs.logits_per_text / scale, rtol=0, atol=1e-5)
    one_by_one = np.stack([encoder.encode(text) for text in TEXTS])
    np.testing.assert_allclose(texts, one_by_one, atol=1e-5)


def test_long_texts_are_truncated(repos, tmp_path):
    encoder = load(repos["image-text"])
    text = " ".join(["rocket"] * 100)
    assert np.isfinite(encoder.encode([text, *TEXTS])).all()
    assert encoder.max_seq_length == 77


def test_the_models_own_limit_holds_where_the_tokenizer_has_none(tmp_path):
    repo = save_image_text_repo(tmp_path, reference_image_text_model())
    settings = json.loads((repo / "tokenizer_config.json").read_text())
    settings.pop("model_max_length")
    (repo / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load(repo).max_seq_length == 77


def test_saved_model_loads_again(repos, tmp_path):
    for kind in ("native", "image-text"):
        encoder = load(repos[kind])
        encoder[0].patches_per_forward = 40
        encoder.save_pretrained(str(tmp_path / kind))
        again = load(tmp_path / kind)
        assert again[0].patches_per_forward == 40
        images = odd_images(4)
        np.testing.assert_array_equal(again.encode(images), encoder.encode(images))


@pytest.mark.parametrize("kind", ["native", "head"])
def test_a_vision_tower_alone_refuses_texts(repos, kind):
    with pytest.raises(ValueError, match=r"(?i)modality.*text.*supported.*image"):
        load(repos[kind]).encode(["a cat"])


def test_budget_below_one_patch_is_refused(repos, tmp_path):
    repo = save_vision_repo(tmp_path, reference_model())
    settings = json.loads((repo / "sentence_bert_config.json").read_text())
    (repo / "sentence_bert_config.json").write_text(json.dumps({**settings, "patches_per_forward": 0}))
    with pytest.raises(ValueError, match="`patches_per_forward` must be at least 1, got 0"):
        load(repo)


def test_gradients_reach_the_model(repos):
    for kind in ("native", "image-text"):
        encoder = load(repos[kind])
        features = encoder.preprocess(odd_images(3))
        encoder(features)["sentence_embedding"].square().sum().backward()
        tower = getattr(encoder[0].model, "vision_model", encoder[0].model)
        assert all(parameter.grad is not None for parameter in tower.parameters())
