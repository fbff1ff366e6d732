# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""`AutoModelForImageClassification`: a linear classifier on the vector per image."""

import pytest
import torch
from reference import ODD_GRIDS, pack, random_images
from safetensors.torch import load_file, save_file
from scaling import make_model_repo
from transformers import AutoModelForImageClassification


@pytest.mark.parametrize("use_head", [True, False])
def test_a_new_classifier_trains_saves_and_loads(use_head, tmp_path):
    repo = make_model_repo(tmp_path / f"with_head_{use_head}", use_head=use_head)
    model = AutoModelForImageClassification.from_pretrained(repo, trust_remote_code=True, num_labels=3)
    inputs, labels = pack(random_images(ODD_GRIDS)), torch.arange(10) % 3
    outputs = model.eval()(**inputs, labels=labels)
    pooled = model.vision_model.get_image_features(**inputs).pooler_output
    logits = pooled @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(outputs.logits, logits)
    torch.testing.assert_close(outputs.loss, torch.nn.functional.cross_entropy(logits, labels))
    outputs.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())

    model.save_pretrained(tmp_path / f"trained_{use_head}")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / f"trained_{use_head}", trust_remote_code=True)
    with torch.inference_mode():
        assert (again.eval()(**inputs).logits - outputs.logits).abs().max() < 1e-5
    assert again.vision_model.last_engine == "cpu"


def test_states_and_maps_are_those_of_the_tower(tmp_path):
    repo = make_model_repo(tmp_path / "eager")
    model = AutoModelForImageClassification.from_pretrained(repo, trust_remote_code=True, attn_implementation="eager")
    inputs, asked = pack(random_images([(2, 3), (1, 2)])), {"output_hidden_states": True, "output_attentions": True}
    with torch.inference_mode():
        outputs, expected = model.eval()(**inputs, **asked), model.vision_model(**inputs, **asked)
        model.config.return_dict = False
        (logits,) = model(**inputs)
    torch.testing.assert_close(logits, outputs.logits)
    for ours, theirs in ((outputs.hidden_states, expected.hidden_states), (outputs.attentions, expected.attentions)):
        torch.testing.assert_close(ours, theirs)


def test_an_encoder_that_lacks_weights_is_refused(tmp_path):
    repo = make_model_repo(tmp_path / "incomplete")
    weights = load_file(repo / "model.safetensors")
    del weights["rms_norm.weight"]
    save_file(weights, repo / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights, .vision_model\.rms_norm\.weight. first"):
        AutoModelForImageClassification.from_pretrained(repo, trust_remote_code=True)
