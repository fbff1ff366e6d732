# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""What `encode` takes for an image and what for a text: a path is never embedded as words."""

import base64
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from image_text_checkpoints import reference_image_text_model, save_image_text_repo, save_vision_repo
from reference import reference_model
from sentence_transformers import SentenceTransformer


# One suffix or more of every format that the processor reads.
SUFFIXES = [".png", ".jpg", ".JPEG", ".jfif", ".mpo", ".gif", ".bmp", ".webp", ".tif", ".TIFF", ".avif", ".ppm", ".pgm"]
SUFFIXES += [".jp2", ".j2k", ".qoi", ".ico"]


@pytest.fixture(scope="module")
def image_text(tmp_path_factory):
    torch.manual_seed(0)
    repo = save_image_text_repo(tmp_path_factory.mktemp("image-text"), reference_image_text_model())
    return SentenceTransformer(str(repo), trust_remote_code=True, device="cpu")


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    torch.manual_seed(0)
    repo = save_vision_repo(tmp_path_factory.mktemp("vision"), reference_model())
    return SentenceTransformer(str(repo), trust_remote_code=True, device="cpu")


def picture(mode: str = "RGB") -> PIL.Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    return PIL.Image.fromarray(values).convert(mode)


def saved(folder: Path, suffix: str) -> Path:
    path = folder / f"a photo of a cat{suffix}"
    picture("L" if suffix == ".pgm" else "RGB").save(path)
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_path_of_an_image_is_the_image(image_text, tmp_path, suffix):
    if PIL.Image.registered_extensions().get(suffix.lower()) not in PIL.Image.SAVE:
        pytest.skip(f"this PIL does not write {suffix}")
    path = saved(tmp_path, suffix)
    with PIL.Image.open(path) as image:
        expected = image_text.encode(image)
    for sample in (str(path), path, {"image": str(path)}, {"image": path}):
        np.testing.assert_allclose(image_text.encode(sample), expected, atol=1e-6)
        np.testing.assert_allclose(image_text.encode([sample, sample]), [expected, expected], atol=1e-6)


def test_a_string_that_is_no_file_or_has_another_suffix_is_a_text(image_text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a cat").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("a cat")
    (tmp_path / "folder.png").mkdir()
    for text in ("a cat", "notes.txt", "folder.png", "photo.tif", "no such photo.jpg", ".png", "a cat, a dog.gif"):
        features = image_text.preprocess([text])
        assert features["modality"] == "text"
        tokens = image_text.tokenizer(text)["input_ids"]
        assert features["input_ids"][0].tolist() == tokens


@pytest.mark.parametrize("kind", ["image_text", "vision"])
@pytest.mark.parametrize("name", ["missing.png", "missing.tif", "missing", "a cat"])
def test_a_missing_image_is_an_error(kind, name, tmp_path, request):
    encoder = request.getfixturevalue(kind)
    for sample in (tmp_path / name, {"image": tmp_path / name}, {"image": str(tmp_path / name)}, {"image": name}):
        with pytest.raises(FileNotFoundError, match=name):
            encoder.encode([sample])


def test_a_file_that_is_no_image_is_an_error(image_text, tmp_path):
    path = tmp_path / "notes.png"
    path.write_text("a cat")
    for sample in (str(path), path, {"image": path}):
        with pytest.raises(OSError, match=r"notes\.png.* holds no image"):
            image_text.encode(sample)


@pytest.mark.parametrize("suffix", [".avif", ".AVIF", ".avifs", ".heic", ".HEIC", ".heics", ".heif", ".heifs", ".hif"])
def test_a_file_of_a_format_that_this_pil_does_not_read_is_an_error(image_text, tmp_path, monkeypatch, suffix):
    """Pillow before 11.3 knows no AVIF, and none knows HEIF without pillow-heif."""
    PIL.Image.init()
    read = {name: opener for name, opener in PIL.Image.OPEN.items() if name not in ("AVIF", "HEIF")}
    monkeypatch.setattr(PIL.Image, "OPEN", read)
    extensions = {ending: name for ending, name in PIL.Image.EXTENSION.items() if name in read}
    monkeypatch.setattr(PIL.Image, "EXTENSION", extensions)
    monkeypatch.setattr(
        image_text[0], "image_suffixes", image_text.processor.image_processor.image_suffixes.__wrapped__()
    )
    path = tmp_path / f"a cat{suffix}"
    path.write_bytes(b"\0\0\0\x18ftyp" + suffix.lower()[1:5].encode() + bytes(16))
    for sample in (str(path), path, {"image": str(path)}):
        with pytest.raises(OSError, match=rf"a cat\{suffix}.* holds no image of the formats BMP"):
            image_text.encode(sample)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_vision_tower_takes_paths(vision, tmp_path, suffix):
    path = saved(tmp_path, suffix)
    expected = vision.encode(picture())
    for sample in (path, {"image": path}, {"image": str(path)}):
        np.testing.assert_allclose(vision.encode([sample]), [expected], atol=1e-6)


def test_base64_and_data_uris(image_text, tmp_path):
    encoded = base64.b64encode(saved(tmp_path, ".png").read_bytes()).decode()
    expected = image_text.encode(picture())
    for sample in (f"data:image/png;base64,{encoded}", {"image": f"data:image/png;base64,{encoded}"}):
        np.testing.assert_allclose(image_text.encode(sample), expected, atol=1e-6)


def test_paths_and_texts_in_one_batch_are_refused(image_text, tmp_path):
    path = saved(tmp_path, ".tif")
    for inputs in ([path, "a cat"], [str(path), "a cat"], ["a cat", {"image": path}]):
        with pytest.raises(ValueError, match=r"mixes multiple modalities \(image, text\).*Encode each modality"):
            image_text.encode(inputs)


def test_several_images_in_one_input_are_refused(image_text):
    """They would give more vectors than inputs, each under the name of another."""
    for inputs in (
        [{"image": [picture(), picture()]}],
        [{"image": [picture(), picture()]}, {"image": picture()}],
        [picture(), {"image": []}],
        [{"image": np.zeros((2, 28, 28, 3), dtype=np.uint8)}],
    ):
        with pytest.raises(ValueError, match=r"An input must hold one image, got (0|2)"):
            image_text.encode(inputs)
    np.testing.assert_array_equal(image_text.encode([{"image": [picture()]}]), image_text.encode([picture()]))


def test_vectors_keep_the_order_of_paths_images_and_dictionaries(image_text, tmp_path):
    images = [picture().rotate(90 * turn).resize((30 + 20 * turn, 40)) for turn in range(4)]
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index}.tiff")
    expected = image_text.encode(images)
    inputs = [tmp_path / "0.tiff", images[1], {"image": tmp_path / "2.tiff"}, str(tmp_path / "3.tiff")]
    np.testing.assert_allclose(image_text.encode(inputs, batch_size=3), expected, atol=1e-6)


def test_a_file_url_is_its_image_and_never_a_text(image_text, tmp_path):
    path = saved(tmp_path, ".png")
    assert np.array_equal(image_text.encode([path.as_uri()]), image_text.encode([path]))
    with pytest.raises(FileNotFoundError, match="missing"):
        image_text.encode([(tmp_path / "missing.png").as_uri()])
