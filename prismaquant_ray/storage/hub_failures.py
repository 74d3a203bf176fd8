"""Diagnosing errors of the hub's client, in one line without the token."""

from __future__ import annotations

import re

from huggingface_hub import get_token
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is that of httpx or httpx2
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from prismaquant_ray.storage.failures import Problem, clean, short

#: Exceptions of requests. RuntimeErrors of an upload and of the native uploader wrap one of these.
HUB_FAILURES: tuple[type[Exception], ...] = (HTTPError, OSError)
_AGAIN = "run the same command again to continue"
_LIMIT = 120


def diagnose_hub(error: BaseException) -> Problem:
    """The cause of an error, a remedy, and whether it is transient."""
    cause = request_error(error)
    if isinstance(cause, OfflineModeIsEnabled):
        return Problem("HF_HUB_OFFLINE is set", "unset it to publish", input=True)
    if isinstance(cause, HfHubHTTPError):
        return _answered(cause)
    if isinstance(cause, HTTPError):
        return Problem(silence(cause), f"check the network and HF_ENDPOINT, then {_AGAIN}", passing=True)
    return _elsewhere(error.__cause__ or error)


def _elsewhere(error: BaseException) -> Problem:
    """A local failure, or one of the native uploader, whose errors have the HTTP status only in their text."""
    text = tidy(str(error))
    if refused := re.search(r"client error \((4\d\d)", text):
        remedy = f"set HF_HUB_DISABLE_XET=1 if this hub has no xet storage, and {_AGAIN}"
        return Problem(f"the native uploader met HTTP {refused[1]}", remedy, passing=refused[1] in ("408", "429"))
    # Python's file errors have an errno and are permanent; those of the native uploader have none.
    passing = not isinstance(error, OSError) or error.errno is None
    return Problem(f"{type(error).__name__}: {short(text, _LIMIT)}", _AGAIN, passing=passing)


def request_error(error: BaseException) -> BaseException:
    """The request error behind an error, or the error itself."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HTTPError | OfflineModeIsEnabled):
        cause = cause.__cause__
    return error if cause is None else cause


def _answered(error: HfHubHTTPError) -> Problem:
    status = error.response.status_code
    said = short(tidy(error.server_message or ""), _LIMIT)
    shown = f"HTTP {status}: {said}" if said else f"HTTP {status}"
    if isinstance(error, GatedRepoError):
        return Problem("the repository is gated and this account has no access", "use an account that has", input=True)
    if isinstance(error, RepositoryNotFoundError):
        return Problem("no such repository for this account", "check the name and whose token is used", input=True)
    if status == 401:
        return Problem(f"the token is not accepted ({shown})", "hf auth login, or correct HF_TOKEN", input=True)
    if status == 403:
        return Problem(f"not permitted ({shown})", "use a token that may write there, or another name", input=True)
    if status == 400:
        return Problem(f"the hub refuses it ({shown})", "correct what it names", input=True)
    if status in (409, 412):
        return Problem(f"the repository was changed meanwhile ({shown})", _AGAIN)
    passing = status in (408, 429) or (status >= 500 and status != 501)
    return Problem(f"the hub answers {shown}", _AGAIN, passing=passing)


def silence(error: BaseException) -> str:
    """Why a request had no answer."""
    text = str(error)
    if re.search(r"Name or service not known|nodename|getaddrinfo|name resolution", text):
        return "the hub has no address (host name not found)"
    if "refused" in text:
        return "the hub is not there (connection refused)"
    if "imeout" in type(error).__name__ or "timed out" in text:
        return "the hub does not answer (timed out)"
    return "the hub cannot be reached or cut the connection"


def tidy(text: str) -> str:
    """One line without the token and without query parameters of signed URLs."""
    token = get_token()
    if token:
        text = text.replace(token, "…")
    return clean(re.sub(r"(https?://[^\s?]+)\?\S+", r"\1?…", text))
