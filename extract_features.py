# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
Features of a corpus of images, written as Parquet. Run it again after a crash and it does what is missing.

    python extract_features.py --model REPO --input photographs/ --output features/
    python extract_features.py --model REPO --input 's3://bucket/*.tar' --output s3://bucket/features --dtype bfloat16

Runs in this process, or on Ray with --address, --num-workers or several GPUs. See docs/corpus.md.
"""

import argparse
import dataclasses
import sys

from conversion.messages import is_of_store, next_step, printable_lines, say, without_credentials
from corpus.options import Options


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def minutes(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be more than 0, got {text}")
    return value


def names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model repo: a folder or an id on the Hub")
    parser.add_argument("--revision", help="branch, tag or commit of --model on the Hub")
    parser.add_argument("--input", nargs="+", help="images, .parquet or WebDataset .tar: folders, files, globs or URLs")
    parser.add_argument("--output", required=True, help="folder or URL for the Parquet files; run again to resume")
    parser.add_argument("--retry-errors", action="store_true", help="try images again whose row holds an error")
    parser.add_argument(
        "--redo-changed",
        action="store_true",
        help="do the rows again of files that changed since: a size or time differs",
    )
    parser.add_argument("--limit", type=positive, help="encode at most this many images in this run")

    group = parser.add_argument_group(
        "jobs that share an input, such as those of a SLURM array, each of them a shard of OUTPUT"
    )
    group.add_argument("--num-shards", type=positive, help="of the input")
    group.add_argument("--shard-index", type=int, help="of this job, from 0")
    group.add_argument("--status", action="store_true", help="say which shards of --output are complete, and stop")

    group = parser.add_argument_group("features and what goes along")
    group.add_argument(
        "--pooling",
        choices=["projection", "head", "mean"],
        help="by default the projection of an image-text model, else the head, else the mean over patches",
    )
    group.add_argument("--patch-features", choices=["float16", "bfloat16"], help="also write the feature of each patch")
    group.add_argument("--embedding-dtype", choices=["float32", "float16"], help="of the embeddings (%(default)s)")
    group.add_argument(
        "--keep",
        type=names,
        help="columns of Parquet, or texts beside the images of archives by their suffixes, such as txt,json",
    )
    group.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the model (%(default)s)")
    group.add_argument("--max-patches", type=positive, help="of one image, instead of the image processor's")
    group.add_argument("--image-size", type=positive, help="resize and crop each image to a square of this side")

    group = parser.add_argument_group("Parquet input")
    group.add_argument("--image-column", help="(%(default)s)")
    group.add_argument("--id-column", help="with unique values; by default FILE#ROW is the id")

    group = parser.add_argument_group("what is too large, and becomes an error before it is read")
    group.add_argument("--max-image-bytes", type=positive, help="of the file of an image (%(default)s)")
    group.add_argument("--max-image-pixels", type=positive, help="of an image (%(default)s)")

    group = parser.add_argument_group("the run")
    group.add_argument("--device", help="such as cpu or cuda:1; by default a GPU where there is one")
    group.add_argument("--address", help="Ray cluster to run on, such as auto")
    group.add_argument("--num-workers", type=positive, help="copies of the model, on Ray; by default one per GPU")
    group.add_argument("--patches-per-batch", type=positive, help="most patches encoded at once (16384, CPU: 4096)")
    group.add_argument("--rows-per-file", type=positive, help="a file is closed at (%(default)s)")
    group.add_argument("--flush-minutes", type=minutes, help="or after (%(default)s), when rows are waiting")
    parser.set_defaults(
        **{
            field.name: field.default
            for field in dataclasses.fields(Options)
            if field.default is not dataclasses.MISSING
        }
    )
    arguments = parser.parse_args()
    if not arguments.status and (arguments.model is None or arguments.input is None):
        parser.error("the following arguments are required: --model, --input")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    resume = "Run the same command again to resume."
    try:
        options = vars(arguments)
        if options.pop("status"):
            from corpus.shards import status_lines

            say(*status_lines(arguments.output))
            return
        from corpus.run import run

        run(Options(**options))
    except ModuleNotFoundError as error:
        sys.exit(f"extract_features.py: {error.name} is not installed: pip install -r requirements-scale.txt")
    except KeyboardInterrupt:
        say(f"extract_features.py: interrupted. What is encoded is written. {resume}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not isinstance(error, (MemoryError, OSError, ValueError, RuntimeError)) and not is_of_store(error):
            raise
        step = "check the URL, the credentials and the connection" if is_of_store(error) else next_step(error)
        reason = str(error) or ("not enough memory" if isinstance(error, MemoryError) else type(error).__name__)
        message = printable_lines(without_credentials(" ".join(reason.split())))
        sys.exit(f"extract_features.py: {message}{f' - {step}. {resume}' if step else ''}")


if __name__ == "__main__":
    main()
