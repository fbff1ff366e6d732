# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""A run: what it is to do is decided before anything starts, and what it did is said at the end."""

import os
from dataclasses import asdict
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from PIL import Image

from conversion.local_code import CODE_FOLDER, local_class
from corpus import in_process
from corpus.ids import IdSet
from corpus.inputs import Corpus, corpus_of
from corpus.interrupts import Interrupts
from corpus.job import Job
from corpus.models import device_of, load_processor, model_folder
from corpus.options import Options
from corpus.output import SKIPPED, Output
from corpus.progress import Progress, Summary, skipped_lines
from corpus.settings import Settings, code_hash, config_of, processor_of, weights_of
from corpus.sink import Sink
from corpus.stages import check_pooling


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
    output = Output(options.output)
    job, corpus = plan(options)
    with Interrupts() as interrupts, output.opened():
        note_settings(output, job, corpus, options)
        output.write_skipped(corpus.skipped)
        done, retried, elsewhere, failed = done_of(output, corpus, options.retry_errors)
        if elsewhere:
            print(f"{elsewhere:,} rows of the output are of images that are not in the input; they are kept.")
        parts = corpus.parts
        if corpus.kind == "image":
            parts = [part for part in parts if part.name not in done][: options.limit]
        missing = None if corpus.total is None else corpus.total - len(done)
        skipped = skipped_lines(corpus.skipped, f"{options.output.rstrip('/')}/{SKIPPED}")
        if missing == 0:
            print(f"All {corpus.total:,} images were done before.")
        else:
            # None where the members of archives are not counted.
            wanted = min((number for number in (missing, options.limit) if number is not None), default=None)
            summary = Summary()
            progress = Progress(wanted, 0) if options.limit else Progress(corpus.total, len(done))
            seconds = options.flush_minutes * 60
            sink = Sink(output, retried, options.rows_per_file, seconds, progress, summary, options.limit)
            try:
                engine.encode(job, corpus.kind, parts, done, options, sink, interrupts)
            finally:
                progress.close()
                print(f"{summary.images:,} images, {summary.patches:,} patches; {progress.rate()}")
                print("\n".join([*summary.lines(), f"{len(done):,} were done before."]))
            if missing is not None and wanted is not None and summary.images < wanted:
                raise RuntimeError(
                    f"{wanted - summary.images:,} images of the input have no row, because the input has changed or a "
                    "worker was lost: run again."
                )
        if failed and not options.retry_errors:
            print(f"{failed:,} rows from before hold an error; --retry-errors tries them again.")
        if skipped:
            print("\n".join(skipped))


def plan(options: Options) -> tuple[Job, Corpus]:
    """
    What is to be done, with everything checked that does not need the output.

    Raises:
        OSError: there is no input, or no image processor.
        ValueError: an argument does not fit the model or the input.
    """
    folder, commit = model_folder(options.model, options.revision)
    config = local_class("configuration_aimv2_packing.Aimv2PackingConfig").from_pretrained(folder)
    pooling = check_pooling(options.pooling, options.model, config_of(folder), config.use_head)
    processor = load_processor(folder, options.max_patches, options.image_size)
    # Settings that do not fit each other show when it is used.
    processor(Image.new("RGB", (processor.patch_size, processor.patch_size)))
    side = (processor.image_size or 0) // processor.patch_size
    largest = side**2 or processor.max_patches
    patches_per_batch = options.patches_per_batch or max(
        largest, PATCHES_ON_CPU if device_of(options.device) == "cpu" and not options.address else PATCHES_ON_GPU
    )
    if patches_per_batch < largest:
        raise ValueError(
            "`--patches-per-batch` must hold any image, and the image processor makes at most "
            f"{largest} patches of one, got {patches_per_batch}."
        )
    # Workers have other working folders.
    inputs = tuple(location if ":" in location else os.path.abspath(location) for location in options.input)
    formats = tuple(local_class("image_processing_aimv2_packing.image_formats")())
    corpus = corpus_of(inputs, options.output, formats, options.image_column, options.id_column)
    is_parquet = corpus.kind == "parquet"
    settings = Settings(
        weights=weights_of(folder),
        config=config_of(folder),
        processor=processor_of(processor),
        dtype=options.dtype,
        pooling=pooling,
        patch_features=options.patch_features,
        image_column=options.image_column if is_parquet else None,
        id_column=options.id_column if is_parquet else None,
    )
    job = Job(
        model=folder if commit is None else options.model,
        revision=commit,
        inputs=inputs,
        max_patches=options.max_patches,
        image_size=options.image_size,
        patches_per_batch=patches_per_batch,
        image_formats=formats,
        settings=settings,
    )
    return job, corpus


def note_settings(output: Output, job: Job, corpus: Corpus, options: Options) -> None:
    """
    Notes in the output what its rows are made with.

    Raises:
        ValueError: it holds rows that were made with something else.
    """
    record = output.record()
    begun = {
        "model": options.model,
        "commit": job.revision,
        "input": list(job.inputs),
        "code": code_hash(CODE_FOLDER),
    }
    if output.files():
        if record is None:
            raise ValueError(
                f"`--output` {options.output} holds Parquet files but no record of what they were made with: give "
                "another output."
            )
        if "weights" not in record:
            check_old_record(record, job.settings, options)
        elif found := job.settings.differences(record):
            was = record["begun"]
            commit = f" at commit {was['commit']}" if was["commit"] else ""
            raise ValueError(
                f"`--output` {options.output} was begun with {was['model']}{commit}, and its rows were made with "
                f"something else: {'; '.join(found)}. Give what it was begun with, or another output."
            )
        else:
            was = record["begun"]
            if was["code"] != begun["code"]:
                print("The code has changed since this output was begun or last resumed; the rows there are kept.")
            if was["input"] != begun["input"]:
                print(
                    f"This output was last given --input {' '.join(was['input'])}; its ids are taken for those of this "
                    "input."
                )
    new = {**asdict(job.settings), "begun": begun}
    if record != new:
        output.write_record(new)


def check_old_record(record: dict[str, Any], settings: Settings, options: Options) -> None:
    """
    Compares with a record that names the model and not its content.

    Raises:
        ValueError: what can be compared differs.
    """
    names = ["dtype", "pooling", "patch_features"]
    if settings.image_column:
        names += ["image_column", "id_column"]
    now = {name: getattr(settings, name) for name in names} | {"model": options.model}
    was = {**record, "model": record["model"]}
    if os.path.isdir(options.model):
        now["model"] = os.path.abspath(options.model)
    for name, value in now.items():
        if was.get(name) != value:
            raise ValueError(
                f"`--output` {options.output} was begun with {name}={was.get(name)!r}, got {value!r}, by a version "
                "that recorded no more: give the same, or another output."
            )
    print(
        "This output was begun by a version that did not record the weights and the image processor: they are taken to "
        "be those of the model now."
    )


def done_of(output: Output, corpus: Corpus, retry_errors: bool) -> tuple[IdSet, dict[str, str], int, int]:
    """
    The ids of the input that are done, the files of the error rows that are to be tried again, and how many rows are of
    no image of the input, and of one that holds an error.
    """
    retried: dict[str, str] = {}
    elsewhere = failed = 0

    def done() -> Any:
        nonlocal elsewhere, failed
        for file, id_, error in output.rows():
            if not corpus.holds(id_):
                elsewhere += 1
                continue
            failed += error is not None
            if error is not None and retry_errors:
                retried[id_] = file
            else:
                yield id_

    ids = IdSet(done())
    return ids, retried, elsewhere, failed
