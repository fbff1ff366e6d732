# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
Converts an AIMv2 checkpoint of any checkpoint format into a packed model repo, verifies one, and uploads it to the Hub.

    python convert_weights.py apple/aimv2-large-patch14-native aimv2-large-packed --verify
    python convert_weights.py aimv2-large-packed --verify --device cuda --dtype bfloat16
    python convert_weights.py aimv2-large-packed --push-to-hub USER/aimv2-large-packed
    python convert_weights.py USER/aimv2-large-packed --verify-code
"""

import argparse
import errno
import sys
from pathlib import Path


try:
    import torch
    from huggingface_hub import split_state_dict_into_shards_factory
    from huggingface_hub.utils import httpx, validate_repo_id

    from conversion.checkpoint_formats import Encoder
    from conversion.features import read_images
    from conversion.hub_files import download_files, hub_file_names, local_path, not_converted
    from conversion.hub_upload import push_to_hub
    from conversion.messages import next_step, printable, printable_lines, say, without_credentials
    from conversion.model_card import describe, summary
    from conversion.model_repo import convert, difference_from
    from conversion.repo_contents import repo_differences
    from conversion.repo_kinds import is_converted, repo_kind, why_not_converted
    from conversion.sources import read_source
    from conversion.verification import Report, verify
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}. What is needed: pip install -r {Path(__file__).resolve().parent}/requirements.txt")


DTYPE_CHOICES = ("float32", "bfloat16", "float16")


def print_report(report: Report) -> None:
    say(f"\n{report.model} against {report.reference}, {report.dtype} on {report.device}\n")
    say(report.tables())
    say(f"\n{report.thresholds()}\n")
    if report.identical_weights is not None:
        say(f"Weights: {'equal, bit by bit' if report.identical_weights else 'NOT those of the reference'}.")
    print_code(report.code_differences, report.code_files)
    for note in report.notes:
        say(f"Note: {note}.")
    say(f"Verdict: {'passed' if report.passed else 'FAILED'}.\n")


def print_code(differences: list[str], files: int) -> None:
    if not differences:
        say(f"Code: equal to this tree's, file by file ({files} files).")
        return
    say("Code: NOT this tree's, and with trust_remote_code it would run:")
    for difference in differences:
        say(f"  {difference}")


def verify_code(source: str, revision: str | None) -> None:
    """Compares the code of a converted repo with this tree's; neither runs it nor downloads weights."""
    folder, commit, names = local_path(source, revision), None, None
    if folder is None:
        folder = download_files(source, revision, ["*.json", "*.py"])
        commit = folder.name
        names = hub_file_names(source, commit)
        if names is None:
            say("The Hub is out of reach: what an earlier download holds is compared.")
    if not folder.is_dir():
        raise ValueError(f"{source} is no folder of a converted repo.")
    if reason := why_not_converted(folder):
        raise not_converted(source, reason)
    differences = repo_differences(folder, names)
    print_code(differences, len(repo_kind(folder).code_files))
    if commit:
        say(f"Compared: commit {commit}. It is the one to pin: revision={commit!r}.")
    if differences:
        raise ValueError(f"The code of {source} is not this tree's: do not trust it before you have read it.")


def shard_size(value: str) -> str:
    try:
        split = split_state_dict_into_shards_factory(
            {"a": b"1", "b": b"1"}, get_storage_size=len, filename_pattern="{suffix}", max_shard_size=value
        )
        if split.is_sharded:
            raise ValueError("no tensor fits")
    except (ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(f"must be like 5GB or 500MB: {error}") from error
    return value


def usable_device(value: str) -> str:
    try:
        torch.empty(0, device=value).cpu()
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{value} cannot be used here: {str(error).splitlines()[0]}") from error
    return value


def existing_file(value: str) -> Path:
    if not Path(value).is_file():
        raise argparse.ArgumentTypeError(f"{value} is no file")
    return Path(value)


def new_file(value: str) -> Path:
    if Path(value).is_dir():
        raise argparse.ArgumentTypeError(f"{value} is a folder")
    if not Path(value).parent.is_dir():
        raise argparse.ArgumentTypeError(f"{Path(value).parent} is no folder: make it first")
    return Path(value)


def hub_id(value: str) -> str:
    try:
        validate_repo_id(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return value


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="Hub id, folder, .safetensors file or index: any AIMv2 checkpoint")
    parser.add_argument(
        "output_dir", nargs="?", type=Path, help="folder to make; without it, SOURCE is a converted repo"
    )
    group = parser.add_argument_group("converting")
    group.add_argument("--revision", help="branch, tag or commit of SOURCE on the Hub")
    group.add_argument("--prefix", help="what the names of the encoder's tensors begin with, where several fit")
    group.add_argument(
        "--vision-only", action="store_true", help="of an image-text model, convert the vision encoder alone"
    )
    group.add_argument("--dtype", choices=DTYPE_CHOICES, help="of the weights, and of --verify (default: the source's)")
    group.add_argument("--max-shard-size", type=shard_size, help="of one file of weights (default: 5GB)")
    group.add_argument(
        "--plain", action="store_true", help="write the plain model alone, without engines: fewer files to read"
    )
    group.add_argument(
        "--overwrite", action="store_true", help="replace an earlier conversion, once this one is complete"
    )
    group = parser.add_argument_group("verifying")
    group.add_argument(
        "--verify", action="store_true", help="compare with the original model; exit code 1 if it differs"
    )
    group.add_argument(
        "--verify-code",
        action="store_true",
        help="compare SOURCE's code with this tree's and do no more; exit code 1 if it differs",
    )
    group.add_argument("--reference", help="compare with this checkpoint (Hub id, folder or file) instead of SOURCE")
    group.add_argument("--images", nargs="+", type=existing_file, help="default: photographs and ten sizes")
    group.add_argument("--device", type=usable_device, help="where to compare, like cuda (default: cpu)")
    group.add_argument("--report", type=new_file, help="write the comparison to this JSON file too")
    group = parser.add_argument_group("uploading")
    group.add_argument(
        "--push-to-hub", metavar="USER/NAME", type=hub_id, help="upload the converted repo in one commit"
    )
    group.add_argument("--private", action="store_true", help="make the repo private")
    group.add_argument("--hub-revision", metavar="BRANCH", help="branch to commit to (default: main)")
    group.add_argument(
        "--overwrite-card", action="store_true", help="replace a card and a licence that this tool did not write"
    )
    options = parser.parse_args(arguments)
    for needed, names in (
        ("verify", ("reference", "images", "device", "report")),
        ("push_to_hub", ("private", "hub_revision", "overwrite_card")),
    ):
        for name in names:
            if getattr(options, name) and not getattr(options, needed):
                parser.error(f"--{name.replace('_', '-')} needs --{needed.replace('_', '-')}")
    if options.verify_code and (options.output_dir or options.verify or options.push_to_hub or options.prefix):
        parser.error("--verify-code takes a converted SOURCE, and goes with no other action and no --prefix")
    for name in ("vision_only", "plain", "max_shard_size", "overwrite"):
        if getattr(options, name) and options.output_dir is None:
            parser.error(f"--{name.replace('_', '-')} is for converting: give OUTPUT_DIR")
    if options.dtype and options.output_dir is None and not options.verify:
        parser.error("--dtype is for converting or verifying: give OUTPUT_DIR or --verify")
    if options.output_dir is None and not (options.verify or options.verify_code or options.push_to_hub):
        parser.error("give OUTPUT_DIR to convert, or --verify or --push-to-hub for a SOURCE that is converted already")
    return options


def run(options: argparse.Namespace) -> None:
    """Does what the command line asks for."""
    if options.verify_code:
        verify_code(options.source, options.revision)
        return
    dtype = getattr(torch, options.dtype) if options.dtype else None
    source = read_source(options.source, options.revision, options.prefix, options.vision_only)
    # What is compared has the parts that the converted model has.
    without_text = isinstance(source.model, Encoder)
    reference = read_source(options.reference, vision_only=without_text) if options.reference else None
    if options.images:
        # Before the conversion, which takes longer.
        model = source.model
        read_images(model.config if isinstance(model, Encoder) else model.config.vision_config, options.images)
    output: Path | None = options.output_dir
    if output is None and not is_converted(source.folder):
        raise ValueError(f"{options.source} is not converted yet: give an OUTPUT_DIR.")
    # A conversion whose upload was cut off is there already when the same command runs again.
    continued = output is not None and options.push_to_hub and not options.overwrite and is_converted(output)
    if output is not None and continued:
        if difference := difference_from(output, source, dtype, options.plain):
            raise FileExistsError(
                f"{output} exists and is another conversion: it {difference}. Choose another folder, replace it with "
                f"--overwrite, or upload it as it is: python convert_weights.py {output} --push-to-hub "
                f"{options.push_to_hub}"
            )
        say(f"{output} already holds this conversion of {source.name}.")

    def check(folder: Path) -> Report:
        compared = reference or (source if output is not None else None)
        report = verify(
            folder,
            reference=compared.model if compared else None,
            reference_name=compared.name if compared else "transformers' model with the same weights",
            images=options.images,
            device=options.device or "cpu",
            dtype=dtype,
        )
        report.model = str(output or options.source)
        print_report(report)
        if options.report:
            options.report.write_text(report.to_json())
        if report.code_differences:
            raise ValueError(f"The code of {report.model} is not this tree's.")
        if not report.passed:
            raise ValueError(f"{report.model} differs from {report.reference}.")
        return report

    folder = output or source.folder
    if output is not None and not continued:
        verifier = check if options.verify else None
        model_id = options.push_to_hub or output.resolve().name
        max_shard_size = options.max_shard_size or "5GB"
        convert(source, output, model_id, dtype, max_shard_size, options.overwrite, verifier, options.plain)
        found = f"{describe(source.model)}, checkpoint format {source.model.checkpoint_format.name}"
        say(f"Converted {source.name} ({found}) to {output}.")
        if dropped := source.model.dropped:
            say(f"Left out of the source: {summary(dropped)}.")
    elif options.verify:
        check(folder)
    if options.push_to_hub:
        url = push_to_hub(
            folder, options.push_to_hub, options.private, options.hub_revision, overwrite_card=options.overwrite_card
        )
        say(f"Uploaded to {url}")


def main() -> int:
    try:
        run(parse_arguments())
    except KeyboardInterrupt:
        say("error: interrupted. Nothing is half done: run the same command again.", file=sys.stderr)
        return 130
    except (MemoryError, torch.OutOfMemoryError) as error:
        reason = str(error) or "not enough memory"
        say(
            f"error: {printable_lines(reason)}. Less is needed with a smaller --dtype, and by --verify with fewer or "
            "smaller --images or another --device.",
            file=sys.stderr,
        )
        return 1
    except (ValueError, OSError, RecursionError, httpx.TransportError) as error:
        say(f"error: {printable_lines(without_credentials(explain(error)))}", file=sys.stderr)
        return 1
    return 0


def explain(error: Exception) -> str:
    """The error in words, and what to do where the system only gave a number."""
    step = next_step(error)
    if not isinstance(error, OSError) or step is None:
        return str(error)
    where = f"{printable(error.filename)}: " if error.filename else ""
    downloads = "; HF_HOME says where downloads go" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return f"{where}{error.strerror}. {step[0].upper()}{step[1:]}{downloads}."


if __name__ == "__main__":
    sys.exit(main())
