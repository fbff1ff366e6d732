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
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any, Literal, NamedTuple

from loading import run  # first: it says what is not installed


# isort: split
import PIL.Image
import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sentence_transformers import SentenceTransformer
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from conversion.hub_files import require_converted


FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
GONE = Response(status_code=499)  # nobody reads it
Sample = str | dict[str, Any]  # a text, or the patches of an image


@dataclass(frozen=True)
class Limits:
    patches_per_forward: int = 16384  # or one larger image; tokens of texts count as patches
    wait_seconds: float = 0.005  # for others to share a forward
    requests: int = 256  # arriving, waiting or encoded
    body_bytes: int = 16 * 2**20
    pixels: int = 40_000_000  # of an image, before it is decoded
    texts: int = 256  # of a request
    characters: int = 8192  # of a text, which the tokenizer cuts to what the model reads
    read_seconds: float = 10.0  # for a request to arrive


class Encoder:
    """The model by Sentence Transformers: an image to patches, in any thread, and samples to vectors, in one."""

    def __init__(self, checkpoint: str, device: str | None = None, dtype: str = "auto"):
        require_converted(checkpoint)
        options = {"dtype": dtype}
        self.model = SentenceTransformer(checkpoint, device=device, trust_remote_code=True, model_kwargs=options).eval()
        self.tokens = (self.model[0].max_seq_length or 0) if "text" in self.model[0].modalities else 0

    def prepare(self, data: bytes, max_pixels: int) -> tuple[dict[str, Any], int]:
        """
        Tensors of an image, and the number of its patches.

        Raises:
            HTTPException: the bytes hold no image, or one that is too large or too narrow.
        """
        try:
            with PIL.Image.open(BytesIO(data), formats=FORMATS) as image:
                if (pixels := image.width * image.height) > max_pixels:
                    raise HTTPException(413, f"An image may have {max_pixels} pixels, got {pixels}.")
                image.load()
        except HTTPException:
            raise
        except PIL.Image.DecompressionBombError as error:
            raise HTTPException(413, f"An image may have {max_pixels} pixels. {error}") from error
        except Exception as error:  # decoders raise anything on a broken file
            raise HTTPException(400, f"This is no image that can be read, of {', '.join(FORMATS)}.") from error
        try:
            features = self.model.preprocess([{"image": image}])
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        (sizes,) = (value for name, value in features.items() if "grid_thw" in name)
        return features, int(sizes.prod())

    @torch.inference_mode()
    def __call__(self, samples: list[Sample]) -> list[torch.Tensor]:
        """A float32 vector of each, on the CPU."""
        texts = [{"text": sample} for sample in samples if isinstance(sample, str)]
        images = [sample for sample in samples if not isinstance(sample, str)]
        vectors: dict[bool, Any] = {True: iter(()), False: iter(())}
        if texts:
            vectors[True] = self.vectors(self.model.preprocess(texts))
        if images:
            vectors[False] = self.vectors(packed(images))
        return [next(vectors[isinstance(sample, str)]) for sample in samples]

    def vectors(self, features: dict[str, Any]) -> Any:
        # Sizes of images are read on the host, and are its only integers.
        moved = {
            name: value.to(self.model.device) if isinstance(value, torch.Tensor) and "grid_thw" not in name else value
            for name, value in features.items()
        }
        return iter(self.model(moved)["sentence_embedding"].float().cpu())


def packed(images: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        name: torch.cat([image[name] for image in images]) if isinstance(value, torch.Tensor) else value
        for name, value in images[0].items()
    }


class Item(NamedTuple):
    sample: Sample
    patches: int
    arrived: float
    vector: asyncio.Future


class Batcher:
    """Encodes what waits, as much at once as fits the budget, in a thread of its own."""

    def __init__(self, encode: Callable[[list[Sample]], list[torch.Tensor]], limits: Limits):
        self.encode, self.limits, self.waiting = encode, limits, asyncio.Queue[Item]()

    async def vector(self, sample: Sample, patches: int) -> torch.Tensor:
        loop = asyncio.get_running_loop()
        item = Item(sample, patches, loop.time(), loop.create_future())
        self.waiting.put_nowait(item)
        return await item.vector

    async def run(self) -> None:
        loop, left_over = asyncio.get_running_loop(), None
        with ThreadPoolExecutor(1) as thread:
            while True:
                batch = [left_over or await self.waiting.get()]
                left_over, patches = None, batch[0].patches
                while left_over is None and patches < self.limits.patches_per_forward:
                    try:
                        async with asyncio.timeout_at(batch[0].arrived + self.limits.wait_seconds):
                            item = await self.waiting.get()
                    except TimeoutError:
                        break
                    patches += item.patches
                    if patches > self.limits.patches_per_forward:
                        left_over = item
                    else:
                        batch.append(item)
                # Who has left waits no longer.
                batch = [item for item in batch if not item.vector.done()]
                try:
                    vectors = await loop.run_in_executor(thread, self.encode, [item.sample for item in batch])
                except Exception as error:
                    vectors = [error] * len(batch)
                for item, vector in zip(batch, vectors, strict=True):
                    if not item.vector.done():
                        (item.vector.set_exception if isinstance(vector, Exception) else item.vector.set_result)(vector)


class Strict(BaseModel):
    """What this server does not know it refuses: nothing is dropped."""

    model_config = ConfigDict(extra="forbid")


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
    input: str | list[str] | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=1)
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None  # of OpenAI's API, where it changes no vector either


async def read(request: Request, limit: int, seconds: float) -> bytes:
    """
    The body. What is beyond the limit is read and dropped, so that the client hears why.

    Raises:
        HTTPException: the body is too large, or has not arrived in time.
    """
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                size += len(part)
                if size <= limit:
                    body += part
    except TimeoutError as error:
        raise HTTPException(408, f"A request has to arrive in {seconds:g} seconds.") from error
    if size > limit:
        raise HTTPException(413, f"A request may have {limit} bytes, got {size}.")
    return bytes(body)


def image_of(url: str) -> bytes:
    header, _, data = url.partition(",")
    if not (header.startswith("data:") and header.endswith(";base64")):
        raise HTTPException(400, "`image_url` must be a data URI in base64: no URL is fetched.")
    try:
        return base64.b64decode(data, validate=True)
    except ValueError as error:
        raise HTTPException(400, f"`image_url` is not in base64: {error}.") from error


def create_app(encoder: Encoder, name: str, limits: Limits = Limits()) -> FastAPI:
    """The application that serves `encoder` under the name of a model."""
    batcher = Batcher(encoder, limits)
    threads = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2))
    busy = 0

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.running = asyncio.create_task(batcher.run())
        yield
        app.state.running.cancel()
        threads.shutdown()

    app = FastAPI(title="Embeddings by AIMv2, packed", lifespan=lifespan)

    @app.exception_handler(HTTPException)
    def refusal(request: Request, error: HTTPException) -> Response:
        of = {"message": error.detail, "type": "invalid_request_error", "param": None, "code": error.status_code}
        return JSONResponse({"error": of}, error.status_code, error.headers)

    def texts_of(given: str | list[str]) -> list[str]:
        texts = [given] if isinstance(given, str) else given
        if not encoder.tokens:
            raise HTTPException(400, f"{name!r} embeds images alone: send one in `messages`.")
        if not 1 <= len(texts) <= limits.texts:
            raise HTTPException(400, f"`input` may hold 1 to {limits.texts} texts, got {len(texts)}.")
        if (longest := max(map(len, texts))) > limits.characters:
            raise HTTPException(400, f"A text may have {limits.characters} characters, got {longest}.")
        return texts

    async def answer(wanted: Wanted) -> dict:
        if wanted.model not in (None, name):
            raise HTTPException(404, f"There is no such model here: {name!r} is.")
        if wanted.input is not None and wanted.messages is None:
            samples: list[Sample] = [*texts_of(wanted.input)]
            costs = [encoder.tokens] * len(samples)
        elif wanted.messages is not None and wanted.input is None:
            content = image_of(wanted.messages[0].content[0].image_url.url)
            prepare = partial(encoder.prepare, content, limits.pixels)
            image, patches = await asyncio.get_running_loop().run_in_executor(threads, prepare)
            samples, costs = [image], [patches]
        else:
            raise HTTPException(400, "A request holds either `input`, of texts, or `messages`, of an image.")
        vectors = await asyncio.gather(*map(batcher.vector, samples, costs))
        as_asked = [
            base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()
            if wanted.encoding_format == "base64"
            else vector.tolist()
            for vector in vectors
        ]
        data = [{"object": "embedding", "index": index, "embedding": each} for index, each in enumerate(as_asked)]
        usage = {"prompt_tokens": sum(costs), "total_tokens": sum(costs)}
        return {"object": "list", "data": data, "model": name, "usage": usage}

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
            wanted = Wanted.model_validate_json(await read(request, limits.body_bytes, limits.read_seconds))
            work = asyncio.ensure_future(answer(wanted))
            # After the body nothing comes but word that the client has left.
            left = asyncio.ensure_future(request.receive())
            await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
            left.cancel()
            if work.done():
                return JSONResponse(work.result())
            work.cancel()
            return GONE
        except ValidationError as error:
            faults = [
                f"`{'.'.join(map(str, each['loc']))}`: {each['msg']}" for each in error.errors(include_input=False)
            ]
            raise HTTPException(400, "; ".join(faults)) from error
        except ClientDisconnect:
            return GONE
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
    parser.add_argument("--name", help="what clients call the model (default: as --checkpoint)")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", help="(default: a GPU where there is one)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--patches-per-forward", type=int, default=Limits.patches_per_forward, help="(%(default)s)")
    parser.add_argument("--wait-ms", type=float, default=1e3 * Limits.wait_seconds, help="(%(default)s)")
    parser.add_argument("--requests", type=int, default=Limits.requests, help="at once, else 503 (%(default)s)")
    args = parser.parse_args()
    limits = Limits(args.patches_per_forward, args.wait_ms / 1e3, args.requests)
    app = create_app(Encoder(args.checkpoint, args.device, args.dtype), args.name or args.checkpoint, limits)
    # On SIGTERM and SIGINT: what has arrived is answered, nothing more is taken.
    uvicorn.run(app, host=args.host, port=args.port, access_log=False, timeout_graceful_shutdown=60)


if __name__ == "__main__":
    run(main)
