# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""examples/serve.py where something goes wrong: hostile bodies, poisoned batches, clients that leave, odd requests."""

import asyncio
import base64
import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import numpy as np
import PIL.Image
import psutil
import pytest
import torch
from clients import (
    TEXT,
    Recorded,
    answer,
    client,
    connect,
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
from reference import hub_module


@pytest.fixture(scope="module")
def port(serve, encoder) -> Iterator[int]:
    with serving(serve.create_app(encoder, "aimv2-lit")) as port:
        yield port


def image_body(url: str) -> bytes:
    return json.dumps(message({"type": "image_url", "image_url": {"url": url}})).encode()


def vectors_of(got: tuple[int, dict]) -> torch.Tensor:
    status, answered = got
    assert status == 200, answered
    return torch.tensor([item["embedding"] for item in answered["data"]])


def prepared(encoder, seed: int):
    return encoder.prepare(jpeg(seed), 10**6)[0]


@pytest.mark.parametrize(
    "body",
    [
        b'{"input":[' + b"1," * 2_000_000 + b"1]}",
        b'{"input":[' + b"[1]," * 1_000_000 + b"[1]]}",
        b'{"messages":[' + b"{}," * 1_000_000 + b"{}]}",
        b"{" + b",".join(b'"%x":0' % number for number in range(500_000)) + b"}",
        b'{"input":' + b"[" * 2_000_000,
    ],
    ids=["tokens", "lists of tokens", "messages", "unknown fields", "nested"],
)
def test_a_body_of_a_million_faults_is_refused_in_a_line_and_little_memory(body, port):
    process = psutil.Process()
    before, peak, ended = process.memory_info().rss, 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        is_last = False
        # At least once: the answer may come before the first look.
        while not is_last:
            is_last = ended.wait(0.01)
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    status, error = answer(port, body)
    ended.set()
    watcher.join()
    assert status == 400 and len(error["error"]["message"]) < 500
    assert peak - before < 500 * 2**20


def test_a_poisoned_image_fails_alone(serve, native_encoder):
    """Whatever it is that makes a forward fail with it."""
    images = [jpeg(seed) for seed in range(9)]
    expected = [native_encoder([prepared(native_encoder, seed)])[0] for seed in range(9)]
    poison = prepared(native_encoder, 4)["pixel_values"]

    class Poisoned(Recorded):
        def __call__(self, samples: list) -> list:
            if any(torch.equal(sample["pixel_values"], poison) for sample in samples):
                raise RuntimeError("poisoned")
            return super().__call__(samples)

    async def load(port: int) -> list:
        async with client(port, openai.AsyncOpenAI) as each:
            asked = (embed_image(each, image, encoding_format="float") for image in images)
            return await asyncio.gather(*asked, return_exceptions=True)

    with serving(serve.create_app(Poisoned(native_encoder), "aimv2", serve.Limits(wait_seconds=0.3))) as port:
        answers = asyncio.run(load(port))
        assert health(port) == {"status": "ok", "requests": 0}
    assert isinstance(answers.pop(4), openai.InternalServerError)
    del expected[4]
    for answered, vector in zip(answers, expected, strict=True):
        torch.testing.assert_close(torch.tensor(answered.data[0].embedding), vector, rtol=0, atol=1e-5)


def test_who_has_left_takes_no_part_of_the_budget(serve, native_encoder, batchers):
    """While a forward runs, one client of four leaves; the others fit one forward only without it."""
    recorded = Recorded(native_encoder)
    images = [jpeg(seed) for seed in range(5)]
    patches = [native_encoder.prepare(image, 10**6)[1] for image in images]
    limits = serve.Limits(patches_per_forward=sum(patches[1:]) - patches[2], wait_seconds=0)
    with serving(serve.create_app(recorded, "aimv2", limits)) as port:
        recorded.may_go_on.clear()
        connections = []
        for number, image in enumerate(images, start=1):
            body = json.dumps(image_request(image)).encode()
            connections.append(connect(port))
            connections[-1].sendall(head(len(body)) + body)
            wait_for(lambda number=number: health(port)["requests"] == number)
            if number == 1:
                wait_for(lambda: len(recorded.batches) == 1)
        wait_for(lambda: len(batchers[0].waiting) == 4)
        connections.pop(2).close()
        wait_for(lambda: health(port)["requests"] == 4)
        recorded.may_go_on.set()
        for connection in connections:
            assert read_answer(connection)[0] == 200
            connection.close()
    assert [len(batch) for batch in recorded.batches] == [1, 3]


def test_an_answer_waits_for_no_image_that_is_decoded(serve, native_encoder):
    recorded, decoded, decoding = Recorded(native_encoder), threading.Event(), []
    body = json.dumps(image_request(jpeg(0))).encode()

    def waiting(*arguments):
        decoding.append(1)
        assert decoded.wait(300)
        return native_encoder.prepare(*arguments)

    with serving(serve.create_app(recorded, "aimv2")) as port:
        recorded.may_go_on.clear()
        connections = [connect(port) for _ in range(1 + (os.cpu_count() or 1))]
        connections[0].sendall(head(len(body)) + body)
        wait_for(lambda: len(recorded.batches) == 1)
        recorded.prepare = waiting
        for connection in connections[1:]:
            connection.sendall(head(len(body)) + body)
        wait_for(lambda: len(decoding) == max(1, (os.cpu_count() or 1) // 2))
        recorded.may_go_on.set()
        try:
            assert read_answer(connections[0])[0] == 200
        finally:
            decoded.set()
        for connection in connections[1:]:
            assert read_answer(connection)[0] == 200
            connection.close()


def test_a_stop_answers_every_request_that_has_arrived(serve, native_encoder):
    recorded = Recorded(native_encoder)
    images = [jpeg(seed) for seed in range(20)]
    expected = [native_encoder([prepared(native_encoder, seed)])[0] for seed in range(20)]
    recorded.may_go_on.clear()
    with serving(serve.create_app(recorded, "aimv2", serve.Limits(patches_per_forward=300))) as port:
        connections = [connect(port) for _ in images]
        for connection, image in zip(connections, images, strict=True):
            body = json.dumps(image_request(image)).encode()
            connection.sendall(head(len(body)) + body)
        wait_for(lambda: health(port)["requests"] == 20)

        def go_on() -> None:
            try:
                wait_for(lambda: not listens(port))
            finally:
                recorded.may_go_on.set()

        # The server is told to stop when this block ends.
        stopping = threading.Thread(target=go_on)
        stopping.start()
    stopping.join()
    for connection, vector in zip(connections, expected, strict=True):
        torch.testing.assert_close(vectors_of(read_answer(connection))[0], vector, rtol=0, atol=1e-5)
        connection.close()
    with pytest.raises(ConnectionRefusedError):
        connect(port)


def chunked(parts: list[bytes]) -> bytes:
    start = b"POST /v1/embeddings HTTP/1.1\r\nHost: here\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    return start + b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in [*parts, b""])


def test_a_body_without_a_length_is_read_and_limited(serve, encoder):
    with serving(serve.create_app(encoder, "aimv2-lit", serve.Limits(body_bytes=10_000))) as port:
        with connect(port) as connection:
            connection.sendall(chunked([TEXT[index : index + 1] for index in range(len(TEXT))]))
            got = vectors_of(read_answer(connection))
        torch.testing.assert_close(got[0], encoder(["a cat"])[0], rtol=0, atol=1e-5)
        with connect(port) as connection:
            connection.sendall(chunked([b" " * 7000] * 300))
            status, error = read_answer(connection)
        assert status == 413 and "10000 bytes, got 2100000" in error["error"]["message"]
        assert health(port) == {"status": "ok", "requests": 0}


def test_base64_as_clients_write_it(port, encoder):
    """In lines of 76 characters, in the alphabet for URLs, and under any media type, which is not read."""
    image = next(
        image for image in map(jpeg, range(100)) if {b"+", b"/"} <= {*map(bytes, zip(base64.b64encode(image)))}
    )
    expected = encoder([encoder.prepare(image, 10**6)[0]])[0]
    for text in (base64.encodebytes(image), base64.urlsafe_b64encode(image), base64.b64encode(image)):
        for kind in ("image/jpeg", "image/png", "image/jpeg;name=a.jpg", ""):
            got = vectors_of(answer(port, image_body(f"data:{kind};base64,{text.decode()}")))
            torch.testing.assert_close(got[0], expected, rtol=0, atol=1e-5)
    without_padding = base64.b64encode(image + b"\0" * (1 - len(image) % 3)).decode().rstrip("=")
    status, error = answer(port, image_body(f"data:image/jpeg;base64,{without_padding}"))
    assert status == 400 and "not in base64: Incorrect padding" in error["error"]["message"]


def test_what_openais_clients_send_beside_the_input(port, encoder):
    fields = {"model": "aimv2-lit", "user": "somebody"}
    one = client(port).embeddings.create(input="a cat", encoding_format="float", **fields)
    np.testing.assert_allclose(one.data[0].embedding, encoder(["a cat"])[0], rtol=0, atol=1e-5)
    with pytest.raises(openai.BadRequestError, match="`dimensions`: Extra inputs are not permitted"):
        client(port).embeddings.create(input="a cat", dimensions=8, **fields)
    nothing = {"model": None, "encoding_format": None, "user": None, "messages": None}
    assert answer(port, json.dumps({"input": "a cat", **nothing}).encode())[0] == 200


@pytest.mark.parametrize("tokens", [[320, 2368], [[320, 2368], [320]]])
def test_tokens_are_refused_as_such(tokens, port):
    """They are those of another model's tokenizer."""
    with pytest.raises(openai.BadRequestError, match=r"`input\.list\[str\]\.0`: Input should be a valid string"):
        client(port).embeddings.create(model="aimv2-lit", input=tokens)


def test_empty_texts_are_texts(port, encoder):
    got = client(port).embeddings.create(model="aimv2-lit", input=["", "a cat", " "])
    expected = encoder.model.encode(["", "a cat", " "])
    np.testing.assert_allclose([item.embedding for item in got.data], expected, rtol=0, atol=1e-5)


def test_as_many_texts_as_openai_takes_keep_their_order(port, encoder):
    texts = [" ".join(["cat", "rocket", "cup", "sky"][: 1 + index % 4]) + f" {index}" for index in range(2048)]
    got = client(port).embeddings.create(model="aimv2-lit", input=texts)
    assert [item.index for item in got.data] == list(range(2048))
    expected = encoder.model.encode(texts)
    np.testing.assert_allclose([item.embedding for item in got.data], expected, rtol=0, atol=1e-5)


def test_usage_counts_tokens_and_patches(port, encoder):
    texts = ["a cat", "a rocket on its launch pad, seen from afar " * 40, ""]
    tokens = sum(int(encoder.model.preprocess([{"text": text}])["attention_mask"].sum()) for text in texts)
    used = client(port).embeddings.create(model="aimv2-lit", input=texts).usage
    assert used.prompt_tokens == used.total_tokens == tokens
    (grid,) = encoder.model.preprocess([{"image": PIL.Image.open(BytesIO(jpeg(0)))}])["image_grid_thw"].tolist()
    used = embed_image(client(port), jpeg(0)).usage
    assert used.prompt_tokens == used.total_tokens == np.prod(grid)


@pytest.mark.parametrize(
    ("start", "status"),
    [
        ("GET /v1/embeddings", 405),
        ("HEAD /v1/embeddings", 405),
        ("POST /health", 405),
        ("GET /", 404),
        ("HEAD /nothing", 404),
        ("POST /v1/embeddings/../../etc/passwd", 404),
        ("GET /docs", 404),
        ("GET /openapi.json", 404),
    ],
)
def test_other_paths_and_methods(start, status, port):
    with connect(port) as connection:
        connection.sendall(f"{start} HTTP/1.1\r\nHost: here\r\nConnection: close\r\nContent-Length: 0\r\n\r\n".encode())
        received = b""
        while part := connection.recv(65536):
            received += part
    first, _, body = received.partition(b"\r\n\r\n")
    assert int(first.split()[1]) == status
    assert (b"allow: " in first.lower()) == (status == 405)
    if start.startswith("HEAD"):
        assert body == b""
    else:
        assert json.loads(body)["error"]["code"] == status


def test_a_limit_that_is_none_ends_the_command_in_one_line(serve, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["serve.py", "--checkpoint", "none", "--requests", "0"])
    with pytest.raises(SystemExit, match=r"^error: .*requests.* greater than 0") as ended:
        serve.run(serve.main)
    assert "\n" not in str(ended.value)


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn", "sentence_transformers"])
def test_without_its_packages_the_command_says_what_to_install(missing, serve, monkeypatch):
    for name in ("serve", "dynamic_batching"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit, match=rf"^error: .*{missing}.* pip install -r .*/requirements-serve\.txt"):
        importlib.import_module("serve")


def test_no_more_images_are_decoded_than_fill_two_forwards(serve, native_encoder, batchers):
    recorded, images, decoded = Recorded(native_encoder), [jpeg(seed) for seed in range(40)], []

    def counted(*arguments):
        decoded.append(native_encoder.prepare(*arguments))
        return decoded[-1]

    recorded.prepare = counted
    largest = max(native_encoder.prepare(image, 10**6)[1] for image in images)
    with serving(serve.create_app(recorded, "aimv2", serve.Limits(patches_per_forward=largest))) as port:
        recorded.may_go_on.clear()
        connections = [connect(port) for _ in images]
        for connection, image in zip(connections, images, strict=True):
            body = json.dumps(image_request(image)).encode()
            connection.sendall(head(len(body)) + body)
        wait_for(lambda: health(port)["requests"] == len(images))
        wait_for(lambda: not batchers[0].has_space.is_set())
        time.sleep(0.5)  # in which all could be decoded
        encoded = {id(sample) for batch in recorded.batches for sample in batch}
        waiting = sum(patches for sample, patches in decoded if id(sample) not in encoded)
        recorded.may_go_on.set()
        assert waiting <= (2 + max(1, (os.cpu_count() or 1) // 2)) * largest
        assert [read_answer(connection)[0] for connection in connections] == [200] * len(images)
    assert len(decoded) == len(images)


class Tower(torch.nn.Module):
    def __init__(self, device: str, error: type[Exception] | None = None):
        super().__init__()
        self.device, self.error = torch.device(device), error
        self.captured: list[int] = []

    def capture_cuda_graphs(self, lengths: list[int]) -> None:
        self.captured += lengths
        if self.error:
            raise self.error


def test_on_a_gpu_graphs_of_small_batches_are_captured_before_the_first_request(serve):
    batching, padded_size = importlib.import_module("dynamic_batching"), hub_module("cuda_engine").padded_size
    on_gpu, on_cpu, refused = Tower("cuda"), Tower("cpu"), Tower("cuda", ValueError)
    batching.capture_cuda_graphs(torch.nn.Sequential(on_gpu, torch.nn.Sequential(on_cpu), refused))
    assert set(map(padded_size, on_gpu.captured)) == {padded_size(patches) for patches in range(1, 4097)}
    assert on_cpu.captured == [] and refused.captured == [64]


def test_vectors_that_are_not_finite_are_errors_of_their_requests(serve, native_encoder):
    """JSON has no NaN, and in base64 nobody would see it."""
    overflowing = native_encoder.prepare(jpeg(1), 10**6)[1]

    class Overflowing(Recorded):
        def __call__(self, samples: list) -> list:
            vectors = [vector.clone() for vector in super().__call__(samples)]
            for sample, vector in zip(samples, vectors, strict=True):
                if len(sample["pixel_values"]) == overflowing:
                    vector[0] = float("inf")
            return vectors

    with serving(serve.create_app(Overflowing(native_encoder), "aimv2")) as port:
        for fields in ({}, {"encoding_format": "base64"}):
            status, error = answer(port, json.dumps(image_request(jpeg(1), **fields)).encode())
            assert (
                status == 500 and "not finite" in error["error"]["message"] and "--dtype" in error["error"]["message"]
            )
        assert answer(port, json.dumps(image_request(jpeg(0))).encode())[0] == 200
        assert health(port) == {"status": "ok", "requests": 0}


def test_where_encoding_has_ended_nobody_waits(serve, encoder, monkeypatch):
    """Its thread is shut down: what waits gets an error, and so does what comes later."""

    class ShutDown(ThreadPoolExecutor):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.shutdown()

    monkeypatch.setattr(importlib.import_module("dynamic_batching"), "ThreadPoolExecutor", ShutDown)
    with serving(serve.create_app(encoder, "aimv2-lit")) as port:
        for _ in range(2):
            status, error = answer(port, TEXT)
            assert status == 500 and "start it again" in error["error"]["message"]
        with connect(port) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n")
            assert read_answer(connection) == (500, {"status": "broken", "requests": 0})


def test_threads_count_tokens_at_once(encoder):
    """And beside them one pads, which changes a setting of its tokenizer."""
    texts = [[f"a cat {number} " * (1 + number % 7)] * 20 for number in range(40)]
    expected = [encoder.count_tokens(some) for some in texts]
    with ThreadPoolExecutor(8) as pool, ThreadPoolExecutor(1) as one:
        padded = [one.submit(encoder.model.preprocess, [{"text": text} for text in some]) for some in texts]
        assert list(pool.map(encoder.count_tokens, texts)) == expected
        assert [int(each.result()["attention_mask"].sum()) for each in padded] == expected


def test_a_body_that_is_no_json_is_said_plainly(port):
    for body in (b"", b"[]", '{"input": "a"}'.encode("utf-16")):
        status, error = answer(port, body)
        assert status == 400 and error["error"]["message"].startswith("`body`: ")


def test_more_pixels_than_pillow_opens_are_no_limit(serve):
    with pytest.raises(ValueError, match="pixels"):
        serve.Limits(pixels=200_000_000)
