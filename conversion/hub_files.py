# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Whether a repo, on disk or on the Hub, is a converted one; and files of the Hub, with errors that say what next."""

from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from json import JSONDecodeError
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx, validate_repo_id

from .code_files import REPO
from .safetensors_files import read_json


# `model_type` of what this repo's models load.
CONVERTED_TYPES = ("aimv2_packing", "aimv2_packing_image_text")


def local_path(source: str, revision: str | None = None, wanted: str = "a file, a folder") -> Path | None:
    """
    The existing path that `source` is, or `None` where it is a Hub id, `USER/NAME`. The Hub is not asked.

    Raises:
        ValueError: it is neither, and what is `wanted`; or `revision` is given for a path.
    """
    path = Path(source).expanduser()
    if path.exists():
        if revision is not None:
            raise ValueError(f"{source} is a local path, and --revision is for sources on the Hub.")
        return path
    try:
        validate_repo_id(source)
        is_id = source.count("/") == 1
    except HFValidationError:
        is_id = False
    if not is_id:
        raise ValueError(f"{source} does not exist: give {wanted}, or a Hub id of the form USER/NAME.")
    return None


def require_converted(source: str, revision: str | None = None) -> str | None:
    """
    Makes sure that a command which loads packed models was given one. Only its `config.json` is read.

    Args:
        source (`str`): A folder or a Hub id.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.

    Returns:
        `str` or `None`: its commit on the Hub; of a folder, `None`.

    Raises:
        ValueError: there is no such folder or repo, or it is not converted, and how to convert it.
    """
    converter = f"python {REPO / 'convert_weights.py'}"
    folder, commit = local_path(source, revision, f"a folder that `{converter} SOURCE FOLDER` has made"), None
    if folder is None:
        folder = download_files(source, revision, ["config.json"])
        commit = folder.name
    file = folder / "config.json"
    model_type = read_json(file).get("model_type") if file.is_file() else None
    if model_type not in CONVERTED_TYPES:
        found = f"its model_type is {model_type!r}" if file.is_file() else "it has no config.json"
        raise ValueError(
            f"{source} is not converted: {found}. If it is an AIMv2 checkpoint, convert it first: {converter} {source} "
            "OUTPUT_DIR"
        )
    return commit


def download_files(repo_id: str, revision: str | None, patterns: list[str]) -> Path:
    """
    The folder with those files of a Hub repo that fit the patterns. The folder's name is the commit. Where the Hub is
    out of reach or out of order, it is that of an earlier download.

    Raises:
        ValueError: there is no such repo or revision, or neither the Hub nor an earlier download has the files.
    """
    with hub_errors(repo_id, revision):
        try:
            # One short question, because a download asks an unreachable Hub again and again.
            HfApi().model_info(repo_id, revision=revision, timeout=10)
        except (RepositoryNotFoundError, RevisionNotFoundError):
            raise
        # No JSON is what a network's own login page answers with.
        except (HfHubHTTPError, httpx.TransportError, OfflineModeIsEnabled, JSONDecodeError) as error:
            try:
                folder = snapshot_download(repo_id, revision=revision, allow_patterns=patterns, local_files_only=True)
            except LocalEntryNotFoundError:
                raise error from None
            names = [file.name for file in Path(folder).rglob("*")]
            if not all(any(fnmatch(name, pattern) for name in names) for pattern in patterns):
                raise error from None
        else:
            folder = snapshot_download(repo_id, revision=revision, allow_patterns=patterns)
        return Path(folder)


@contextmanager
def hub_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turns what may happen on the way to the Hub into a ValueError of one line that says what next."""
    try:
        yield
    except GatedRepoError as error:
        raise ValueError(
            f"{repo_id} is on the Hub for those who accept its terms: accept them at {constants.ENDPOINT}/{repo_id}, "
            "and log in with `hf auth login`, or set HF_TOKEN."
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{repo_id} is no local path, and no repo on the Hub that is open to you. Check the name; if it is "
            "private, log in with `hf auth login`, or set HF_TOKEN."
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{repo_id} on the Hub has no branch, tag or commit {revision!r}.") from error
    except LocalEntryNotFoundError as error:
        raise unreachable(repo_id, error.__cause__ or error) from error
    except (httpx.TransportError, OfflineModeIsEnabled, JSONDecodeError) as error:
        raise unreachable(repo_id, error) from error
    except EntryNotFoundError:
        raise
    except HfHubHTTPError as error:
        said = error.server_message or str(error)
        said = " ".join(said.split()).rstrip(".")
        raise ValueError(f"{repo_id} was refused by the Hub: {said}. Try again later.") from error


def unreachable(repo_id: str, error: BaseException) -> ValueError:
    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return ValueError(
        f"{repo_id} is no local path, and the Hub at {constants.ENDPOINT} cannot be reached ({reason}). Check the "
        "connection, or give the path of a downloaded checkpoint."
    )
