"""The meaning of a backend's errors, in one line without credentials.

Status and code are parsed from the text of obstore's errors, which have no fields for them.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from obstore.exceptions import BaseError

from prismaquant_ray.errors import InputError, PrismaquantError, StoreError

#: Exceptions that backends raise.
FAILURES = (BaseError, OSError)

_SECRETS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_BEARER_TOKEN",
    "GOOGLE_SERVICE_ACCOUNT_KEY",
)
_MESSAGE_LIMIT = 300
_WRONG_CREDENTIALS = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "InvalidToken",
    "ExpiredToken",
    "TokenRefreshRequired",
    "InvalidClientTokenId",
    "InvalidSecurity",
}
_NOT_PERMITTED = {"AccessDenied", "AllAccessDisabled", "AccountProblem", "Forbidden"}
_PASSING = {
    "SlowDown",
    "InternalError",
    "ServiceUnavailable",
    "RequestTimeout",
    "IncompleteBody",
    "OperationAborted",
    "ConditionalRequestConflict",
    "NoSuchUpload",  # lost answer to a completion, or expired upload: repeated as a whole
}
# Where the clients look for credentials when the environment has none.
_METADATA_SERVERS = ("169.254.169.254", "169.254.170.2", "metadata.google.internal")


@dataclass(frozen=True, slots=True)
class Problem:
    """The meaning of a backend's error: `input` if the user's input is at fault, `passing` if waiting may help.

    `wait`: seconds after which the server wants to be asked again.
    """

    reason: str
    remedy: str = ""
    input: bool = False
    passing: bool = False
    wait: float = 0.0


class UploadInterruptedError(StoreError):
    """An upload that stopped for a reason that may have passed."""


def diagnose_store(error: BaseException) -> Problem:
    """The meaning of an error of obstore or of the file system."""
    text = str(error)
    code = _found(r"<Code>(\w+)</Code>", text) or _found(r"\(code: (\w+)\)", text)
    status = int(_found(r"status code: (\d{3})", text) or 0)
    said = _found(r"<Message>(.*?)</Message>", text)
    shown = ": ".join(part for part in (code or (f"HTTP {status}" if status else ""), short(said, 100)) if part)
    if any(server in text for server in _METADATA_SERVERS):
        return Problem(
            "there are no credentials in the environment",
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or GOOGLE_APPLICATION_CREDENTIALS for gs://",
            input=True,
        )
    if code in _WRONG_CREDENTIALS or status == 401:
        remedy = "correct AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN (Google: the key file)"
        return Problem(f"wrong or expired credentials ({code or shown})", remedy, input=True)
    if code == "NoSuchBucket":
        return Problem("the bucket does not exist", "create it, or correct the name and AWS_ENDPOINT_URL", input=True)
    if code in _NOT_PERMITTED or status == 403:
        return Problem(f"not permitted ({shown})", "give these credentials that right, or use others", input=True)
    if code == "PermanentRedirect" or status in (301, 307):
        return Problem(f"the bucket is in another region ({shown})", "set AWS_REGION to the bucket's", input=True)
    if code in _PASSING or status in (408, 429) or (status >= 500 and status != 501):
        return Problem(f"the server answers {shown}", "run the same command again later", passing=True)
    if status or code:
        return Problem(f"the server answers {shown}", "see its documentation")
    if "HTTP error" in text or "error decoding response body" in text:
        remedy = "check AWS_ENDPOINT_URL and the network, then run the same command again"
        return Problem(f"the server {_silence(text)}", remedy, passing=True)
    return Problem(text.partition("\n")[0])


def _silence(text: str) -> str:
    """Why there was no answer, from the causes that obstore lists below its message."""
    if re.search(r"dns error|failed to lookup", text):
        return "has no address (host name not found)"
    if "Connection refused" in text or "ConnectionRefused" in text:
        return "is not there (connection refused)"
    if re.search(r"TimedOut|timed out", text):
        return "does not answer (timed out)"
    return "cannot be reached or cut the connection"


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.DOTALL)
    return match[1] if match else ""


def clean(text: str) -> str:
    """One line without credentials."""
    for secret in map(os.environ.get, _SECRETS):
        text = text.replace(secret, "…") if secret else text
    text = re.sub(r"\b(AKIA|ASIA)[A-Z0-9]{12,}", "…", text)
    return " ".join(text.split())


def short(text: str, limit: int) -> str:
    """At most `limit` characters, cut off with …."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def to_error(uri: str, what: str, problem: Problem, kind: type[PrismaquantError] = StoreError) -> PrismaquantError:
    """The exception to raise: InputError when the input is to blame, else `kind`; one line of bounded length."""
    reason = clean(problem.reason)
    tail = f"; {problem.remedy}" if problem.remedy else ""
    place = short(f"{uri}: {what}", _MESSAGE_LIMIT - 100)
    room = max(40, _MESSAGE_LIMIT - len(place) - len(tail) - 3)
    return (InputError if problem.input else kind)(f"{place} ({short(reason, room)}){tail}")


def is_missing(error: BaseException) -> bool:
    """Whether an object does not exist; that its bucket does not is another matter."""
    return isinstance(error, FileNotFoundError) and "NoSuchBucket" not in str(error)
