# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""transformers' tests of every model, `ModelTesterMixin` and `ConfigTester`, run on the packed models."""

import unittest
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from reference import Aimv2PackingAcceleratedModel, Aimv2PackingConfig
from sdist import common_tests
from transformers import Aimv2TextConfig, Aimv2TextModel, PreTrainedModel
from transformers.testing_utils import torch_device

from conversion.local_code import local_class


ModelTesterMixin = common_tests("test_modeling_common").ModelTesterMixin
ConfigTester = common_tests("test_configuration_common").ConfigTester

Aimv2PackingImageTextModel = local_class("accelerated_image_text_aimv2_packing.Aimv2PackingAcceleratedImageTextModel")
Aimv2PackingImageTextConfig = Aimv2PackingImageTextModel.config_class

# Each is expected to fail, and fails this run when it passes or is not there.
NO_ATTENTION_MAPS = "it asks for the attention maps, and those of segments of unequal length make no tensor"
PREMISES_OF_VISION = {
    "test_attention_outputs": NO_ATTENTION_MAPS,
    "test_model_get_set_embeddings": "its embeddings are a table of tokens; here they are made from patches",
}
NESTED_OUTPUTS = "it reads hidden states in the output itself; as in `Aimv2Model`, they are in the outputs of the parts"
PREMISES_OF_IMAGE_TEXT = {
    "test_attention_outputs": NO_ATTENTION_MAPS,
    "test_hidden_states_output": NESTED_OUTPUTS,
    "test_retain_grad_hidden_states_attentions": NESTED_OUTPUTS,
}

# Attention maps are a part of these, and are left out.
WITHOUT_ATTENTION_MAPS = ("test_model_outputs_equivalence", "test_retain_grad_hidden_states_attentions")
# These load files that lack weights, to see what initialises them; our `from_pretrained` refuses such files.
WITH_INCOMPLETE_FILES = ("test_can_init_all_missing_weights", "test_model_weights_reload_no_missing_tied_weights")
# These want the loss that the model returns.
WITH_LOSS = (
    "test_training",
    "test_training_gradient_checkpointing",
    "test_training_gradient_checkpointing_use_reentrant_false",
    "test_training_gradient_checkpointing_use_reentrant_true",
)

# 12 patches each, since some tests take the first of n parts of every input; images and videos of several shapes.
GRIDS = [(1, 3, 4), (1, 4, 3), (2, 2, 3), (1, 1, 12), (1, 6, 2), (3, 2, 2), (1, 3, 4)]
NUM_TOKENS = 10
VOCABULARY = 99


def expect_failures(premises: dict[str, str]) -> Callable[[type], type]:
    """Marks the tests whose premise packed input does not fulfil."""

    def mark(cls: type) -> type:
        for name, reason in premises.items():
            setattr(cls, name, pytest.mark.xfail(strict=True, reason=reason)(getattr(cls, name)))
        return cls

    return mark


def with_loss(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The model, and a loss that depends on all its outputs."""

    class ModelWithLoss(model_class):  # type: ignore[misc, valid-type]
        def forward(self, **kwargs):
            outputs = super().forward(**kwargs)
            tensors = [value for value in outputs.values() if isinstance(value, torch.Tensor)]
            outputs.loss = torch.stack([value.square().mean() for value in tensors]).sum()
            return outputs

    return ModelWithLoss


class VisionTester:
    """What the common tests ask for: a small model and a packed batch, and the sizes of both."""

    is_training = True
    batch_size = len(GRIDS)
    seq_length = batch_size * 12
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4

    def __init__(self, **fields):
        self.fields = fields

    def get_config(self):
        return Aimv2PackingConfig(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=40,
            patch_size=4,
            image_size=16,
            **self.fields,
        )

    def prepare_config_and_inputs_for_common(self):
        patches = torch.randn(self.seq_length, 3 * 4 * 4, device=torch_device)
        return self.get_config(), {"hidden_states": patches, "grid_thw": torch.tensor(GRIDS, device=torch_device)}


class TextTester:
    """The same of texts that fill the positions."""

    num_hidden_layers = 2

    def get_config(self):
        return Aimv2TextConfig(
            vocab_size=VOCABULARY,
            hidden_size=24,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=2,
            intermediate_size=40,
            max_position_embeddings=NUM_TOKENS,
            eos_token_id=VOCABULARY - 1,
        )

    def prepare_config_and_inputs_for_common(self):
        input_ids = torch.randint(VOCABULARY - 1, (len(GRIDS), NUM_TOKENS), device=torch_device)
        input_ids[:, -1] = VOCABULARY - 1
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


class ImageTextTester:
    """Both together."""

    is_training = True
    batch_size = len(GRIDS)

    def __init__(self):
        self.vision_model_tester = VisionTester()
        self.text_model_tester = TextTester()

    def get_config(self):
        return Aimv2PackingImageTextConfig(
            vision_config=self.vision_model_tester.get_config(),
            text_config=self.text_model_tester.get_config(),
            projection_dim=28,
        )

    def prepare_config_and_inputs_for_common(self):
        _, images = self.vision_model_tester.prepare_config_and_inputs_for_common()
        _, texts = self.text_model_tester.prepare_config_and_inputs_for_common()
        return self.get_config(), images | texts


class PackedTests(ModelTesterMixin):  # type: ignore[misc, valid-type]
    test_resize_embeddings = False  # There is no vocabulary of patches, and the texts' is fixed.

    def setUp(self):
        self.has_attentions = self._testMethodName not in WITHOUT_ATTENTION_MAPS
        if self._testMethodName in WITH_LOSS:
            self.all_model_classes = tuple(map(with_loss, self.all_model_classes))
        if self._testMethodName in WITH_INCOMPLETE_FILES:
            for model_class in self.all_model_classes:
                lenient = classmethod(PreTrainedModel.from_pretrained.__func__)
                patch = mock.patch.object(model_class, "from_pretrained", lenient)
                patch.start()
                self.addCleanup(patch.stop)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        # A test that cuts each input to as many rows leaves too few patches: they are repeated in the images left.
        patches, described = inputs["hidden_states"], int(inputs["grid_thw"].prod(dim=1).sum())
        inputs["hidden_states"] = patches.repeat(-(-described // len(patches)), 1)[:described]
        return inputs

    def test_config(self):
        self.config_tester.run_common_tests()


def test_every_test_named_here_exists():
    named = {*PREMISES_OF_VISION, *PREMISES_OF_IMAGE_TEXT, *WITHOUT_ATTENTION_MAPS, *WITH_INCOMPLETE_FILES, *WITH_LOSS}
    assert {name for name in named if not hasattr(ModelTesterMixin, name)} == set()


@expect_failures(PREMISES_OF_VISION)
class VisionTest(PackedTests, unittest.TestCase):
    all_model_classes = (Aimv2PackingAcceleratedModel,)
    additional_model_inputs = ["grid_thw"]
    skip_test_image_features_output_shape = True  # One row per image; here it is one per patch.

    def setUp(self):
        super().setUp()
        self.model_tester = VisionTester()
        self.config_tester = ConfigTester(self, Aimv2PackingConfig, has_text_modality=False, hidden_size=64)

    def _image_features_prepare_config_and_inputs(self):
        # All inputs are of images, though none is called so.
        return self.model_tester.prepare_config_and_inputs_for_common()


@expect_failures(PREMISES_OF_VISION)
class NativeVisionTest(VisionTest):
    """As the released models of native resolution: no learned positions and no head."""

    def setUp(self):
        super().setUp()
        self.model_tester = VisionTester(is_native=True, use_head=False)


@expect_failures(PREMISES_OF_IMAGE_TEXT)
class ImageTextTest(PackedTests, unittest.TestCase):
    all_model_classes = (Aimv2PackingImageTextModel,)
    additional_model_inputs = ["hidden_states", "grid_thw"]
    _is_composite = True
    skip_test_image_features_output_shape = True  # One row per image; here it is one per patch.

    def setUp(self):
        super().setUp()
        self.model_tester = ImageTextTester()
        self.config_tester = ConfigTester(
            self,
            Aimv2PackingImageTextConfig,
            has_text_modality=False,
            common_properties=["projection_dim", "logit_scale_init_value"],
        )

    def test_capture_outputs_decorator(self):
        # The text encoder has attention maps, but one that asks for them asks both parts.
        recorded = {"hidden_states": Aimv2TextModel._can_record_outputs["hidden_states"]}
        with mock.patch.object(Aimv2TextModel, "_can_record_outputs", recorded):
            super().test_capture_outputs_decorator()
