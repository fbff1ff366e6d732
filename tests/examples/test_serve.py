# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""examples/serve.py as clients meet it: by openai's package, in crowds, slow, broken, gone, and stopped under load."""

import asyncio
import base64
import dataclasses
import json
import re
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import numpy as np
import PIL.Image
import pytest
import torch
from clients import (
    TEXT,
    Recorded,
    answer,
    client,
    connect,
    data_uri,
    embed_image,
    head,
    health,
    image_request,
    jpeg,
    listens,
    message,
    openai,
    read_answer,
    serving,
    wait_for,
)
from reference import REPO
from sentence_transformers import SentenceTransformer
from served import start_server


PHOTOGRAPHS = sorted((REPO / "examples" / "photographs").glob("*.jpg"))
TEXTS = ["a cat", "a rocket on its launch pad", "two cups of coffee, seen from above"]


@pytest.fixture(scope="module")
def port(serve, encoder) -> Iterator[int]:
    with serving(serve.create_app(encoder, "aimv2-lit")) as port:
        yield port


def as_encoded(encoder, images: list[bytes]) -> torch.Tensor:
    pictures = [PIL.Image.open(BytesIO(image)) for image in images]
    return torch.cat([encoder.model.encode([picture], convert_to_tensor=True) for picture in pictures])


def test_texts_by_the_openai_package_are_those_of_sentence_transformers(port, checkpoint):
    expected = SentenceTransformer(checkpoint, trust_remote_code=True, device="cpu").encode(TEXTS)
    for encoding in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
        answer = client(port).embeddings.create(model="aimv2-lit", input=TEXTS, **encoding)
        vectors = [item.embedding for item in answer.data]
        if encoding == {"encoding_format": "base64"}:
            vectors = [np.frombuffer(base64.b64decode(vector), "<f4") for vector in vectors]
        np.testing.assert_allclose(np.array(vectors), expected, rtol=0, atol=1e-5)
        assert [item.index for item in answer.data] == [0, 1, 2] and answer.model == "aimv2-lit"
        assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0
    (alone,) = client(port).embeddings.create(model="aimv2-lit", input=TEXTS[1]).data
    np.testing.assert_allclose(np.array(alone.embedding), expected[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("which", ["image-text", "native"])
def test_images_are_those_of_sentence_transformers(which, serve, encoder, native_encoder):
    encoder = encoder if which == "image-text" else native_encoder
    expected = encoder.model.encode([str(path) for path in PHOTOGRAPHS])
    with serving(serve.create_app(encoder, "aimv2")) as port:
        for path, vector in zip(PHOTOGRAPHS, expected, strict=True):
            (item,) = embed_image(client(port), path.read_bytes(), model="aimv2", encoding_format="float").data
            np.testing.assert_allclose(np.array(item.embedding), vector, rtol=0, atol=1e-5)


def test_a_text_is_a_text_whatever_it_names(port, encoder):
    """No URL is fetched and no file is opened: Sentence Transformers would take these for images."""
    named = [str(PHOTOGRAPHS[0]), f"http://127.0.0.1:{port}/picture.jpg", data_uri(PHOTOGRAPHS[0].read_bytes())[:4000]]
    answer = client(port).embeddings.create(model="aimv2-lit", input=named)
    expected = encoder([*named])
    np.testing.assert_allclose([item.embedding for item in answer.data], torch.stack(expected), rtol=0, atol=1e-5)


def rows_of(image: dict) -> int:
    return max(len(value) for value in image.values() if isinstance(value, torch.Tensor))


def test_images_that_wait_share_a_forward_of_the_budget(serve, native_encoder, batchers):
    recorded = Recorded(native_encoder)
    images = [jpeg(seed) for seed in range(12)]
    expected = as_encoded(native_encoder, images)
    limits = serve.Limits(patches_per_forward=150)

    async def load(port: int) -> list:
        async with client(port, openai.AsyncOpenAI) as each:
            return await asyncio.gather(*(embed_image(each, image, encoding_format="float") for image in images))

    with serving(serve.create_app(recorded, "aimv2", limits)) as port, ThreadPoolExecutor(1) as thread:
        recorded.may_go_on.clear()
        answering = thread.submit(asyncio.run, load(port))
        try:
            wait_for(lambda: sum(map(len, recorded.batches)) + len(batchers[0].waiting) == len(images))
        finally:
            recorded.may_go_on.set()
        answers = answering.result()
    vectors = torch.tensor([answer.data[0].embedding for answer in answers])
    torch.testing.assert_close(vectors, expected, rtol=0, atol=1e-5)
    patches = [sum(map(rows_of, batch)) for batch in recorded.batches]
    assert sum(map(len, recorded.batches)) == len(images) and len(recorded.batches) < len(images)
    assert all(total <= 150 or len(batch) == 1 for total, batch in zip(patches, recorded.batches, strict=True))


def test_a_crowd_is_answered_or_sent_away_and_no_vector_is_anothers(serve, native_encoder):
    """Nothing is encoded before the first was sent away: else none might be, where requests come slowly."""
    recorded, images = Recorded(native_encoder), [jpeg(seed) for seed in range(120)]
    recorded.may_go_on.clear()
    expected = as_encoded(native_encoder, images)

    async def embedded(each, image: bytes) -> torch.Tensor | None:
        try:
            return torch.tensor((await embed_image(each, image, encoding_format="float")).data[0].embedding)
        except openai.APIStatusError as error:
            recorded.may_go_on.set()
            assert (error.status_code, error.response.headers["retry-after"]) == (503, "1")
            assert "24 requests" in error.body["message"]
            return None

    async def load(port: int) -> list:
        async with client(port, openai.AsyncOpenAI) as each:
            return await asyncio.gather(*(embedded(each, image) for image in images))

    with serving(serve.create_app(recorded, "aimv2", serve.Limits(requests=24))) as port:
        vectors = asyncio.run(load(port))
        answered = [index for index, vector in enumerate(vectors) if vector is not None]
        assert len(answered) >= 24 and len(answered) < len(images)
        for index in answered:
            assert torch.cdist(vectors[index][None], expected).argmin() == index
            torch.testing.assert_close(vectors[index], expected[index], rtol=0, atol=1e-5)
        assert answer(port, TEXT)[0] == 400  # it still answers: this model has no texts


def large_png(side: int) -> bytes:
    """Many pixels in few bytes."""
    file = BytesIO()
    PIL.Image.new("1", (side, side)).save(file, "PNG")
    return file.getvalue()


IMAGE = {"type": "image_url", "image_url": {"url": data_uri(jpeg(0))}}
REFUSED = [
    ({"input": TEXTS, **message(IMAGE)}, 400, "either `input`, of texts, or `messages`"),
    ({}, 400, "either `input`, of texts, or `messages`"),
    ({"input": []}, 400, "1 to 4 texts, got 0"),
    ({"input": ["a"] * 5}, 400, "1 to 4 texts, got 5"),
    ({"input": "a" * 101}, 400, "100 characters, got 101"),
    ({"input": [1, 2, 3]}, 400, "`input.list[str].0`: Input should be a valid string"),
    ({"input": "a", "dimensions": 8}, 400, "`dimensions`: Extra inputs are not permitted"),
    ({"input": "a", "encoding_format": "int8"}, 400, "`encoding_format`: Input should be 'float' or 'base64'"),
    ({"input": "a", "model": "other"}, 404, "no such model here: 'aimv2-lit' is"),
    ({"input": "a" * 70_000}, 413, "65536 bytes, got 70"),
    (message(IMAGE, IMAGE), 400, "`messages.0.content`: List should have at most 1 item"),
    (message(), 400, "`messages.0.content`: List should have at least 1 item"),
    (message({"type": "text", "text": "a cat"}), 400, "`messages.0.content.0.type`: Input should be 'image_url'"),
    (message(IMAGE, role="system"), 400, "`messages.0.role`: Input should be 'user'"),
    *(
        (message({"type": "image_url", "image_url": {"url": url}}), 400, said)
        for url, said in [
            ("http://127.0.0.1:1/a.jpg", "no URL is fetched"),
            ("file:///etc/hostname", "no URL is fetched"),
            (str(PHOTOGRAPHS[0]), "no URL is fetched"),
            ("data:image/jpeg,abc", "must be a data URI in base64"),
            ("data:image/jpeg;base64,a!b", "is not in base64"),
            (data_uri(b"no image"), "no image that can be read, of BMP, GIF, JPEG, PNG, WEBP"),
            (data_uri(jpeg(0)[:200]), "no image that can be read"),
            (data_uri(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"), "no image that can be read"),
        ]
    ),
    *(
        (message({"type": "image_url", "image_url": {"url": data_uri(large_png(side))}}), 413, said)
        for side, said in [(1001, "1000000 pixels, got 1002001"), (20_000, "1000000 pixels. Image size (400000000 pix")]
    ),
]


@pytest.fixture(scope="module")
def narrow_port(serve, encoder) -> Iterator[int]:
    limits = serve.Limits(body_bytes=65536, pixels=1_000_000, texts=4, characters=100, read_seconds=60)
    with serving(serve.create_app(encoder, "aimv2-lit", limits)) as port:
        yield port


@pytest.fixture(scope="module")
def hasty_port(serve, encoder) -> Iterator[int]:
    """For requests of one packet, which arrive at once or not at all."""
    with serving(serve.create_app(encoder, "aimv2-lit", serve.Limits(read_seconds=1))) as port:
        yield port


@pytest.mark.parametrize(("body", "status", "said"), REFUSED)
def test_what_is_refused_is_told_why(body, status, said, narrow_port):
    got, error = answer(narrow_port, json.dumps(body).encode())
    assert got == status, error
    assert said in error["error"]["message"] and error["error"]["code"] == status


def test_an_image_alone_has_the_vector_that_it_has_among_texts_and_images(serve, encoder):
    samples = [encoder.prepare(path.read_bytes(), 10**7)[0] for path in PHOTOGRAPHS]
    mixed = [samples[0], TEXTS[0], *samples[1:], TEXTS[1]]
    together = encoder(mixed)
    for sample, vector in zip(mixed, together, strict=True):
        torch.testing.assert_close(encoder([sample])[0], vector, rtol=0, atol=1e-5)


def test_a_model_of_images_alone_says_so(serve, native_encoder):
    with serving(serve.create_app(native_encoder, "aimv2")) as port:
        status, error = answer(port, TEXT)
    assert status == 400 and "'aimv2' embeds images alone" in error["error"]["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b'{"input": "a \\ud800"}', b"null"])
def test_a_body_that_is_no_request_is_an_error_of_the_client(body, narrow_port):
    status, error = answer(narrow_port, body)
    assert status == 400 and error["error"]["message"]


def test_slow_and_broken_clients_hold_nobody_up(hasty_port):
    with connect(hasty_port) as slow, connect(hasty_port) as silent, connect(hasty_port) as half_a_head:
        slow.sendall(head(1000) + b'{"input": ')
        half_a_head.sendall(b"POST /v1/embed")
        with connect(hasty_port) as garbage:
            garbage.sendall(b"\x16\x03\x01\x02\x00 what\r\n\r\n")
            assert b" 400 " in garbage.recv(65536)
        with connect(hasty_port) as gone:
            gone.sendall(head(1000) + b'{"input": ')
        assert answer(hasty_port, TEXT)[0] == 200
        status, error = read_answer(slow)
        assert status == 408 and "1 seconds" in error["error"]["message"]
        assert answer(hasty_port, TEXT)[0] == 200
        silent.close()
    wait_for(lambda: health(hasty_port) == {"status": "ok", "requests": 0})


def test_who_has_left_is_not_encoded(serve, encoder, batchers):
    recorded = Recorded(encoder)
    with serving(serve.create_app(recorded, "aimv2-lit", serve.Limits(wait_seconds=0))) as port:
        recorded.may_go_on.clear()
        with connect(port) as stays, connect(port) as leaves:
            stays.sendall(head(len(TEXT)) + TEXT)
            wait_for(lambda: len(recorded.batches) == 1)
            body = json.dumps({"input": "never seen"}).encode()
            leaves.sendall(head(len(body)) + body)
            wait_for(lambda: len(batchers[0].waiting) == 1)
            leaves.close()
            wait_for(lambda: health(port)["requests"] == 1)
            recorded.may_go_on.set()
            assert read_answer(stays)[0] == 200
        assert answer(port, TEXT)[0] == 200
    assert [sample for batch in recorded.batches for sample in batch] == ["a cat", "a cat"]


def test_a_forward_that_fails_fails_its_requests_alone(serve, encoder):
    class Failing(Recorded):
        def __call__(self, samples: list) -> list:
            if "fails" in samples:
                raise RuntimeError("out of memory")
            return super().__call__(samples)

    with serving(serve.create_app(Failing(encoder), "aimv2-lit")) as port:
        with pytest.raises(openai.InternalServerError):
            client(port).embeddings.create(model="aimv2-lit", input="fails")
        assert answer(port, TEXT)[0] == 200
        assert health(port) == {"status": "ok", "requests": 0}


def test_a_stop_under_load_answers_what_has_arrived(checkpoint, tmp_path):
    """The server is told to stop while it encodes, and while bodies arrive: these end when it has begun to stop."""
    log = tmp_path / "log"
    server, port = start_server(log, "--checkpoint", checkpoint, "--read-seconds", 120, folder=REPO)
    answered: list[int] = []

    async def load(count: int) -> None:
        async with client(port, openai.AsyncOpenAI) as each:

            async def ask(index: int) -> None:
                await embed_image(each, jpeg(index), model=checkpoint)
                answered.append(index)

            asked = asyncio.gather(*(ask(index) for index in range(count)))
            before, arrived = 0, 0
            while before + arrived < count + len(late):
                before, arrived = len(answered), (await asyncio.to_thread(health, port))["requests"]
            server.send_signal(signal.SIGTERM)
            await asked

    bodies = [json.dumps(image_request(jpeg(seed))).encode() for seed in range(20)]
    late = [connect(port) for _ in bodies]
    try:
        for connection, body in zip(late, bodies, strict=True):
            connection.sendall(head(len(body)) + body[:100])
        with ThreadPoolExecutor(1) as thread:
            loading = thread.submit(asyncio.run, load(60))
            wait_for(lambda: loading.done() or not listens(port))
            for connection, body in zip(late, bodies, strict=True):
                connection.sendall(body[100:])
            statuses = [read_answer(connection)[0] for connection in late]
            loading.result()
        server.wait(timeout=120)
    finally:
        server.kill()
    assert len(answered) == 60 and statuses == [200] * len(late)
    assert "Application shutdown complete" in log.read_text() and "Traceback" not in log.read_text()
    assert server.returncode in (0, -signal.SIGTERM)


def test_the_page_has_the_limits(serve):
    page = (REPO / "docs" / "serving.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", page, re.MULTILINE))
    assert rows == {field.name: str(field.default) for field in dataclasses.fields(serve.Limits)}


def test_a_checkpoint_that_is_none_ends_the_command_in_one_line(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["serve.py", "--checkpoint", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match=r"^error: .*none") as ended:
        serve.run(serve.main)
    assert "\n" not in str(ended.value)
