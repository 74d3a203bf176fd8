"""Retries: for a bounded time, with exponential back-off and jitter, while the failure may pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from random import SystemRandom
from typing import TypeVar

from prismaquant_ray.storage.failures import Problem, to_error

_T = TypeVar("_T")


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

    Raises:
        InputError, StoreError: about `what` at `uri`, for a failure that `diagnose` does not call passing, and for the
            last one. Other exceptions pass through.
    """
    give_up = time.monotonic() + seconds
    for pause in pauses(longest_pause):
        try:
            return action()
        except failures as error:
            problem = diagnose(error)
            if not problem.passing or time.monotonic() + pause > give_up:
                # Not chained: the client's text may repeat an access key, a signed address or what was signed.
                raise to_error(uri, what, problem) from None
        time.sleep(pause)
    raise AssertionError


def pauses(longest_pause: float) -> Iterator[float]:
    """Exponential back-off with jitter, in seconds; without jitter many workers would come back at once."""
    longest, random = min(0.5, longest_pause), SystemRandom()
    while True:
        yield random.uniform(longest / 2, longest)
        longest = min(2 * longest, longest_pause)
