# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Videos, splitting packed features, the batch sampler and the collator, and transformers' pipeline."""

import itertools
import json
import random
import shutil

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from reference import REPO, TINY, packing_model, reference_model
from test_image_processing import BACKENDS, PHOTOGRAPHS, load, noise
from torch.utils.data import DataLoader
from transformers import pipeline
from transformers.video_utils import load_video

from conversion.local_code import local_class


pack_in_order = local_class("batching_aimv2_packing.pack_in_order")
PatchBudgetBatchSampler = local_class("batching_aimv2_packing.PatchBudgetBatchSampler")


@pytest.fixture(params=BACKENDS)
def processor(request):
    return load(request.param, min_patches=1, max_patches=60)


def lengths_of(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(1, 200, count).tolist()


def sampler(lengths, budget, **kwargs):
    """The sampler for images whose sizes give these numbers of patches."""
    processor = load("pil", min_patches=1)
    return processor.batch_sampler([(14, 14 * length) for length in lengths], budget, **kwargs)


@pytest.mark.parametrize("image_size", [None, 56])
def test_each_frame_of_a_video_is_encoded_as_its_image(processor, image_size):
    model = packing_model(reference_model(is_native=image_size is None))
    videos = [noise(3, 50, 70, 3), noise(2, 90, 40, 3, seed=1), noise(1, 30, 30, 3, seed=2)]
    inputs = processor.preprocess_videos(videos, return_tensors="pt", image_size=image_size)
    assert inputs["grid_thw"][:, 0].tolist() == [3, 2, 1] and inputs["grid_thw"].dtype == torch.int64
    frames = [frame for video in videos for frame in video]
    with torch.no_grad():
        maps = processor.unpack_features(model(**inputs).last_hidden_state, inputs["grid_thw"])
        alone = [
            model(**processor(frame, return_tensors="pt", image_size=image_size)).last_hidden_state for frame in frames
        ]
    actual = [frame.flatten(0, 1) for video in maps for frame in video]
    for one, other in zip(actual, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_videos_of_every_form(processor):
    video = noise(3, 50, 70, 3)
    expected = processor.preprocess_videos([video, video], return_tensors="pt")
    frames = list(video)
    pictures = [PIL.Image.fromarray(frame) for frame in video]
    for videos in ([frames, pictures], [torch.from_numpy(video), video.transpose(0, 3, 1, 2)], np.stack([video] * 2)):
        inputs = processor.preprocess_videos(videos, return_tensors="pt")
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    for one in (video, frames, tuple(frames), pictures, [video]):
        inputs = processor.preprocess_videos(one, return_tensors="np")
        assert np.array_equal(inputs["grid_thw"], expected["grid_thw"][:1])
    for count in (1, 2):
        for shorter in (frames[:count], tuple(frames[:count])):
            inputs = processor.preprocess_videos(shorter, return_tensors="np")
            assert inputs["grid_thw"].tolist() == [[count, *expected["grid_thw"][0, 1:].tolist()]]


def test_a_video_file(processor, tmp_path):
    import av

    with av.open(str(tmp_path / "video.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in noise(10, 48, 64, 3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    frames, _ = load_video(str(tmp_path / "video.mp4"), num_frames=4, backend="pyav")
    assert processor.preprocess_videos(frames, return_tensors="pt")["grid_thw"].tolist() == [[4, 3, 5]]


@pytest.mark.parametrize(
    ("videos", "message"),
    [
        ([], "at least one frame"),
        ([[], [noise(30, 30, 3)]], "none for video 0"),
        ([[noise(30, 30, 3), noise(30, 90, 3)]], "one size"),
        ([noise(2, 30, 30, 3), noise(30, 30, 3)], "a list of both"),
        ("clip.mp4", "pip install av"),
    ],
)
def test_what_is_no_video_is_refused(processor, videos, message):
    with pytest.raises(ValueError, match=message):
        processor.preprocess_videos(videos)


def test_features_are_split_as_they_were_packed():
    unpack = load("pil").unpack_features
    grid_thw = torch.tensor([[1, 2, 3], [4, 1, 2], [1, 1, 1]])
    features = torch.randn(15, 8, requires_grad=True)
    maps = unpack(features, grid_thw)
    assert [tuple(part.shape) for part in maps] == [(1, 2, 3, 8), (4, 1, 2, 8), (1, 1, 1, 8)]
    assert torch.equal(maps[1][2, 0, 1], features[6 + 2 * 2 + 1])
    maps[0].sum().backward()
    assert features.grad[:6].eq(1).all() and features.grad[6:].eq(0).all()
    assert unpack(features[:0], grid_thw[:0]) == []
    with pytest.raises(ValueError, match="15 patches, but `features` holds 14"):
        unpack(features[:14], grid_thw)


@pytest.mark.parametrize("max_items", [None, 1, 4])
def test_neighbours_are_packed_as_long_as_they_fit(max_items):
    rng = random.Random(0)
    for _ in range(200):
        budget = rng.randint(1, 20)
        lengths = [rng.choice([0, 1, rng.randint(0, 25)]) for _ in range(rng.randint(1, 30))]
        groups = list(pack_in_order(range(len(lengths)), lengths.__getitem__, budget, max_items))
        assert [index for group in groups for index in group] == list(range(len(lengths)))
        sums = [sum(lengths[index] for index in group) for group in groups]
        for group, total, following in zip(groups, sums, [*groups[1:], None], strict=True):
            long = [index for index in group if lengths[index] > budget]
            assert total <= budget or (len(long) == 1 and total == lengths[long[0]])
            whole = following is None or len(group) == max_items or total >= budget
            assert whole or total + lengths[following[0]] > budget
            assert group and (max_items is None or len(group) <= max_items)


def test_a_stream_is_packed_without_its_end():
    """And a group that is full is given before the next item is read."""
    stream = itertools.count(1)
    groups = pack_in_order(stream, lambda length: length, 6)
    assert next(groups) == [1, 2, 3] and next(stream) == 4
    assert [next(groups) for _ in range(3)] == [[5], [6], [7]]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("count", [0, 1, 7, 3000])
def test_every_image_is_in_one_batch_within_the_budget(shuffle, count):
    lengths = lengths_of(count)
    batches = list(sampler(lengths, 1000, shuffle=shuffle))
    assert sorted(index for batch in batches for index in batch) == list(range(count))
    assert all(batch and sum(lengths[index] for index in batch) <= 1000 for batch in batches)
    if not shuffle:
        assert [index for batch in batches for index in batch] == list(range(count))


def test_shuffled_batches_are_full_and_new_each_epoch():
    lengths = lengths_of(5000)
    batches = sampler(lengths, 2000, shuffle=True)
    first = list(batches)
    filled = sorted(sum(lengths[index] for index in batch) for batch in first)
    assert len(first) <= -(-sum(lengths) // 2000) + 1 and filled[1] > 1900
    assert list(batches) == first == list(sampler(lengths, 2000, shuffle=True, seed=0))
    batches.set_epoch(0)
    assert list(batches) == first
    batches.set_epoch(1)
    assert list(batches) != first and list(sampler(lengths, 2000, shuffle=True, seed=5)) != first


@pytest.mark.parametrize("drop_last", [False, True])
def test_replicas_share_the_batches_evenly(drop_last):
    lengths = lengths_of(1000)
    whole = list(sampler(lengths, 1500, shuffle=True))
    assert len(whole) % 7
    parts = [
        list(sampler(lengths, 1500, shuffle=True, num_replicas=7, rank=rank, drop_last=drop_last)) for rank in range(7)
    ]
    expected = len(whole) // 7 if drop_last else -(-len(whole) // 7)
    assert [len(part) for part in parts] == [expected] * 7
    together = [batch for step in zip(*parts, strict=True) for batch in step]
    assert together[: len(whole)] == whole[: len(together)]
    few = [list(sampler([5], 10, num_replicas=3, rank=rank)) for rank in range(3)]
    assert few == [[[0]]] * 3


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_patches_per_batch": 9}, "got 10 for image 1"),
        ({"max_patches_per_batch": 99, "rank": 1}, "rank"),
        ({"max_patches_per_batch": 99, "rank": -1, "num_replicas": 2}, "rank"),
        ({"max_patches_per_batch": 99, "num_replicas": 0}, "num_replicas"),
    ],
)
def test_a_sampler_that_cannot_be_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        load("pil", min_patches=1).batch_sampler([(14, 14), (28, 70)], **kwargs)


def test_numbers_from_0_to_the_budget_are_taken():
    assert list(PatchBudgetBatchSampler([9, 0, 9], 9)) == [[0], [1, 2]]
    assert len(PatchBudgetBatchSampler([6, 0, 4], 10, shuffle=True)) == 1
    for number in (-1, 10):
        with pytest.raises(ValueError, match=f"from 0 to `max_patches_per_batch`, 9, got {number} for image 1"):
            PatchBudgetBatchSampler([9, number], 9)


def photographs() -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict(
        {"image": [str(path) for path in PHOTOGRAPHS], "label": list(range(len(PHOTOGRAPHS)))}, features=features
    )


@pytest.mark.parametrize("start_method", [None, "spawn"])
def test_a_data_loader_over_datasets(processor, start_method):
    dataset = photographs()
    sizes = [PIL.Image.open(path).size[::-1] for path in PHOTOGRAPHS]
    batches = processor.batch_sampler(sizes, 130)
    loader = DataLoader(
        dataset, batch_sampler=batches, collate_fn=processor.collate, num_workers=0 if start_method is None else 1,
        multiprocessing_context=start_method,
    )  # fmt: skip
    seen = []
    for batch in loader:
        assert len(batch["hidden_states"]) == batch["grid_thw"].prod(dim=1).sum() <= 130
        seen += batch["label"].tolist()
        expected = processor([str(PHOTOGRAPHS[label]) for label in batch["label"]], return_tensors="pt")
        assert torch.equal(batch["hidden_states"], expected["hidden_states"])
    assert len(loader) == len(batches) == 2 and seen == list(range(len(PHOTOGRAPHS)))


def test_examples_without_an_image_are_refused(processor):
    assert set(processor.collate([noise(20, 20, 3)])) == {"hidden_states", "grid_thw"}
    assert len(processor.collate([{"picture": noise(28, 28, 3)}], image_column="picture")["hidden_states"]) == 4
    for examples in ([{"label": 1}], [{"image": noise(20, 20, 3), "grid_thw": 1}]):
        with pytest.raises(ValueError, match="image_column"):
            processor.collate(examples)
        with pytest.raises(ValueError, match="image_column"):
            list(processor.packed_stream(examples, 100))


def test_the_pipeline_takes_images_of_different_sizes(tmp_path):
    reference = reference_model(use_head=True)
    packing_model(reference).save_pretrained(tmp_path)
    for path in (*REPO.glob("*_aimv2_packing.py"), REPO / "preprocessor_config.json"):
        shutil.copy(path, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = json.loads((REPO / "config.json").read_text())["auto_map"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    extract = pipeline("image-feature-extraction", model=str(tmp_path), trust_remote_code=True)
    images = [str(path) for path in PHOTOGRAPHS]
    outputs = extract(images, return_tensors=True, image_processor_kwargs={"max_patches": 200})
    inputs = extract.image_processor(images, return_tensors="pt", max_patches=200)
    with torch.no_grad():
        packed = extract.model(**inputs)
    torch.testing.assert_close(torch.cat(outputs), packed.last_hidden_state, rtol=0, atol=1e-5)
    pooled = extract(images[0], pool=True, image_processor_kwargs={"max_patches": 200})
    assert np.shape(pooled) == (1, TINY["hidden_size"])
    with pytest.raises(ValueError, match="batch_size"):
        extract(images, batch_size=2)
