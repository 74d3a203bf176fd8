"""Retries: for a bounded time, with exponential back-off and jitter, while the failure may pass."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from random import SystemRandom
from typing import TypeVar

from prismaquant_ray.storage.failures import Problem, to_error

_T = TypeVar("_T")
_LOG = logging.getLogger(__name__)
# Seconds of failing after which it is said, and between two such lines.
_QUIET = 10.0


def retried(
    action: Callable[[], _T],
    *,
    uri: str,
    what: str,
    failures: tuple[type[Exception], ...],
    diagnose: Callable[[Exception], Problem],
    seconds: float,
    longest_pause: float = 8.0,
) -> _T:
    """The result of `action`, which is repeated for at most `seconds` while it raises one of `failures`.

    A server that says when to come back is not asked before.

    Raises:
        InputError, StoreError: about `what` at `uri`, for a failure that `diagnose` does not call passing, and for the
            last one. Other exceptions pass through.
    """
    began = told = time.monotonic()
    for least in pauses(longest_pause):
        try:
            return action()
        except failures as error:
            problem, now = diagnose(error), time.monotonic()
            pause = max(least, problem.wait)
            if not problem.passing or now + pause > began + seconds:
                # Not chained: the client's text may repeat an access key, a signed address or what was signed.
                raise to_error(uri, what, problem) from None
            if now - told >= _QUIET:
                told = now
                reason = to_error(uri, what, problem)
                _LOG.warning("%s; tried again for %.0f s more", reason, began + seconds - now)
        time.sleep(pause)
    raise AssertionError


def pauses(longest_pause: float) -> Iterator[float]:
    """Exponential back-off with jitter, in seconds; without jitter many workers would come back at once."""
    longest, random = min(0.5, longest_pause), SystemRandom()
    while True:
        yield random.uniform(longest / 2, longest)
        longest = min(2 * longest, longest_pause)
