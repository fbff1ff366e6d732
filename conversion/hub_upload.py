# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Uploads a packed model repo to the Hub in one commit."""

import re
import time
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import httpx

from .hub_card import card_for, merged_card
from .hub_files import one_line
from .messages import listed, printable, say, without_credentials
from .repo_contents import WEIGHTS, file_names, is_written
from .repo_kinds import CONVERTED_TYPES, repo_kind
from .safetensors_files import INDEX_NAME, hub_blobs, read_json


# Of a whole upload; the client itself repeats each request five times.
ATTEMPTS = 2
# What the Hub itself or a person may have put into a repo before its first upload.
INITIAL_FILES = {".gitattributes", "README.md", "LICENSE"}
CODE = re.compile(r"\w+_aimv2_packing\.py")


def push_to_hub(
    folder: Path, repo_id: str, private: bool = False, branch: str | None = None, overwrite_card: bool = False
) -> str:
    """
    Creates the repo if it is not there and uploads `folder` in one commit. Files that the Hub already holds are not
    sent again, so that a second call continues an upload that was cut off; weights of an earlier upload that are no
    longer in `folder` are deleted in the same commit. Only what the converter writes is uploaded, and what it has not
    written of the repo's card and licence is kept; both are said.

    Args:
        folder (`Path`): A converted model repo. The usage example in its card is changed to name `repo_id`.
        repo_id (`str`): `USER/NAME`.
        private (`bool`, *optional*, defaults to `False`): Whether only the owner may see the repo.
        branch (`str`, *optional*): Where to commit, by default `main`; made from `main` if it is not there.
        overwrite_card (`bool`, *optional*, defaults to `False`): Whether to replace a card and a licence that others
            wrote.

    Returns:
        `str`: URL of what was uploaded.

    Raises:
        ValueError: the upload is not possible; the message says why and what to do.
    """
    api, paths = HfApi(), files_to_upload(folder)
    try:
        url = api.create_repo(repo_id, private=private or None, exist_ok=True)
        info = api.model_info(repo_id)
        check_existing(repo_id, [sibling.rfilename for sibling in info.siblings or []])
        if private and not info.private:
            raise ValueError(f"{repo_id} exists and is public, but --private was asked for: nothing was uploaded.")
        if branch is not None:
            api.create_branch(repo_id, branch=branch, exist_ok=True)
        operations = planned_commit(api, paths, repo_id, branch, overwrite_card)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                commit(api, operations, repo_id, branch)
                break
            except (httpx.TransportError, HfHubHTTPError) as error:
                refused = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
                if refused or attempt == ATTEMPTS:
                    raise
                say(f"The upload was interrupted ({one_line(error)}); continuing, attempt {attempt + 1}.")
                time.sleep(5)
    except (httpx.TransportError, HfHubHTTPError, LocalTokenNotFoundError) as error:
        raise ValueError(f"The upload to {repo_id} failed: {explain(error)}") from error
    return printable(without_credentials(f"{url}/tree/{branch}" if branch else str(url)))


def check_existing(repo_id: str, files: list[str]) -> None:
    """Refuses to put a packed model on top of something else."""
    if set(files) <= INITIAL_FILES:
        return
    try:
        model_type = read_json(Path(hf_hub_download(repo_id, "config.json"))).get("model_type")
    except EntryNotFoundError:
        model_type = None
    if model_type not in CONVERTED_TYPES:
        raise ValueError(
            f"The name {repo_id} is taken by a repo that is no packed AIMv2 model (model_type {model_type!r}): choose "
            "another name, or delete that repo."
        )


def files_to_upload(folder: Path) -> list[Path]:
    """
    The files of a converted repo that the converter writes. Others are named, and stay.

    Raises:
        ValueError: one of them is a link, which may lead to anything; or there is code of another version, whose other
            files need it.
    """
    kind, blobs = repo_kind(folder), hub_blobs(folder)
    names = file_names(folder)
    written = [folder / name for name in names if is_written(name, kind)]
    for path in written:
        if not path.is_file() or (path.is_symlink() and not (blobs and path.resolve().is_relative_to(blobs))):
            raise ValueError(
                f"{printable(path)} is a link or no file: put the file itself there. Nothing was uploaded."
            )
    if code := [name for name in names if CODE.fullmatch(name) and folder / name not in written]:
        raise ValueError(
            f"{folder} holds code that this tree's converter does not write ({listed(code)}): convert the source "
            "again, or convert this folder, which takes its weights and settings. Nothing was uploaded."
        )
    if others := [name for name in names if folder / name not in written]:
        say(f"Not uploaded, because the converter does not write it: {listed(others)}.")
    return written


def planned_commit(
    api: HfApi, paths: list[Path], repo_id: str, branch: str | None, overwrite_card: bool
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """What to add and to delete, so that the branch holds `paths` and what others wrote."""
    contents: dict[str, Path | bytes] = {path.name: path for path in paths}
    if isinstance(card := contents.get("README.md"), Path):
        contents["README.md"] = card_for(card.read_text("utf-8"), repo_id).encode()
    present = set(api.list_repo_files(repo_id, revision=branch))
    for name in sorted({"README.md", "LICENSE"} & present & contents.keys()):
        if not overwrite_card:
            there = Path(hf_hub_download(repo_id, name, revision=branch)).read_bytes()
            contents[name] = with_others(name, there, contents[name], repo_id)
    stale = {name for name in present if WEIGHTS.fullmatch(name) or name == INDEX_NAME or CODE.fullmatch(name)}
    return [
        *(CommitOperationAdd(name, content) for name, content in contents.items()),
        *(CommitOperationDelete(name) for name in sorted(stale - contents.keys())),
    ]


def with_others(name: str, there: bytes, new: Path | bytes, repo_id: str) -> bytes:
    """What becomes of a card or a licence, `there` on the Hub, that somebody else may have written."""
    content = new.read_bytes() if isinstance(new, Path) else new
    if name == "LICENSE":
        content, is_kept = there, there.split() != content.split()
    else:
        merged, is_kept = merged_card(there.decode("utf-8", "replace"), content.decode("utf-8"))
        content = merged.encode()
    if is_kept:
        say(f"{name} of {repo_id} was not written by this tool: its text is kept. To replace it: --overwrite-card.")
    return content


def commit(api: HfApi, operations: list[CommitOperationAdd | CommitOperationDelete], repo_id: str, branch: str | None):
    try:
        # Not `upload_folder`, which may split an upload into commits that do not load on their own.
        api.create_commit(repo_id, operations, commit_message="Upload packed AIMv2", revision=branch)
    except RuntimeError as error:
        # What the client makes of any error in one of its uploading threads.
        raise error.__cause__ or error from None


def explain(error: Exception) -> str:
    """What went wrong, and what to do about it."""
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token. Log in with `hf auth login`, or set HF_TOKEN."
    if not isinstance(error, HfHubHTTPError):
        return f"the connection broke ({one_line(error)}). Run the same command again: what is uploaded is kept."
    said = one_line(error.server_message or error)
    status = error.response.status_code
    if status in (402, 413, 507) or re.search(r"quota|storage|limit", said, re.I):
        return f"the account's storage is full or the limit for a file is exceeded. The Hub said: {said}"
    if status == 401:
        return f"the token is wrong or has expired. Log in with `hf auth login`, or set HF_TOKEN. The Hub said: {said}"
    if status == 403:
        return f"the token does not allow to write there; it needs the role 'write'. The Hub said: {said}"
    if status >= 500:
        return f"the Hub is in trouble ({said}). Run the same command again: what is uploaded is kept."
    return f"the Hub said ({status}): {said}"
