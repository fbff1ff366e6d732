# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""The image-text model: transformers' numbers at the fixed size, each image as if alone at any size."""

import json
import shutil

import pytest
import torch
from image_text_checkpoints import (
    MAX_TOKENS,
    TEXTS,
    Aimv2PackingImageTextConfig,
    Aimv2PackingImageTextModel,
    clip_tokenizer,
    image_text_model,
    reference_image_text_model,
    save_image_text_repo,
)
from reference import (
    REPO,
    Aimv2PackingAcceleratedModel,
    pack,
    packed_layout,
    packing_model,
    random_images,
    reference_model,
)
from transformers import Aimv2Model, Aimv2VisionConfig, AutoModel, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module


IMAGE_INPUTS, TEXT_INPUTS = ("hidden_states", "grid_thw"), ("input_ids", "attention_mask")
ODD_GRIDS = [(1, 1), (1, 9), (9, 1), (3, 3), (3, 3), (2, 6), (13, 11), (4, 4), (6, 2)]


def tokenised(texts=TEXTS):
    return clip_tokenizer()(texts, padding=True, return_tensors="pt")


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    torch.manual_seed(0)
    return save_image_text_repo(tmp_path_factory.mktemp("image-text") / "repo", reference_image_text_model())


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("image_size", [56, 224])
@torch.no_grad()
def test_equals_transformers_model_at_the_fixed_size(attn, image_size):
    reference = reference_image_text_model(vision={"image_size": image_size})
    model = image_text_model(reference, attn_implementation=attn)
    side = image_size // 14
    images, texts = random_images([(side, side)] * 3), tokenised()
    inputs = pack(images)
    expected = reference(**texts, pixel_values=torch.stack(images))
    outputs = model(**texts, **inputs)
    for name in ("logits_per_image", "logits_per_text", "image_embeds", "text_embeds"):
        torch.testing.assert_close(outputs[name], expected[name], rtol=0, atol=1e-5)
    image_features = reference.get_image_features(torch.stack(images)).pooler_output
    torch.testing.assert_close(model.get_image_features(**inputs).pooler_output, image_features, rtol=0, atol=1e-5)
    text_features = reference.get_text_features(**texts).pooler_output
    torch.testing.assert_close(model.get_text_features(**texts).pooler_output, text_features, rtol=0, atol=1e-5)


@torch.no_grad()
def test_an_image_of_any_size_is_as_if_alone():
    model = image_text_model(reference_image_text_model())
    images, texts = random_images(ODD_GRIDS), tokenised()
    together = model(**texts, **pack(images))
    assert together.logits_per_image.shape == (len(images), len(TEXTS))
    for index, image in enumerate(images):
        alone = model(**texts, **pack([image]))
        torch.testing.assert_close(together.image_embeds[index], alone.image_embeds[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(together.logits_per_image[index], alone.logits_per_image[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_image_features_are_the_projected_head():
    model = image_text_model(reference_image_text_model())
    inputs = pack(random_images(ODD_GRIDS))
    pooled = model.vision_model(**inputs).pooler_output
    features = model.get_image_features(**inputs)
    torch.testing.assert_close(features.pooler_output, pooled @ model.visual_projection.weight.T, rtol=0, atol=1e-6)
    assert len(features.last_hidden_state) == len(inputs["hidden_states"])


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@torch.no_grad()
def test_without_a_mask_a_token_sees_those_before_it(attn):
    reference = reference_image_text_model()
    model = image_text_model(reference, attn_implementation=attn)
    input_ids = tokenised([TEXTS[1]])["input_ids"]
    changed = input_ids.clone()
    place = changed.shape[1] // 2
    changed[0, place] = 7
    first, second = (model.get_text_features(ids).last_hidden_state[0] for ids in (input_ids, changed))
    torch.testing.assert_close(second[:place], first[:place], rtol=0, atol=1e-6)
    assert (second[place:] - first[place:]).abs().amax(dim=-1).min() > 1e-3
    # It drops the causal mask under sdpa, and where it is given no mask.
    reference.set_attn_implementation("eager")
    expected = reference.get_text_features(input_ids, torch.ones_like(input_ids))
    torch.testing.assert_close(first, expected.last_hidden_state[0], rtol=0, atol=1e-5)
    features = model.get_text_features(input_ids).pooler_output
    torch.testing.assert_close(features, expected.pooler_output, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_scale_is_bounded():
    reference = reference_image_text_model()
    torch.nn.init.constant_(reference.logit_scale, 9.0)
    model = image_text_model(reference)
    outputs = model(**tokenised(), **pack(random_images([(4, 4)])))
    similarity = outputs.image_embeds @ outputs.text_embeds.T
    torch.testing.assert_close(outputs.logits_per_image, 100 * similarity, rtol=0, atol=1e-4)


@torch.no_grad()
def test_outputs_as_tuples_and_of_all_layers():
    model = image_text_model(reference_image_text_model())
    inputs = {**tokenised(), **pack(random_images([(4, 4), (2, 3)]))}
    outputs = model(**inputs, output_hidden_states=True)
    assert [len(outputs[part].hidden_states) for part in ("vision_model_output", "text_model_output")] == [3, 3]
    torch.testing.assert_close(model(**inputs, return_dict=False)[0], outputs.logits_per_image)
    features = model.get_image_features(inputs["hidden_states"], inputs["grid_thw"], return_dict=False)
    assert torch.equal(features[1], model.get_image_features(inputs["hidden_states"], inputs["grid_thw"]).pooler_output)


@pytest.mark.parametrize("part", ["vision_config", "text_config", None])
@torch.no_grad()
def test_a_configuration_may_ask_for_tuples(part):
    reference = reference_image_text_model()
    inputs = {**tokenised(), **pack(random_images([(4, 4), (2, 3)]))}
    texts, images = ({name: inputs[name] for name in names} for names in (TEXT_INPUTS, IMAGE_INPUTS))
    expected = image_text_model(reference)
    model = image_text_model(reference)
    (getattr(model.config, part) if part else model.config).return_dict = False
    outputs, features, text_features = (
        model(**inputs),
        model.get_image_features(**images),
        model.get_text_features(**texts),
    )
    assert [isinstance(output, tuple) for output in (outputs, features, text_features)] == [part is None] * 3
    assert torch.equal(outputs[0], expected(**inputs).logits_per_image)
    assert torch.equal(features[1], expected.get_image_features(**images).pooler_output)
    assert torch.equal(text_features[1], expected.get_text_features(**texts).pooler_output)


def test_gradients_are_those_of_transformers():
    reference = reference_image_text_model()
    model = image_text_model(reference)
    images, texts = random_images([(4, 4)] * 4), tokenised()
    for outputs in (reference(**texts, pixel_values=torch.stack(images)), model(**texts, **pack(images))):
        torch.nn.functional.cross_entropy(outputs.logits_per_image, torch.arange(4)).backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_attention_of_both_parts_is_chosen_together(repo):
    model = AutoModel.from_pretrained(repo, trust_remote_code=True, attn_implementation="eager")
    parts = (model.vision_model.config, model.text_model.config)
    assert [part._attn_implementation for part in parts] == ["eager"] * 2
    model.set_attn_implementation("sdpa")
    assert [part._attn_implementation for part in parts] == ["sdpa"] * 2


@torch.no_grad()
def test_half_precision(repo):
    model = AutoModel.from_pretrained(repo, trust_remote_code=True, dtype=torch.bfloat16).eval()
    exact = AutoModel.from_pretrained(repo, trust_remote_code=True).eval()
    inputs = {**tokenised(), **pack(random_images(ODD_GRIDS))}
    outputs, expected = model(**inputs), exact(**inputs)
    assert outputs.image_embeds.dtype == torch.bfloat16
    for name in ("image_embeds", "text_embeds"):
        assert torch.cosine_similarity(outputs[name].float(), expected[name]).min() > 0.995


def test_gradient_checkpointing_gives_the_same_gradients():
    reference = reference_image_text_model()
    inputs = {**tokenised(), **pack(random_images([(4, 4), (2, 3)]))}
    gradients = []
    for checkpointing in (False, True):
        model = image_text_model(reference).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**inputs).logits_per_image.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_a_random_model_starts_as_configured():
    config = reference_image_text_model().config.to_dict()
    model = Aimv2PackingImageTextModel(Aimv2PackingImageTextConfig(**config | {"logit_scale_init_value": 1.5}))
    assert model.logit_scale.item() == 1.5
    assert model.vision_model.head.cls_token.std() > 0


@torch.no_grad()
def test_repo_loads_by_the_auto_classes_and_in_transformers(repo):
    model = AutoModel.from_pretrained(repo, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
    images = [torch.randint(256, (3, 56, 56), dtype=torch.uint8) for _ in range(3)]
    inputs = processor(images=images, text=TEXTS, padding=True, return_tensors="pt")
    assert set(inputs) == {"hidden_states", "grid_thw", "input_ids", "attention_mask"}
    logits = model(**inputs).logits_per_image

    reference = Aimv2Model.from_pretrained(repo).eval()
    pixels = inputs["hidden_states"].view(3, 4, 4, 3, 14, 14).permute(0, 3, 1, 4, 2, 5).reshape(3, 3, 56, 56)
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(reference(pixel_values=pixels, **texts).logits_per_image, logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_processor_takes_images_of_all_sizes(repo):
    model = AutoModel.from_pretrained(repo, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
    images = [torch.randint(256, (3, 56, 140), dtype=torch.uint8), torch.randint(256, (3, 84, 28), dtype=torch.uint8)]
    fixed = processor(images=images, return_tensors="pt")
    assert fixed["grid_thw"].tolist() == [[1, 4, 4]] * 2
    native = processor(images=images, return_tensors="pt", images_kwargs={"image_size": None})
    assert native["grid_thw"].tolist() == [[1, 4, 10], [1, 6, 2]]
    assert model.get_image_features(**native).pooler_output.shape == (2, model.config.projection_dim)


def test_saved_model_and_processor_load_again(repo, tmp_path):
    AutoModel.from_pretrained(repo, trust_remote_code=True).save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(repo, trust_remote_code=True).save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    expected = AutoModel.from_pretrained(repo, trust_remote_code=True).state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    image = torch.randint(256, (3, 70, 98), dtype=torch.uint8)
    inputs = processor(images=image, text=TEXTS[:1], return_tensors="pt")
    assert inputs["grid_thw"].tolist() == [[1, 4, 4]]
    assert inputs["input_ids"].tolist() == [clip_tokenizer()(TEXTS[0])["input_ids"]]


@torch.no_grad()
def test_vision_tower_loads_alone(repo):
    tower = Aimv2PackingAcceleratedModel.from_pretrained(repo).eval()
    expected = AutoModel.from_pretrained(repo, trust_remote_code=True).eval().vision_model
    inputs = pack(random_images(ODD_GRIDS))
    assert torch.equal(tower(**inputs).pooler_output, expected(**inputs).pooler_output)
    assert tower.config.to_dict().keys() == expected.config.to_dict().keys()


def test_checkpoint_without_its_texts_is_refused(repo, tmp_path):
    tower = packing_model(reference_model(use_head=True, is_native=False))
    tower.save_pretrained(tmp_path)
    config = json.loads((repo / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    for path in REPO.glob("*_aimv2_packing.py"):
        shutil.copyfile(path, tmp_path / path.name)
    with pytest.raises(
        ValueError, match=r"is no checkpoint of Aimv2PackingAcceleratedImageTextModel .*: it lacks .* weights"
    ):
        AutoModel.from_pretrained(tmp_path, trust_remote_code=True)


def test_repo_without_a_tokenizer_is_refused_by_the_processor(tmp_path):
    folder = save_image_text_repo(tmp_path, reference_image_text_model(), tokenizer=False)
    with pytest.raises(ValueError, match=r"has no tokenizer, none of tokenizer\.json, vocab\.json: add"):
        AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def test_texts_too_long_are_refused_and_truncated_on_request():
    model = image_text_model(reference_image_text_model())
    tokenizer = clip_tokenizer()
    text = " ".join(["rocket"] * 100)
    with pytest.raises(ValueError, match=r"`input_ids` must hold at most 77 tokens per text, got \d+"):
        model.get_text_features(**tokenizer(text, return_tensors="pt"))
    cut = tokenizer(text, truncation=True, return_tensors="pt")
    assert cut["input_ids"].shape == (1, MAX_TOKENS)
    assert cut["input_ids"][0, -1] == model.config.text_config.eos_token_id
    assert model.get_text_features(**cut).pooler_output.shape == (1, model.config.projection_dim)


@pytest.mark.parametrize(
    "input_ids",
    [
        *([1, 2], torch.ones(3), torch.ones(2, 3), torch.ones(3, dtype=torch.int64)),
        *(torch.ones(0, 3, dtype=torch.int64), torch.ones(2, 0, dtype=torch.int64)),
    ],
)
def test_what_are_no_tokens_is_refused_before_any_work(input_ids):
    model = image_text_model(reference_image_text_model())
    with pytest.raises(ValueError, match="`input_ids` must be a tensor of integers of shape"):
        model.get_text_features(input_ids)
    with pytest.raises(ValueError, match="`input_ids` must be a tensor of integers of shape"):
        model(input_ids, **pack(random_images([(4, 4)])))


def test_mask_of_another_shape_is_refused():
    model = image_text_model(reference_image_text_model())
    texts = tokenised()
    with pytest.raises(ValueError, match=r"`attention_mask` must have the shape of `input_ids`, \(4, \d+\), got \(3, "):
        model.get_text_features(texts["input_ids"], texts["attention_mask"][:3])
    with pytest.raises(ValueError, match=r"`attention_mask` must have the shape of `input_ids`, .* got list"):
        model.get_text_features(texts["input_ids"], texts["attention_mask"].tolist())


@pytest.mark.parametrize("name", ["attention_msk", "position_ids", "is_causal", "layout"])
def test_arguments_that_the_text_encoder_would_ignore_or_misread_are_refused(name):
    model, texts = image_text_model(reference_image_text_model()), tokenised()
    with pytest.raises(TypeError, match=f"^`{name}` is not an argument of `get_text_features`"):
        model.get_text_features(**texts, **{name: False})
    model.get_text_features(**texts, **{name: None})


@torch.no_grad()
def test_what_is_for_the_vision_tower_leaves_texts_as_they_are():
    model, texts, inputs = image_text_model(reference_image_text_model()), tokenised(), pack(random_images([(4, 4)]))
    expected = model(**texts, **inputs).text_embeds
    layout = packed_layout(inputs["grid_thw"], model.config.vision_config)
    options = {"layout": layout, "is_causal": False, "num_items_in_batch": 1, "output_hidden_states": True}
    outputs = model(**texts, **inputs, **options)
    assert torch.equal(outputs.text_embeds, expected)
    assert len(outputs.text_model_output.hidden_states) == model.config.text_config.num_hidden_layers + 1


def test_configuration():
    config = Aimv2PackingImageTextConfig(vision_config={"patch_layout": "channels_last"}, projection_dim=8)
    assert config.vision_config.patch_layout == "channels_last"
    again = Aimv2PackingImageTextConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert again.to_dict()["vision_config"]["model_type"] == "aimv2_packing"
    vision = Aimv2VisionConfig(hidden_size=64, num_attention_heads=2)
    converted = Aimv2PackingImageTextConfig(vision_config=vision).vision_config
    assert converted.hidden_size == 64
    assert converted.model_type == "aimv2_packing"


def test_configuration_takes_that_of_a_vision_tower_of_another_repo():
    # Each repo's code is a module of its own, so the class has the same name and is another.
    other_class = get_class_from_dynamic_module("configuration_aimv2_packing.Aimv2PackingConfig", str(REPO))
    vision = other_class(hidden_size=64, num_attention_heads=2, patch_layout="channels_last")
    own_class = Aimv2PackingImageTextConfig.sub_configs["vision_config"]
    assert type(vision) is not own_class
    config = Aimv2PackingImageTextConfig(vision_config=vision).vision_config
    assert type(config) is own_class
    assert config.to_dict() == vision.to_dict()


def test_parts_of_the_configuration_are_named_by_their_classes():
    config = Aimv2PackingImageTextConfig()
    assert Aimv2PackingImageTextConfig.sub_configs == {
        "text_config": type(config.text_config),
        "vision_config": type(config.vision_config),
    }


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"vision_config": {"use_head": False}}, "vision_config.use_head"),
        ({"text_config": Aimv2VisionConfig()}, "text_config"),
        ({"projection_dim": 0}, "projection_dim"),
        ({"projection_dim": "512"}, "projection_dim"),
        ({"max_logit_scale": 0.0}, "max_logit_scale"),
        ({"vision_config": {"patch_size": 0}}, "patch_size"),
    ],
)
def test_configuration_refuses_what_no_model_can_have(fields, named):
    with pytest.raises(Exception, match=named):
        Aimv2PackingImageTextConfig(**fields)


def test_images_by_a_layout_alone():
    model, inputs = image_text_model(reference_image_text_model()), pack(random_images(ODD_GRIDS))
    layout = packed_layout(inputs["grid_thw"], model.config.vision_config)
    with torch.inference_mode():
        expected = model.get_image_features(**inputs).pooler_output
        assert torch.equal(model.get_image_features(inputs["hidden_states"], layout=layout).pooler_output, expected)


@pytest.mark.parametrize("name", ["videos", "audio"])
def test_the_processor_refuses_what_it_would_leave_out(repo, name):
    processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
    with pytest.raises(ValueError, match=f"`{name}` must be None"):
        processor(text="a cat", **{name: [torch.zeros(2, 3, 28, 28)]})
    with pytest.raises(ValueError, match="`text` must be"):
        processor(text=[])
    assert processor(text=[""])["input_ids"] == processor(text=["", "a"])["input_ids"][:1]
