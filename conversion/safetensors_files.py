# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
Reads and writes safetensors checkpoints, chunk by chunk. The safetensors library checks every header, and
huggingface_hub divides the tensors among files. Three promises keep the copying here: memory stays the same whatever
the size and the dtype (`save_file` needs a whole file's tensors, and a cast makes them anew), a source that shrinks
meanwhile is an error (a mapped one would end the process), and one pass finds the values that are not finite.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from huggingface_hub.utils import tqdm
from safetensors import SafetensorError, safe_open

from .messages import listed


WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Small enough to stay in the processor's cache from reading through checking to writing.
CHUNK_BYTES = 1 << 20
# Above the largest tokenizers and indexes.
MAX_JSON_BYTES = 100 << 20


class StoredTensor(NamedTuple):
    """
    Bytes of a file that hold one tensor, or equal part `part` of `parts` of it along the first dimension.

    Attributes:
        path (`Path`): The safetensors file.
        offset (`int`): Position in the file, in bytes.
        dtype (`str`): The dtype's name in the safetensors format.
        shape (`tuple[int, ...]`): The shape, of the part if it is one.
    """

    path: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    def nbytes_as(self, dtype: torch.dtype | None) -> int:
        """Size in bytes when cast to `dtype`, or as it is."""
        return torch.Size(self.shape).numel() * (dtype or DTYPES[self.dtype]).itemsize

    def part(self, index: int, parts: int) -> "StoredTensor":
        """Equal part `index` of `parts` along the first dimension, which `parts` must divide."""
        part = self._replace(shape=(self.shape[0] // parts, *self.shape[1:]))
        return part._replace(offset=self.offset + index * part.nbytes_as(None))

    def chunks(self, buffer: torch.Tensor) -> Iterator[torch.Tensor]:
        """
        The values in one-dimensional chunks, each read into `buffer` (uint8) over the one before.

        Raises:
            ValueError: the file ends before the tensor does.
        """
        view, left = memoryview(buffer.numpy()), self.nbytes_as(None)
        with self.path.open("rb") as file:
            file.seek(self.offset)
            while left:
                size = min(left, len(view))
                if file.readinto(view[:size]) < size:
                    raise ValueError(f"{self.path} ended while it was read: it has been changed or cut off.")
                left -= size
                yield buffer[:size].view(DTYPES[self.dtype])

    def load(self, dtype: torch.dtype) -> torch.Tensor:
        """The whole tensor in memory, cast to `dtype`."""
        (values,) = self.chunks(torch.empty(self.nbytes_as(None), dtype=torch.uint8))
        return values.to(dtype).view(self.shape)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`, which would silently keep the last of equal keys."""
    result = dict(pairs)
    if len(result) != len(pairs):
        repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"it holds the key {repeated!r} twice")
    return result


def read_json_value(path: Path) -> Any:
    """
    Reads any JSON.

    Raises:
        ValueError: the file is none, repeats a key, is a pipe or a device, or holds more than `MAX_JSON_BYTES`.
        OSError: the file cannot be read.
    """
    # Before it is opened: a pipe would block.
    if not path.is_file() and path.exists():
        raise ValueError(f"{path} is no regular file.")
    with path.open("rb") as file:
        content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"{path} holds more than {MAX_JSON_BYTES} bytes of JSON: refused.")
    try:
        return json.loads(content, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{path} cannot be read as JSON: {reason}.") from error


def read_json(path: Path) -> dict[str, Any]:
    """
    Reads a JSON object.

    Raises:
        ValueError: the file is no JSON object, or repeats a key, or is as [`read_json_value`] says.
        OSError: the file cannot be read.
    """
    value = read_json_value(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}.")
    return value


def read_header(path: Path) -> dict[str, StoredTensor]:
    """
    The tensors of one safetensors file, by name.

    Raises:
        ValueError: the file is cut off, or its header is no JSON, repeats a name, or describes ranges that overlap,
            leave gaps, or do not fit their shape or the file.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(8)
        try:
            # It has checked the header when it is open.
            with safe_open(path, framework="pt"):
                header_bytes = int.from_bytes(start, "little")
                header = json.loads(file.read(header_bytes), object_pairs_hook=unique_keys)
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path} is not an intact safetensors file: {error}.") from error
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(path, 8 + header_bytes + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"]))
        for name, entry in header.items()
    }


def safe_path(folder: Path, name: str) -> Path:
    """
    The path of the file `name` of `folder`.

    Raises:
        ValueError: it is no file, or lies outside `folder`: by an absolute path, by `..`, or by a symbolic link other
            than those of the Hub's cache.
    """
    root, blobs = folder.resolve(), hub_blobs(folder)
    path, parts = folder / name, PurePosixPath(name)
    try:
        target, is_file = path.resolve(), path.is_file()
        inside = target.is_relative_to(root) or (blobs is not None and target.is_relative_to(blobs))
    except (OSError, RuntimeError, ValueError) as error:
        # Links in a circle, and names that are too long or hold characters that no path can.
        raise ValueError(f"{name!r} is no path of a file in {folder}: {error}.") from error
    if parts.is_absolute() or ".." in parts.parts or not inside:
        raise ValueError(f"{name!r} leads out of {folder}: refused.")
    if not is_file:
        raise ValueError(f"{folder} lacks the file {name!r}.")
    return path


def hub_blobs(folder: Path) -> Path | None:
    """Where the links of a folder of the Hub's cache lead, `models--*/snapshots/COMMIT`; `None` for other folders."""
    snapshots = folder.resolve().parent
    is_cache = snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--")
    return snapshots.parent / "blobs" if is_cache else None


def choose_weights(source: Path | str, names: list[str]) -> str:
    """
    Which of the files in `source` holds the weights: a safetensors file, or the index of several.

    Raises:
        ValueError: none does, or more than one and none has the standard name; or the weights are pickled.
    """
    standard = [name for name in (WEIGHTS_NAME, INDEX_NAME) if name in names]
    indexes = [name for name in names if name.endswith(".safetensors.index.json")]
    candidates = standard or indexes or [name for name in names if name.endswith(".safetensors")]
    if len(candidates) > 1:
        raise ValueError(f"{source} holds more than one set of weights: {listed(candidates)}. Name one file.")
    if not candidates:
        raise no_safetensors(source, names)
    return candidates[0]


def find_weights(source: Path) -> Path:
    """
    The safetensors file, or the index of several, that a local `source` is or contains.

    Raises:
        ValueError: as [`choose_weights`], or the file lies outside the folder, or `source` is a pipe or device.
    """
    if source.is_dir():
        return safe_path(source, choose_weights(source, sorted(path.name for path in source.iterdir())))
    choose_weights(source, [source.name])
    if not source.is_file():
        raise ValueError(f"{source} is neither a folder nor a file.")
    return source


def no_safetensors(source: Path | str, names: list[str]) -> ValueError:
    pickles = [name for name in names if Path(name).suffix in PICKLE_SUFFIXES]
    if not pickles:
        return ValueError(f"{source} holds no .safetensors weights: give the folder, the file or the index that does.")
    return ValueError(
        f"{source} holds its weights as pickle ({listed(pickles)}), which can run code when it is read: refused. "
        "Convert them to safetensors first, for example with https://huggingface.co/spaces/safetensors/convert."
    )


def read_weight_map(index: Path) -> dict[str, str]:
    """
    The names of the files of an index, by tensor.

    Raises:
        ValueError: it is no index.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} is no index of safetensors files: `weight_map` must map names to file names.")
    return weight_map


def read_checkpoint(weights: Path) -> dict[str, StoredTensor]:
    """
    All tensors of a safetensors file or of an index of several, by name; no data is read.

    Raises:
        ValueError: a file is missing, damaged or outside the index's folder, or index and files do not agree.
    """
    if weights.suffix != ".json":
        return read_header(weights)
    weight_map = read_weight_map(weights)
    tensors: dict[str, StoredTensor] = {}
    for file_name in sorted(set(weight_map.values())):
        if not file_name.endswith(".safetensors"):
            raise no_safetensors(weights, [file_name])
        header = read_header(safe_path(weights.parent, file_name))
        if twice := sorted(header.keys() & tensors.keys()):
            raise ValueError(f"{weights}: {file_name!r} and another file both hold the tensor {twice[0]!r}.")
        indexed = {name for name, value in weight_map.items() if value == file_name}
        if wrong := sorted(indexed ^ header.keys()):
            raise ValueError(
                f"{weights} and {file_name!r} do not agree on the tensor {wrong[0]!r} and {len(wrong) - 1} more."
            )
        tensors |= header
    return tensors


def main_dtype(tensors: dict[str, StoredTensor]) -> torch.dtype:
    """The dtype of most of the weights."""
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        sizes[tensor.dtype] += tensor.nbytes_as(None)
    return DTYPES[sizes.most_common(1)[0][0]]


def same_tensors(stored: dict[str, StoredTensor], expected: dict[str, StoredTensor], dtype: torch.dtype | None) -> bool:
    """Whether `stored` holds the very bytes that [`write_checkpoint`] makes of `expected`."""
    if stored.keys() != expected.keys():
        return False
    first, second = (torch.empty(CHUNK_BYTES, dtype=torch.uint8) for _ in range(2))
    for name, tensor in expected.items():
        own, target = stored[name], dtype or DTYPES[tensor.dtype]
        if own.shape != tensor.shape or DTYPES[own.dtype] != target:
            return False
        # Chunks of as many values on both sides.
        values = CHUNK_BYTES // 8
        pairs = zip(
            own.chunks(first[: values * target.itemsize]),
            tensor.chunks(second[: values * DTYPES[tensor.dtype].itemsize]),
            strict=True,
        )
        if not all(torch.equal(a.view(torch.uint8), b.to(target).view(torch.uint8)) for a, b in pairs):
            return False
    return True


def write_checkpoint(
    folder: Path, tensors: dict[str, StoredTensor], dtype: torch.dtype | None, max_shard_size: int | str
) -> list[str]:
    """
    Copies tensors into `folder` as `model.safetensors`, or as shards and an index. The same tensors and options give
    the same bytes.

    Args:
        folder (`Path`): An existing folder.
        tensors (`dict[str, StoredTensor]`): What to write, by name, in this order.
        dtype (`torch.dtype`, *optional*): What to cast to; by default each tensor keeps its own.
        max_shard_size (`int` or `str`): In bytes, or like `"5GB"`. A larger tensor gets a file of its own.

    Returns:
        `list[str]`: Names of the tensors that hold NaN or infinite values as written.
    """
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes_as(dtype),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    threads = torch.get_num_threads()
    # Chunks are too small to share out: on a busy machine threads would wait for each other, at ten times the time.
    torch.set_num_threads(1)
    try:
        with tqdm(total=split.metadata["total_size"], unit="B", unit_scale=True, desc="Writing weights") as progress:
            not_finite: list[str] = []
            for file_name, names in split.filename_to_tensors.items():
                part = {name: tensors[name] for name in names}
                not_finite += write_file(folder / file_name, part, dtype, progress)
    finally:
        torch.set_num_threads(threads)
    return not_finite


def write_file(path: Path, tensors: dict[str, StoredTensor], dtype: torch.dtype | None, progress: tqdm) -> list[str]:
    """Writes one file for [`write_checkpoint`], which see, and moves `progress` on by the bytes written."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes_as(dtype)
        dtype_name = tensor.dtype if dtype is None else DTYPE_NAMES[dtype]
        header[name] = {"dtype": dtype_name, "shape": tensor.shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    # The format asks for data that starts at a multiple of 8 bytes.
    encoded += b" " * (-len(encoded) % 8)
    buffer = torch.empty(CHUNK_BYTES, dtype=torch.uint8)
    not_finite = []
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, tensor in tensors.items():
            finite = True
            for chunk in tensor.chunks(buffer):
                values = chunk if dtype is None else chunk.to(dtype)
                # NaN spreads to the minimum and the maximum: one fast pass shows it, and infinity.
                finite = finite and bool(torch.stack(torch.aminmax(values)).isfinite().all())
                file.write(values.view(torch.uint8).numpy())
                progress.update(values.nbytes)
            if not finite:
                not_finite.append(name)
    return not_finite
