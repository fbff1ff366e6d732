# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
Features of a corpus of images, on Ray Data: `python extract_features.py --model REPO --input INPUT --output DIR`.

The same command runs on a laptop, where it starts Ray itself, and on a cluster (`--address`). Run it again after a
crash and it does what is missing: the Parquet files in the output are the only record of what is done. A file appears
there complete, by a rename, and only this process renames, never its workers: whatever dies, no image has two rows.
See docs/scaling.md.
"""

import argparse
import base64
import hashlib
import io
import json
import logging
import os
import re
import shutil
import sys
import tarfile
import tempfile
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq
import ray
import ray.data
import torch
from filelock import FileLock, Timeout
from fsspec.implementations.local import LocalFileSystem
from PIL import Image
from tqdm import tqdm
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils.hub import HF_MODULES_CACHE
from transformers.utils.logging import disable_progress_bar


CODE = Path(__file__).resolve().parent

IMAGE_SUFFIXES = (
    ".avif",
    ".bmp",
    ".gif",
    ".jp2",
    ".jpe",
    ".jpeg",
    ".jpg",
    ".pgm",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)

# Folder of files that are being written; its name hides it from readers of the Parquet files.
UNFINISHED = "_unfinished"
SETTINGS = "_settings.json"
LOCK = "_lock"

# Of images on their way from one stage to the next; Ray joins small blocks and waits when too many lie about.
BYTES_PER_BLOCK = 32 * 2**20
FILES_PER_BLOCK = 64

IMAGE_SCHEMA = pa.schema({"id": pa.string(), "error": pa.string(), "image": pa.large_binary()})
PATCH_SCHEMA = pa.schema(
    {"id": pa.string(), "error": pa.string(), "grid_thw": pa.list_(pa.int64()), "patches": pa.large_binary()}
)


@dataclass(frozen=True)
class Settings:
    """What the rows of an output depend on; all files of one output have the same."""

    model: str
    input: str
    image_column: str
    id_column: str | None
    pooling: str
    dtype: str
    patch_features: str | None


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Features of a corpus of images, written as Parquet.")
    parser.add_argument("--model", required=True, help="model repo: a folder or an id on the Hub")
    parser.add_argument(
        "--input", required=True, help="images, .parquet or WebDataset .tar: a folder, file, glob or URL"
    )
    parser.add_argument("--output", required=True, help="folder or URL for the Parquet files; run again to resume")
    parser.add_argument("--address", help="Ray cluster to run on, such as auto; by default Ray is started here")
    parser.add_argument("--num-workers", type=int, help="copies of the model; by default one per GPU, or one")
    parser.add_argument("--pooling", choices=["head", "mean"], help="by default the model's head where it has one")
    parser.add_argument(
        "--patch-features", choices=["float16", "bfloat16"], help="also write the feature of each patch"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the model")
    parser.add_argument(
        "--patches-per-batch", type=int, default=16384, help="most patches encoded at once (%(default)s)"
    )
    parser.add_argument("--rows-per-file", type=int, help="default: 1024, or 128 with --patch-features")
    parser.add_argument("--image-column", default="image", help="of Parquet input (%(default)s)")
    parser.add_argument("--id-column", help="of Parquet input, with unique values; by default FILE#ROW is the id")
    arguments = parser.parse_args()
    for name in ("num_workers", "patches_per_batch", "rows_per_file"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    return arguments


def local_class(name: str, folder: str) -> Any:
    """A class of this repo's code: never that of the model repo, which only gives weights and settings."""
    os.makedirs(HF_MODULES_CACHE, exist_ok=True)
    # Workers start together, and transformers copies the files without a lock.
    with FileLock(os.path.join(HF_MODULES_CACHE, ".aimv2_packing.lock")):
        return get_class_from_dynamic_module(name, folder)


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".encode("utf-8", "backslashreplace").decode()


def printable(name: str) -> str:
    """A file name as valid UTF-8, which Linux and tar do not promise."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


class DoneIds:
    """A set of ids as 16 bytes each, which all workers of a machine share: the ids of a corpus fill its memory."""

    def __init__(self, ids: Iterable[str]):
        digests = b"".join(self.digest(id_) for id_ in ids)
        self.sorted = np.sort(np.frombuffer(digests, dtype="S16"))

    @staticmethod
    def digest(id_: str) -> bytes:
        """96 bits, as text: NumPy drops zeros at the end of bytes."""
        return base64.b64encode(hashlib.blake2b(id_.encode(), digest_size=12).digest())

    def __contains__(self, id_: str) -> bool:
        digest = self.digest(id_)
        index = np.searchsorted(self.sorted, digest)
        return bool(index < len(self.sorted) and self.sorted[index] == digest)

    def __len__(self) -> int:
        return len(self.sorted)


def list_input(location: str) -> tuple[str, list[tuple[str, str]]]:
    """
    The kind (`"image"`, `"archive"` or `"parquet"`) and the sorted `(path, name)` of all files of the input. The name
    is the path below the input, so that ids do not depend on where the input is mounted.

    Raises:
        FileNotFoundError: there is no image, archive or Parquet file.
        ValueError: there is more than one kind.
    """
    fs, path = fsspec.core.url_to_fs(location)
    is_folder = fs.isdir(path)
    root = path if is_folder else os.path.dirname(re.split(r"[*?\[]", path)[0])
    kinds: dict[str, list[str]] = {}
    for file in sorted(fs.find(path) if is_folder or fs.exists(path) else fs.glob(path)):
        suffixes = PurePosixPath(file.lower()).suffixes
        if suffixes[-1:] == [".parquet"]:
            kinds.setdefault("parquet", []).append(file)
        elif suffixes[-1:] in ([".tar"], [".tgz"]) or suffixes[-2:-1] == [".tar"]:
            kinds.setdefault("archive", []).append(file)
        elif is_image(file):
            kinds.setdefault("image", []).append(file)
    if not kinds:
        raise FileNotFoundError(f"`--input` must hold images, .parquet or .tar files, got {location}, which has none.")
    if len(kinds) > 1:
        counts = ", ".join(f"{len(files)} {kind}" for kind, files in kinds.items())
        raise ValueError(f"`--input` must hold one kind of file, got {counts} files in {location}: give a glob.")
    kind, files = kinds.popitem()
    return kind, [(file, printable(os.path.relpath(file, root))) for file in files]


def is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


# The readers give (id, function that returns the bytes of the image), so that what is done is not read again.
Entry = tuple[str, Callable[[], bytes]]


def read_image(fs: fsspec.AbstractFileSystem, path: str, name: str, settings: Settings) -> Iterator[Entry]:
    yield name, lambda: fs.cat_file(path)


def read_archive(fs: fsspec.AbstractFileSystem, path: str, name: str, settings: Settings) -> Iterator[Entry]:
    seen: Counter[str] = Counter()
    with fs.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r|*") as archive:
        for member in archive:
            if member.isfile() and is_image(member.name):
                seen[member.name] += 1
                # tar allows two files of one name.
                copy = f"#{seen[member.name]}" if seen[member.name] > 1 else ""
                yield f"{name}/{printable(member.name)}{copy}", partial(read_member, archive, member)


def read_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    return file.read() if file else b""


def read_parquet(fs: fsspec.AbstractFileSystem, path: str, name: str, settings: Settings) -> Iterator[Entry]:
    columns = [settings.image_column] + ([settings.id_column] if settings.id_column else [])
    with fs.open(path, "rb") as file:
        row = 0
        for batch in pq.ParquetFile(file).iter_batches(batch_size=FILES_PER_BLOCK, columns=columns):
            for index in range(len(batch)):
                id_ = str(batch[settings.id_column][index].as_py()) if settings.id_column else f"{name}#{row}"
                yield id_, partial(read_value, batch[settings.image_column][index])
                row += 1


def read_value(value: pa.Scalar) -> bytes:
    """The bytes of a binary value, or of the `{"bytes", "path"}` that the datasets library writes."""
    data = value.as_py()
    data = data.get("bytes") if isinstance(data, dict) else data
    if not isinstance(data, bytes):
        raise ValueError(f"the image must be bytes, got {type(data).__name__}")
    return data


READERS = {"image": read_image, "archive": read_archive, "parquet": read_parquet}


def read(files: pa.Table, kind: str, settings: Settings, done: DoneIds) -> Iterator[pa.Table]:
    """Ray Data stage: files of the input to `IMAGE_SCHEMA`, less the rows that are done."""
    fs, _ = fsspec.core.url_to_fs(settings.input)
    rows: list[tuple] = []
    size = 0
    for path, name in zip(files["path"].to_pylist(), files["name"].to_pylist(), strict=True):
        try:
            for id_, load in READERS[kind](fs, os.fsdecode(path), name, settings):
                if id_ in done:
                    continue
                try:
                    rows.append((id_, None, load()))
                    size += len(rows[-1][2])
                except (OSError, ValueError, tarfile.TarError) as error:
                    rows.append((id_, describe(error), None))
                if size > BYTES_PER_BLOCK or len(rows) == FILES_PER_BLOCK:
                    yield table_of(rows, IMAGE_SCHEMA)
                    rows, size = [], 0
        # What decompresses and parses an archive raises more than OSError.
        except Exception as error:
            if name not in done:
                rows.append((name, describe(error), None))
    yield table_of(rows, IMAGE_SCHEMA)


def table_of(rows: list[tuple], schema: pa.Schema) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else [[] for _ in schema]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)


class Preprocessor:
    """Ray Data stage: `IMAGE_SCHEMA` to `PATCH_SCHEMA`, patches as bytes in the dtype of the model."""

    def __init__(self, settings: Settings):
        torch.set_num_threads(1)
        self.processor = load_processor(settings.model, os.getcwd())
        self.dtype = getattr(torch, settings.dtype)

    def __call__(self, images: pa.Table) -> Iterator[pa.Table]:
        rows: list[tuple] = []
        size = 0
        for row in images.to_pylist():
            rows.append(self.preprocess(**row))
            size += len(rows[-1][3] or b"")
            if size > BYTES_PER_BLOCK:
                yield table_of(rows, PATCH_SCHEMA)
                rows, size = [], 0
        yield table_of(rows, PATCH_SCHEMA)

    def preprocess(self, id: str, error: str | None, image: bytes | None) -> tuple:
        if image is None:
            return id, error, None, None
        try:
            with Image.open(io.BytesIO(image)) as opened:
                features = self.processor(opened, return_tensors="pt")
        # The decoders of PIL raise anything on a broken file.
        except Exception as failure:
            return id, describe(failure), None, None
        patches = features["hidden_states"].to(self.dtype).view(torch.uint8).numpy().tobytes()
        return id, None, features["grid_thw"][0].tolist(), patches


def output_schema(hidden_size: int, settings: Settings) -> pa.Schema:
    fields = [
        pa.field("id", pa.string()),
        pa.field("error", pa.string()),
        pa.field("grid_thw", pa.list_(pa.int64())),
        pa.field("embedding", pa.list_(pa.float32(), hidden_size)),
    ]
    if settings.patch_features:
        # Arrow has no bfloat16, and lists of half floats are slow to read and write.
        dtype = {"dtype": settings.patch_features, "shape": f"(t, h, w, {hidden_size})"}
        fields.append(pa.field("patch_features", pa.large_binary(), metadata=dtype))
    return pa.schema(fields)


class Encoder:
    """Ray Data stage: `PATCH_SCHEMA` to rows of the output, one copy of the model per GPU or share of the CPUs."""

    def __init__(self, settings: Settings, patches_per_batch: int, num_threads: int):
        torch.set_num_threads(num_threads)
        # Arrow's memory is read-only, and only read.
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        disable_progress_bar()
        self.settings = settings
        self.patches_per_batch = patches_per_batch
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_model(settings.model, os.getcwd(), settings.dtype).to(self.device)
        self.sampler_class = local_class("batching_aimv2_packing.PatchBudgetBatchSampler", os.getcwd())
        self.schema = output_schema(self.model.config.hidden_size, settings)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        failed = table.filter(table["error"].is_valid()).select(["id", "error", "grid_thw"])
        nulls = [pa.nulls(len(failed), field.type) for field in self.schema][3:]
        yield pa.Table.from_arrays([*failed.columns, *nulls], schema=self.schema)

        table = table.filter(table["error"].is_null()).combine_chunks()
        if not len(table):
            return
        # Arrow lays binary values end to end: the column is packed already.
        patches = pa.concat_arrays(table["patches"].chunks)
        offsets = torch.frombuffer(patches.buffers()[1], dtype=torch.int64)[patches.offset :]
        values = torch.frombuffer(patches.buffers()[2], dtype=getattr(torch, self.settings.dtype))
        grids = torch.tensor(table["grid_thw"].to_pylist())
        lengths = grids.prod(1)
        previous = None
        for indices in self.sampler_class(lengths.tolist(), self.patches_per_batch):
            batch = slice(indices[0], indices[-1] + 1)
            start, stop = (int(offsets[i]) // values.element_size() for i in (batch.start, batch.stop))
            hidden_states = values[start:stop].view(int(lengths[batch].sum()), -1)
            # The device works on this batch while the one before becomes a table.
            current = table[batch.start : batch.stop], lengths[batch], self.encode(hidden_states, grids[batch])
            if previous:
                yield self.to_table(*previous)
            previous = current
        if previous:
            yield self.to_table(*previous)

    @torch.inference_mode()
    def encode(self, hidden_states: torch.Tensor, grids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        output = self.model(hidden_states.to(self.device), grids)
        embeddings = output.pooler_output
        if self.settings.pooling == "mean":
            lengths = grids.prod(1).to(self.device)
            embeddings = torch.segment_reduce(output.last_hidden_state.float(), "mean", lengths=lengths)
        features = None
        if self.settings.patch_features:
            features = output.last_hidden_state.to(getattr(torch, self.settings.patch_features))
        return embeddings.float(), features

    def to_table(self, rows: pa.Table, lengths: torch.Tensor, outputs: tuple) -> pa.Table:
        embeddings, features = outputs
        values = pa.array(embeddings.cpu().numpy().reshape(-1))
        arrays = [pa.FixedSizeListArray.from_arrays(values, embeddings.shape[1])]
        if features is not None:
            parts = features.cpu().view(torch.uint8).split(lengths.tolist())
            arrays.append(pa.array([part.numpy().tobytes() for part in parts], pa.large_binary()))
        columns = rows.select(["id", "error", "grid_thw"]).columns
        return pa.Table.from_arrays([*columns, *arrays], schema=self.schema)


def write(table: pa.Table, folder: str) -> pa.Table:
    """Ray Data stage: rows of the output to one file that is not yet part of it, and what is in the file."""
    fs, path = fsspec.core.url_to_fs(folder)
    name = f"{uuid.uuid4().hex}.parquet"
    with fs.open(f"{path}/{UNFINISHED}/{name}", "wb") as file:
        # No value comes twice: a dictionary of them takes an eighth more.
        pq.write_table(table, file, use_dictionary=False)
    grids = np.array(table["grid_thw"].drop_null().to_pylist(), dtype=np.int64).reshape(-1, 3)
    errors = len(table) - table["error"].null_count
    summary = {"file": name, "images": len(table), "errors": errors, "patches": int(grids.prod(1).sum())}
    return pa.Table.from_pylist([summary])


def load_model(model: str, code: str, dtype: str):
    model_class = local_class("modeling_aimv2_packing.Aimv2PackingModel", code)
    return model_class.from_pretrained(model, dtype=getattr(torch, dtype)).eval()


def load_processor(model: str, code: str):
    processor_class = local_class("image_processing_aimv2_packing.Aimv2PackingImageProcessor", code)
    return processor_class.from_pretrained(model)


def read_done(fs: fsspec.AbstractFileSystem, path: str) -> DoneIds:
    """
    The ids of all rows of the output.

    Raises:
        ValueError: a file of the output cannot be read.
    """
    ids: list[str] = []
    for file in fs.glob(f"{path}/*.parquet"):
        try:
            with fs.open(file, "rb") as opened:
                ids += pq.read_table(opened, columns=["id"])["id"].to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{file} of `--output` cannot be read ({error}): delete it to redo its rows.") from error
    return DoneIds(ids)


def check_settings(fs: fsspec.AbstractFileSystem, path: str, settings: Settings) -> None:
    """
    Notes the settings in a new output.

    Raises:
        ValueError: the output holds rows that were made with others.
    """
    file = f"{path}/{SETTINGS}"
    if not fs.exists(file):
        fs.pipe_file(f"{path}/{UNFINISHED}/{SETTINGS}", json.dumps(asdict(settings), indent=2).encode())
        fs.mv(f"{path}/{UNFINISHED}/{SETTINGS}", file)
        return
    for name, value in json.loads(fs.cat_file(file)).items():
        if value != getattr(settings, name):
            raise ValueError(
                f"`--output` {path} was begun with {name}={value!r}, got {getattr(settings, name)!r}: give the same "
                "arguments, or another output."
            )


def remove_unfinished(fs: fsspec.AbstractFileSystem, path: str) -> None:
    # An object store has no empty folders.
    if fs.exists(f"{path}/{UNFINISHED}"):
        fs.rm(f"{path}/{UNFINISHED}", recursive=True)


def count_rows(fs: fsspec.AbstractFileSystem, files: list[str], settings: Settings) -> int:
    """
    Rows of the Parquet files of the input.

    Raises:
        ValueError: a column is missing, or an id is missing or occurs twice.
    """
    dataset = pyarrow.dataset.dataset(files, filesystem=fs, format="parquet")
    for column in (settings.image_column, settings.id_column):
        if column and column not in dataset.schema.names:
            raise ValueError(f"The Parquet files must have a column {column!r}, got {dataset.schema.names}.")
    rows = dataset.count_rows()
    if settings.id_column:
        ids = dataset.to_table(columns=[settings.id_column])[settings.id_column]
        if ids.null_count or pc.count_distinct(ids).as_py() != rows:
            raise ValueError(f"`--id-column` {settings.id_column!r} must hold a different value in each row.")
    return rows


def start_ray(address: str | None) -> None:
    """Connects to the cluster, or starts Ray here, and gives the workers this repo's code as their working folder."""
    with tempfile.TemporaryDirectory() as code:
        for file in CODE.glob("*_aimv2_packing.py"):
            shutil.copy(file, code)
        runtime_env = {"working_dir": code}
        options = {"address": address} if address else {"address": "local", "num_cpus": max(2, os.cpu_count() or 1)}
        ray.init(**options, runtime_env=runtime_env, logging_level="error", include_dashboard=False)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def features(
    kind: str,
    files: list[tuple[str, str]],
    done: DoneIds,
    output: str,
    settings: Settings,
    arguments: argparse.Namespace,
) -> ray.data.Dataset:
    """The stages as a dataset whose rows say what each finished file holds."""
    resources = ray.cluster_resources()
    cpus, gpus = int(resources["CPU"]), int(resources.get("GPU", 0))
    num_workers = arguments.num_workers or gpus or 1
    if gpus and num_workers > gpus:
        raise ValueError(f"`--num-workers` must be at most the number of GPUs, {gpus}, got {num_workers}.")
    # Actors keep their shares of the CPUs; a whole one must stay free, for Ray's repartition, or nothing is written
    # before all is encoded. The shares only guide Ray: they limit no threads.
    share = min(1.0, cpus / 8)
    encoder = {"num_gpus": 1, "num_cpus": share} if gpus else {"num_cpus": cpus / 4 / num_workers}
    preprocessors = max(1, int((cpus - num_workers * encoder["num_cpus"] - 1 - share) / share))
    rows_per_file = arguments.rows_per_file or (128 if settings.patch_features else 1024)

    per_block = 1 if kind != "image" else max(1, min(FILES_PER_BLOCK, len(files) // (4 * num_workers)))
    blocks = [
        pa.table({"path": [os.fsencode(path) for path, _ in part], "name": [name for _, name in part]})
        for part in (files[i : i + per_block] for i in range(0, len(files), per_block))
    ]
    return (
        ray.data.from_arrow(blocks)
        .map_batches(
            read,
            batch_size=None,
            batch_format="pyarrow",
            fn_kwargs={"kind": kind, "settings": settings, "done": done},
            num_cpus=share / 2,
        )
        .map_batches(
            Preprocessor,
            batch_size=None,
            batch_format="pyarrow",
            fn_constructor_args=(settings,),
            concurrency=(1, preprocessors),
            num_cpus=share,
        )
        .map_batches(
            Encoder,
            batch_size=None,
            batch_format="pyarrow",
            fn_constructor_args=(settings, arguments.patches_per_batch, max(1, cpus // num_workers)),
            concurrency=num_workers,
            **encoder,
        )
        .repartition(target_num_rows_per_block=rows_per_file, strict=True)
        .map_batches(
            write,
            batch_size=None,
            batch_format="pyarrow",
            fn_args=(output,),
            num_cpus=share / 2,
        )
    )


def run(arguments: argparse.Namespace) -> None:
    """
    Encodes what is missing in the output.

    Raises:
        FileNotFoundError: the input holds nothing.
        ValueError: an argument does not fit the model, the input or what is in the output, or another run is writing
            to the output.
        RuntimeError: the output has not one row for each image, because the input has changed.
    """
    kind, files = list_input(arguments.input)
    input_fs, input_path = fsspec.core.url_to_fs(arguments.input)
    fs, output = fsspec.core.url_to_fs(arguments.output)
    model = os.path.abspath(arguments.model) if os.path.isdir(arguments.model) else arguments.model
    config = local_class("configuration_aimv2_packing.Aimv2PackingConfig", str(CODE)).from_pretrained(model)
    if arguments.pooling == "head" and not config.use_head:
        raise ValueError(f"`--pooling head` needs a model with a head, got {model}, which has none: give mean.")
    # An image processor that cannot be loaded is an error here, not in a worker.
    processor = load_processor(model, str(CODE))
    side = (processor.image_size or 0) // processor.patch_size
    largest = side**2 or processor.max_patches
    if arguments.patches_per_batch < largest:
        raise ValueError(
            "`--patches-per-batch` must hold any image, and the image processor makes at most "
            f"{largest} patches of one, got {arguments.patches_per_batch}."
        )
    settings = Settings(
        model=model,
        input=input_fs.unstrip_protocol(input_path),
        image_column=arguments.image_column,
        id_column=arguments.id_column,
        pooling=arguments.pooling or ("head" if config.use_head else "mean"),
        dtype=arguments.dtype,
        patch_features=arguments.patch_features,
    )
    total = len(files) if kind == "image" else None
    if kind == "parquet":
        total = count_rows(input_fs, [path for path, _ in files], settings)

    with ExitStack() as stack:
        fs.makedirs(f"{output}/{UNFINISHED}", exist_ok=True)
        if isinstance(fs, LocalFileSystem):
            try:
                stack.enter_context(FileLock(f"{output}/{LOCK}", blocking=False))
            except Timeout as error:
                raise ValueError(f"`--output` {output} is being written by another run.") from error
        stack.callback(remove_unfinished, fs, output)
        check_settings(fs, output, settings)
        done = read_done(fs, output)
        if len(done) == total:
            print(f"All {total} images were done before.")
            return

        stack.callback(ray.shutdown)
        start_ray(arguments.address)
        images, patches, errors, start = 0, 0, 0, time.perf_counter()
        progress = stack.enter_context(tqdm(total=total, initial=len(done), unit=" images", smoothing=0.1))
        dataset = features(kind, files, done, fs.unstrip_protocol(output), settings, arguments)
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for summary in batch.to_pylist():
                # Only here does a file become part of the output, so what a killed run leaves behind never does.
                fs.mv(f"{output}/{UNFINISHED}/{summary['file']}", f"{output}/{summary['file']}")
                images += summary["images"]
                patches += summary["patches"]
                errors += summary["errors"]
                progress.set_postfix_str(f"{patches / (time.perf_counter() - start):.0f} patches/s", refresh=False)
                progress.update(summary["images"])
        seconds = time.perf_counter() - start
    print(
        f"{images} images, {patches} patches in {seconds:.1f} s: {images / seconds:.1f} images/s, "
        f"{patches / seconds:.0f} patches/s. {errors} could not be decoded. {len(done)} were done before."
    )
    if total is not None and len(done) + images != total:
        raise RuntimeError(f"The output has {len(done) + images} rows for {total} images: the input has changed.")


def main() -> None:
    try:
        run(parse_arguments())
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"extract_features.py: {error}")


if __name__ == "__main__":
    main()
