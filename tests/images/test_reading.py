# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Files and strings: TIFF of every depth, malformed EXIF, URLs and base64 that would do harm."""

import base64
import os
import random
import struct
import sys
import threading
import zlib
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import datasets
import numpy as np
import PIL.Image
import PIL.TiffImagePlugin
import pytest
import torch
from huggingface_hub.utils import httpx
from image_text_checkpoints import clip_tokenizer
from reference import REPO
from test_image_processing import BACKENDS, load, noise
from transformers.dynamic_module_utils import get_class_from_dynamic_module


@pytest.fixture(params=BACKENDS)
def processor(request):
    return load(request.param, min_patches=1)


def module():
    return sys.modules[type(load("pil")).__module__]


def levels(processor, image, **kwargs) -> np.ndarray:
    """Pixels `(height, width, 3)` of one image, in 0 to 255."""
    inputs = processor(image, return_tensors="pt", do_resize=False, do_normalize=False, **kwargs)
    _, rows, columns = inputs["grid_thw"][0].tolist()
    pixels = inputs["hidden_states"].view(rows, columns, 3, 14, 14).permute(0, 3, 1, 4, 2)
    return pixels.reshape(rows * 14, columns * 14, 3).numpy() * 255


def encoded_file(image: PIL.Image.Image, file_format: str, **kwargs) -> bytes:
    buffer = BytesIO()
    image.save(buffer, file_format, **kwargs)
    return buffer.getvalue()


# TIFF


def tiff_file(order: str, tags: dict[int, tuple[str, list[int]]], data: bytes) -> bytes:
    """A TIFF of one strip; `order` is "<" or ">", tags are types of struct and values."""
    entries, extra = b"", b""
    tags = {**tags, 273: ("I", [0]), 279: ("I", [len(data)])}
    start = 8 + 2 + 12 * len(tags) + 4
    sizes = {tag: struct.calcsize(f"{len(values)}{kind}") for tag, (kind, values) in tags.items()}
    tags[273] = ("I", [start + sum(size for size in sizes.values() if size > 4)])
    for tag, (kind, values) in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(values)}{kind}", *values)
        entries += struct.pack(f"{order}HHI", tag, {"H": 3, "I": 4}[kind], len(values))
        entries += packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack(f"{order}I", start + len(extra))
        extra += packed if len(packed) > 4 else b""
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    return head + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + extra + data


def packed_samples(samples: np.ndarray, bits: int, order: str, fill_order: int) -> bytes:
    """Samples `(height, width, channels)` in rows of whole bytes."""
    height = len(samples)
    if bits >= 16:
        data = samples.astype(f"{order}u{bits // 8}").tobytes()
    else:
        flat = samples.reshape(height, -1, 1).astype(np.uint16)
        each_bit = (flat >> np.arange(bits - 1, -1, -1)) & 1
        data = np.packbits(each_bit.reshape(height, -1).astype(bool), axis=1).tobytes()
    if fill_order == 2:
        data = np.packbits(np.unpackbits(np.frombuffer(data, np.uint8)).reshape(-1, 8)[:, ::-1], axis=1).tobytes()
    return data


SIDES = (28, 42)


def tiff_of(key: tuple) -> tuple[bytes, np.ndarray | None]:
    """A TIFF of this key of PIL's, and its pixels in 0 to 255; `None` where its values have no range."""
    prefix, photometric, sample_format, fill_order, bits_per_sample, extra = key
    order, bits = ("<" if prefix == b"II" else ">"), bits_per_sample[0]
    most = 2**bits - 1
    rng = np.random.default_rng(0)
    colours = len(bits_per_sample) - len(extra)
    if photometric == 2 and len(bits_per_sample) == 4 and not extra:
        colours = 3
    samples = rng.integers(0, most + 1, (*SIDES, colours))
    tags = {256: ("H", [SIDES[1]]), 257: ("H", [SIDES[0]]), 258: ("H", list(bits_per_sample)), 259: ("H", [1]),
            262: ("H", [photometric]), 266: ("H", [fill_order]), 277: ("H", [len(bits_per_sample)]),
            278: ("H", [SIDES[0]]), 284: ("H", [1])}  # fmt: skip
    if photometric == 3:
        palette = rng.integers(0, 256, (3, most + 1))
        tags[320] = ("H", (palette * 257).ravel().tolist())
        expected = palette[:, samples[..., 0]].transpose(1, 2, 0)
    elif photometric == 5:
        samples[..., 3] = 0
        expected = 255 - samples[..., :3] / most * 255
    elif photometric == 6 and colours == 3:
        samples[..., 1:] = 128
        tags[530] = ("H", [1, 1])
        expected = samples[..., :1].repeat(3, 2)
    elif photometric == 8:
        samples[..., 1:] = 0
        luminance = np.where(samples > 20, ((samples / 2.55 + 16) / 116) ** 3, samples / 2.55 / 903.3)[..., :1]
        gamma = np.where(luminance > 0.0031308, 1.055 * luminance ** (1 / 2.4) - 0.055, 12.92 * luminance)
        expected = (gamma * 255).repeat(3, 2)
    else:
        expected = samples / most * 255
        expected = 255 - expected if photometric == 0 else expected
        expected = expected if colours == 3 else expected.repeat(3, 2)
    has_range = sample_format == (1,) and bits < 32
    if extra:
        tags[338] = ("H", list(extra))
    if sample_format != (1,):
        tags[339] = ("H", [sample_format[0]] * len(bits_per_sample))
    # Alpha is opaque; other extra samples mean nothing.
    for kind in extra or [2] * (len(bits_per_sample) - colours):
        opaque = np.full((*SIDES, 1), most)
        samples = np.concatenate([samples, rng.integers(0, most, opaque.shape) if kind == 0 else opaque], axis=2)
    return tiff_file(order, tags, packed_samples(samples, bits, order, fill_order)), expected if has_range else None


def test_tiff_of_every_depth_and_photometric(processor):
    read = set()
    for key in PIL.TiffImagePlugin.OPEN_INFO:
        data, expected = tiff_of(key)
        source = base64.b64encode(data).decode()
        try:
            PIL.Image.open(BytesIO(data)).load()
        except (ValueError, OSError):
            # This PIL knows of it, and cannot decode it.
            with pytest.raises(OSError, match="Cannot read"):
                levels(processor, source)
            continue
        for image in (source, PIL.Image.open(BytesIO(data))):
            if expected is None:
                with pytest.raises(ValueError, match="no defined range"):
                    levels(processor, image)
            else:
                # 16 bits become 8; CIELAB goes through a colour profile.
                rounding = 2 if key[1] == 8 else 1.01
                np.testing.assert_allclose(levels(processor, image), expected, rtol=0, atol=rounding, err_msg=str(key))
                read.add((key[1], key[4][0]))
    assert {(0, 16), (1, 12), (0, 4), (3, 2), (5, 16), (8, 8)} <= read


@pytest.mark.parametrize("most", [1, 255, 256, 1023, 4095, 65535])
def test_portable_graymaps_of_every_depth(processor, tmp_path, most):
    values = np.random.default_rng(0).integers(0, most + 1, SIDES)
    binary = values.astype(">u2" if most > 255 else "u1").tobytes()
    plain = " ".join(map(str, values.ravel())).encode()
    for header, data in ((b"P5", binary), (b"P2", plain)):
        (tmp_path / "image.pgm").write_bytes(b"%s 42 28 %d\n%s" % (header, most, data))
        for source in (str(tmp_path / "image.pgm"), PIL.Image.open(tmp_path / "image.pgm")):
            pixels = levels(processor, source)
            np.testing.assert_allclose(pixels, (values / most * 255)[..., None].repeat(3, 2), rtol=0, atol=1.01)


# EXIF


def exif_block(rng: random.Random, orientation: int, malformed: int) -> bytes:
    """EXIF with an orientation and other fields, whose types, counts and values are what a broken camera writes."""
    order = rng.choice("<>")
    entries = {0x0112: struct.pack(f"{order}HHIHH", 0x0112, 3, 1, orientation, 0)}
    for _ in range(malformed):
        tag = rng.choice([0x0100, 0x0101, 0x010F, 0x011A, 0x011B, 0x0128, 0x0132, 0x013B, 0x0213, 0x8298, 0xA40A])
        kind, count = rng.randint(0, 13), rng.choice([0, 1, 1, 1, 2, 7, 2**31])
        value = rng.choice([struct.pack(f"{order}i", -5), struct.pack(f"{order}f", float("nan")), rng.randbytes(4),
                            struct.pack(f"{order}I", 38), struct.pack(f"{order}I", 2**32 - 1)])  # fmt: skip
        entries[tag] = struct.pack(f"{order}HHI", tag, kind, count) + value
    body = struct.pack(f"{order}H", len(entries)) + b"".join(entries[tag] for tag in sorted(entries))
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    # A rational over 0, where an entry points to it.
    return b"Exif\0\0" + head + body + bytes(4) + struct.pack(f"{order}iiii", -1, 0, 1, 0)


TRANSPOSITIONS = {1: None, 2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
                  6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}  # fmt: skip


def turned(image: PIL.Image.Image, orientation: int) -> np.ndarray:
    name = TRANSPOSITIONS[orientation]
    return np.asarray(image if name is None else image.transpose(PIL.Image.Transpose[name]))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_orientation_is_read_beside_malformed_exif(file_format):
    processor, rng = load("pil", min_patches=1), random.Random(file_format)
    stored = PIL.Image.fromarray(noise(*SIDES, 3))
    for round_ in range(150):
        orientation = rng.randint(1, 8)
        exif = exif_block(rng, orientation, rng.randint(0, 5))
        data = encoded_file(stored, file_format, exif=exif, **({"lossless": True} if file_format == "WEBP" else {}))
        with PIL.Image.open(BytesIO(data)) as image:
            expected = turned(image.convert("RGB"), orientation)
        for source in (base64.b64encode(data).decode(), PIL.Image.open(BytesIO(data))):
            assert np.abs(levels(processor, source) - expected).max() < 0.01, (round_, exif)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_exif_that_cannot_be_read_turns_nothing(file_format):
    processor, rng = load("pil", min_patches=1), random.Random(file_format)
    stored = PIL.Image.fromarray(noise(*SIDES, 3))
    blocks = [b"Exif\0\0XX*\0" + bytes(20), b"Exif\0\0II+\0" + bytes(20), b"Exif\0\0", b"Exif\0\0II*\0"]
    for _ in range(150):
        block = bytearray(exif_block(rng, rng.randint(0, 9), rng.randint(0, 5)))
        for _ in range(rng.randint(1, 6)):
            block[rng.randrange(6, len(block))] = rng.randrange(256)
        blocks.append(bytes(block[: rng.choice([len(block), rng.randint(6, len(block))])]))
    for block in blocks:
        data = encoded_file(stored, file_format, exif=block, **({"lossless": True} if file_format == "WEBP" else {}))
        with PIL.Image.open(BytesIO(data)) as image:
            possible = [turned(image.convert("RGB"), orientation) for orientation in TRANSPOSITIONS]
        for source in (base64.b64encode(data).decode(), PIL.Image.open(BytesIO(data))):
            pixels = levels(processor, source)
            assert any(x.shape == pixels.shape and np.abs(x - pixels).max() < 0.01 for x in possible), block


def test_premultiplied_transparency_is_that_of_straight_alpha(processor):
    image = PIL.Image.fromarray(noise(*SIDES, 4), "RGBA")
    image.putalpha(PIL.Image.fromarray(noise(*SIDES) // 128 * 255))
    for straight, mode in ((image, "RGBa"), (image.convert("LA"), "La"), (PIL.Image.new("RGBA", SIDES[::-1]), "RGBa")):
        premultiplied = straight.convert(mode)
        assert premultiplied.mode == mode
        # White in the newest transformers; in older ones what lay below.
        expected = levels(processor, premultiplied.convert(straight.mode))
        assert np.array_equal(levels(processor, premultiplied), expected)


def test_heic_is_read_without_being_registered(processor, tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    image = PIL.Image.fromarray(np.tile(np.linspace(0, 255, 84).astype(np.uint8)[:, None, None], (1, 56, 3)))
    pillow_heif.from_pillow(image).save(tmp_path / "photograph.jpg", format="HEIF", quality=100)
    PIL.Image.init()
    for registry in (PIL.Image.OPEN, PIL.Image.SAVE):
        registry.pop("HEIF", None)
    module().register_heif.cache_clear()
    pixels = levels(processor, str(tmp_path / "photograph.jpg"))
    assert pixels.shape == (84, 56, 3) and np.abs(pixels - np.asarray(image)).max() < 8


# What people give


def test_what_people_give_is_taken(processor, tmp_path):
    pixels = noise(*SIDES, 3)
    image = PIL.Image.fromarray(pixels)
    image.save(tmp_path / "a picture.png")
    expected = processor(image, return_tensors="pt")["hidden_states"]
    broken_lines = base64.encodebytes(encoded_file(image, "PNG")).decode()
    assert "\n" in broken_lines.strip()
    for source in (broken_lines, broken_lines.replace("\n", "\r\n"), f"data:image/png;base64,{broken_lines}",
                   f"data:image/png;base64,{broken_lines.replace('+', '%2B').replace('=', '%3D')}",
                   (tmp_path / "a picture.png").as_uri(), f"file://localhost{tmp_path}/a%20picture.png"):  # fmt: skip
        assert torch.equal(processor(source, return_tensors="pt")["hidden_states"], expected)
    column = datasets.Dataset.from_dict({"image": [image, image]}).cast_column("image", datasets.Image())["image"]
    for images in (column, (image, image)):
        assert torch.equal(processor(images, return_tensors="pt")["hidden_states"], torch.cat([expected] * 2))
    for source in (torch.from_numpy(pixels).bfloat16(), torch.from_numpy(pixels).float().requires_grad_()):
        got = processor(source, return_tensors="pt")["hidden_states"]
        torch.testing.assert_close(got.detach(), expected, rtol=0, atol=0.05)
    with pytest.raises(ValueError, match="this machine"):
        processor("file://elsewhere/image.png")
    with pytest.raises(FileNotFoundError, match="missing"):
        processor((tmp_path / "missing.png").as_uri())
    with pytest.raises(TypeError, match="bytes"):
        processor(encoded_file(image, "PNG"))


def test_a_pipe_does_not_block(processor, tmp_path):
    os.mkfifo(tmp_path / "image.png")
    for source in (str(tmp_path / "image.png"), tmp_path / "image.png", (tmp_path / "image.png").as_uri()):
        with pytest.raises(OSError, match="no regular file"):
            processor(source)


def test_long_strings_are_not_printed(processor, monkeypatch):
    for prefix, error in (("", FileNotFoundError), ("data:image/png;base64,", OSError)):
        with pytest.raises(error, match="of 30000") as caught:
            processor(prefix + "A" * 3_000_000)
        assert len(str(caught.value)) < 400
    monkeypatch.setattr(module(), "MAX_IMAGE_BYTES", 1000)
    data = base64.b64encode(encoded_file(PIL.Image.fromarray(noise(*SIDES, 3)), "PNG")).decode()
    for prefix in ("", "data:image/png;base64,"):
        with pytest.raises(ValueError, match="at most 1000 bytes"):
            processor(prefix + data)


def test_too_many_pixels_are_refused_before_they_are_decoded(processor, tmp_path, monkeypatch):
    image = PIL.Image.fromarray(noise(20, 30, 3))
    image.save(tmp_path / "image.png")
    for source in (str(tmp_path / "image.png"), [[tmp_path / "image.png"]]):
        assert len(processor(source, max_image_pixels=600)["grid_thw"]) == 1
        with pytest.raises(OSError, match=r"image.png.*30 x 20 pixels, more than 599"):
            processor(source, max_image_pixels=599)
        with pytest.raises(OSError, match="more than 599"):
            load(processor.backend, max_image_pixels=599)(source)
    # Its header alone claims this.
    data = bytearray(encoded_file(PIL.Image.new("L", (1, 1)), "PNG"))
    data[16:24] = struct.pack(">II", 13_300, 13_400)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.warns(PIL.Image.DecompressionBombWarning), pytest.raises(OSError, match="13300 x 13400 pixels"):
        processor(base64.b64encode(data).decode())


def test_limits_are_of_the_caller_and_not_of_a_repo(processor, tmp_path):
    load(processor.backend, allow_urls=False, max_image_pixels=5).save_pretrained(tmp_path)
    saved = (tmp_path / "preprocessor_config.json").read_text()
    assert "allow_urls" not in saved and "max_image_pixels" not in saved
    fields = {"allow_urls": False, "max_image_pixels": 10**15}
    assert type(processor).from_dict(fields).max_image_pixels == 160_000_000
    assert type(processor).from_dict(fields).allow_urls is True
    assert type(processor).from_dict({}, **fields).max_image_pixels == 10**15


# URLs


@contextmanager
def server(respond):
    """A server on loopback; `respond` is called with the handler and the server's URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            with suppress(BrokenPipeError, ConnectionResetError):
                respond(self, url)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        url = f"http://127.0.0.1:{running.server_port}"
        threading.Thread(target=running.serve_forever, daemon=True).start()
        try:
            yield url
        finally:
            running.shutdown()


def send(handler, status: int, body: bytes = b"", **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


def test_bodies_without_end_are_cut_off(processor, monkeypatch):
    monkeypatch.setattr(module(), "MAX_IMAGE_BYTES", 100_000)
    sent = []

    def respond(handler, url):
        handler.send_response(200)
        handler.end_headers()
        for _ in range(2000):
            handler.wfile.write(bytes(50_000))
            sent.append(50_000)

    with server(respond) as url, pytest.raises(OSError, match="more than 100000 bytes"):
        processor(f"{url}/image.png")
    assert sum(sent) < 50_000_000


def test_slow_bodies_are_cut_off(processor, monkeypatch):
    monkeypatch.setattr(module(), "URL_SECONDS", 0.5)
    stop, sent = threading.Event(), []

    def respond(handler, url):
        handler.send_response(200)
        handler.end_headers()
        while len(sent) < 1000 and not stop.wait(0.05):
            handler.wfile.write(b"x")
            sent.append(b"x")

    with server(respond) as url:
        with pytest.raises(OSError, match=r"more than 0.5 seconds"):
            processor(f"{url}/image.png")
        stop.set()
    assert len(sent) < 1000
    monkeypatch.setattr(module(), "URL_PAUSE", 0.2)
    silent = threading.Event()
    with server(lambda handler, url: silent.wait(120)) as url:
        with pytest.raises(httpx.TimeoutException):
            processor(f"{url}/image.png")
        silent.set()


def test_redirects_may_not_lead_to_other_addresses_inside(processor, tmp_path, monkeypatch):
    picture = encoded_file(PIL.Image.fromarray(noise(*SIDES, 3)), "PNG")
    asked = []

    def secret(handler, url):
        asked.append(handler.path)
        send(handler, 200, picture)

    with server(secret) as inside:
        port = inside.rpartition(":")[2]
        targets = [f"{inside}/", f"http://localhost:{port}/", f"http://[::ffff:127.0.0.1]:{port}/",
                   "http://169.254.169.254/latest", "http://10.0.0.1/", "http://0.0.0.0/",
                   "http://no-such-host.invalid/"]  # fmt: skip

        def respond(handler, url):
            name = handler.path.strip("/")
            if name.isdigit():
                send(handler, 302, Location=targets[int(name)])
            elif name == "loop":
                send(handler, 301, Location="/loop")
            elif name == "file":
                send(handler, 302, Location=f"file://{tmp_path}/image.png")
            elif name == "near":
                send(handler, 307, Location="/picture")
            else:
                send(handler, 200, picture)

        with server(respond) as url:
            for index in range(len(targets)):
                with pytest.raises(OSError, match="no public address"):
                    processor(f"{url}/{index}")
            with pytest.raises(OSError, match="more than 5 times"):
                processor(f"{url}/loop")
            with pytest.raises((OSError, httpx.HTTPError)):
                processor(f"{url}/file")
            expected = processor(base64.b64encode(picture).decode(), return_tensors="pt")["hidden_states"]
            for path in ("near", "picture"):
                assert torch.equal(processor(f"{url}/{path}", return_tensors="pt")["hidden_states"], expected)
            assert not asked
            # A public address that answers here.
            monkeypatch.setattr(module(), "is_public", lambda host: True)
            assert torch.equal(processor(f"{url}/0", return_tensors="pt")["hidden_states"], expected)
            assert asked == ["/"]


def test_urls_can_be_forbidden(processor):
    asked = []
    name = "processing_aimv2_packing.Aimv2PackingProcessor"
    with_texts = get_class_from_dynamic_module(name, str(REPO))(processor, clip_tokenizer())

    def respond(handler, url):
        asked.append(handler.path)
        send(handler, 404)

    with server(respond) as url:
        source = f"{url}/image.png"
        careful = load(processor.backend, allow_urls=False)
        calls = [
            lambda: processor(source, allow_urls=False),
            lambda: processor([[source]], allow_urls=False),
            lambda: careful([source.replace("http", "HTTP")]),
            lambda: careful.open_image(source, allow_urls=False),
            lambda: processor.preprocess_videos([[source]], allow_urls=False),
            lambda: careful.collate([{"image": source}]),
            lambda: with_texts(images=[source], text=["a cat"], images_kwargs={"allow_urls": False}),
        ]
        for call in calls:
            with pytest.raises(ValueError, match=r"allow_urls.*image\.png"):
                call()
        assert not asked
        with pytest.raises(httpx.HTTPStatusError, match="404"):
            careful(source, allow_urls=True)
        with pytest.raises(httpx.HTTPStatusError, match="404"):
            with_texts(images=[source], text=["a cat"])
