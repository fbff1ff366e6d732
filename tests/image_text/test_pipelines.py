# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""What transformers' pipelines do with a converted repo, and the lines for what they leave out."""

import pytest
import torch
from image_text_checkpoints import TEXTS, reference_image_text_model, save_image_text_repo, save_vision_repo
from PIL import Image
from reference import REPO, reference_model
from transformers import AutoModel, AutoProcessor, pipeline


PHOTOGRAPHS = [str(path) for path in sorted((REPO / "examples/photographs").glob("*.jpg"))][:3]


@torch.no_grad()
def test_zero_shot_image_classification(tmp_path):
    repo = save_image_text_repo(tmp_path, reference_image_text_model())
    classify = pipeline("zero-shot-image-classification", model=str(repo), trust_remote_code=True)
    template = "a photo of {}."
    found = classify(PHOTOGRAPHS, candidate_labels=TEXTS, hypothesis_template=template)

    model = AutoModel.from_pretrained(repo, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
    images = [Image.open(path) for path in PHOTOGRAPHS]
    texts = [template.format(text) for text in TEXTS]
    probabilities = model(**processor(images, texts, padding=True, return_tensors="pt")).logits_per_image.softmax(dim=1)
    for hits, expected in zip(found, probabilities.tolist(), strict=True):
        assert [hit["score"] for hit in hits] == sorted((hit["score"] for hit in hits), reverse=True)
        scores = {hit["label"]: hit["score"] for hit in hits}
        assert [scores[text] for text in TEXTS] == pytest.approx(expected, abs=1e-5)


def test_image_features_with_a_head_are_pooled(tmp_path):
    repo = save_vision_repo(tmp_path, reference_model(use_head=True, is_native=False))
    extract = pipeline("image-feature-extraction", model=str(repo), trust_remote_code=True)
    vectors = extract(PHOTOGRAPHS, pool=True)
    assert [torch.tensor(vector).shape for vector in vectors] == [(1, 64)] * 3


def test_image_features_without_a_head_are_a_mean(tmp_path):
    """The pipeline pools only by a head, and says so; the mean is one line of the docs."""
    repo = save_vision_repo(tmp_path, reference_model())
    extract = pipeline("image-feature-extraction", model=str(repo), trust_remote_code=True)
    with pytest.raises(ValueError, match="No pooled output was returned"):
        extract(PHOTOGRAPHS[0], pool=True)
    vectors = torch.stack([features.mean(dim=0) for features in extract(PHOTOGRAPHS, return_tensors=True)])
    assert vectors.shape == (3, 64)
