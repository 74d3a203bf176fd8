"""One model repository on the Hugging Face hub, through huggingface_hub, with retries for a bounded time."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_session, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, but in no __all__
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    hf_raise_for_status,
    validate_repo_id,
)
from huggingface_hub.utils.logging import get_verbosity, set_verbosity

from prismaquant_ray.errors import InputError, StoreError
from prismaquant_ray.publishing.finished import File
from prismaquant_ray.storage.hub_failures import HUB_FAILURES, diagnose_hub, tidy
from prismaquant_ray.storage.retry import retried
from prismaquant_ray.storage.store import CHECK_SECONDS, RETRY_SECONDS

# Read timeout in seconds. A commit of many files may take a minute.
_SILENCE = 120.0
_CONNECT = 10.0
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file as the hub lists it; `sha256` for LFS files, else None."""

    size: int | None
    sha256: str | None
    blob_id: str | None

    def is_same(self, file: File) -> bool:
        """Whether its size and digest are those of a file."""
        digest = self.blob_id == file.blob_id if self.sha256 is None else self.sha256 == file.sha256
        return digest and self.size == file.size


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """A repository at one commit; `commit` is None for an empty one."""

    commit: str | None
    private: bool
    files: Mapping[str, RemoteFile]


class HubRepository:
    """Client for `hf://org/name`. Calls retry transient failures for `seconds`.

    Raises:
        InputError: the token, the name or the rights are wrong.
        StoreError: the hub failed until the end of the retries.
    """

    def __init__(self, uri: str, api: HfApi, *, seconds: float = RETRY_SECONDS) -> None:
        self.uri = uri
        self.id = repository_id(uri)
        self.api = api
        self._seconds = seconds
        self._silence = min(_SILENCE, max(_CONNECT, seconds))

    def hasty(self) -> HubRepository:
        """A copy for checks while somebody waits; it gives up within about 20 seconds."""
        return HubRepository(self.uri, self.api, seconds=min(self._seconds, CHECK_SECONDS))

    @property
    def url(self) -> str:
        """Address of the repository for people."""
        return f"{self.api.endpoint}/{self.id}"

    def check_token(self) -> frozenset[str] | None:
        """The owners for which the token may create repositories; None if unknown.

        Raises:
            InputError: there is no valid token, or it is read-only.
        """
        token = self.api.token
        if token is False or not (isinstance(token, str) or get_token()):
            raise InputError(
                f"{self.uri}: there is no Hugging Face token; hf auth login, or set HF_TOKEN to one that may write"
            )
        account = self._ask("the token cannot be checked", self.api.whoami)
        access = (account.get("auth") or {}).get("accessToken") or {}
        if access.get("role") == "read":
            raise InputError(f"{self.uri}: the Hugging Face token may only read; use one that may write")
        if access.get("role") != "write":  # the hub does not list all organizations of a fine-grained token
            return None
        return frozenset([account["name"], *(entry["name"] for entry in account.get("orgs") or ())])

    def look(self) -> Snapshot | None:
        """The current state of the repository; None if it does not exist or is not visible to this account."""

        def ask() -> Snapshot | None:
            try:
                info = self.api.model_info(self.id, files_metadata=True, timeout=self._silence)
            except RepositoryNotFoundError as error:
                if error.response.status_code == 404:
                    return None
                raise
            files = {
                entry.rfilename: RemoteFile(entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)
                for entry in info.siblings or ()
            }
            return Snapshot(commit=info.sha, private=bool(info.private), files=files)

        return self._ask("cannot be looked at", ask)

    def create(self) -> None:
        """Create the repository as private."""
        self._ask("cannot be created", lambda: self.api.create_repo(self.id, private=True, exist_ok=True))

    def make_public(self) -> None:
        """Make the repository public."""
        self._ask("cannot be made public", lambda: self.api.update_repo_settings(self.id, private=False))

    def get(self, name: str, commit: str | None) -> bytes:
        """The bytes of a small file at a commit."""

        def fetch() -> bytes:
            with tempfile.TemporaryDirectory(prefix="prismaquant-") as directory:
                return Path(self.api.hf_hub_download(self.id, name, revision=commit, local_dir=directory)).read_bytes()

        return self._ask(f"{name} cannot be read", fetch)

    def upload(self, operation: CommitOperationAdd) -> None:
        """Upload a large file for a later commit; skipped if the hub has it already."""

        def send() -> None:
            try:
                self.api.preupload_lfs_files(self.id, additions=[operation])
            except HUB_FAILURES:
                raise
            except ValueError as error:  # the client could not parse the answer
                raise StoreError(f"{self.uri}: {operation.path_in_repo} cannot be sent ({tidy(str(error))})") from None

        self._ask(f"{operation.path_in_repo} cannot be sent", send, (*HUB_FAILURES, RuntimeError))

    def check_card(self, readme: str) -> None:
        """Raise InputError if the hub refuses the front matter of this README.md."""

        def ask() -> None:
            body = {"content": readme, "repoType": "model"}
            hf_raise_for_status(get_session().post(f"{self.api.endpoint}/api/validate-yaml", json=body))

        self._ask("README.md cannot be checked", ask)

    def commit(
        self, message: str, additions: Iterable[CommitOperationAdd], removed: Iterable[str], parent: str | None
    ) -> None:
        """Add and remove files in one commit on `parent`; the caller must check the result.

        Raises:
            InputError: the hub refuses the front matter of README.md.
            StoreError: there is another commit after `parent`.
        """
        operations: list[CommitOperationAdd | CommitOperationDelete] = [*additions]
        operations += (CommitOperationDelete(name, is_folder=False) for name in removed)
        unanswered = False

        def attempt() -> None:
            nonlocal unanswered
            if unanswered:
                # The answer may have been lost, not the commit.
                now = self.look()
                if now is not None and now.commit != parent:
                    return
            try:
                self.api.create_commit(self.id, operations, commit_message=message, parent_commit=parent)
            except HUB_FAILURES:
                unanswered = True
                raise
            except ValueError as error:
                raise InputError(
                    f"{self.uri}: the hub refuses it ({tidy(str(error))}); correct what it names"
                ) from None

        self._ask("cannot be committed to", attempt, (*HUB_FAILURES, RuntimeError))

    def _ask(self, what: str, call: Callable[[], _T], failures: tuple[type[Exception], ...] = HUB_FAILURES) -> _T:
        def attempt() -> _T:
            # The client has no timeout by default, and may be a new one.
            session = get_session()
            session.timeout = type(session.timeout)(self._silence, connect=_CONNECT)
            return call()

        return retried(
            attempt, uri=self.uri, what=what, failures=failures, diagnose=diagnose_hub, seconds=self._seconds
        )


def repository_id(uri: str) -> str:
    """org/name of hf://org/name; raises InputError for anything else."""
    name = uri.removeprefix("hf://").rstrip("/")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        reason = str(error).partition(":")[0].rstrip(".")
        raise InputError(f"{uri} is no name of a repository ({reason}); give hf://org/name") from None
    if "/" not in name:
        raise InputError(f"{uri} names no owner; give hf://org/name, with your user name or an organization")
    return name


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the client's progress bars and warnings, which contain signed URLs."""
    bars, verbosity = not are_progress_bars_disabled(), get_verbosity()
    set_verbosity(logging.ERROR)
    disable_progress_bars()
    try:
        yield
    finally:
        set_verbosity(verbosity)
        if bars:
            enable_progress_bars()
