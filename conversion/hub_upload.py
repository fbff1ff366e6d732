# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Uploads a packed model repo to the Hub in one commit."""

import re
import time
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import httpx

from .hub_files import CONVERTED_TYPES
from .safetensors_files import read_json


# Of a whole upload; the client itself repeats each request five times.
ATTEMPTS = 2
# What the Hub itself or a person may have put into a repo before its first upload.
INITIAL_FILES = {".gitattributes", "README.md", "LICENSE"}


def push_to_hub(folder: Path, repo_id: str, private: bool = False, branch: str | None = None) -> str:
    """
    Creates the repo if it is not there and uploads `folder` in one commit. Files that the Hub already holds are not
    sent again, so that a second call continues an upload that was cut off; weights of an earlier upload that are no
    longer in `folder` are deleted in the same commit.

    Args:
        folder (`Path`): A converted model repo. The usage example in its card is changed to name `repo_id`.
        repo_id (`str`): `USER/NAME`.
        private (`bool`, *optional*, defaults to `False`): Whether only the owner may see the repo.
        branch (`str`, *optional*): Where to commit, by default `main`; made from `main` if it is not there.

    Returns:
        `str`: URL of what was uploaded.

    Raises:
        ValueError: the upload is not possible; the message says why and what to do.
    """
    api = HfApi()
    try:
        url = api.create_repo(repo_id, private=private or None, exist_ok=True)
        info = api.model_info(repo_id)
        check_existing(repo_id, [sibling.rfilename for sibling in info.siblings or []])
        if private and not info.private:
            raise ValueError(f"{repo_id} exists and is public, but --private was asked for: nothing was uploaded.")
        if branch is not None:
            api.create_branch(repo_id, branch=branch, exist_ok=True)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                commit_folder(api, folder, repo_id, branch)
                break
            except (httpx.TransportError, HfHubHTTPError) as error:
                refused = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
                if refused or attempt == ATTEMPTS:
                    raise
                print(f"The upload was interrupted ({one_line(error)}); continuing, attempt {attempt + 1}.")
                time.sleep(5)
    except (httpx.TransportError, HfHubHTTPError, LocalTokenNotFoundError) as error:
        raise ValueError(f"The upload to {repo_id} failed: {explain(error)}") from error
    return f"{url}/tree/{branch}" if branch else str(url)


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


def commit_folder(api: HfApi, folder: Path, repo_id: str, branch: str | None) -> None:
    paths = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    additions = [
        CommitOperationAdd(path.name, card_for(path, repo_id) if path.name == "README.md" else path) for path in paths
    ]
    present = api.list_repo_files(repo_id, revision=branch)
    stale = {name for name in present if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", name)}
    deletions = [CommitOperationDelete(name) for name in sorted(stale - {path.name for path in paths})]
    try:
        # Not `upload_folder`, which may split an upload into commits that do not load on their own.
        api.create_commit(repo_id, [*additions, *deletions], commit_message="Upload packed AIMv2", revision=branch)
    except RuntimeError as error:
        # What the client makes of any error in one of its uploading threads.
        raise error.__cause__ or error from None


def card_for(card: Path, repo_id: str) -> bytes:
    """The model card with a usage example for `repo_id`."""
    return re.sub(r'^model_id = ".*"$', f'model_id = "{repo_id}"', card.read_text("utf-8"), flags=re.M).encode()


def explain(error: Exception) -> str:
    """What went wrong, and what to do about it."""
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token. Log in with `hf auth login`, or set HF_TOKEN."
    if not isinstance(error, HfHubHTTPError):
        return f"the connection broke ({one_line(error)}). Run the same command again: what is uploaded is kept."
    said = error.server_message or one_line(error)
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


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
