# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""The composite of the examples: it loads in a process that knows nothing of it, and counts its image tokens right."""

import os
import subprocess
import sys
import textwrap

import numpy as np
import PIL.Image
import pytest
import torch
from hub_server import Hub
from reference import REPO
from transformers import AutoModel, AutoProcessor


# Height and width; one patch, a strip, one of many patches.
SIZES = [(14, 14), (60, 700), (300, 200)]
IMAGES = [
    PIL.Image.fromarray(np.random.default_rng(index).integers(0, 256, (*size, 3), dtype=np.uint8))
    for index, size in enumerate(SIZES)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("composite") / "saved"
    command = [sys.executable, str(REPO / "examples" / "vision_language_model.py"), "--steps", "1", "--output", folder]
    result = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return AutoModel.from_pretrained(folder, trust_remote_code=True).eval()


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder, trust_remote_code=True)


@pytest.mark.parametrize("source", ["a folder", "the Hub"])
def test_it_loads_in_a_process_of_its_own(folder, model, processor, tmp_path, source):
    inputs = processor(IMAGES, ["<image>?<image>", "<image>"], padding=True, return_tensors="pt")
    with torch.no_grad():
        np.save(tmp_path / "logits.npy", model(**inputs).logits.numpy())
    for index, image in enumerate(IMAGES):
        image.save(tmp_path / f"{index}.png")
    hub = Hub()
    hub.add_repo("alice/composite", {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    code = """
        import sys
        import numpy as np
        import torch
        from transformers import AutoModel, AutoProcessor

        model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
        processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
        images = ["0.png", "1.png", "2.png"]
        inputs = processor(images, ["<image>?<image>", "<image>"], padding=True, return_tensors="pt")
        with torch.no_grad():
            np.testing.assert_array_equal(model(**inputs).logits.numpy(), np.load("logits.npy"))
    """
    name = str(folder) if source == "a folder" else "alice/composite"
    command = [sys.executable, "-c", textwrap.dedent(code), name]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    hub.close()
    assert result.returncode == 0, result.stderr


def test_a_composite_that_asks_autoconfig_loads_after_registration(folder, tmp_path):
    """As docs/vision_language.md says; without it transformers does not know the model type."""
    composite = """
        import sys
        from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        class Config(PreTrainedConfig):
            model_type = "somebodys_composite"
            sub_configs = {"vision_config": AutoConfig}
            vision_config: dict | None = None

            def __post_init__(self, **kwargs):
                if isinstance(self.vision_config, dict):
                    self.vision_config = AutoConfig.for_model(**self.vision_config)
                super().__post_init__(**kwargs)

        class Model(PreTrainedModel):
            config_class = Config

            def __init__(self, config):
                super().__init__(config)
                self.vision = AutoModel.from_config(config.vision_config)
                self.post_init()

        def register(repo):
            config_class = get_class_from_dynamic_module("configuration_aimv2_packing.Aimv2PackingConfig", repo)
            model_class = get_class_from_dynamic_module("accelerated_aimv2_packing.Aimv2PackingAcceleratedModel", repo)
            AutoConfig.register("aimv2_packing", config_class)
            AutoModel.register(config_class, model_class)

        tower, saved = sys.argv[1:3]
    """
    save = """
        register(tower)
        vision = AutoConfig.for_model("aimv2_packing", num_hidden_layers=1, hidden_size=8, num_attention_heads=2)
        Model(Config(vision_config=vision)).save_pretrained(saved)
    """
    fresh = "Model.from_pretrained(saved)"
    registered = """
        register(tower)
        assert type(Model.from_pretrained(saved).vision).__name__ == "Aimv2PackingAcceleratedModel"
    """
    results = []
    for code in (save, fresh, registered):
        program = textwrap.dedent(composite) + textwrap.dedent(code)
        command = [sys.executable, "-c", program, str(folder), str(tmp_path / "saved")]
        results.append(subprocess.run(command, capture_output=True, text=True, check=False))
    assert [result.returncode for result in results] == [0, 1, 0], results[-1].stderr
    assert "Unrecognized model identifier: aimv2_packing" in results[1].stderr


@pytest.mark.parametrize("options", [{}, {"max_patches": 20}, {"image_size": 56}, {"min_patches": 1}])
def test_image_tokens_are_counted_before_encoding(model, processor, options):
    counts = processor._get_num_multimodal_tokens(image_sizes=SIZES, **options)
    inputs = processor(IMAGES, ["<image>"] * 3, padding=True, return_tensors="pt", images_kwargs=options)
    patches = len(model.vision(inputs["hidden_states"], inputs["grid_thw"]).last_hidden_state)
    assert counts["num_image_tokens"] == (inputs["input_ids"] == processor.image_token_id).sum(dim=1).tolist()
    assert sum(counts["num_image_tokens"]) == patches / 4
    assert counts["num_image_patches"] == inputs["grid_thw"].prod(dim=1).tolist()


@torch.no_grad()
def test_rows_of_features_take_the_image_tokens_in_their_order(model, processor):
    """Against the projector on each image alone."""
    texts = ["<image> and <image>", "no image", "<image>"]
    inputs = processor(IMAGES, texts, padding=True, return_tensors="pt")
    embedded = model.embed(inputs["input_ids"], inputs["hidden_states"], inputs["grid_thw"])
    is_image = inputs["input_ids"] == processor.image_token_id
    alone = []
    for image in IMAGES:
        patches = processor.image_processor(image, return_tensors="pt")
        _, rows, columns = patches["grid_thw"][0].tolist()
        features = model.vision(**patches).last_hidden_state.view(rows, columns, -1)
        for row in range(0, rows, 2):
            for column in range(0, columns, 2):
                alone.append(model.projector(features[row : row + 2, column : column + 2].reshape(1, -1)))
    torch.testing.assert_close(embedded[is_image], torch.cat(alone), rtol=0, atol=1e-5)
    words = model.language.get_input_embeddings()(inputs["input_ids"])
    assert torch.equal(embedded[~is_image], words[~is_image])


@torch.no_grad()
def test_texts_alone(model, processor):
    inputs = processor(text=["a cat", "two cups of coffee"], padding=True, return_tensors="pt")
    expected = model.language(**inputs).logits
    torch.testing.assert_close(model(**inputs).logits, expected)


def test_counts_that_do_not_agree_are_refused(model, processor):
    with pytest.raises(ValueError, match=r"total number of <image> tokens.* 1 <image> tokens and 3 images"):
        processor(IMAGES, ["<image>"], return_tensors="pt")
    inputs = processor(IMAGES[:1], ["<image>"], return_tensors="pt")
    count = len(inputs["hidden_states"]) // 4
    with pytest.raises(ValueError, match=f"an image token per row of features, got {count} and 0"):
        model(inputs["input_ids"])
    with pytest.raises(ValueError, match=f"an image token per row of features, got {count - 1} and {count}"):
        model(inputs["input_ids"][:, 1:], hidden_states=inputs["hidden_states"], grid_thw=inputs["grid_thw"])
