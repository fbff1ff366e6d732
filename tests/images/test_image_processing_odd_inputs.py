# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Odd images: each gives what its plain RGB form gives, or an error that says what is wrong."""

import base64
import os
import random
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL.EpsImagePlugin
import PIL.ExifTags
import PIL.Image
import pytest
import torch
from huggingface_hub.utils import httpx
from test_image_processing import BACKENDS, PHOTOGRAPHS, load, noise


# More, such as 2000, for a long run.
FUZZ_IMAGES = int(os.environ.get("AIMV2_FUZZ_IMAGES", "100"))


@pytest.fixture(params=BACKENDS)
def processor(request):
    return load(request.param, min_patches=1)


def patches(processor, image, **kwargs) -> torch.Tensor:
    return processor(image, return_tensors="pt", **kwargs)["hidden_states"]


def on_white(image: PIL.Image.Image) -> PIL.Image.Image:
    image = image.convert("RGBA")
    return PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image).convert("RGB")


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_modes_without_transparency(processor, mode):
    image = PIL.Image.fromarray(noise(40, 60, 3)).convert(mode)
    assert torch.equal(patches(processor, image), patches(processor, image.convert("RGB")))


def test_transparency_is_the_same_from_an_image_and_from_its_file(processor, tmp_path):
    images = {mode: PIL.Image.fromarray(noise(40, 60, 4), "RGBA").convert(mode) for mode in ("RGBA", "LA")}
    images["P"] = PIL.Image.fromarray(noise(40, 60) % 4, "P")
    images["P"].putpalette(noise(12).tolist())
    images["P"].info["transparency"] = 1
    for mode, image in images.items():
        image.save(tmp_path / f"{mode}.png")
        from_file = patches(processor, str(tmp_path / f"{mode}.png"))
        assert torch.equal(from_file, patches(processor, image))


def test_sixteen_bits_keep_their_range(processor, tmp_path):
    values = noise(40, 60)
    expected = patches(processor, PIL.Image.fromarray(values))
    wide = values.astype(np.uint16) * 257
    image = PIL.Image.fromarray(wide)
    image.save(tmp_path / "wide.png")
    image.save(tmp_path / "wide.tiff")
    assert image.mode == "I;16"
    sources = [image, wide, torch.from_numpy(wide), str(tmp_path / "wide.png"), str(tmp_path / "wide.tiff")]
    for source in sources:
        assert torch.equal(patches(processor, source), expected)


def test_exif_rotated_photographs_are_upright(processor, tmp_path):
    upright = PIL.Image.fromarray(noise(40, 60, 3))
    undo = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90",
            7: "TRANSVERSE", 8: "ROTATE_270"}  # fmt: skip
    expected = patches(processor, upright)
    for orientation, transposition in undo.items():
        stored = upright.transpose(PIL.Image.Transpose[transposition])
        exif = PIL.Image.Exif()
        exif[PIL.ExifTags.Base.Orientation] = orientation
        stored.save(tmp_path / "turned.png", exif=exif)
        assert torch.equal(patches(processor, str(tmp_path / "turned.png")), expected), orientation
        image = PIL.Image.open(tmp_path / "turned.png")
        assert torch.equal(patches(processor, image), expected), orientation
        assert image.size == stored.size, "the caller's image must not change"


def test_arrays_of_every_shape_and_dtype(processor):
    rgb, gray, rgba = noise(42, 56, 3), noise(42, 56), noise(42, 56, 4)
    expected = patches(processor, PIL.Image.fromarray(rgb))
    tensor = torch.from_numpy(rgb)
    sources = [rgb, rgb.transpose(2, 0, 1), tensor, tensor.permute(2, 0, 1), rgb[None], [[rgb]], rgb.astype(np.int64),
               rgb.astype(">u2") * 257, np.asarray(PIL.Image.fromarray(rgb)), rgb[::-1][::-1]]  # fmt: skip
    for source in sources:
        assert torch.equal(patches(processor, source), expected)
    assert torch.equal(
        patches(processor, rgb.astype(np.float32), do_resize=False), patches(processor, rgb, do_resize=False)
    )
    scaled = patches(processor, rgb / np.float32(255), do_rescale=False, do_resize=False)
    torch.testing.assert_close(scaled, patches(processor, rgb, do_resize=False), rtol=0, atol=1e-5)

    expected = patches(processor, PIL.Image.fromarray(gray))
    for source in (gray, gray[None], gray[..., None], torch.from_numpy(gray), [gray, gray][:1]):
        assert torch.equal(patches(processor, source), expected)
    expected = patches(processor, PIL.Image.fromarray(rgba, "RGBA"))
    for source in (rgba, rgba.transpose(2, 0, 1), torch.from_numpy(rgba)):
        assert torch.equal(patches(processor, source), expected)


def test_thin_images(processor):
    for height, width in [(1, 1), (1, 200), (200, 1), (1, 2), (3, 500)]:
        image = noise(height, width, 3)
        expected = patches(processor, PIL.Image.fromarray(image))
        assert expected.isfinite().all()
        assert torch.equal(patches(processor, image, input_data_format="channels_last"), expected)


BAD_INPUTS = {
    "no image": ([], ValueError, "at least one image"),
    "none": (None, TypeError, "NoneType"),
    "a number": (3, TypeError, "int"),
    "strip": (noise(201, 1, 3), ValueError, "at most 200 times"),
    "empty": (np.zeros((0, 5, 3), np.uint8), ValueError, r"shape \(0, 5, 3\)"),
    "two channels": (noise(20, 30, 2), ValueError, "channel dimension"),
    "ambiguous": (noise(3, 50, 3), ValueError, "input_data_format"),
    "ambiguous row": (noise(1, 50, 3), ValueError, "input_data_format"),
    "one dimension": (noise(50), ValueError, "images"),
    "five dimensions": (noise(1, 1, 5, 5, 3), ValueError, "images"),
    "negative": (np.full((20, 20, 3), -1), ValueError, "0 to 255"),
    "too large": (np.full((20, 20, 3), 256), ValueError, "0 to 255"),
    "not finite": (np.full((20, 20, 3), np.nan, np.float32), ValueError, "finite"),
    "infinite": (torch.full((3, 20, 20), torch.inf), ValueError, "finite"),
    "scaled already": (np.full((20, 20, 3), 0.5, np.float32), ValueError, "do_rescale=False"),
    "mask": (np.ones((20, 20, 3), bool), ValueError, "bool"),
    "complex": (np.ones((20, 20, 3), np.complex64), ValueError, "complex64"),
    "float alpha": (np.full((20, 20, 4), 9.5, np.float32), ValueError, "alpha"),
    "mode F": (PIL.Image.new("F", (20, 20)), ValueError, "'F' has no defined range"),
    "mode I": (PIL.Image.new("I", (20, 20)), ValueError, "'I' has no defined range"),
    "no such file": ("no/such/file.jpg", FileNotFoundError, "no/such/file.jpg"),
    "no such path": (Path("no/such/file.jpg"), FileNotFoundError, "no/such/file.jpg"),
    "no such file, but base64": ("no/such/file", FileNotFoundError, "no/such/file"),
    "no base64": ("data:image/png;base64,?", ValueError, "data:image/png"),
    "a folder": (".", OSError, r"'\.'"),
    "no base64 image": ("aGVsbG8=", OSError, "aGVsbG8="),
    "a source file": (__file__, OSError, "formats"),
}


IMAGE_FORMATS = sys.modules[type(load("pil")).__module__].IMAGE_FORMATS


@pytest.mark.parametrize("image_format", IMAGE_FORMATS)
def test_every_listed_format_is_read_whatever_the_name(processor, tmp_path, image_format):
    PIL.Image.init()
    if image_format not in PIL.Image.SAVE:
        pytest.skip(f"this PIL does not write {image_format}")
    image = PIL.Image.fromarray(noise(28, 28, 3))
    image.save(tmp_path / "image.jpg", image_format)
    with PIL.Image.open(tmp_path / "image.jpg") as stored:
        assert stored.format == image_format
        expected = patches(processor, stored)
    assert torch.equal(patches(processor, str(tmp_path / "image.jpg")), expected)
    opened = processor.open_image(BytesIO((tmp_path / "image.jpg").read_bytes()))
    assert torch.equal(patches(processor, opened), expected)


@pytest.mark.parametrize("image_format", ["EPS", "PDF", "PSD", "WMF", "TGA", "FITS", "ICNS", "PCX", "SGI"])
def test_no_other_format_is_opened(processor, tmp_path, monkeypatch, image_format):
    started = []
    monkeypatch.setattr(PIL.EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: started.append(args))
    headers = {
        "PSD": b"8BPS\0\1" + bytes(200),
        "WMF": b"\xd7\xcd\xc6\x9a\0\0" + bytes(200),
        "FITS": b"SIMPLE  =                    T" + bytes(2850),
    }
    if image_format in headers:
        (tmp_path / "image.jpg").write_bytes(headers[image_format])
    else:
        PIL.Image.fromarray(noise(32, 32, 3)).save(tmp_path / "image.jpg", image_format)
    for source in (str(tmp_path / "image.jpg"), base64.b64encode((tmp_path / "image.jpg").read_bytes()).decode()):
        with pytest.raises(OSError, match=r"no image of the formats|holds no image"):
            processor(source)
    assert not started


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_what_is_no_image_is_refused(processor, name):
    image, error, message = BAD_INPUTS[name]
    with pytest.raises(error, match=message):
        processor(image, return_tensors="pt")


def test_a_black_float_image_is_black(processor):
    black = np.zeros((28, 28, 3), np.float32)
    assert torch.equal(patches(processor, black), patches(processor, black.astype(np.uint8)))


def test_urls_and_base64(processor, tmp_path):
    image = PIL.Image.fromarray(noise(40, 60, 4), "RGBA")
    image.save(tmp_path / "image.png")
    expected = patches(processor, image)
    encoded = base64.b64encode((tmp_path / "image.png").read_bytes()).decode()
    for source in (encoded, f"data:image/png;base64,{encoded}"):
        assert torch.equal(patches(processor, source), expected)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert torch.equal(patches(processor, f"{url}/image.png"), expected)
        with pytest.raises(httpx.HTTPStatusError, match="404"):
            processor(f"{url}/missing.png")
        server.shutdown()


def test_many_files_do_not_exhaust_the_file_handles(processor, tmp_path):
    import resource

    PIL.Image.fromarray(noise(14, 14, 3)).save(tmp_path / "image.png")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        assert len(patches(processor, [str(tmp_path / "image.png")] * 500)) == 500
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


SOUND_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I;16"}


def odd_image(rng: random.Random, index: int) -> PIL.Image.Image:
    size = rng.choice(
        [(1, 1), (1, rng.randint(1, 250)), (rng.randint(1, 250), 1), (rng.randint(2, 90), rng.randint(2, 90))]
    )
    pixels = PIL.Image.fromarray(noise(size[1], size[0], 4, seed=index), "RGBA")
    mode = rng.choice(
        ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "La", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16"]
    )
    if mode == "I;16":
        return PIL.Image.fromarray(noise(size[1], size[0], seed=index).astype(np.uint16) * 200)
    if mode == "LAB":
        return PIL.Image.new("LAB", size)
    via = {"YCbCr": "RGB", "HSV": "RGB", "La": "LA"}.get(mode, "RGBA")
    return pixels.convert(via).convert(mode)


def odd_file(rng: random.Random, image: PIL.Image.Image) -> bytes:
    """The image as a file of a random format, whole, cut short or with bytes changed."""
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = rng.randint(0, 9)
    buffer = BytesIO()
    file_format = rng.choice(["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "ICO"])
    try:
        image.save(buffer, file_format, **({"exif": exif} if file_format in ("JPEG", "PNG", "WEBP", "TIFF") else {}))
    except (OSError, ValueError, KeyError):
        buffer = BytesIO()
        PIL.Image.new("RGB", image.size, "teal").save(buffer, "JPEG", exif=exif)
    data = bytearray(buffer.getvalue())
    damage = rng.choice(["none", "cut", "bytes", "header"])
    if damage == "cut":
        return bytes(data[: rng.randint(0, len(data))])
    for _ in range({"none": 0, "bytes": rng.randint(1, 20), "header": rng.randint(1, 4)}[damage]):
        data[rng.randrange(min(len(data), 64) if damage == "header" else len(data))] = rng.randrange(256)
    return bytes(data)


# Broken headers claim images of up to PIL's limit, which it warns of.
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_fuzzed_images_give_patches_or_a_clear_error(backend, tmp_path):
    """Each image gives patches or a ValueError or an OSError with a message; a sound one always gives patches."""
    processor = load(backend)
    rng = random.Random(backend)
    for index in range(FUZZ_IMAGES):
        image = odd_image(rng, index)
        kind = rng.choice(["image", "array", "file", "file", "lazy file"])
        if kind == "image":
            source = image
        elif kind == "array":
            source = rng.choice([np.asarray, lambda x: torch.from_numpy(np.array(x))])(image)
        else:
            source = str(tmp_path / "image")
            (tmp_path / "image").write_bytes(odd_file(rng, image))
        if kind == "lazy file":
            try:
                source = PIL.Image.open(source)
            except Exception:
                # The caller's own error, before the processor has seen anything.
                continue
        kwargs = {
            "image_size": rng.choice([None, 28, 224]),
            "patch_layout": rng.choice(["channels_first", "channels_last"]),
        }
        try:
            inputs = processor(source, return_tensors="pt", **kwargs)
        except (ValueError, OSError) as error:
            assert len(str(error)) > 10, (index, kind, repr(error))
            sound = kind == "image" and image.mode in SOUND_MODES and max(image.size) <= 200 * min(image.size)
            assert not sound, (index, image.mode, image.size, repr(error))
            continue
        assert inputs["hidden_states"].isfinite().all() and inputs["hidden_states"].shape[1] == 588
        assert inputs["grid_thw"].shape == (1, 3) and inputs["grid_thw"].prod() == len(inputs["hidden_states"]) <= 4096


def test_every_photograph_survives_damage_of_any_byte_range():
    processor = load("pil", image_size=28)
    data = PHOTOGRAPHS[0].read_bytes()
    for part in range(0, len(data), len(data) // 20):
        broken = base64.b64encode(data[:part]).decode()
        with pytest.raises((OSError, ValueError), match=r".{10}"):
            processor(broken)
