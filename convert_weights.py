# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
Converts an AIMv2 checkpoint of any layout into a packed model repo, verifies one, and uploads it to the Hub.

    python convert_weights.py apple/aimv2-large-patch14-native aimv2-large-packed --verify
    python convert_weights.py aimv2-large-packed --verify --device cuda --dtype bfloat16
    python convert_weights.py aimv2-large-packed --push-to-hub USER/aimv2-large-packed
"""

import argparse
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import (
    HfApi,
    ModelCard,
    ModelCardData,
    hf_hub_download,
    metadata_load,
    snapshot_download,
    split_state_dict_into_shards_factory,
)
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import httpx, validate_repo_id
from yaml import YAMLError

from atomic_folder import atomic_folder
from checkpoint_layouts import Encoder, find_encoder
from hub_upload import push_to_hub
from safetensors_files import (
    DTYPES,
    choose_weights,
    find_weights,
    read_checkpoint,
    read_json,
    read_weight_map,
    safe_path,
    write_checkpoint,
)
from verification import CODE_FILES, REPO, Report, verify


# By hidden size, intermediate size and number of layers.
RELEASED = {
    (1024, 2816, 24): "Large",
    (1536, 4096, 24): "Huge",
    (2048, 5632, 24): "1B",
    (3072, 8192, 24): "3B",
}
DTYPE_CHOICES = ("float32", "bfloat16", "float16")


@dataclass
class Source:
    """
    An original checkpoint.

    Attributes:
        name (`str`): Hub id with revision, or file or folder name.
        repo_id (`str` or `None`): Its Hub id.
        folder (`Path`): Where its other files are.
        config (`dict`): Content of its `config.json`, or empty.
        encoder (`Encoder`): The AIMv2 encoder in it.
    """

    name: str
    repo_id: str | None
    folder: Path
    config: dict[str, Any]
    encoder: Encoder


def read_source(source: str, revision: str | None = None, prefix: str | None = None) -> Source:
    """
    Finds a checkpoint, downloads it if it is on the Hub, and looks for the AIMv2 encoder in it.

    Args:
        source (`str`): A folder, a `.safetensors` file, an index of such files, or a Hub id.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        prefix (`str`, *optional*): What the names of the encoder's tensors begin with.

    Raises:
        ValueError: there is no such checkpoint, or it is damaged, unsafe or no AIMv2 encoder.
        `huggingface_hub.errors.HfHubHTTPError`: the Hub refuses.
    """
    path = Path(source).expanduser()
    repo_id = None
    name = path.resolve().name
    if not path.exists():
        path, commit = download(source, revision)
        repo_id, name = source, f"{source} at revision {commit}"
    elif revision is not None:
        raise ValueError(f"--revision is for sources on the Hub, but {source} is a local path.")
    weights = find_weights(path)
    folder = path if path.is_dir() else path.parent
    config = read_json(safe_path(folder, "config.json")) if os.path.lexists(folder / "config.json") else {}
    return Source(name, repo_id, folder, config, find_encoder(read_checkpoint(weights), config, prefix))


def download(repo_id: str, revision: str | None) -> tuple[Path, str]:
    """The folder with the weights, configuration, card and licence of a Hub repo, and its commit."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id} is no existing path and no Hub id: {error}") from error
    info = HfApi().model_info(repo_id, revision=revision)
    names = [sibling.rfilename for sibling in info.siblings or []]
    files = [choose_weights(repo_id, names)]
    if files[0].endswith(".json"):
        index = Path(hf_hub_download(repo_id, files[0], revision=info.sha))
        files += sorted(set(read_weight_map(index).values()))
    wanted = [*files, "*.json", "README.md", "LICENSE*", "WEIGHTS_LICENSE*", *(path.name for path in CODE_FILES)]
    return Path(snapshot_download(repo_id, revision=info.sha, allow_patterns=wanted)), str(info.sha)


def convert(
    source: Source,
    output: Path,
    model_id: str,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    verifier: Callable[[Path], Report] | None = None,
) -> None:
    """
    Writes a complete model repo: weights, configuration, image processor, code, licence and card.

    Args:
        source (`Source`): What to convert.
        output (`Path`): The folder to make. It appears once it is complete.
        model_id (`str`): What the card's usage example loads.
        dtype (`torch.dtype`, *optional*): What to cast the weights to; by default they keep theirs.
        max_shard_size (`str`, *optional*, defaults to `"5GB"`): Size of the largest file of weights.
        overwrite (`bool`, *optional*, defaults to `False`): Whether to replace an earlier conversion at `output`.
        verifier (`Callable`, *optional*): Called with the finished folder before it appears at `output`, to verify
            it; what it raises prevents that.

    Raises:
        ValueError: the result does not fit on the disk, or `output` is not to be replaced.
        FileExistsError: `output` exists and may not be replaced.
    """
    encoder = source.encoder
    check_output(output, source.folder, overwrite)
    with atomic_folder(output, overwrite) as folder:
        needed = sum(tensor.nbytes_as(dtype) for tensor in encoder.tensors.values())
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise ValueError(f"{output} needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free there.")
        for name in write_checkpoint(folder, encoder.tensors, dtype, max_shard_size):
            print(f"warning: {name} holds NaN or infinite values.", file=sys.stderr)
        write_configs(folder, encoder, dtype)
        for path in (*CODE_FILES, REPO / "LICENSE"):
            shutil.copyfile(path, folder / path.name)
        for path in source.folder.glob("WEIGHTS_LICENSE*" if is_converted(source.folder) else "LICENSE*"):
            if not path.is_dir():
                name = f"WEIGHTS_{path.name.removeprefix('WEIGHTS_')}"
                shutil.copyfile(safe_path(source.folder, path.name), folder / name)
        report = verifier(folder) if verifier else None
        write_card(folder, source, model_id, dtype, report)


def check_output(output: Path, source: Path, overwrite: bool) -> None:
    """Refuses to write where something else than an earlier conversion would be lost."""
    output, source = output.resolve(), source.resolve()
    if source.is_relative_to(output):
        raise ValueError(f"{output} holds the source: choose another folder for the output.")
    if overwrite and output.exists() and not is_converted(output):
        raise ValueError(f"{output} is no converted model repo: --overwrite does not replace it. Remove it yourself.")


def is_converted(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and read_json(config).get("model_type") == "aimv2_packing"


def write_configs(folder: Path, encoder: Encoder, dtype: torch.dtype | None) -> None:
    """`config.json` and `preprocessor_config.json`: those of this repo, with the encoder's fields."""
    config = encoder.config
    config.architectures = ["Aimv2PackingModel"]
    config.auto_map = read_json(REPO / "config.json")["auto_map"]
    config.dtype = dtype or main_dtype(encoder)
    config.save_pretrained(folder)
    processor = read_json(REPO / "preprocessor_config.json") | {
        "patch_size": config.patch_size,
        "patch_layout": config.patch_layout,
        "image_size": None if config.is_native else config.image_size,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2, sort_keys=True) + "\n")


def main_dtype(encoder: Encoder) -> torch.dtype:
    """The dtype of most of the weights."""
    sizes: Counter[str] = Counter()
    for tensor in encoder.tensors.values():
        sizes[tensor.dtype] += tensor.nbytes_as(None)
    return DTYPES[sizes.most_common(1)[0][0]]


def write_card(folder: Path, source: Source, model_id: str, dtype: torch.dtype | None, report: Report | None) -> None:
    config = source.encoder.config
    licence, licence_text = source_licence(source)
    if any(folder.glob("WEIGHTS_LICENSE*")):
        licence_text += f" (`{next(folder.glob('WEIGHTS_LICENSE*')).name}`)"
    weights_dtype = str(dtype or main_dtype(source.encoder)).removeprefix("torch.")
    parity = (
        "Not measured. To measure it: `python convert_weights.py REPO --verify`, with the converter of the code's repo."
    )
    if report is not None:
        parity = (
            f"Packed against {report.reference}, image by image, in {report.dtype} on {report.device} with "
            f"PyTorch {torch.__version__}; bounds: max diff {report.max_diff_bound:.1e}, min cosine "
            f"{report.min_cosine_bound}.\n\n{report.table()}"
        )
    card = ModelCard.from_template(
        ModelCardData(
            library_name="transformers",
            pipeline_tag="image-feature-extraction",
            base_model=source.repo_id,
            tags=["vision", "aimv2", "feature-extraction", "custom_code"],
            **licence,
        ),
        template_path=str(REPO / "model_card_template.md"),
        model_id=model_id,
        source=source.name,
        cast="" if dtype is None else f", in {weights_dtype}",
        description=describe(source.encoder),
        layout=source.encoder.layout.name,
        config=config,
        positions="2-D sin-cos, any size"
        if config.is_native
        else f"learned at {config.image_size} x {config.image_size} pixels, interpolated elsewhere",
        dtype=weights_dtype,
        parity=parity,
        licence=licence_text,
    )
    card.save(folder / "README.md")


def source_licence(source: Source) -> tuple[dict[str, Any], str]:
    """Fields of the card's front matter, and words, for the licence that the source's own card states."""
    stated: dict[str, Any] = {}
    if (source.folder / "README.md").exists():
        path = safe_path(source.folder, "README.md")
        try:
            data = metadata_load(path) or {}
            names = ("license", "license_name", "license_link")
            stated = {name: data[name] for name in names if isinstance(data.get(name), str)}
        except (ValueError, RecursionError, YAMLError) as error:
            print(f"warning: the card of {source.name} cannot be read: {error}", file=sys.stderr)
    if not stated:
        return {}, f"{source.name} does not state it in a card"
    return stated, ", ".join(f"`{value}`" for value in stated.values())


def describe(encoder: Encoder) -> str:
    """The encoder in a few words: the released model with its geometry, or its sizes."""
    config = encoder.config
    name = RELEASED.get((config.hidden_size, config.intermediate_size, config.num_hidden_layers))
    size = f"AIMv2-{name}" if name else f"AIMv2 of {config.num_hidden_layers} layers of {config.hidden_size}"
    return f"{size}, {'native resolution' if config.is_native else f'{config.image_size} pixels'}"


def print_report(report: Report) -> None:
    print(f"\n{report.model} against {report.reference}, {report.dtype} on {report.device}\n")
    print(report.table())
    print(f"\nBounds: max diff {report.max_diff_bound:.1e}, min cosine {report.min_cosine_bound}.")
    if report.identical_weights is not None:
        print(f"Weights: {'equal, bit by bit' if report.identical_weights else 'NOT those of the reference'}.")
    for note in report.notes:
        print(f"Note: {note}.")
    print(f"Verdict: {'passed' if report.passed else 'FAILED'}.\n")


def shard_size(value: str) -> str:
    try:
        split_state_dict_into_shards_factory(
            {}, get_storage_size=len, filename_pattern="{suffix}", max_shard_size=value
        )
    except (ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(f"must be like 5GB or 500MB: {error}") from error
    return value


def usable_device(value: str) -> str:
    try:
        torch.empty(0, device=value)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{value} cannot be used here: {str(error).splitlines()[0]}") from error
    return value


def existing_file(value: str) -> Path:
    if not Path(value).is_file():
        raise argparse.ArgumentTypeError(f"{value} is no file")
    return Path(value)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="Hub id, folder, .safetensors file or index: any AIMv2 checkpoint")
    parser.add_argument(
        "output_dir", nargs="?", type=Path, help="folder to make; without it, SOURCE is a converted repo"
    )
    group = parser.add_argument_group("converting")
    group.add_argument("--revision", help="branch, tag or commit of SOURCE on the Hub")
    group.add_argument("--prefix", help="what the names of the encoder's tensors begin with, where several fit")
    group.add_argument("--dtype", choices=DTYPE_CHOICES, help="of the weights, and of --verify (default: the source's)")
    group.add_argument("--max-shard-size", type=shard_size, default="5GB", help="of one file of weights (default: 5GB)")
    group.add_argument(
        "--overwrite", action="store_true", help="replace an earlier conversion, once this one is complete"
    )
    group = parser.add_argument_group("verifying")
    group.add_argument(
        "--verify", action="store_true", help="compare with the original model; exit code 1 if it differs"
    )
    group.add_argument("--reference", help="compare with this checkpoint (Hub id, folder or file) instead of SOURCE")
    group.add_argument("--images", nargs="+", type=existing_file, help="default: photographs and ten sizes")
    group.add_argument("--device", type=usable_device, default="cpu", help="where to compare, like cuda (default: cpu)")
    group.add_argument("--report", type=Path, help="write the comparison to this JSON file too")
    group = parser.add_argument_group("uploading")
    group.add_argument("--push-to-hub", metavar="USER/NAME", help="upload the converted repo in one commit")
    group.add_argument("--private", action="store_true", help="make the repo private")
    group.add_argument("--hub-revision", metavar="BRANCH", help="branch to commit to (default: main)")
    options = parser.parse_args(arguments)
    for needed, names in (("verify", ("reference", "images", "report")), ("push_to_hub", ("private", "hub_revision"))):
        for name in names:
            if getattr(options, name) and not getattr(options, needed):
                parser.error(f"--{name.replace('_', '-')} needs --{needed.replace('_', '-')}")
    if options.output_dir is None and not (options.verify or options.push_to_hub):
        parser.error("give OUTPUT_DIR to convert, or --verify or --push-to-hub for a SOURCE that is converted already")
    return options


def run(options: argparse.Namespace) -> None:
    """Does what the command line asks for."""
    dtype = getattr(torch, options.dtype) if options.dtype else None
    source = read_source(options.source, options.revision, options.prefix)
    reference = read_source(options.reference) if options.reference else None
    output: Path | None = options.output_dir
    if output is None and not is_converted(source.folder):
        raise ValueError(f"{options.source} is not converted yet: give an OUTPUT_DIR.")

    def check(folder: Path) -> Report:
        compared = reference or (source if output is not None else None)
        report = verify(
            folder,
            reference=compared.encoder if compared else None,
            reference_name=compared.name if compared else "Aimv2VisionModel with the same weights",
            images=options.images,
            device=options.device,
            dtype=dtype,
        )
        report.model = str(output or options.source)
        print_report(report)
        if options.report:
            options.report.write_text(report.to_json())
        if not report.passed:
            raise ValueError(f"{report.model} differs from {report.reference}.")
        return report

    folder = source.folder
    if output is not None:
        verifier = check if options.verify else None
        model_id = options.push_to_hub or output.resolve().name
        convert(source, output, model_id, dtype, options.max_shard_size, options.overwrite, verifier)
        folder = output
        print(f"Converted {source.name} ({describe(source.encoder)}, {source.encoder.layout.name} layout) to {output}.")
        if dropped := source.encoder.dropped:
            print(f"Left out {len(dropped)} tensors that are no part of the vision encoder ({dropped[0]}, ...).")
    elif options.verify:
        check(folder)
    if options.push_to_hub:
        print(f"Uploaded to {push_to_hub(folder, options.push_to_hub, options.private, options.hub_revision)}")


def main() -> int:
    try:
        run(parse_arguments())
    except (ValueError, OSError, httpx.TransportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
