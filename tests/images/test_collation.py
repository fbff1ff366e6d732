# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Numbers of patches, merged patches, and batches of examples with texts, several images or none."""

from collections import UserList

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from image_text_checkpoints import clip_tokenizer
from test_image_processing import BACKENDS, load, noise, relative
from torch.utils.data import DataLoader, Dataset, IterableDataset


@pytest.fixture(params=BACKENDS)
def processor(request):
    return load(request.param, min_patches=1, max_patches=60)


SIZES = [(28, 28), (1120, 5600), (301, 187), (10, 1500), (1, 1), (1, 150), (33, 34), (43, 700), (14, 2800)]


@pytest.mark.parametrize("options", [
    {}, {"max_patches": 9}, {"min_patches": 500, "max_patches": 512}, {"image_size": 56}, {"patch_size": 16},
    {"merge_size": 2}, {"merge_size": 3, "max_patches": 50}, {"merge_size": 2, "max_patches": 7, "min_patches": 7},
    {"merge_size": 2, "image_size": 112}, {"do_resize": False}, {"do_resize": False, "patch_size": 7},
    {"do_resize": False, "merge_size": 2}, {"do_resize": None, "image_size": 28}, {"device": "cpu"},
])  # fmt: skip
def test_numbers_of_patches_are_those_of_the_call(options):
    for backend in BACKENDS:
        processor = load(backend)
        for size in SIZES:
            try:
                inputs = processor(np.zeros((*size, 3), np.uint8), input_data_format="channels_last", **options)
            except ValueError as error:
                with pytest.raises(ValueError, match=str(error)[:40].split("`")[0]):
                    processor.get_number_of_image_patches(*size, options)
                continue
            number = len(inputs["hidden_states"])
            assert processor.get_number_of_image_patches(*size, options) == number, (size, options)
            assert processor.get_num_of_video_patches(3, *size, options) == 3 * number
            assert list(processor.batch_sampler([size], number, options)) == [[0]]
            with pytest.raises(ValueError, match=f"got {number} for image 0"):
                processor.batch_sampler([size], number - 1, options)
            merge_size = options.get("merge_size", 1)
            assert not (np.asarray(inputs["grid_thw"])[:, 1:] % merge_size).any()


def test_numbers_of_patches_of_a_processor_with_other_defaults():
    processor = load("pil", merge_size=2, max_patches=100, do_resize=False)
    assert processor.get_number_of_image_patches(280, 1400) == 2000
    assert processor.get_number_of_image_patches(280, 1400, {"do_resize": True}) <= 100
    assert processor.get_number_of_image_patches(28, 28, {"image_size": 112, "do_resize": True}) == 64


@pytest.mark.parametrize(
    "options", [{"max_patchs": 4}, {"image_sise": 28}, {"max_patches": 0}, {"size": {"height": 3}}]
)
def test_an_argument_that_the_call_refuses_is_refused(processor, options):
    with pytest.raises(Exception) as refused:
        processor(noise(28, 28, 3), **options)
    for counted in (
        lambda: processor.get_number_of_image_patches(28, 28, options),
        lambda: processor.get_num_of_video_patches(1, 28, 28, options),
        lambda: processor.batch_sampler([(28, 28)], 100, options),
        lambda: processor.packing([(28, 28)], 100, options),
        lambda: processor.packed_stream([], 100, options),
    ):
        with pytest.raises(type(refused.value), match=next(iter(options))):
            counted()
    with pytest.raises(ValueError, match="num_frames"):
        processor.get_num_of_video_patches(0, 28, 28)
    with pytest.raises(ValueError, match="0 x 28"):
        processor.get_number_of_image_patches(0, 28)


# Merging


def test_merged_patches_are_the_rows_of_qwen2_vl(processor):
    images = [PIL.Image.fromarray(noise(*size, 3, seed=index)) for index, size in enumerate([(301, 187), (90, 400)])]
    size = {"shortest_edge": 112 * 14 * 14, "longest_edge": 400 * 14 * 14}
    for merge_size in (1, 2, 3):
        qwen = relative(processor, "Qwen2VL", patch_size=14, temporal_patch_size=1, merge_size=merge_size, size=size)
        expected = qwen(images, return_tensors="pt")
        inputs = processor(images, return_tensors="pt", merge_size=merge_size, min_patches=112, max_patches=400)
        assert torch.equal(inputs["grid_thw"], expected["image_grid_thw"])
        merged = processor.merge_patches(inputs["hidden_states"], inputs["grid_thw"], merge_size)
        assert torch.equal(merged, expected["pixel_values"].view(len(merged), -1))


def test_merging_frames_and_nothing(processor):
    merge = processor.merge_patches
    features = torch.randn(2 * 4 * 6 + 4, 5, requires_grad=True)
    grid_thw = torch.tensor([[2, 4, 6], [1, 2, 2]])
    merged = merge(features, grid_thw, 2)
    assert merged.shape == (13, 20)
    # Frame 1, second row of squares, third square.
    first = 24 + 2 * 6 + 4
    expected = torch.cat([features[first], features[first + 1], features[first + 6], features[first + 7]])
    assert torch.equal(merged[6 + 3 + 2], expected)
    merged.sum().backward()
    assert features.grad.eq(1).all()
    assert merge(features[:0], grid_thw[:0], 2).shape == (0, 20)
    assert torch.equal(merge(features, grid_thw.to(torch.uint16), 2), merged)
    for arguments, message in (
        ((features, grid_thw, 4), "multiples of `merge_size`, 4"),
        ((features[:12], torch.tensor([[1, 3, 4]]), 2), "multiples of `merge_size`, 2"),
        ((features[:12], torch.tensor([[1, 4, 3]]), 2), "multiples of `merge_size`, 2"),
        ((features, grid_thw, 0), "merge_size"),
        ((features[1:], grid_thw, 2), "52 patches, but `features` holds 51"),
        ((features[None], grid_thw, 2), "shape"),
        ((features, grid_thw.tolist(), 2), "`grid_thw` must be a tensor of integers .* got list"),
        ((features, grid_thw[0], 2), "`grid_thw` must be a tensor of integers"),
    ):
        with pytest.raises(ValueError, match=message):
            merge(*arguments)


def test_videos_are_merged_frame_by_frame(processor):
    video = noise(3, 56, 84, 3)
    inputs = processor.preprocess_videos([video], return_tensors="pt", merge_size=2)
    assert inputs["grid_thw"].tolist() == [[3, 4, 6]]
    merged = processor.merge_patches(inputs["hidden_states"], inputs["grid_thw"], 2)
    frames = processor(list(video), return_tensors="pt", merge_size=2)
    assert torch.equal(merged, processor.merge_patches(frames["hidden_states"], frames["grid_thw"], 2))


def test_what_load_video_returns_is_taken_as_it_is(processor):
    from transformers.video_utils import VideoMetadata

    frames = noise(2, 28, 42, 3)
    expected = processor.preprocess_videos([frames], return_tensors="pt")
    for metadata in (VideoMetadata(total_num_frames=2), {}):
        for videos, count in (((frames, metadata), 1), ([(frames, metadata)], 1), ([(frames, metadata), frames], 2)):
            inputs = processor.preprocess_videos(videos, return_tensors="pt")
            assert torch.equal(inputs["grid_thw"], expected["grid_thw"].repeat(count, 1))
            assert torch.equal(inputs["hidden_states"], expected["hidden_states"].repeat(count, 1))


# Collation


def picture(height: int, width: int, seed: int = 0) -> PIL.Image.Image:
    return PIL.Image.fromarray(noise(height, width, 3, seed=seed))


def test_several_images_in_an_example_and_none(processor):
    values = [[picture(28, 42), picture(56, 28, 1)], [], picture(28, 28, 2), None, [picture(14, 14, 3)],
              noise(2, 28, 28, 3)]  # fmt: skip
    batch = processor.collate([{"image": value, "label": index} for index, value in enumerate(values)])
    assert batch["num_images_per_sample"].tolist() == [2, 0, 1, 0, 1, 2]
    assert batch["label"].tolist() == list(range(6))
    images = [*values[0], values[2], *values[4], *values[5]]
    expected = processor(images, return_tensors="pt")
    assert torch.equal(batch["hidden_states"], expected["hidden_states"])
    assert torch.equal(batch["grid_thw"], expected["grid_thw"])

    empty = processor.collate([{"image": None, "label": 1}, {"image": [], "label": 2}], patch_size=7)
    assert empty["hidden_states"].shape == (0, 147) and empty["grid_thw"].shape == (0, 3)
    assert empty["hidden_states"].dtype == torch.float32 and empty["grid_thw"].dtype == torch.int64
    assert empty["num_images_per_sample"].tolist() == [0, 0]
    assert "num_images_per_sample" not in processor.collate([{"image": picture(14, 14)}])
    assert processor.collate([{"image": noise(2, 28, 28, 3)}])["num_images_per_sample"].tolist() == [2]
    some = processor.collate([{"image": None}, {"image": picture(14, 14)}])
    assert some["num_images_per_sample"].tolist() == [0, 1]
    pair = UserList([picture(14, 14), picture(28, 14)])
    assert processor.collate([{"image": pair}])["num_images_per_sample"].tolist() == [2]
    nothing = processor.collate([])
    assert nothing["hidden_states"].shape == (0, 588) and nothing["grid_thw"].shape == (0, 3) and len(nothing) == 2


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([{"image": None, "a": 1}, {"image": None}], r"same columns, got \['a', 'image'\] and \['image'\]"),
        ([{"image": None}, {"image": None, "a": 1}], r"same columns, got \['image'\] and \['a', 'image'\]"),
        ([{"image": None, "num_images_per_sample": 1}], "num_images_per_sample"),
        ([{"image": noise(14, 14, 3)}, noise(14, 14, 3)], "both"),
        ([{"image": noise(14, 14, 3), "input_ids": torch.ones(n)} for n in (2, 3)], "input_ids.*tokenizer"),
    ],
)
def test_examples_that_do_not_fit_together_are_refused(processor, examples, message):
    with pytest.raises(ValueError, match=message):
        processor.collate(examples)
    with pytest.raises(ValueError, match=message):
        list(processor.packed_stream(examples, 100))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_texts_are_padded_by_the_tokenizer(processor, as_tensor):
    tokenizer = clip_tokenizer()
    rows = [tokenizer(text) for text in ("a cat", "a photo of a dog", "dog")]
    examples = []
    for index, row in enumerate(rows):
        columns = {**row, "labels": list(row["input_ids"])}
        columns = {name: torch.tensor(ids) if as_tensor else ids for name, ids in columns.items()}
        examples.append({"image": picture(14, 28), **columns, "index": index, "name": str(index)})
    for side in ("right", "left"):
        tokenizer.padding_side = side
        batch = processor.collate(examples, tokenizer=tokenizer)
        expected = tokenizer.pad([dict(row) for row in rows], return_tensors="pt")
        for name in expected:
            assert torch.equal(batch[name], expected[name]), name
        mask = expected["attention_mask"].bool()
        assert batch["labels"].shape == mask.shape and batch["labels"][~mask].eq(-100).all() and not mask.all()
        assert torch.equal(batch["labels"][mask], expected["input_ids"][mask])
        assert batch["index"].tolist() == [0, 1, 2] and batch["name"] == ["0", "1", "2"]
        assert len(batch["grid_thw"]) == 3 and "image" not in batch


def test_packing_and_a_stream_make_the_batches_of_collate(processor):
    """Of texts, and of images in a column of another name."""
    tokenizer = clip_tokenizer()
    examples = [
        {"pictures": [picture(14, 28, index)] * index, "input_ids": tokenizer(text)["input_ids"]}
        for index, text in enumerate(("a cat", "a photo of a dog", "dog"))
    ]
    options = {"image_column": "pictures", "tokenizer": tokenizer}
    expected = processor.collate(examples, **options)
    assert expected["num_images_per_sample"].tolist() == [0, 1, 2] and "pictures" not in expected
    _, collate_fn = processor.packing([], 100, **options)
    for batch in (collate_fn(examples), *processor.packed_stream(examples, 100, **options)):
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_labels_that_are_numbers_are_no_texts(processor):
    tokenizer = clip_tokenizer()
    examples = [
        {"image": picture(14, 28), "labels": index, "input_ids": tokenizer(text)["input_ids"]}
        for index, text in enumerate(("a cat", "a photo of a dog"))
    ]
    batch = processor.collate(examples, tokenizer=tokenizer)
    assert torch.equal(batch["labels"], torch.tensor([0, 1]))
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert torch.equal(batch["input_ids"][1], torch.tensor(examples[1]["input_ids"]))
    alone = processor.collate(examples[:1], tokenizer=tokenizer)
    assert alone["input_ids"].tolist() == [examples[0]["input_ids"]] and alone["labels"].tolist() == [0]


def test_one_call_gives_a_sampler_and_what_collates_its_batches(processor):
    sizes = [(14 * (1 + index % 7), 14 * (1 + index % 11)) for index in range(60)]
    data = [{"image": picture(*size), "index": index} for index, size in enumerate(sizes)]
    for options in ({"max_patches": 20}, {"image_size": 28}, {"do_resize": False}, None):
        sampler, collate_fn = processor.packing(sizes, 100, options, shuffle=True, seed=3)
        assert list(sampler) == list(processor.batch_sampler(sizes, 100, options, shuffle=True, seed=3))
        seen = []
        for batch in DataLoader(data, batch_sampler=sampler, collate_fn=collate_fn):
            expected = processor(
                [data[index]["image"] for index in batch["index"]], return_tensors="pt", **options or {}
            )
            assert torch.equal(batch["hidden_states"], expected["hidden_states"])
            assert len(batch["hidden_states"]) <= 100
            seen += batch["index"].tolist()
        assert sorted(seen) == list(range(60))
    sampler, collate_fn = processor.packing([(14, 14)] * 60, 100)
    with pytest.raises(ValueError, match=r"at most `max_patches_per_batch`, 100, patches, got \d+"):
        [collate_fn([data[index] for index in batch]) for batch in sampler]


@pytest.mark.parametrize("shuffle", [False, True])
def test_examples_of_several_images_and_none_are_sampled(processor, shuffle):
    rng = np.random.default_rng(0)
    sizes = [[(14, 14 * int(rng.integers(1, 9))) for _ in range(rng.integers(0, 4))] for _ in range(3000)]
    sizes[:5] = [(14, 28), np.array([14, 28]), [], [(14, 28)], ((14, 14), (14, 14))]
    sampler = processor.batch_sampler(sizes, 64, shuffle=shuffle)
    assert sampler.num_patches[:5] == [2, 2, 0, 2, 2]
    batches = list(sampler)
    assert sorted(index for batch in batches for index in batch) == list(range(3000))
    assert all(sum(sampler.num_patches[index] for index in batch) <= 64 for batch in batches)
    # Examples without an image are not all in one batch, only because they fit.
    assert max(sum(sampler.num_patches[index] == 0 for index in batch) for batch in batches) < 30
    with pytest.raises(ValueError, match="for image 0"):
        processor.batch_sampler([[(14, 280), (14, 700)]], 64)
    nothing = list(processor.batch_sampler([[]] * 3000, 64, shuffle=shuffle))
    assert sorted(index for batch in nothing for index in batch) == list(range(3000))


@pytest.mark.parametrize(
    "entry",
    [(14.0, 28.0), (14, 2.5), np.array([14.0, 28.0]), (14,), (14, 28, 3), 14, "ab", ("14", "28"), None,
     [(14, 28), (14,)], [(14, 28), (14, 28.5)], [[(14, 28)]]],
)  # fmt: skip
def test_sizes_that_are_none_are_refused(entry):
    processor = load("pil", min_patches=1)
    with pytest.raises(ValueError, match=r"`image_sizes` must hold a pair of integers.* for example 1\."):
        processor.batch_sampler([(14, 14), entry], 100)


def test_sizes_of_any_kind_of_integers():
    processor = load("pil", min_patches=1)
    one = [(14, 28), [14, 28], np.array([14, 28], np.uint16), torch.tensor([14, 28]), torch.Size([14, 28])]
    several = [
        ((14, 28), (28, 28)),
        np.array([[14, 28], [28, 28]]),
        torch.tensor([[14, 28], [28, 28]]),
        [one[2], (28, 28)],
    ]
    sampler = processor.batch_sampler([*one, *several, [], np.zeros((0, 2), int)], 100)
    assert sampler.num_patches == [2] * len(one) + [6] * len(several) + [0, 0]


def test_an_image_may_be_a_path_also_in_a_dictionary(processor, tmp_path):
    picture(28, 42).save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    expected = processor(path, return_tensors="pt")
    for examples in ([path], [{"image": path}], [{"image": [path]}]):
        batch = processor.collate(examples)
        assert torch.equal(batch["hidden_states"], expected["hidden_states"])
        assert ("num_images_per_sample" in batch) is (examples not in ([path], [{"image": path}]))


# Streams


class Numbered(Dataset):
    """Pictures of sizes that nobody knows before they are made."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict:
        if index >= len(self):
            raise IndexError(index)
        pictures = [picture(14 * (1 + index % 3), 14 * (1 + index * seed % 7), seed) for seed in range(index % 4)]
        return {"image": pictures, "index": index}


class Divided(IterableDataset):
    """Divides itself among workers, as torch asks."""

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        whole = Numbered()
        yield from (
            whole[index] for index in range(worker.id if worker else 0, 40, worker.num_workers if worker else 1)
        )


@pytest.mark.parametrize("source", ["iterable dataset", "list", "datasets"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_is_packed_to_a_budget(source, num_workers):
    processor = load("pil", min_patches=1, max_patches=60)
    whole = list(Numbered())
    examples = {"iterable dataset": Divided(), "list": whole}.get(source)
    if examples is None:
        features = datasets.Features({"image": datasets.Sequence(datasets.Image()), "index": datasets.Value("int64")})
        examples = datasets.Dataset.from_list(whole, features=features).to_iterable_dataset(num_shards=4)
    loader = DataLoader(processor.packed_stream(examples, 48), batch_size=None, num_workers=num_workers)
    seen, filled = [], []
    for batch in loader:
        images = [image for index in batch["index"] for image in whole[index]["image"]]
        assert batch["num_images_per_sample"].tolist() == [len(whole[index]["image"]) for index in batch["index"]]
        if images:
            expected = processor(images, return_tensors="pt")
            assert torch.equal(batch["hidden_states"], expected["hidden_states"])
            assert torch.equal(batch["grid_thw"], expected["grid_thw"])
        filled.append(len(batch["hidden_states"]))
        seen += batch["index"].tolist()
    assert sorted(seen) == list(range(40))
    assert max(filled) <= 48 and np.mean(filled) > 24
    if num_workers == 0:
        assert seen == list(range(40))


def test_a_stream_has_the_options_of_the_call(processor):
    images = [picture(28, 14 * width, width) for width in range(1, 20)]
    stream = processor.packed_stream(iter(images), 30, {"max_patches": 8})
    batches = list(stream)
    expected = processor(images, return_tensors="pt", max_patches=8)
    assert torch.equal(torch.cat([batch["hidden_states"] for batch in batches]), expected["hidden_states"])
    assert set(batches[0]) == {"hidden_states", "grid_thw"} and len(batches) < len(images)
    with pytest.raises(ValueError, match=r"at most `max_patches_per_batch`, 30, patches, got 32"):
        list(processor.packed_stream(images, 30))
    texts = ({"image": None, "index": index} for index in range(10**9))
    first = next(iter(processor.packed_stream(texts, 30)))
    assert first["index"].tolist() == list(range(1024)) and first["hidden_states"].shape == (0, 588)
