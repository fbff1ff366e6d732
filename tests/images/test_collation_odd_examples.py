# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Examples and videos in odd shapes: the counts beside the patches are those of the patches, or there is an error."""

import numpy as np
import PIL.Image
import pytest
import torch
from reference import packing_model, reference_model
from test_image_processing import load, noise


IMAGE = PIL.Image.fromarray(noise(28, 42, 3))
CLIP = torch.from_numpy(noise(2, 3, 28, 42))


@pytest.fixture(scope="module")
def processor():
    return load("pil", min_patches=1)


NESTED = {
    "lists in a list": ([[IMAGE, IMAGE], [IMAGE]], 3),
    "a batch beside an image": ([CLIP, IMAGE], 3),
    "a batch": (CLIP, 2),
    "a tuple": ((IMAGE, IMAGE), 2),
    "no list": ([], 0),
    "none": (None, 0),
}


@pytest.mark.parametrize("name", NESTED)
@pytest.mark.parametrize("is_column", [True, False])
def test_images_per_sample_are_counted_however_they_are_nested(processor, name, is_column):
    images, count = NESTED[name]
    examples = [{"image": images}, {"image": IMAGE}] if is_column else [images, IMAGE]
    for batch in (processor.collate(examples), next(iter(processor.packed_stream(examples, 100)))):
        assert batch["num_images_per_sample"].tolist() == [count, 1]
        assert len(batch["grid_thw"]) == count + 1 and len(batch["hidden_states"]) == 6 * (count + 1)


def test_one_image_each_needs_no_counts(processor):
    assert set(processor.collate([IMAGE, IMAGE])) == {"hidden_states", "grid_thw"}


@pytest.mark.parametrize("values", [[None, 1], [IMAGE, IMAGE], [1, "one"], [{"a": 1}, {"b": 1}], [[1, 2], [1]]])
def test_a_column_that_cannot_be_collated_is_named(processor, values):
    with pytest.raises(ValueError, match="column 'mask'"):
        processor.collate([{"image": IMAGE, "mask": value} for value in values])


@pytest.mark.parametrize("videos", [[[[IMAGE, IMAGE], [IMAGE]]], [[CLIP, IMAGE]], [[IMAGE, [CLIP]]]])
def test_frames_are_counted_however_they_are_nested(processor, videos):
    inputs = processor.preprocess_videos(videos, return_tensors="pt")
    assert inputs["grid_thw"].tolist() == [[3, 2, 3]] and len(inputs["hidden_states"]) == 3 * 6


def test_a_batch_is_what_a_model_takes(processor):
    model = packing_model(reference_model())
    for examples in ([[IMAGE, IMAGE], None, [IMAGE]], [{"image": [IMAGE, IMAGE]}, {"image": None}, {"image": IMAGE}]):
        with torch.no_grad():
            assert len(model(**processor.collate(examples)).last_hidden_state) == 3 * 6


class Decoder:
    """Frames by their number, as torchcodec's `VideoDecoder` and others give them; no registered sequence."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return CLIP[range(2)[index]]


def object_array():
    frames = np.empty(2, object)
    frames[:] = [IMAGE, IMAGE]
    return frames


@pytest.mark.parametrize("make_video", [Decoder, object_array])
def test_frames_of_arrays_of_objects_and_of_decoders(processor, make_video):
    video = make_video()
    for videos, count in ((video, 1), ([video], 1), ([video, video], 2), ((video, {"fps": 1}), 1)):
        inputs = processor.preprocess_videos(videos, return_tensors="pt")
        assert inputs["grid_thw"].tolist() == [[2, 2, 3]] * count


@pytest.mark.parametrize("shape", [(28, 28, 3), (28, 28), (1, 1, 2, 3, 28, 28)])
def test_an_array_of_another_shape_is_no_video(processor, shape):
    for array in (np.zeros(shape, np.uint8), torch.zeros(shape, dtype=torch.uint8)):
        with pytest.raises(ValueError) as error:
            processor.preprocess_videos(array)
        assert "`videos` must be" in str(error.value) and f"got shape {shape}" in str(error.value)


@pytest.mark.parametrize("videos", [None, 5, IMAGE, b"clip", {"frames": []}])
def test_what_is_no_video_is_named(processor, videos):
    with pytest.raises(ValueError, match=rf"`videos` must be.*{type(videos).__name__}"):
        processor.preprocess_videos(videos)
