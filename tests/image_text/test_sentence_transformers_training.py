# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""A converted repo trained with Sentence Transformers: images of odd sizes reach every loss whole."""

import copy

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from image_text_checkpoints import TEXTS, reference_image_text_model, save_image_text_repo, save_vision_repo
from reference import reference_model
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses
from transformers import AutoModel, AutoProcessor


# Both are deprecated for `directions` of the ranking losses, and still there.
pytestmark = pytest.mark.filterwarnings("ignore:The .*SymmetricRankingLoss is deprecated:DeprecationWarning")

# Widths, heights and numbers of patches differ; the first is the smallest, so that cutting patches as samples shows.
SIZES = [(14, 14), (70, 28), (28, 98), (42, 42)]
IMAGES = [
    PIL.Image.fromarray(np.random.default_rng(index).integers(0, 256, (*size, 3), dtype=np.uint8))
    for index, size in enumerate(SIZES)
]
TURNED = [image.rotate(180) for image in IMAGES]
# None is the match of another row: guided losses compare scores, which would then be equal but for rounding.
OTHERS = [PIL.ImageOps.mirror(image) for image in IMAGES[1:] + IMAGES[:1]]
WRONG = [f"no {text}" for text in TEXTS[1:] + TEXTS[:1]]
SCORES = [0.9, 0.1, 0.7, 0.4]

# Columns of a data set, by what they hold. An image is `i`, a text `t`.
PAIRS = {"ii": [IMAGES, TURNED], "it": [IMAGES, TEXTS], "ti": [TEXTS, IMAGES]}
TRIPLETS = {"iii": [IMAGES, TURNED, OTHERS], "itt": [IMAGES, TEXTS, WRONG], "tii": [TEXTS, IMAGES, OTHERS]}
BOTH = PAIRS | TRIPLETS

RANKING = losses.MultipleNegativesRankingLoss
# Loss, the columns that it takes, and the labels.
TAKES_IMAGES = {
    "AnglELoss": (losses.AnglELoss, PAIRS, SCORES),
    "CachedGISTEmbedLoss": (lambda model: losses.CachedGISTEmbedLoss(model, copy.deepcopy(model)), BOTH, None),
    "CachedMultipleNegativesRankingLoss": (losses.CachedMultipleNegativesRankingLoss, BOTH, None),
    "CachedMultipleNegativesSymmetricRankingLoss": (losses.CachedMultipleNegativesSymmetricRankingLoss, BOTH, None),
    "CoSENTLoss": (losses.CoSENTLoss, PAIRS, SCORES),
    "ContrastiveLoss": (losses.ContrastiveLoss, PAIRS, [1, 0, 1, 0]),
    "ContrastiveTensionLoss": (losses.ContrastiveTensionLoss, {"ii": PAIRS["ii"]}, [1, 0, 1, 0]),
    "CosineSimilarityLoss": (losses.CosineSimilarityLoss, PAIRS, SCORES),
    "DistillKLDivLoss": (losses.DistillKLDivLoss, TRIPLETS, [[score, 1 - score] for score in SCORES]),
    "EmbedDistillLoss": (losses.EmbedDistillLoss, BOTH, np.eye(4, 40).tolist()),
    "GISTEmbedLoss": (lambda model: losses.GISTEmbedLoss(model, copy.deepcopy(model)), BOTH, None),
    "GlobalOrthogonalRegularizationLoss": (losses.GlobalOrthogonalRegularizationLoss, BOTH, None),
    "MSELoss": (losses.MSELoss, BOTH, np.eye(4, 40).tolist()),
    "MarginMSELoss": (losses.MarginMSELoss, TRIPLETS, SCORES),
    "MatryoshkaLoss": (lambda model: losses.MatryoshkaLoss(model, RANKING(model), [40, 8]), BOTH, None),
    "MegaBatchMarginLoss": (lambda model: losses.MegaBatchMarginLoss(model, mini_batch_size=3), PAIRS, None),
    "MultipleNegativesRankingLoss": (RANKING, BOTH, None),
    "MultipleNegativesSymmetricRankingLoss": (losses.MultipleNegativesSymmetricRankingLoss, BOTH, None),
    "OnlineContrastiveLoss": (lambda model: losses.OnlineContrastiveLoss(model, margin=1.5), PAIRS, [1, 0, 1, 0]),
    "SoftmaxLoss": (lambda model: losses.SoftmaxLoss(model, 40, num_labels=3), PAIRS, [0, 1, 2, 1]),
    "TripletLoss": (losses.TripletLoss, TRIPLETS, None),
}
# One column with classes, or without.
TAKES_ONE_COLUMN = {
    "BatchAllTripletLoss": [0, 1, 0, 1],
    "BatchHardSoftMarginTripletLoss": [0, 1, 0, 1],
    "BatchHardTripletLoss": [0, 1, 0, 1],
    "BatchSemiHardTripletLoss": [0, 1, 0, 1],
    "ContrastiveTensionLossInBatchNegatives": None,
}
REFUSED = {
    "AdaptiveLayerLoss": lambda model: losses.AdaptiveLayerLoss(model, RANKING(model)),
    "Matryoshka2dLoss": lambda model: losses.Matryoshka2dLoss(model, RANKING(model), [40, 8]),
}
# A decoder that writes the text of its input again, and what is no loss.
OTHER_NAMES = {
    "BatchHardTripletLossDistanceFunction",
    "ContrastiveTensionDataLoader",
    "DenoisingAutoEncoderLoss",
    "SiameseDistanceMetric",
    "TripletDistanceMetric",
}

# Cached loss, its uncached twin and the columns of both.
TWINS = {
    "ranking": (losses.CachedMultipleNegativesRankingLoss, RANKING, BOTH),
    "symmetric": (
        losses.CachedMultipleNegativesSymmetricRankingLoss,
        losses.MultipleNegativesSymmetricRankingLoss,
        BOTH,
    ),
    "guided": (
        lambda model, **sizes: losses.CachedGISTEmbedLoss(model, copy.deepcopy(model), **sizes),
        lambda model: losses.GISTEmbedLoss(model, copy.deepcopy(model)),
        BOTH,
    ),
    "margin": (
        losses.MegaBatchMarginLoss,
        lambda model: losses.MegaBatchMarginLoss(model, use_mini_batched_version=False),
        PAIRS,
    ),
}


@pytest.fixture(scope="module")
def repos(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("repos")
    repos = {
        "image-text": save_image_text_repo(folder / "image-text", reference_image_text_model()),
        "head": save_vision_repo(folder / "head", reference_model(is_native=False, use_head=True)),
        "native": save_vision_repo(folder / "native", reference_model()),
    }
    for repo in repos.values():
        settings = (repo / "preprocessor_config.json").read_text()
        (repo / "preprocessor_config.json").write_text(settings.replace('"image_size": 56', '"image_size": null'))
    return repos


def load(repo) -> SentenceTransformer:
    return SentenceTransformer(str(repo), trust_remote_code=True, device="cpu")


def dataset(columns: list, labels: list | None) -> Dataset:
    named = dict(zip(("anchor", "positive", "negative"), columns, strict=False))
    return Dataset.from_dict(named if labels is None else {**named, "label": labels})


def trained(model: SentenceTransformer, loss: torch.nn.Module, data: Dataset, folder, **arguments) -> set[str]:
    """Trains `model` for a step and returns the names of the weights that it changed."""
    pytest.importorskip("accelerate", reason="needs requirements-scale.txt")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    arguments = SentenceTransformerTrainingArguments(str(folder), **{**defaults, **arguments})
    SentenceTransformerTrainer(model=model, args=arguments, train_dataset=data, loss=loss).train()
    return {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}


def features(model: SentenceTransformer, columns: list) -> list[dict]:
    return [model.preprocess(column) for column in columns]


def test_every_loss_of_the_released_package_is_named_here():
    assert set(losses.__all__) == {*TAKES_IMAGES, *TAKES_ONE_COLUMN, *REFUSED, *OTHER_NAMES}


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, (_, columns, _) in TAKES_IMAGES.items() for kind in columns]
)
def test_losses_train_images_and_texts(repos, tmp_path, name, kind):
    make_loss, columns, labels = TAKES_IMAGES[name]
    model = load(repos["image-text"])
    changed = trained(model, make_loss(model), dataset(columns[kind], labels), tmp_path)
    tower = {part for part, _ in model.named_parameters() if "vision_model" in part or "visual_projection" in part}
    if kind == "tii":
        # The difference between the scores of two images with one text does not depend on it.
        tower.remove("0.model.vision_model.head.output_proj.bias")
    assert tower <= changed
    assert any("text_model" in part for part in changed) == ("t" in kind)


@pytest.mark.parametrize("name", TAKES_ONE_COLUMN)
def test_losses_of_one_column_train_images(repos, tmp_path, name):
    model = load(repos["head"])
    changed = trained(model, getattr(losses, name)(model), dataset([IMAGES], TAKES_ONE_COLUMN[name]), tmp_path)
    assert changed == {part for part, _ in model.named_parameters()}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("kind", ["ii", "it", "tt"])
def test_losses_of_other_layers_are_refused(repos, tmp_path, name, kind):
    model = load(repos["image-text"])
    columns = {**PAIRS, "tt": [TEXTS, WRONG]}[kind]
    with pytest.raises(ValueError, match=r"no embeddings of its layers.*`AdaptiveLayerLoss`"):
        trained(model, REFUSED[name](model), dataset(columns, None), tmp_path)


@pytest.mark.parametrize("kind", BOTH)
def test_the_ranking_loss_is_that_of_the_models_own_vectors(repos, kind):
    """Independent of Sentence Transformers: the model on each input alone, and the cross entropy written out."""
    encoder = load(repos["image-text"])
    model = AutoModel.from_pretrained(repos["image-text"], trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(repos["image-text"], trust_remote_code=True)

    def vector(sample):
        if isinstance(sample, str):
            return model.get_text_features(**processor(text=sample, return_tensors="pt")).pooler_output[0]
        return model.get_image_features(**processor(images=sample, return_tensors="pt")).pooler_output[0]

    with torch.no_grad():
        columns = [F.normalize(torch.stack([vector(sample) for sample in column]), dim=1) for column in BOTH[kind]]
        expected = F.cross_entropy(20 * columns[0] @ torch.cat(columns[1:]).T, torch.arange(4))
        for loss in (RANKING(encoder), losses.CachedMultipleNegativesRankingLoss(encoder, mini_batch_size=3)):
            torch.testing.assert_close(loss(features(encoder, BOTH[kind]), None), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mini_batch_size", [1, 3, 64])
@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, (_, _, columns) in TWINS.items() for kind in columns]
)
def test_cached_losses_have_the_value_and_gradients_of_their_uncached_twins(repos, name, kind, mini_batch_size):
    make_cached, make_plain, columns = TWINS[name]
    model = load(repos["image-text"]).double()
    results = []
    for loss in (make_plain(model), make_cached(model, mini_batch_size=mini_batch_size)):
        model.zero_grad()
        value = loss(features(model, columns[kind]), None)
        value.backward()
        gradients = {part: weight.grad.clone() for part, weight in model.named_parameters() if weight.grad is not None}
        results.append((value.detach(), gradients))
    (value, gradients), (cached_value, cached_gradients) = results
    assert any("vision_model" in part for part in gradients)
    torch.testing.assert_close(cached_value, value, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(cached_gradients, gradients, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["ranking", "symmetric", "guided", "margin"])
@pytest.mark.parametrize("kind", ["ii", "it"])
def test_mini_batches_by_tokens_are_refused_for_images(repos, name, kind):
    model = load(repos["image-text"])
    loss = TWINS[name][0](model, mini_batch_num_tokens=64)
    with pytest.raises(ValueError, match=r"(?s)mini_batch_num_tokens.*'attention_mask'.*Use mini_batch_size instead"):
        loss(features(model, PAIRS[kind]), None)


@pytest.mark.parametrize("kind", ["image-text", "head", "native"])
def test_a_trained_model_is_saved_and_loaded_with_what_it_learned(repos, tmp_path, kind):
    model = load(repos[kind])
    before = model.encode(IMAGES)
    loss = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)
    columns = dataset([IMAGES, TEXTS, WRONG] if kind == "image-text" else [IMAGES, TURNED], None)
    trained(model, loss, columns, tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    after = model.encode(IMAGES)
    assert np.abs(after - before).max() > 1e-4
    model.save_pretrained(str(tmp_path / "saved"))
    for folder in (tmp_path / "checkpoint-2", tmp_path / "saved"):
        again = load(folder)
        assert type(again[0]).__name__ == "Aimv2PackingTransformer"
        np.testing.assert_allclose(again.encode(IMAGES), after, atol=1e-5)
