# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
A Hub on the loopback interface, in memory: the part of the HTTP interface that `huggingface_hub` uses to upload and
download model repos, with the failures that real connections and accounts have.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


LFS_SUFFIXES = (".safetensors", ".bin")
PART = 1 << 16


@dataclass
class Commit:
    oid: str
    title: str
    files: dict[str, "StoredFile"]


@dataclass
class StoredFile:
    """`oid` is git's hash of a blob; `sha256` is set for files in LFS."""

    data: bytes
    oid: str
    sha256: str | None


@dataclass
class Repo:
    private: bool
    commits: list[Commit] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, revision: str) -> Commit | None:
        oid = self.refs.get(revision) or self.tags.get(revision) or revision
        return next((commit for commit in self.commits if commit.oid == oid), None)

    def add(self, branch: str, title: str, files: dict[str, StoredFile]) -> Commit:
        oid = hashlib.sha1(f"{len(self.commits)}{title}{sorted(files)}".encode()).hexdigest()
        self.commits.append(Commit(oid, title, files))
        self.refs[branch] = oid
        return self.commits[-1]


def stored(path: str, data: bytes) -> StoredFile:
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    return StoredFile(data, oid, hashlib.sha256(data).hexdigest() if path.endswith(LFS_SUFFIXES) else None)


class Hub:
    """
    The server's state, and its failures to come.

    Attributes:
        url (`str`): For `HF_ENDPOINT`.
        tokens (`dict[str, str]`): User by token; each may write in a namespace of that name.
        uploads (`list[str]`): SHA-256 of each LFS object that was received whole.
        drop_uploads (`int`): How many uploads of an LFS object to cut off, from now on.
        drop_downloads (`int`): How many downloads of an LFS object to cut off half-way.
        fail_commits (`int`): How many commits to answer with status 500.
        full (`set[str]`): Users who have no storage left.
        is_down (`bool`): Whether every request is answered with status 503.
    """

    def __init__(self) -> None:
        self.tokens = {"hf_alice": "alice", "hf_bob": "bob", "hf_carol": "carol"}
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.drop_uploads = self.drop_downloads = self.fail_commits = 0
        self.full: set[str] = set()
        self.is_down = False
        handler = type("HubHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        # Another host name: a redirect to the same one is taken for a moved repo.
        self.lfs_url = f"http://localhost:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add_repo(self, repo_id: str, files: dict[str, bytes], private: bool = False) -> Repo:
        repo = self.repos[repo_id] = Repo(private)
        repo.add("main", "initial commit", {path: stored(path, data) for path, data in files.items()})
        return repo


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def reply(self, status: int, body: Any = None, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, message: str, code: str = "") -> None:
        self.reply(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    @property
    def user(self) -> str | None:
        return self.hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def repo(self, repo_id: str) -> Repo | None:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and self.user != repo_id.split("/", maxsplit=1)[0]):
            self.refuse(401 if self.user is None else 404, "Repository not found", "RepoNotFound")
            return None
        return repo

    def may_write(self, repo_id: str) -> bool:
        if self.user is None:
            self.refuse(401, "Invalid username or password.")
        elif self.user != repo_id.split("/", maxsplit=1)[0]:
            self.refuse(403, f"You don't have the rights to write to {repo_id}")
        return self.user == repo_id.split("/", maxsplit=1)[0]

    def dispatch(self) -> None:
        parts = urlsplit(self.path)
        # One segment at a time: branch names may hold an escaped slash.
        path, self.query = parts.path, parse_qs(parts.query)
        if self.hub.is_down:
            self.close_connection = True
            self.refuse(503, "Service Unavailable")
            return
        for method, pattern, action in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == self.command.replace("HEAD", "GET"):
                getattr(self, action)(*(unquote(group) for group in match.groups()))
                return
        self.body()
        self.refuse(404, f"No such endpoint: {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = dispatch  # noqa: N815

    def whoami(self) -> None:
        if self.user is None:
            self.refuse(401, "Invalid username or password.")
        else:
            self.reply(200, {"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token"}})

    def create(self) -> None:
        request = json.loads(self.body())
        repo_id = f"{request.get('organization') or self.user}/{request['name']}"
        if not self.may_write(repo_id):
            return
        url = f"{self.hub.url}/{repo_id}"
        if repo_id in self.hub.repos:
            self.reply(409, {"error": "You already created this model repo", "url": url})
            return
        private = request.get("visibility") == "private" or bool(request.get("private"))
        self.hub.add_repo(repo_id, {".gitattributes": b"*.safetensors filter=lfs\n"}, private)
        self.reply(200, {"url": url, "name": repo_id, "id": repo_id})

    def validate_yaml(self) -> None:
        self.body()
        self.reply(200, {"errors": [], "warnings": []})

    def info(self, repo_id: str, revision: str = "main") -> None:
        if repo := self.repo(repo_id):
            commit = repo.commit(revision)
            if commit is None:
                self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
                return
            siblings = [{"rfilename": path} for path in sorted(commit.files)]
            fields = {"id": repo_id, "modelId": repo_id, "sha": commit.oid, "private": repo.private, "tags": []}
            self.reply(200, fields | {"siblings": siblings, "downloads": 0, "likes": 0})

    def tree(self, repo_id: str, revision: str) -> None:
        if repo := self.repo(repo_id):
            commit = repo.commit(revision)
            if commit is None:
                self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
                return
            self.reply(200, [describe(path, file) for path, file in sorted(commit.files.items())])

    def paths_info(self, repo_id: str, revision: str) -> None:
        wanted = self.body()
        if repo := self.repo(repo_id):
            commit = repo.commit(revision)
            body = parse_qs(wanted.decode()) if not wanted.startswith(b"{") else json.loads(wanted)
            files = commit.files if commit else {}
            self.reply(200, [describe(path, files[path]) for path in body["paths"] if path in files])

    def refs(self, repo_id: str) -> None:
        if repo := self.repo(repo_id):
            branches = [{"name": k, "ref": f"refs/heads/{k}", "targetCommit": v} for k, v in repo.refs.items()]
            tags = [{"name": k, "ref": f"refs/tags/{k}", "targetCommit": v} for k, v in repo.tags.items()]
            self.reply(200, {"branches": branches, "tags": tags, "converts": []})

    def add_ref(self, repo_id: str, kind: str, name: str) -> None:
        request = json.loads(self.body() or b"{}")
        repo = self.repo(repo_id)
        if repo is None or not self.may_write(repo_id):
            return
        if kind == "tag":
            # Of a tag the path holds the revision, and the body the name.
            commit, refs, name = repo.commit(name), repo.tags, request["tag"]
        else:
            commit, refs = repo.commit(request.get("startingPoint", "main")), repo.refs
        if name in refs:
            self.refuse(409, f"Reference already exists: {name}")
        elif commit is None:
            self.refuse(404, "Invalid rev id", "RevisionNotFound")
        else:
            refs[name] = commit.oid
            self.reply(200)

    def preupload(self, repo_id: str, revision: str) -> None:
        request = json.loads(self.body())
        repo = self.repo(repo_id)
        if repo is None or not self.may_write(repo_id):
            return
        commit = repo.commit(revision)
        if commit is None:
            self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return
        files = []
        for file in request["files"]:
            mode = "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"
            present = commit.files.get(file["path"])
            oid = present and (present.sha256 or present.oid)
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.reply(200, {"files": files})

    def batch(self, repo_id: str) -> None:
        request = json.loads(self.body())
        if not self.may_write(repo_id):
            return
        if self.user in self.hub.full:
            self.refuse(403, "Private repository storage limit reached, please upgrade your plan")
            return
        objects: list[dict[str, Any]] = []
        for item in request["objects"]:
            oid = item["oid"]
            entry = {"oid": oid, "size": item["size"]}
            if oid not in self.hub.objects:
                upload = {"href": f"{self.hub.lfs_url}/lfs/{oid}", "header": {}}
                verify = {"href": f"{self.hub.url}/lfs-verify/{oid}", "header": {}}
                entry["actions"] = {"upload": upload, "verify": verify}
            objects.append(entry)
        self.reply(200, {"transfer": "basic", "objects": objects})

    def receive(self, oid: str) -> None:
        if self.hub.drop_uploads:
            self.hub.drop_uploads -= 1
            self.rfile.read(min(1000, int(self.headers["Content-Length"])))
            self.close_connection = True
            self.connection.close()
            return
        data = self.body()
        if hashlib.sha256(data).hexdigest() != oid:
            self.refuse(400, "The content does not have the announced hash")
            return
        self.hub.objects[oid] = data
        self.hub.uploads.append(oid)
        self.reply(200)

    def verify(self, oid: str) -> None:
        self.body()
        self.reply(200 if oid in self.hub.objects else 404)

    def commit(self, repo_id: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.body().splitlines()]
        repo = self.repo(repo_id)
        if repo is None or not self.may_write(repo_id):
            return
        parent = repo.commit(revision)
        if self.hub.fail_commits:
            self.hub.fail_commits -= 1
            self.refuse(500, "Internal error")
            return
        if parent is None or revision not in repo.refs:
            self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return
        files, title = dict(parent.files), ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, parent.oid):
                    self.refuse(412, "A commit has happened since.")
                    return
            elif line["key"] == "file":
                files[value["path"]] = stored(value["path"], base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                files[value["path"]] = stored(value["path"], self.hub.objects[value["oid"]])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = repo.add(revision, title, files).oid
        url = f"{self.hub.url}/{repo_id}/commit/{oid}"
        self.reply(200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        repo = self.repo(repo_id)
        if repo is None:
            return
        commit = repo.commit(revision)
        if commit is None:
            self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return
        file = commit.files.get(path)
        if file is None:
            self.refuse(404, "Entry not found", "EntryNotFound")
            return
        headers = {"X_Repo_Commit": commit.oid, "ETag": f'"{file.oid}"', "Accept_Ranges": "bytes"}
        if file.sha256:
            headers |= {"X_Linked_Etag": f'"{file.sha256}"', "X_Linked_Size": str(len(file.data))}
            self.hub.objects[file.sha256] = file.data
            self.reply(302, b"", Location=f"{self.hub.lfs_url}/lfs/{file.sha256}", **headers)
        elif self.command == "HEAD":
            self.reply(200, file.data, **headers)
        else:
            self.send_part(file.data, headers)

    def download(self, oid: str) -> None:
        self.send_part(self.hub.objects[oid], {"ETag": f'"{oid}"'})

    def send_part(self, data: bytes, headers: dict[str, str]) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(match[1]) if match else 0
        end = int(match[2]) + 1 if match and match[2] else len(data)
        part, status = data[start:end], 206 if match else 200
        if match:
            headers |= {"Content_Range": f"bytes {start}-{start + len(part) - 1}/{len(data)}"}
        if self.hub.drop_downloads and self.command == "GET" and len(part) > PART:
            self.hub.drop_downloads -= 1
            self.send_response(status)
            for name, value in {"Content-Length": str(len(part)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(part[: len(part) // 2])
            self.close_connection = True
            self.connection.close()
            return
        self.reply(status, part, **headers)


def describe(path: str, file: StoredFile) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(file.data), "oid": file.oid}
    if file.sha256:
        entry["lfs"] = {"oid": file.sha256, "size": len(file.data), "pointerSize": 130}
    return entry


REPO_ID = r"([^/]+/[^/]+)"
ROUTES = (
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate_yaml"),
    ("POST", f"/api/models/{REPO_ID}/preupload/([^/]+)", "preupload"),
    ("POST", f"/api/models/{REPO_ID}/commit/([^/]+)", "commit"),
    ("POST", f"/api/models/{REPO_ID}/paths-info/([^/]+)", "paths_info"),
    ("POST", f"/api/models/{REPO_ID}/(tag|branch)/([^/]+)", "add_ref"),
    ("GET", f"/api/models/{REPO_ID}/refs", "refs"),
    ("GET", f"/api/models/{REPO_ID}/tree/([^/]+)", "tree"),
    ("GET", f"/api/models/{REPO_ID}/revision/([^/]+)", "info"),
    ("GET", f"/api/models/{REPO_ID}", "info"),
    ("POST", rf"/{REPO_ID}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", "/lfs/([0-9a-f]{64})", "receive"),
    ("GET", "/lfs/([0-9a-f]{64})", "download"),
    ("POST", "/lfs-verify/([0-9a-f]{64})", "verify"),
    ("GET", f"/{REPO_ID}/resolve/([^/]+)/(.+)", "resolve"),
)
