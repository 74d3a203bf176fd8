"""A model hub on loopback that speaks the protocol huggingface_hub uploads with: git commits as ndjson, blobs by LFS.

Bytes really are stored, by digest, and a commit that names a blob which never arrived is refused. Transfers are
`basic`, or `multipart` above `part_bytes`, for clients that have xet off (HF_HUB_DISABLE_XET). Of xet there is only
what lets a client store chunks in a directory of its own machine, `chunks`; the server cannot put them together again.
One branch, models only, listings in one page. Files are read by ranges, from here or from a `cdn` (tests/hub_cdn.py).
"""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import constants

from tests.hub_cdn import Cdn, Sent

#: Tokens that may write to their user and organization, plain and fine-grained; one for reading; a stranger's.
TOKEN, FINE, READER, STRANGER = "hf_writerwriter", "hf_finegrained", "hf_readerreader", "hf_strangerstranger"
USER, ORGANIZATION = "ada", "lab"
_ACCOUNTS = {
    TOKEN: {"name": USER, "orgs": [ORGANIZATION], "role": "write"},
    FINE: {"name": USER, "orgs": [ORGANIZATION], "role": "fineGrained"},
    READER: {"name": USER, "orgs": [ORGANIZATION], "role": "read"},
    STRANGER: {"name": "bob", "orgs": [], "role": "write"},
}
_GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
#: Faults: cut the connection in the middle of the request's body, or after all was done and before it is answered.
CUT, LOST = 0, -1


class RefusedError(Exception):
    """An answer that is an error."""

    def __init__(
        self, status: int, said: str, code: str = "", headers: Mapping[str, str] | None = None, **facts: str
    ) -> None:
        super().__init__(said)
        self.status = status
        self.headers = headers or {}
        self.code = code
        self.facts = facts


@dataclass(frozen=True)
class Entry:
    """A file of a commit; `lfs` when git holds only a reference to the blob."""

    sha256: str
    size: int
    blob_id: str
    lfs: bool


@dataclass
class Commit:
    """What one commit has, and what it changed."""

    id: str
    title: str
    files: dict[str, Entry]
    changed: list[str]


@dataclass
class Repository:
    private: bool
    gated: bool = False
    commits: list[Commit] = field(default_factory=list)

    @property
    def files(self) -> dict[str, Entry]:
        return self.commits[-1].files


class HubServer:
    """`with HubServer() as hub:` then HfApi(endpoint=hub.endpoint).

    `fault(method, path)` may return a status to answer a request with instead, or CUT or LOST. `flip` damages that many
    blobs on their way in. `requests` and `blobs_received` tell what came, `ranges` which bytes of which blob left.
    Without `answers_ranges` every answer has the whole file. With a `cdn` readers of LFS files are sent there.
    """

    def __init__(self, *, port: int = 0, part_bytes: int | None = None, chunks: Path | None = None) -> None:
        self.part_bytes = part_bytes
        self.chunks = chunks
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.blobs_received: list[str] = []
        self.ranges: list[Sent] = []
        self.answers_ranges = True
        self.answer_with: dict[str, str] = {}
        self.cdn: Cdn | None = None
        self.fault: Callable[[str, str], int | None] = _nothing
        self.after_commit: Callable[[Repository], object] = _nothing
        self.flip = 0
        self._arriving: dict[str, bytes] = {}
        self._lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    # What tests look at and change --------------------------------------------------------------------------------

    def content(self, repository: str) -> dict[str, bytes]:
        """Every file of the newest commit, without what the hub itself puts there."""
        files = self.repositories[repository].files
        return {name: self.blobs[entry.sha256] for name, entry in files.items() if name != ".gitattributes"}

    def make(self, repository: str, files: dict[str, bytes], *, private: bool = True, gated: bool = False) -> None:
        """A repository that somebody else made."""
        made = self.repositories[repository] = Repository(private, gated)
        self._commit(made, "initial commit", {".gitattributes": self._store(_GITATTRIBUTES, lfs=False)})
        if files:
            entries = {name: self._store(data, lfs=name.endswith(".safetensors")) for name, data in files.items()}
            self._commit(made, "files", made.files | entries)

    def replace(self, repository: str, files: dict[str, bytes]) -> None:
        """A commit after which these are all the files."""
        made = self.repositories[repository]
        self._commit(made, "files", {k: self._store(data, lfs=k.endswith(".safetensors")) for k, data in files.items()})

    def rot(self, repository: str, name: str) -> None:
        """A stored file has other bytes now, and is listed so."""
        files = self.repositories[repository].files
        files[name] = self._store(_flipped(self.blobs[files[name].sha256]), lfs=files[name].lfs)

    # The protocol -------------------------------------------------------------------------------------------------

    def answer(self, method: str, target: str, token: str, body: bytes) -> tuple[bytes, dict[str, str]]:
        """The body and headers of an answer, or RefusedError."""
        url = urlsplit(target)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        with self._lock:
            match method, parts:
                case "PUT", ["lfs", name, *part]:
                    return self._receive(name, "".join(part), body)
                case "POST", ["lfs-complete", name]:
                    return self._complete(name, json.loads(body))
                case "POST", ["lfs-verify", name]:
                    self._account(token)
                    return self._verify(name, json.loads(body))
                case "GET", ["api", "whoami-v2"]:
                    return self._whoami(self._account(token))
                case "POST", ["api", "validate-yaml"]:
                    return _validate(json.loads(body)["content"])
                case "POST", ["api", "repos", "create"]:
                    return self._create(self._account(token), json.loads(body))
                case "GET", ["api", "models", owner, name] | ["api", "models", owner, name, "revision", _]:
                    blobs, found = "blobs" in parse_qs(url.query), self._visible(token, owner, name)
                    commit = self._at(found, parts[5] if len(parts) == 6 else "main")
                    return _json(self._info(f"{owner}/{name}", found, commit, blobs=blobs))
                case "GET", ["api", "models", owner, name, "tree", revision]:
                    return _json(_tree(self._at(self._visible(token, owner, name), revision)))
                case "PUT", ["api", "models", owner, name, "settings"]:
                    return self._settings(self._writable(token, owner, name), json.loads(body))
                case "POST", ["api", "models", owner, name, "preupload", "main"]:
                    return self._preupload(self._writable(token, owner, name), json.loads(body))
                case "POST", ["api", "models", owner, name, "commit", "main"]:
                    return self._take(f"{owner}/{name}", self._writable(token, owner, name), body)
                case "GET", ["api", "models", owner, name, "xet-write-token", "main"] if self.chunks is not None:
                    self._writable(token, owner, name)
                    return _chunk_store(self.chunks)
                case "POST", [owner, git, "info", "lfs", "objects", "batch"]:
                    self._writable(token, owner, git.removesuffix(".git"))
                    return self._batch(json.loads(body))
                case "GET" | "HEAD", [owner, name, "resolve", revision, *path]:
                    return self._resolve(self._visible(token, owner, name), revision, "/".join(path))
        raise RefusedError(404, f"no such call: {method} {url.path}")

    def _account(self, token: str) -> dict[str, Any]:
        if token not in _ACCOUNTS:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return _ACCOUNTS[token]

    def _visible(self, token: str, owner: str, name: str) -> Repository:
        account = _ACCOUNTS.get(token, {"name": "", "orgs": []})
        mine = owner in (account["name"], *account["orgs"])
        repository = self.repositories.get(f"{owner}/{name}")
        if repository is None or (repository.private and not mine):
            # The hub tells nobody without a token whether a repository exists.
            raise RefusedError(404 if account["name"] else 401, "Repository not found", "RepoNotFound")
        if repository.gated and not mine:
            raise RefusedError(403, "Access to this model is restricted.", "GatedRepo")
        return repository

    def _writable(self, token: str, owner: str, name: str) -> Repository:
        account = self._account(token)
        repository = self._visible(token, owner, name)
        if account["role"] == "read" or owner not in (account["name"], *account["orgs"]):
            raise RefusedError(403, "Forbidden: you must use a write token to upload to a repository.")
        return repository

    def _whoami(self, account: dict[str, Any]) -> tuple[bytes, dict[str, str]]:
        listed = account["orgs"] if account["role"] == "write" else []
        orgs = [{"name": name, "type": "org"} for name in listed]
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": account["role"]}}
        return _json({"type": "user", "name": account["name"], "orgs": orgs, "auth": auth})

    def _create(self, account: dict[str, Any], wanted: dict[str, Any]) -> tuple[bytes, dict[str, str]]:
        owner = wanted.get("organization") or account["name"]
        if account["role"] == "read" or owner not in (account["name"], *account["orgs"]):
            raise RefusedError(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        repository = f"{owner}/{wanted['name']}"
        if repository in self.repositories:
            raise RefusedError(409, "You already created this model repo", url=f"{self.endpoint}/{repository}")
        self.make(repository, {}, private=wanted.get("visibility") == "private" or wanted.get("private") is True)
        return _json({"url": f"{self.endpoint}/{repository}", "name": repository})

    def _info(self, name: str, repository: Repository, commit: Commit, *, blobs: bool) -> dict[str, Any]:
        siblings: list[dict[str, Any]] = []
        for path, entry in commit.files.items():
            siblings.append({"rfilename": path})
            if blobs:
                siblings[-1] |= {"size": entry.size, "blobId": entry.blob_id}
                if entry.lfs:
                    siblings[-1]["lfs"] = {"size": entry.size, "sha256": entry.sha256, "pointerSize": 130}
        info = {"id": name, "private": repository.private, "gated": "manual" if repository.gated else False}
        return info | {"sha": commit.id, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0}

    def _at(self, repository: Repository, revision: str) -> Commit:
        for commit in repository.commits:
            if commit.id == revision:
                return commit
        if revision != "main":
            raise RefusedError(404, "Invalid rev id", "RevisionNotFound")
        return repository.commits[-1]

    def _settings(self, repository: Repository, wanted: dict[str, Any]) -> tuple[bytes, dict[str, str]]:
        visibility = wanted.get("visibility")
        repository.private = visibility == "private" if visibility else bool(wanted["private"])
        return _json(wanted)

    def _preupload(self, repository: Repository, wanted: dict[str, Any]) -> tuple[bytes, dict[str, str]]:
        found = []
        for file in wanted["files"]:
            entry = repository.files.get(file["path"])
            lfs = file["path"].endswith(".safetensors") or file["size"] > 10_000_000
            oid = None if entry is None else entry.sha256 if entry.lfs else entry.blob_id
            mode = "lfs" if lfs else "regular"
            found.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return _json({"files": found})

    def _batch(self, wanted: dict[str, Any]) -> tuple[bytes, dict[str, str]]:
        assert wanted["operation"] == "upload"
        assert wanted["hash_algo"] == "sha256"
        found = []
        for item in wanted["objects"]:
            name, size = item["oid"], item["size"]
            answer: dict[str, Any] = {"oid": name, "size": size}
            if name not in self.blobs:
                upload: dict[str, Any] = {"href": f"{self.endpoint}/lfs/{name}?X-Signature=secret"}
                if self.part_bytes is not None and size > self.part_bytes:
                    count = -(-size // self.part_bytes)
                    parts = {
                        f"{n + 1:05d}": f"{self.endpoint}/lfs/{name}/{n + 1:05d}?X-Signature=secret"
                        for n in range(count)
                    }
                    header = {"chunk_size": str(self.part_bytes)} | parts
                    upload = {"href": f"{self.endpoint}/lfs-complete/{name}", "header": header}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.endpoint}/lfs-verify/{name}"}}
            found.append(answer)
        return _json({"transfer": "basic", "objects": found})

    def _receive(self, name: str, part: str, body: bytes) -> tuple[bytes, dict[str, str]]:
        if self.flip > 0:
            self.flip -= 1
            body = _flipped(body)
        self._arriving[name + part] = body
        return b"", {"ETag": f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'}

    def _complete(self, name: str, wanted: dict[str, Any]) -> tuple[bytes, dict[str, str]]:
        body = b""
        for part in wanted["parts"]:
            piece = self._arriving.pop(f"{name}{part['partNumber']:05d}")
            assert part["etag"] == f'"{hashlib.md5(piece, usedforsecurity=False).hexdigest()}"'
            body += piece
        self._arriving[name] = body
        return _json({})

    def _verify(self, name: str, wanted: dict[str, Any]) -> tuple[bytes, dict[str, str]]:
        body = self._arriving.pop(name)
        if len(body) != wanted["size"] or hashlib.sha256(body).hexdigest() != name or wanted["oid"] != name:
            raise RefusedError(422, "the object is not what its name says")
        self.blobs[name] = body
        self.blobs_received.append(name)
        return _json({})

    def _take(self, name: str, repository: Repository, body: bytes) -> tuple[bytes, dict[str, str]]:
        """A commit: its lines are a header, then files with their content or their LFS name, and deletions."""
        files, header = dict(repository.files), {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            match line["key"]:
                case "header":
                    header = value
                case "file":
                    assert value["encoding"] == "base64"
                    files[value["path"]] = self._store(base64.b64decode(value["content"]), lfs=False)
                case "lfsFile":
                    if value["oid"] not in self.blobs:
                        raise RefusedError(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                    files[value["path"]] = self._store(self.blobs[value["oid"]], lfs=True)
                case "deletedFile":
                    if files.pop(value["path"], None) is None:
                        raise RefusedError(404, "A file with this name doesn't exist", "EntryNotFound")
                case other:
                    raise RefusedError(400, f"unknown line {other}")
        if header.get("parentCommit", repository.commits[-1].id) != repository.commits[-1].id:
            raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
        commit = self._commit(repository, header["summary"], files)
        self.after_commit(repository)
        url = f"{self.endpoint}/{name}/commit/{commit.id}"
        return _json({"success": True, "commitOid": commit.id, "commitUrl": url})

    def _commit(self, repository: Repository, title: str, files: dict[str, Entry]) -> Commit:
        before = repository.files if repository.commits else {}
        changed = sorted(name for name in files.keys() | before.keys() if files.get(name) != before.get(name))
        count = sum(len(every.commits) for every in self.repositories.values())
        name = hashlib.sha1(f"{id(repository)} {count} {title}".encode(), usedforsecurity=False).hexdigest()
        repository.commits.append(Commit(name, title, files, changed))
        return repository.commits[-1]

    def _store(self, data: bytes, *, lfs: bool) -> Entry:
        sha256 = hashlib.sha256(data).hexdigest()
        self.blobs[sha256] = data
        in_git = data
        if lfs:
            in_git = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n".encode()
        blob_id = hashlib.sha1(b"blob %d\0" % len(in_git) + in_git, usedforsecurity=False).hexdigest()
        return Entry(sha256, len(data), blob_id, lfs)

    def _resolve(self, repository: Repository, revision: str, path: str) -> tuple[bytes, dict[str, str]]:
        commit = self._at(repository, revision)
        entry = commit.files.get(path)
        if entry is None:
            raise RefusedError(404, "Entry not found", "EntryNotFound")
        etag = entry.sha256 if entry.lfs else entry.blob_id
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit.id}
        if self.cdn is None or not entry.lfs:
            return self.blobs[entry.sha256], headers
        linked = {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(entry.size)}
        link = self.cdn.link(path, self.blobs[entry.sha256])
        raise RefusedError(302, "elsewhere", headers=headers | linked | {"Location": link})


def reach(hub: HubServer, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    """Make it the hub of `huggingface_hub` in this process, with an empty cache in `directory` and no token."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(directory / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(directory / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    files = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{repo_id}")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "".join((hub.endpoint, *files[1:])))
    monkeypatch.delenv("HF_TOKEN", raising=False)


def _nothing(*_: object) -> None:
    pass


def _flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def _json(body: Any) -> tuple[bytes, dict[str, str]]:
    return json.dumps(body).encode(), {"Content-Type": "application/json"}


def _tree(commit: Commit) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for path, entry in commit.files.items():
        found.append({"type": "file", "path": path, "size": entry.size, "oid": entry.blob_id})
        if entry.lfs:
            found[-1]["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": 130}
    return found


def _chunk_store(directory: Path) -> tuple[bytes, dict[str, str]]:
    place, until = f"local://{directory}", int(time.time()) + 3600
    body, headers = _json({"casUrl": place, "accessToken": "chunks", "exp": until})
    named = {"X-Xet-Cas-Url": place, "X-Xet-Access-Token": "chunks", "X-Xet-Token-Expiration": str(until)}
    return body, headers | named


def _validate(content: str) -> tuple[bytes, dict[str, str]]:
    if content.startswith("---\n") and "\n---\n" not in content[3:]:
        raise RefusedError(400, "front matter has no end")
    return _json({"errors": [], "warnings": []})


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Small answers must not wait for the client to acknowledge the headers.
        disable_nagle_algorithm = True

        def log_message(self, *arguments: object) -> None:
            pass

        def handle_any(self) -> None:
            path = urlsplit(self.path).path
            hub.requests.append((self.command, path))
            fault = hub.fault(self.command, path)
            if fault == CUT:
                self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            body = b"".join(self.body())
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            try:
                if fault not in (None, LOST):
                    status, (answer, headers) = fault, _json({"error": "out of order"})
                else:
                    status, (answer, headers) = 200, hub.answer(self.command, self.path, token, body)
            except RefusedError as refused:
                status, said = refused.status, {"error": str(refused)} | refused.facts
                if path.endswith("validate-yaml"):
                    said = {"errors": [{"message": str(refused)}]}
                answer, headers = _json(said)
                headers |= {"X-Error-Message": str(refused)} | ({"X-Error-Code": refused.code} if refused.code else {})
                headers |= refused.headers
            headers |= hub.answer_with
            wanted = self.headers.get("Range") if self.command == "GET" and "/resolve/" in path else None
            if status == 200 and wanted is not None:
                hub.ranges.append(Sent.of(path.rpartition("/")[2], wanted, len(answer)))
                if hub.answers_ranges:
                    status, headers, answer = hub.ranges[-1].answer(headers, answer)
            if fault == LOST:
                self.close_connection = True
                return
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer)

        def body(self) -> Iterator[bytes]:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                yield self.rfile.read(int(self.headers.get("Content-Length") or 0))
                return
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()

        do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

    return Handler
