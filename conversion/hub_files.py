# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Whether a repo, on disk or on the Hub, is a converted one; and files of the Hub, with errors that say what next."""

from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from json import JSONDecodeError
from pathlib import Path

from huggingface_hub import HfApi, ModelInfo, constants, snapshot_download
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
from .messages import printable_lines, without_credentials
from .repo_kinds import why_not_converted


CONVERTER = f"python {REPO / 'convert_weights.py'}"


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
    folder, commit = local_path(source, revision, f"a folder that `{CONVERTER} SOURCE FOLDER` has made"), None
    if folder is None:
        folder = download_files(source, revision, ["config.json"])
        commit = folder.name
    if reason := why_not_converted(folder):
        raise not_converted(source, reason)
    return commit


def not_converted(source: str, reason: str) -> ValueError:
    """With the command that converts it."""
    return ValueError(
        f"{source} is not converted: {reason}. If it is an AIMv2 checkpoint, convert it first: {CONVERTER} {source} "
        "OUTPUT_DIR"
    )


def download_files(repo_id: str, revision: str | None, patterns: list[str]) -> Path:
    """
    The folder with those files of a Hub repo that fit the patterns. The folder's name is the commit. Where the Hub is
    out of reach or out of order, it is that of an earlier download.

    Raises:
        ValueError: there is no such repo or revision, or neither the Hub nor an earlier download has the files.
    """
    with hub_errors(repo_id, revision):
        try:
            ask_hub(repo_id, revision)
        except HubOutOfReachError as error:
            folder = cached_folder(repo_id, revision, patterns)
            names = [file.name for file in folder.rglob("*")] if folder else []
            if folder is None or not all(any(fnmatch(name, pattern) for name in names) for pattern in patterns):
                raise error.reason from None
            return folder
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))


class HubOutOfReachError(Exception):
    """The Hub did not answer, or not as it should, for this `reason`: an earlier download may do."""

    def __init__(self, reason: Exception):
        super().__init__(str(reason))
        self.reason = reason


def ask_hub(repo_id: str, revision: str | None) -> ModelInfo:
    """
    What the Hub knows of a repo, with the sizes of its files.

    Raises:
        HubOutOfReachError: the Hub cannot be reached, or is out of order.
        RepositoryNotFoundError, RevisionNotFoundError: there is no such repo or revision.
    """
    try:
        # One short question, because a download asks an unreachable Hub again and again.
        return HfApi().model_info(repo_id, revision=revision, files_metadata=True, timeout=10)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise
    # No JSON is what a network's own login page answers with.
    except (HfHubHTTPError, httpx.TransportError, OfflineModeIsEnabled, JSONDecodeError) as error:
        raise HubOutOfReachError(error) from error


def cached_folder(repo_id: str, revision: str | None, patterns: list[str]) -> Path | None:
    """The folder of an earlier download, unless it is known to lack a file that fits the patterns."""
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def hub_file_names(repo_id: str, commit: str) -> list[str] | None:
    """All files of a commit of a Hub repo, or `None` where the Hub is out of reach."""
    with hub_errors(repo_id, commit):
        try:
            return [sibling.rfilename for sibling in ask_hub(repo_id, commit).siblings or []]
        except HubOutOfReachError:
            return None


@contextmanager
def hub_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turns what may happen on the way to the Hub into a ValueError of one line that says what next."""
    try:
        yield
    except GatedRepoError as error:
        raise ValueError(
            f"{repo_id} is on the Hub for those who accept its terms: accept them at "
            f"{without_credentials(constants.ENDPOINT)}/{repo_id}, and log in with `hf auth login`, or set HF_TOKEN."
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
        said = one_line(error.server_message or error)
        raise ValueError(f"{repo_id} was refused by the Hub: {said}. Try again later.") from error


def unreachable(repo_id: str, error: BaseException) -> ValueError:
    return ValueError(
        f"{repo_id} is no local path, and the Hub at {without_credentials(constants.ENDPOINT)} cannot be reached "
        f"({one_line(error)}). Check the connection, or give the path of a downloaded checkpoint."
    )


def one_line(said: str | BaseException) -> str:
    """What a server or a library said, fit to be printed."""
    text = " ".join(str(said).split()) or type(said).__name__
    return printable_lines(without_credentials(text)).rstrip(".")
