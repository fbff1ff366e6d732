# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""`AutoModelForImageClassification`: a linear classifier on the vector per image."""

import pytest
import torch
from reference import ODD_GRIDS, TINY, Aimv2PackingConfig, pack, random_images, random_weights
from safetensors.torch import load_file, save_file
from scaling import make_model_repo
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

from conversion.local_code import local_class


LABELS = {
    "single_label_classification": torch.tensor([2, 0, 1, 1]),
    "multi_label_classification": torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 1], [0, 1, 0]]),
    "regression": torch.tensor([[0.5, 2, -1], [0, 0, 1], [3, 1, 1], [0, -1, 0.25]]),
}


def classifier(**config):
    model_class = local_class("modeling_aimv2_packing.Aimv2PackingForImageClassification")
    return random_weights(model_class(Aimv2PackingConfig(**{**TINY, "num_labels": 3, **config})))


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


@pytest.mark.parametrize("problem_type", LABELS)
def test_losses_of_a_steps_batches_add_up_to_that_of_all_images(problem_type):
    model, images, labels = classifier(problem_type=problem_type), random_images(ODD_GRIDS[:4]), LABELS[problem_type]
    expected = model(**pack(images), labels=labels).loss
    for count in (labels.numel(), torch.tensor(labels.numel())):
        losses = [
            model(**pack(images[part]), labels=labels[part], num_items_in_batch=count).loss
            for part in (slice(0, 1), slice(1, 4))
        ]
        torch.testing.assert_close(sum(losses), expected)


def test_trainers_accumulated_step_is_that_of_all_images_at_once(tmp_path):
    images, labels = random_images(ODD_GRIDS[:4]), LABELS["single_label_classification"]
    batches = [{**pack(images[part]), "labels": labels[part]} for part in (slice(0, 1), slice(1, 4))]
    model = classifier()
    before, weight = model.classifier.weight.detach().clone(), model.classifier.weight
    (expected,) = torch.autograd.grad(model(**pack(images), labels=labels).loss, weight)
    arguments = TrainingArguments(
        tmp_path,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
    )
    Trainer(model, arguments, data_collator=lambda batch: batch[0], train_dataset=batches).train()
    torch.testing.assert_close(before - weight.detach(), expected)


def test_a_loss_of_ones_own_is_left_as_it_is():
    model, images, labels = classifier(problem_type="regression"), random_images([(2, 3)]), torch.ones(1, 3)
    model.loss_function = lambda labels, logits, config, num_items_in_batch: logits.sum() / num_items_in_batch
    outputs = model(**pack(images), labels=labels, num_items_in_batch=8)
    torch.testing.assert_close(outputs.loss, outputs.logits.sum() / 8)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_classes_may_be_integers_of_any_dtype(dtype):
    model, inputs, labels = classifier(), pack(random_images(ODD_GRIDS[:4])), LABELS["single_label_classification"]
    assert torch.equal(model(**inputs, labels=labels.to(dtype)).loss, model(**inputs, labels=labels).loss)


@pytest.mark.parametrize("labels", [[2, 0, 1, 1], torch.tensor(1), torch.ones(1, 1), torch.tensor([2, 0, 1])])
def test_labels_that_are_not_one_per_segment_are_refused(labels):
    """One label for several frames would be compared with each of them."""
    model = classifier(num_labels=1)
    with pytest.raises(ValueError, match="`labels` must"):
        model(**pack(random_images(ODD_GRIDS[:4])), labels=labels)
