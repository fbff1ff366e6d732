# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""A run: what it is to do is decided before anything starts, and what it did is said at the end."""

import os
from dataclasses import asdict
from importlib import import_module
from types import ModuleType
from typing import Any

import pyarrow as pa
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image

from conversion.local_code import CODE_FOLDER, local_class
from conversion.messages import printable, say, without_credentials
from corpus import in_process
from corpus.done import changed_line, done_of, note_redone
from corpus.inputs import Corpus, corpus_of, has_image_name
from corpus.interrupts import Interrupts
from corpus.models import device_of, load_processor, model_folder
from corpus.options import Options
from corpus.output import SKIPPED, Output
from corpus.progress import Progress, Summary, skipped_lines
from corpus.rows import OUR_COLUMNS
from corpus.settings import Job, Settings, code_hash, config_of, processor_of, weights_of
from corpus.shards import keep_shard, mark_complete, output_of, passed_over, recorded_shard, unmark
from corpus.sink import Sink
from corpus.stages import check_pooling
from corpus.tables import add_rows


# Of a batch by default: what fills a GPU, and on a CPU what comes soon.
PATCHES_ON_GPU = 16384
PATCHES_ON_CPU = 4096


def run(options: Options) -> None:
    """
    Encodes what is missing in the output.

    Raises:
        ImportError: the engine that is asked for is not installed.
        KeyboardInterrupt: the run was interrupted.
        OSError: the input holds nothing or is gone, or the output cannot be written.
        ValueError: an argument does not fit the model, the input or what is in the output, or another run is writing
            to the output.
        RuntimeError: an image of the input has no row at the end, because the input has changed.
    """
    engine: ModuleType = in_process
    if options.address or options.num_workers or (options.device is None and torch.cuda.device_count() > 1):
        # Or what still runs when a failed run ends would start Ray once more.
        os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
        engine = import_module("corpus.on_ray")
    if engine is not in_process and options.device not in (None, "cpu", "cuda"):
        raise ValueError(
            "`--device` must be cuda or cpu with `--num-workers` or `--address`, where each worker has one of its own, "
            f"got {options.device}."
        )
    for name, locations in (("input", options.input), ("output", [options.output])):
        # Which would be the working folder.
        if "" in locations:
            raise ValueError(f"`--{name}` must be a folder, a file or a URL, got ''.")
    output = output_of(options.output, options.num_shards, options.shard_index)
    job, corpus = plan(options)
    if options.num_shards is not None and not output.files() and (other := recorded_shard(options.output)):
        check_settings(job, *other)
    with Interrupts() as interrupts, output.opened():
        note_settings(output, job, corpus, options)
        output.write_skipped(corpus.skipped)
        done = done_of(output, corpus, options.retry_errors, options.redo_changed)
        if done.elsewhere:
            say(f"{done.elsewhere:,} rows of the output are of images that are not in the input; they are kept.")
        if done.changed:
            say(changed_line(done, options.redo_changed))
        parts = corpus.parts
        if corpus.kind == "image":
            parts = [part for part in parts if part.name not in done.ids][: options.limit]
        missing = None if corpus.total is None else corpus.total - len(done.ids)
        skipped = skipped_lines(corpus.skipped, f"{output.shown.rstrip('/')}/{SKIPPED}")
        is_shard, is_complete = options.num_shards is not None, True
        if missing == 0 or not parts:
            say(f"All {corpus.total or 0:,} images were done before.")
        else:
            # None where the members of archives are not counted.
            wanted = min((number for number in (missing, options.limit) if number is not None), default=None)
            summary = Summary()
            total, before = (wanted, 0) if options.limit else (corpus.total, len(done.ids))
            progress = Progress(total, before, corpus.position())
            seconds = options.flush_minutes * 60
            sink = Sink(output, done.retried, options.rows_per_file, seconds, progress, summary, options.limit)
            is_complete = False
            if is_shard:
                unmark(output)
            passed = passed_over(corpus, done.ids, options.num_shards, options.shard_index)
            try:
                engine.encode(job, corpus.kind, parts, passed, options, sink, interrupts)
                is_complete = not sink.is_full()
            finally:
                progress.close()
                if options.retry_errors or options.redo_changed:
                    note_redone(output, corpus, done, is_complete)
                say(f"{summary.images:,} images, {summary.patches:,} patches; {progress.rate()}")
                say(*summary.lines(), f"{len(done.ids):,} were done before.")
            if missing is not None and wanted is not None and summary.images < wanted:
                raise RuntimeError(
                    f"{wanted - summary.images:,} images of the input have no row, because the input has changed or a "
                    "worker was lost: run again."
                )
        if is_shard and is_complete:
            mark_complete(output)
        if done.failed and not options.retry_errors:
            say(f"{done.failed:,} rows from before hold an error; --retry-errors tries them again.")
        if skipped:
            say(*skipped)


def plan(options: Options) -> tuple[Job, Corpus]:
    """
    What is to be done, with everything checked that does not need the output.

    Raises:
        OSError: there is no input, or no image processor.
        ValueError: an argument does not fit the model or the input.
    """
    folder, commit = model_folder(options.model, options.revision)
    try:
        config = local_class("configuration_aimv2_packing.Aimv2PackingConfig").from_pretrained(folder)
    except StrictDataclassError as error:
        raise ValueError(f"`--model` {printable(options.model)}: its config.json cannot be used: {error}") from error
    pooling = check_pooling(options.pooling, options.model, config_of(folder), config.use_head)
    processor = load_processor(folder, options.max_patches, options.image_size)
    # Settings that do not fit each other show when it is used.
    processor(Image.new("RGB", (processor.patch_size, processor.patch_size)))
    side = (processor.image_size or 0) // processor.patch_size
    largest = side**2 or processor.max_patches
    patches_per_batch = options.patches_per_batch or max(
        largest, PATCHES_ON_CPU if not options.address and device_of(options.device) == "cpu" else PATCHES_ON_GPU
    )
    if patches_per_batch < largest:
        raise ValueError(
            "`--patches-per-batch` must hold any image, and the image processor makes at most "
            f"{largest} patches of one, got {patches_per_batch}."
        )
    # Workers have other working folders.
    inputs = tuple(location if ":" in location else os.path.abspath(location) for location in options.input)
    formats = tuple(local_class("image_processing_aimv2_packing.image_formats")())
    corpus = corpus_of(inputs, options.output, formats)
    is_parquet = corpus.kind == "parquet"
    for option, given in (("image", options.image_column != Options.image_column), ("id", options.id_column)):
        if given and not is_parquet:
            raise ValueError(
                f"`--{option}-column` is for Parquet files and manifests, got files of kind {corpus.kind}."
            )
    check_keep(options.keep, corpus.kind, formats)
    # Of an archive they are texts.
    keep = pa.schema([(name, pa.string()) for name in options.keep])
    if is_parquet:
        if options.num_shards is not None and options.id_column is None:
            keep_shard(corpus, options.num_shards, options.shard_index or 0)
        # An id may come twice in files of different shards.
        keep = add_rows(corpus, inputs, options.image_column, options.id_column, options.keep)
    if options.num_shards is not None:
        keep_shard(corpus, options.num_shards, options.shard_index or 0)
    settings = Settings(
        weights=weights_of(folder),
        config=config_of(folder),
        processor=processor_of(processor),
        dtype=options.dtype,
        pooling=pooling,
        patch_features=options.patch_features,
        image_column=options.image_column if is_parquet else None,
        id_column=options.id_column if is_parquet else None,
        embedding_dtype=options.embedding_dtype,
        keep={field.name: str(field.type) for field in keep} or None,
    )
    job = Job(
        model=folder if commit is None else options.model,
        revision=commit,
        inputs=inputs,
        max_patches=options.max_patches,
        image_size=options.image_size,
        patches_per_batch=patches_per_batch,
        image_formats=formats,
        max_image_bytes=options.max_image_bytes,
        max_image_pixels=options.max_image_pixels,
        settings=settings,
        keep=keep if options.keep else None,
    )
    return job, corpus


def check_keep(keep: tuple[str, ...], kind: str, formats: tuple[str, ...]) -> None:
    """
    Raises:
        ValueError: names that cannot be columns of the output, or have no meaning for the input.
    """
    if not keep:
        return
    if kind == "image":
        raise ValueError(f"`--keep` needs Parquet files or archives, got {','.join(keep)} with files of images.")
    if taken := {"", *OUR_COLUMNS}.intersection(keep):
        raise ValueError(f"`--keep` must not name columns of the output itself, got {min(taken)!r}.")
    if len({*keep}) < len(keep):
        raise ValueError(f"`--keep` must name each column once, got {','.join(keep)}.")
    if kind == "archive" and (
        odd := [name for name in keep if has_image_name(f".{name}", formats) or name.lower() != name]
    ):
        raise ValueError(f"`--keep` names suffixes of texts, in lower case and without the first dot, got {odd[0]!r}.")


def check_settings(job: Job, output: Output, record: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: the rows there were made with something else.
    """
    if found := job.settings.differences(record):
        was = record["begun"]
        commit = f" at commit {was['commit']}" if was["commit"] else ""
        raise ValueError(
            f"`--output` {output.shown} was begun with {was['model']}{commit}, and its rows were made with "
            f"something else: {'; '.join(found)}. Give what it was begun with, or another output."
        )


def note_settings(output: Output, job: Job, corpus: Corpus, options: Options) -> None:
    """
    Notes in the output what its rows are made with.

    Raises:
        ValueError: it holds rows that were made with something else.
    """
    record = output.record()
    begun = {
        "model": job.model,
        "commit": job.revision,
        "input": [without_credentials(location) for location in job.inputs],
        "code": code_hash(CODE_FOLDER),
    }
    if output.files():
        if record is None:
            raise ValueError(
                f"`--output` {output.shown} holds Parquet files but no record of what they were made with: give "
                "another output."
            )
        check_settings(job, output, record)
        was = record["begun"]
        if was["code"] != begun["code"]:
            say("The code has changed since this output was begun or last resumed; the rows there are kept.")
        if was["input"] != begun["input"]:
            before = " ".join(map(printable, was["input"]))
            say(f"This output was last given --input {before}; its ids are taken for those of this input.")
    new = {**asdict(job.settings), "begun": begun}
    if record != new:
        output.write_record(new)
