# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""An image-text checkpoint of the loopback Hub, converted and pushed, and what loads from there."""

import checkpoints
import pytest
import torch
from hub_server import Hub
from image_text_checkpoints import (
    TEXTS,
    clip_tokenizer,
    image_text_model,
    reference_image_text_model,
)
from reference import REPO, pack, random_images
from safetensors.torch import save_file
from test_hub import client, converter


LOAD = """
    import sys
    import torch
    from safetensors.torch import load_file
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoProcessor, pipeline
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    expected = load_file(sys.argv[1])
    texts, photograph = sys.argv[3:], sys.argv[2]
    batch = {name: expected[name] for name in ("hidden_states", "grid_thw")}
    close = lambda found, name: torch.testing.assert_close(found, expected[name], rtol=0, atol=1e-5)

    torch.set_grad_enabled(False)
    model = AutoModel.from_pretrained("alice/lit", trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained("alice/lit", trust_remote_code=True)
    close(model(**batch, **processor(text=texts, padding=True, return_tensors="pt")).logits_per_image, "logits")

    tower_class = get_class_from_dynamic_module("modeling_aimv2_packing.Aimv2PackingModel", "alice/lit")
    tower = tower_class.from_pretrained("alice/lit").eval()
    close(tower(**batch).pooler_output, "pooled")

    encoder = SentenceTransformer("alice/lit", trust_remote_code=True, device="cpu")
    close(encoder.encode(texts, convert_to_tensor=True), "texts")
    pixels = processor(images=photograph, return_tensors="pt")
    torch.testing.assert_close(
        encoder.encode([photograph], convert_to_tensor=True), model.get_image_features(**pixels).pooler_output
    )

    classify = pipeline("zero-shot-image-classification", model="alice/lit", trust_remote_code=True)
    assert {hit["label"] for hit in classify(photograph, candidate_labels=texts)} == set(texts)
    print("loaded")
"""


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.close()


@torch.no_grad()
def test_pushed_and_loaded_from_the_hub(hub, tmp_path):
    reference = reference_image_text_model()
    tensors, config = checkpoints.apple_image_text(reference), checkpoints.apple_image_text_config(reference)
    source = checkpoints.save(tmp_path / "source", tensors, config)
    clip_tokenizer().save_pretrained(source)
    (source / "trap.py").write_text("raise SystemExit('the code of the source was run')")
    hub.add_repo("apple/aimv2-tiny-lit", {path.name: path.read_bytes() for path in source.iterdir()})
    command = ["apple/aimv2-tiny-lit", tmp_path / "out", "--push-to-hub", "alice/lit", "--private"]
    pushed = converter(hub, tmp_path / "a", *command)
    assert pushed.returncode == 0, pushed.stderr
    assert not list((tmp_path / "a").rglob("trap.py"))

    model = image_text_model(reference)
    batch = pack(random_images([(4, 4), (3, 5), (1, 7)]))
    texts = clip_tokenizer()(TEXTS, padding=True, return_tensors="pt")
    expected = {
        "logits": model(**batch, **texts).logits_per_image,
        "pooled": model.vision_model(**batch).pooler_output,
        "texts": model.get_text_features(**texts).pooler_output,
    }
    save_file({**batch, **{name: tensor.contiguous() for name, tensor in expected.items()}}, tmp_path / "expected")
    photograph = REPO / "examples" / "photographs" / "cat.jpg"
    loaded = client(hub, tmp_path / "b", LOAD, tmp_path / "expected", photograph, *TEXTS)
    assert "loaded" in loaded.stdout, loaded.stderr
