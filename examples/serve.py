# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
A server of embeddings that packs what arrives into one forward: `POST /v1/embeddings`, texts as OpenAI's clients send
them, an image as vLLM's pooling API takes it. Every converted checkpoint works; texts need an image-text model.

    python examples/serve.py --checkpoint CHECKPOINT [--port 8000] [--device cuda] [--dtype bfloat16]
"""

import argparse
import asyncio
import base64
import os
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import fields
from typing import Annotated, Literal

from loading import REPO, run  # first: it says what is not installed


try:
    import PIL.Image
    import pydantic_core
    import torch
    import uvicorn
    from dynamic_batching import Batcher, Encoder, Sample
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import JSONResponse
    from pydantic import BaseModel, Field, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError
    from pydantic.dataclasses import dataclass
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}. What is needed: pip install -r {REPO}/requirements-serve.txt")


GONE = 499, "The client has left."


@dataclass(frozen=True)
class Limits:
    patches_per_forward: PositiveInt = 16384  # or one larger image; tokens of texts count as patches
    wait_seconds: NonNegativeFloat = 0.005  # for others to share a forward
    requests: PositiveInt = 256  # arriving, waiting or encoded
    body_bytes: PositiveInt = 16 * 2**20
    pixels: Annotated[PositiveInt, Field(le=178_956_970)] = 40_000_000  # of an image, before Pillow decodes it
    texts: PositiveInt = 2048  # of a request
    characters: PositiveInt = 8192  # of a text, which the tokenizer cuts to what the model reads
    read_seconds: PositiveFloat = 10.0  # for a request to arrive


class Strict(BaseModel, extra="forbid"):
    """What this server does not know it refuses: nothing is dropped."""


class ImageURL(Strict):
    url: str


class Part(Strict):
    type: Literal["image_url"]
    image_url: ImageURL


class Message(Strict):
    role: Literal["user"]
    content: list[Part] = Field(min_length=1, max_length=1)


class Wanted(Strict):
    model: str | None = None
    input: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=1)
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None  # of OpenAI's API, where it changes no vector either


async def read(request: Request, limit: int, seconds: float) -> bytes:
    """The body. What is beyond the limit is read and dropped, so that the client hears why."""
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                size += len(part)
                if size <= limit:
                    body += part
    except TimeoutError as error:
        raise HTTPException(408, f"A request has to arrive in {seconds:g} seconds.") from error
    except ClientDisconnect as error:
        raise HTTPException(*GONE) from error
    if size > limit:
        raise HTTPException(413, f"A request may have {limit} bytes, got {size}.")
    return bytes(body)


def described(error: ValidationError) -> str:
    if error.error_count() > 16:  # to list a million takes minutes
        return f"This is no request for embeddings: it has {error.error_count()} faults."
    return "; ".join(f"`{'.'.join(map(str, each['loc'])) or 'body'}`: {each['msg']}" for each in error.errors())


def image_of(url: str) -> bytes:
    header, _, data = url.partition(",")
    if not (header.startswith("data:") and header.endswith(";base64")):
        raise ValueError("`image_url` must be a data URI in base64: no URL is fetched.")
    try:
        # Clients break lines, and some use the alphabet for URLs.
        characters = data.encode().translate(bytes.maketrans(b"-_", b"+/"), b" \t\r\n")
        return base64.b64decode(characters, validate=True)
    except ValueError as error:
        raise ValueError(f"`image_url` is not in base64: {error}.") from error


def create_app(encoder: Encoder, name: str, limits: Limits | None = None) -> FastAPI:
    """The application that serves `encoder` under the name of a model."""
    limits = limits or Limits()
    batcher, busy = Batcher(encoder, limits.patches_per_forward, limits.wait_seconds), 0
    decoders = max(1, (os.cpu_count() or 1) // 2)
    # A client that leaves frees its turn, but not the thread.
    turns, decoding = asyncio.Semaphore(decoders), ThreadPoolExecutor(decoders)

    def prepared(body: bytes) -> tuple[list[Sample], list[int], int, bool]:
        """The samples, patches of each, patches or tokens in all, and whether base64 is wanted."""
        wanted = Wanted.model_validate_json(body)
        in_base64 = wanted.encoding_format == "base64"
        if wanted.model not in (None, name):
            raise HTTPException(404, f"There is no such model here: {name!r} is.")
        if (wanted.input is None) == (wanted.messages is None):
            raise ValueError("A request holds either `input`, of texts, or `messages`, of an image.")
        if wanted.messages:
            image, patches = encoder.prepare(image_of(wanted.messages[0].content[0].image_url.url), limits.pixels)
            return [image], [patches], patches, in_base64
        texts = [wanted.input] if isinstance(wanted.input, str) else wanted.input or []
        if not encoder.tokens:
            raise ValueError(f"{name!r} embeds images alone: send one in `messages`.")
        if not 1 <= len(texts) <= limits.texts:
            raise ValueError(f"`input` may hold 1 to {limits.texts} texts, got {len(texts)}.")
        if (longest := max(map(len, texts))) > limits.characters:
            raise ValueError(f"A text may have {limits.characters} characters, got {longest}.")
        return [*texts], [encoder.tokens] * len(texts), encoder.count_tokens(texts), in_base64

    def written(vectors: list[torch.Tensor], used: int, in_base64: bool) -> Response:
        if not all(vector.isfinite().all() for vector in vectors):
            raise HTTPException(500, "The features are not finite: start the server with --dtype bfloat16 or float32.")
        arrays = [vector.numpy().astype("<f4") for vector in vectors]
        embeddings = [base64.b64encode(array).decode() if in_base64 else array.tolist() for array in arrays]
        data = [{"object": "embedding", "index": index, "embedding": each} for index, each in enumerate(embeddings)]
        usage = {"prompt_tokens": used, "total_tokens": used}
        content = {"object": "list", "data": data, "model": name, "usage": usage}
        return Response(pydantic_core.to_json(content), media_type="application/json")

    async def answer(body: bytes) -> Response:
        try:
            async with turns:
                await batcher.has_space.wait()
                work = asyncio.get_running_loop().run_in_executor(decoding, prepared, body)
                samples, patches, used, in_base64 = await work
        except PIL.Image.DecompressionBombError as error:
            raise HTTPException(413, str(error)) from error
        except ValueError as error:
            message = described(error) if isinstance(error, ValidationError) else str(error)
            raise HTTPException(400, message) from error
        vectors = await asyncio.gather(*map(batcher.vector, samples, patches))
        return await asyncio.to_thread(written, vectors, used, in_base64)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.running = asyncio.create_task(batcher.run())
        yield
        app.state.running.cancel()

    app = FastAPI(lifespan=lifespan, openapi_url=None)

    @app.exception_handler(HTTPException)
    async def refusal(request: Request, error: HTTPException) -> Response:
        of = {"message": error.detail, "type": "invalid_request_error", "param": None, "code": error.status_code}
        return JSONResponse({"error": of}, error.status_code, error.headers)

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        nonlocal busy
        if busy >= limits.requests:
            with suppress(HTTPException):
                await read(request, 0, limits.read_seconds)
            message = f"{limits.requests} requests are being answered: try again."
            raise HTTPException(503, message, {"Retry-After": "1"})
        busy += 1
        try:
            body = await read(request, limits.body_bytes, limits.read_seconds)
            work = asyncio.ensure_future(answer(body))
            # After the body nothing comes but word that the client has left.
            left = asyncio.ensure_future(request.receive())
            await asyncio.wait({work, left, app.state.running}, return_when=asyncio.FIRST_COMPLETED)
            left.cancel()
            if work.done():
                return work.result()
            work.cancel()
            if app.state.running.done():
                raise HTTPException(500, "The server encodes nothing any more: start it again.")
            raise HTTPException(*GONE)
        finally:
            busy -= 1

    @app.get("/health")
    async def health() -> Response:
        sound = not app.state.running.done()
        return JSONResponse({"status": "ok" if sound else "broken", "requests": busy}, 200 if sound else 500)

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="converted checkpoint: its code is run")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", help="(default: a GPU where there is one)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    for limit in fields(Limits):
        option = f"--{limit.name.replace('_', '-')}"
        parser.add_argument(option, type=type(limit.default), default=limit.default, help="(%(default)s)")
    args = parser.parse_args()
    limits = Limits(**{limit.name: getattr(args, limit.name) for limit in fields(Limits)})
    # On SIGTERM and SIGINT: what has arrived is answered, nothing more is taken.
    app = create_app(Encoder(args.checkpoint, args.device, args.dtype), args.checkpoint, limits)
    uvicorn.run(app, host=args.host, port=args.port, access_log=False, timeout_graceful_shutdown=60)


if __name__ == "__main__":
    run(main)
