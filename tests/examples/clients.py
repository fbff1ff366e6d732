# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Clients of the server of examples/serve.py, and the server in a thread."""

import base64
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO

import numpy as np
import PIL.Image
import pytest


openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn", reason="needs requirements-serve.txt")

TEXT = json.dumps({"input": "a cat"}).encode()


class Recorded:
    """An encoder that keeps what it is called with, and waits until it may go on."""

    def __init__(self, encoder):
        self.encoder, self.batches = encoder, []
        self.tokens, self.prepare, self.count_tokens = encoder.tokens, encoder.prepare, encoder.count_tokens
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def __call__(self, samples: list) -> list:
        self.batches.append(samples)
        assert self.may_go_on.wait(300)
        return self.encoder(samples)


@contextmanager
def serving(app) -> Iterator[int]:
    """The port of a server in a thread of this process."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=60))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def wait_for(condition) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def client(port: int, kind=openai.OpenAI):
    return kind(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)


def data_uri(content: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(content).decode()


def image_request(content: bytes, **fields) -> dict:
    part = {"type": "image_url", "image_url": {"url": data_uri(content)}}
    return {"messages": [{"role": "user", "content": [part]}], **fields}


def embed_image(client, content: bytes, **fields):
    """As vLLM's documentation calls its pooling API."""
    return client.post(
        "/embeddings", body=image_request(content, **fields), cast_to=openai.types.CreateEmbeddingResponse
    )


def answer(port: int, body: bytes, path: str = "/v1/embeddings") -> tuple[int, dict]:
    """Status and JSON of a request over a socket of its own."""
    with connect(port) as connection:
        connection.sendall(head(len(body), path) + body)
        return read_answer(connection)


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=120)


def listens(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


def head(length: int, path: str = "/v1/embeddings") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: here\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n".encode()


def read_answer(connection: socket.socket) -> tuple[int, dict]:
    received = b""
    while part := connection.recv(65536):
        received += part
    status, _, body = received.partition(b"\r\n\r\n")
    return int(status.split()[1]), json.loads(body)


def jpeg(seed: int) -> bytes:
    """A picture of its own size and colours."""
    rng = np.random.default_rng(seed)
    coarse = PIL.Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
    file = BytesIO()
    coarse.resize(tuple(rng.integers(30, 120, 2).tolist())).save(file, "JPEG", quality=95)
    return file.getvalue()


def message(*parts: dict, role: str = "user") -> dict:
    return {"messages": [{"role": role, "content": list(parts)}]}


def health(port: int) -> dict:
    with connect(port) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n")
        status, state = read_answer(connection)
    assert status == 200
    return state
