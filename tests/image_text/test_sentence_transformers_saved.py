# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""What `save_pretrained` of model and processor writes, as after fine-tuning, is a Sentence Transformers model."""

import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import PIL.Image
import pytest
import torch
from hub_server import Hub
from image_text_checkpoints import TEXTS, reference_image_text_model, save_image_text_repo, save_vision_repo
from reference import Aimv2PackingConfig, reference_model
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor, Trainer, TrainingArguments


KINDS = ["native", "fixed", "head", "image-text"]
IMAGES = [
    PIL.Image.fromarray(np.random.default_rng(index).integers(0, 256, (*size, 3), dtype=np.uint8))
    for index, size in enumerate([(14, 14), (70, 28), (28, 98)])
]


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


@pytest.fixture
def hub_environment(tmp_path):
    """Of a process of alice's, whose Hub is on the loopback interface."""
    hub = Hub()
    yield {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": "hf_alice",
    }
    hub.close()


def load(repo) -> SentenceTransformer:
    return SentenceTransformer(str(repo), trust_remote_code=True, device="cpu")


def saved(repo, folder):
    AutoModel.from_pretrained(repo, trust_remote_code=True).save_pretrained(folder)
    AutoProcessor.from_pretrained(repo, trust_remote_code=True).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_repo_gives_the_vectors_of_the_converted_one(repos, tmp_path, kind):
    converted, again = load(repos[kind]), load(saved(repos[kind], tmp_path / "saved"))
    assert again.modalities == converted.modalities
    expected = converted.encode(IMAGES)
    assert expected.shape == (3, converted.get_embedding_dimension())
    np.testing.assert_allclose(again.encode(IMAGES), expected, atol=1e-5)
    np.testing.assert_allclose(again.encode(IMAGES[0]), expected[0], atol=1e-5)
    if kind == "image-text":
        np.testing.assert_allclose(again.encode(TEXTS), converted.encode(TEXTS), atol=1e-5)


def test_saving_needs_no_sentence_transformers(repos, tmp_path):
    code = f"""
        import sys
        sys.modules["sentence_transformers"] = None
        from transformers import AutoModel, AutoProcessor
        model = AutoModel.from_pretrained({str(repos["image-text"])!r}, trust_remote_code=True)
        model.save_pretrained({str(tmp_path / "saved")!r})
        processor = AutoProcessor.from_pretrained({str(repos["image-text"])!r}, trust_remote_code=True)
        processor.save_pretrained({str(tmp_path / "saved")!r})
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
    expected = load(repos["image-text"]).encode(IMAGES)
    np.testing.assert_allclose(load(tmp_path / "saved").encode(IMAGES), expected, atol=1e-5)


def test_loading_a_model_does_not_import_sentence_transformers(repos):
    code = f"""
        import sys
        from transformers import AutoModel, AutoProcessor
        AutoModel.from_pretrained({str(repos["image-text"])!r}, trust_remote_code=True)
        AutoProcessor.from_pretrained({str(repos["image-text"])!r}, trust_remote_code=True)
        assert "sentence_transformers" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_a_trainers_checkpoint_is_one_too(repos, tmp_path):
    pytest.importorskip("accelerate", reason="needs requirements-scale.txt")
    model = AutoModel.from_pretrained(repos["head"], trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(repos["head"], trust_remote_code=True)

    class Energy(Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            return model(**inputs).pooler_output.square().mean()

    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, learning_rate=0.1,
        per_device_train_batch_size=3, remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Energy(model, arguments, processor.collate, IMAGES, processing_class=processor)
    trainer.train()
    with torch.no_grad():
        expected = model.eval()(**processor(IMAGES, return_tensors="pt")).pooler_output
    np.testing.assert_allclose(load(tmp_path / "checkpoint-1").encode(IMAGES), expected, atol=1e-5)


def test_settings_and_modules_that_are_there_are_kept(repos, tmp_path):
    encoder = load(repos["image-text"])
    encoder[0].patches_per_forward = 40
    encoder.save_pretrained(str(tmp_path))
    saved(repos["image-text"], tmp_path)
    assert load(tmp_path)[0].patches_per_forward == 40
    modules = [*json.loads((tmp_path / "modules.json").read_text()), {"idx": 1, "name": "1", "path": "", "type": "X"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    saved(repos["image-text"], tmp_path)
    assert json.loads((tmp_path / "modules.json").read_text()) == modules


def test_a_configuration_alone_is_no_model(tmp_path):
    Aimv2PackingConfig(hidden_size=64, num_attention_heads=2).save_pretrained(tmp_path)
    assert (tmp_path / "config.json").exists()
    assert not (tmp_path / "modules.json").exists() and not (tmp_path / "sentence_bert_config.json").exists()


# By itself, because it talks to another Hub.
@pytest.mark.parametrize(
    "call", ["save_pretrained(folder, push_to_hub=True, repo_id='alice/tuned')", "push_to_hub('alice/tuned')"]
)
def test_a_model_that_was_pushed_loads_from_the_hub(repos, tmp_path, hub_environment, call):
    code = f"""
        import numpy as np, PIL.Image
        from sentence_transformers import SentenceTransformer
        from transformers import AutoModel, AutoProcessor
        repo, folder = {str(repos["head"])!r}, {str(tmp_path / "tuned")!r}
        AutoProcessor.from_pretrained(repo, trust_remote_code=True).push_to_hub("alice/tuned")
        AutoModel.from_pretrained(repo, trust_remote_code=True).{call}
        image = PIL.Image.new("RGB", (28, 42), "teal")
        load = lambda name: SentenceTransformer(name, trust_remote_code=True, device="cpu")
        np.testing.assert_allclose(load("alice/tuned").encode([image]), load(repo).encode([image]), atol=1e-5)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, env=hub_environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
