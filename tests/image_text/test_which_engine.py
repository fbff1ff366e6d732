# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""An engine runs wherever people meet the model: by `AutoModel`, for words and pictures, embeddings and a corpus."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from image_text_checkpoints import reference_image_text_model, save_image_text_repo
from PIL import Image
from reference import ODD_GRIDS, pack, random_images
from transformers import AutoModel

from corpus.models import load_model


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    torch.manual_seed(0)
    return save_image_text_repo(tmp_path_factory.mktemp("repos") / "served", reference_image_text_model())


@torch.inference_mode()
def test_of_words_and_pictures(repo):
    model = AutoModel.from_pretrained(repo, trust_remote_code=True).eval()
    model.get_image_features(**pack(random_images(ODD_GRIDS)))
    assert (model.vision_model.last_engine, model.vision_model.engine_refusal) == ("cpu", None)


@torch.inference_mode()
@pytest.mark.parametrize("pooling", ["mean", "projection"])
def test_of_a_corpus(repo, pooling):
    model = load_model(str(repo), SimpleNamespace(dtype="float32", pooling=pooling))
    tower = getattr(model, "vision_model", model)
    tower(**pack(random_images(ODD_GRIDS)))
    assert (tower.last_engine, tower.engine_refusal) == ("cpu", None)


def test_of_sentence_transformers(repo):
    package = pytest.importorskip("sentence_transformers")
    model = package.SentenceTransformer(str(repo), trust_remote_code=True, device="cpu")
    model.encode([Image.fromarray(np.zeros((40, 60, 3), dtype=np.uint8))])
    tower = model[0].auto_model.vision_model
    assert (tower.last_engine, tower.engine_refusal) == ("cpu", None)
