"""Byte ranges of one file on the Hugging Face hub: neighbours in one request, redirects by hand, bounded retries.

The hub sends readers of weights to another server by a signed link, which is kept until that server refuses it. The
token goes to the hub alone. Connections are those of huggingface_hub: one pool a process.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from huggingface_hub import get_session
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is that of httpx or httpx2
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented, but in no __all__

from prismaquant_ray.errors import StoreError
from prismaquant_ray.storage.failures import Problem, short
from prismaquant_ray.storage.hub_failures import HUB_FAILURES, request_error, silence, tidy
from prismaquant_ray.storage.retry import retried

if TYPE_CHECKING:
    from collections.abc import Mapping

    from typing_extensions import Buffer

#: Bytes of one request at most, but for gaps; larger tensors are read by several at a time.
REQUEST_BYTES = 1 << 25
#: Ranges that are no farther apart are read together.
GAP_BYTES = 1 << 20
_AT_ONCE = 8
_REDIRECTS = 5
# Seconds without a byte.
_SILENCE = 30.0
# Seconds that one answer may take; a server that sends a byte at a time would never be silent.
_LONGEST = 1800.0
_MOVED = (301, 302, 303, 307, 308)
# A signed link that is too old, or whose file is elsewhere by now.
_EXPIRED = (401, 403, 404, 410)
_ADDRESS = re.compile(r"https?://(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\])(?::\d{1,5})?(?:[/?][\x21-\x7e]{0,8000})?")
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_AGAIN = "run the same command again later"


class NoRangesError(StoreError):
    """The server of a file answers with all of it, or refuses to answer a part."""


class _RefusedError(Exception):
    """An answer without the bytes."""

    def __init__(self, status: int, headers: Mapping[str, str], *, hub: bool) -> None:
        super().__init__(f"HTTP {status}")
        self.status = status
        self.headers = headers
        self.hub = hub


class _InterruptedError(Exception):
    """An answer that ended early."""


#: What is retried or told in one line.
READ_FAILURES: tuple[type[Exception], ...] = (*HUB_FAILURES, _RefusedError, _InterruptedError)


@dataclass(frozen=True, slots=True)
class _Part:
    """Bytes of a file that belong into `target`."""

    start: int
    stop: int
    target: memoryview


class RangedFile:
    """A file of one commit of a repository; safe for threads.

    `url` is the hub's, `uri` and `name` are for errors, `page` is the repository's for people. `size` is what the hub
    lists: another one is an error.
    """

    def __init__(self, url: str, *, uri: str, name: str, page: str, size: int, seconds: float) -> None:
        self._url = url
        self._uri = uri
        self._name = name
        self._page = page
        self._size = size
        self._seconds = seconds
        self._link: str | None = None

    def get_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[Buffer]:
        """Bytes [start, stop) of each range.

        Raises:
            InputError: this account may not read the file.
            NoRangesError: the server does not answer ranges.
            StoreError: the file is shorter, has another size than the hub lists, or cannot be read.
        """
        if not all(0 <= start <= stop <= self._size for start, stop in ranges):
            raise StoreError(f"{self._uri}: {self._name} is shorter than its header says; fetch it again")
        found = [bytearray(stop - start) for start, stop in ranges]
        requests = [*_requests(ranges, found)]
        if len(requests) <= 1:
            for parts in requests:
                self._read(parts)
            return [*found]
        with ThreadPoolExecutor(min(_AT_ONCE, len(requests)), thread_name_prefix="hub") as pool:
            for _ in pool.map(self._read, requests):
                pass
        return [*found]

    def _read(self, parts: Sequence[_Part]) -> None:
        retried(
            lambda: self._attempt(parts),
            uri=self._uri,
            what=f"{self._name} cannot be read",
            failures=READ_FAILURES,
            diagnose=lambda error: diagnose_reading(error, self._page),
            seconds=self._seconds,
        )

    def _attempt(self, parts: Sequence[_Part]) -> None:
        try:
            self._ask_anywhere(parts)
        except RuntimeError as error:
            # huggingface_hub makes a new client where one of its own calls found no connection.
            if "closed" not in str(error):
                raise
            raise _InterruptedError("the connection was closed") from None

    def _ask_anywhere(self, parts: Sequence[_Part]) -> None:
        """By the link of an earlier answer, or by the hub's where that has expired."""
        link = self._link
        if link is not None:
            try:
                self._ask(link, parts)
            except _RefusedError as refusal:
                if refusal.status not in _EXPIRED:
                    raise
                self._link = None
            else:
                return
        self._ask(self._url, parts)

    def _ask(self, url: str, parts: Sequence[_Part]) -> None:
        """Fill the parts from an address or where it leads."""
        start, stop = parts[0].start, max(part.stop for part in parts)
        for _ in range(_REDIRECTS + 1):
            hub = _origin(url) == _origin(self._url)
            headers = build_hf_headers() | {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
            if not hub:
                headers.pop("authorization", None)
            with _answer(url, headers) as response:
                status = response.status_code
                if status >= 300:
                    _drain(response)
                if status in _MOVED:
                    url = self._next(url, response.headers.get("location") or "")
                    continue
                if status in (200, 501):
                    raise NoRangesError(
                        f"{self._uri}: the server of {self._name} does not answer byte ranges; fetch the model first: "
                        f"hf download {self._page.partition('://')[2].partition('/')[2]}"
                    )
                if status != 206:
                    raise _RefusedError(status, response.headers, hub=hub)
                self._check(response.headers, start, stop)
                _fill(response.iter_raw(), start, stop, parts)
                self._link = url if url != self._url else None
                return
        raise StoreError(f"{self._uri}: {self._name} cannot be read (more than {_REDIRECTS} redirects); {_AGAIN}")

    def _next(self, url: str, location: str) -> str:
        """Where a redirect leads; StoreError unless to HTTP."""
        try:
            found = urljoin(url, location)
            fits = _ADDRESS.fullmatch(found) is not None and (urlsplit(found).port or 0) < 1 << 16
        except ValueError:
            found, fits = "", False
        if not location or not fits:
            raise StoreError(f"{self._uri}: {self._name} cannot be read (the hub redirects to no HTTP address)")
        return found

    def _check(self, headers: Mapping[str, str], start: int, stop: int) -> None:
        """StoreError unless the answer has the bytes asked for, of a file as large as the hub lists."""
        match = _CONTENT_RANGE.fullmatch(headers.get("content-range", ""))
        if match is None or (int(match[1]), int(match[2]) + 1) != (start, stop):
            raise StoreError(f"{self._uri}: {self._name} cannot be read (the answer has other bytes than asked for)")
        if int(match[3]) != self._size:
            raise StoreError(
                f"{self._uri}: {self._name} has {int(match[3]):,} bytes, the hub lists {self._size:,}; {_AGAIN}"
            )
        if headers.get("content-encoding", "identity") != "identity":
            raise StoreError(f"{self._uri}: {self._name} cannot be read (the answer is compressed)")


def _requests(ranges: Sequence[tuple[int, int]], buffers: Sequence[bytearray]) -> Iterator[list[_Part]]:
    """Parts by request, in the order of the file."""
    parts = [
        _Part(at, end, memoryview(buffer)[at - start : end - start])
        for (start, stop), buffer in zip(ranges, buffers, strict=True)
        for at in range(start, stop, REQUEST_BYTES)
        for end in [min(stop, at + REQUEST_BYTES)]
    ]
    group: list[_Part] = []
    reached = 0
    for part in sorted(parts, key=lambda part: part.start):
        far = part.start > reached + GAP_BYTES
        if group and (far or part.stop > group[0].start + REQUEST_BYTES):
            yield group
            group, reached = [], 0
        group.append(part)
        reached = max(reached, part.stop)
    if group:
        yield group


def _fill(chunks: Iterator[bytes], start: int, stop: int, parts: Sequence[_Part]) -> None:
    """Copy the bytes of an answer to where they belong; nothing beyond what was asked for is taken."""
    position, first, begun = start, 0, time.monotonic()
    for chunk in chunks:
        if time.monotonic() > begun + _LONGEST:
            raise _InterruptedError(f"it took longer than {_LONGEST:.0f} s")
        end = min(position + len(chunk), stop)
        # Parts are in the order of their beginnings, and may overlap.
        while first < len(parts) and parts[first].stop <= position:
            first += 1
        for part in parts[first:]:
            if part.start >= end:
                break
            low, high = max(position, part.start), min(end, part.stop)
            if low < high:
                part.target[low - part.start : high - part.start] = chunk[low - position : high - position]
        position += len(chunk)
        if position > stop:
            break
    if position != stop:
        raise _InterruptedError(f"{position - start:,} of {stop - start:,} bytes arrived")


def _answer(url: str, headers: dict[str, str]) -> Any:
    """An answer whose body is not read yet, as a context manager."""
    return get_session().stream("GET", url, headers=headers, follow_redirects=False, timeout=_SILENCE)


def _drain(response: Any) -> None:
    """Read a small body that nobody needs, so that the connection is kept."""
    if re.fullmatch(r"\d{1,5}", response.headers.get("content-length", "")):
        for _ in response.iter_raw():
            pass


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


# Failures ---------------------------------------------------------------------------------------------------------


def diagnose_reading(error: BaseException, page: str) -> Problem:
    """The meaning of an error while reading a repository, whose page for people is `page`."""
    if isinstance(error, _InterruptedError):
        return Problem(f"the answer was cut short: {error}", _AGAIN, passing=True)
    if isinstance(error, _RefusedError):
        return _refused(error.status, error.headers, page, hub=error.hub)
    cause = request_error(error)
    if isinstance(cause, OfflineModeIsEnabled):
        return Problem("HF_HUB_OFFLINE is set", "unset it", input=True)
    if isinstance(cause, HfHubHTTPError) and (answer := getattr(cause, "response", None)) is not None:
        return _refused(answer.status_code, answer.headers, page, hub=True)
    if isinstance(cause, HTTPError) and not isinstance(cause, OSError):
        return Problem(
            silence(cause), "check the network and HF_ENDPOINT, then run the same command again", passing=True
        )
    return Problem(f"{type(error).__name__}: {short(tidy(str(error)), 120)}", _AGAIN)


def _refused(status: int, headers: Mapping[str, str], page: str, *, hub: bool) -> Problem:
    said = short(tidy(headers.get("x-error-message", "")), 80)
    shown = f"HTTP {status}: {said}" if said else f"HTTP {status}"
    code = headers.get("x-error-code", "")
    if status in (408, 429) or status >= 500:
        return Problem(f"the hub answers {shown}", _AGAIN, passing=True, wait=_wanted_pause(headers))
    if not hub:
        return Problem(f"the server that the hub names refuses a link that the hub has just made ({shown})", _AGAIN)
    if code == "GatedRepo":
        remedy = f"accept the terms at {page} and set HF_TOKEN of that account, or run hf auth login"
        return Problem("it is gated, and this account has no access", remedy, input=True)
    if code in ("RevisionNotFound", "EntryNotFound"):
        return Problem(f"the hub has no such revision or file ({shown})", "correct model.revision", input=True)
    if status in (401, 403, 404):
        remedy = "correct the name; of a private one set HF_TOKEN, or run hf auth login"
        return Problem(f"the hub shows this account no such repository ({shown})", remedy, input=True)
    return Problem(f"the hub answers {shown}", _AGAIN)


def _wanted_pause(headers: Mapping[str, str]) -> float:
    """Seconds that a server asks to wait; 0 where it does not."""
    text = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d{1,6}", text):
        return float(text)
    if text:
        try:
            return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
        except ValueError:
            return 0.0
    # The hub's own: "resolvers";r=0;t=55
    match = re.search(r";\s*r=0\s*;\s*t=(\d{1,6})", headers.get("ratelimit", ""))
    return float(match[1]) if match else 0.0
