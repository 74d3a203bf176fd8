"""Claims about reading ahead: everything is read once, by a thread, and errors rise where a value is taken."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prismaquant_ray.errors import InputError
from prismaquant_ray.model.prefetch import Prefetcher


class Value:
    def __init__(self, key: int) -> None:
        self.key = key


def reading(log: list[tuple[int, int]]) -> Callable[[int], Value]:
    def read(key: int) -> Value:
        log.append((key, threading.get_ident()))
        return Value(key)

    return read


def test_what_is_expected_is_read_by_one_thread_and_only_once() -> None:
    log: list[tuple[int, int]] = []
    prefetcher = Prefetcher(reading(log))
    prefetcher.prefetch([3, 1, 2])
    prefetcher.prefetch([1, 2, 3])
    assert [prefetcher.get(key).key for key in (2, 3, 1)] == [2, 3, 1]
    assert sorted(key for key, _ in log) == [1, 2, 3]
    (thread,) = {thread for _, thread in log}
    assert thread != threading.get_ident()
    # What nobody expected is read where it is asked for, also a second time.
    assert [prefetcher.get(1).key, prefetcher.get(1).key] == [1, 1]
    assert [thread for _, thread in log[3:]] == [threading.get_ident()] * 2


def test_reading_goes_on_while_something_else_is_done() -> None:
    begun, may_end = threading.Event(), threading.Event()

    def read(key: int) -> int:
        begun.set()
        assert may_end.wait(10)
        return key

    prefetcher = Prefetcher(read)
    prefetcher.prefetch([1])
    assert begun.wait(10)
    may_end.set()
    assert prefetcher.get(1) == 1


def test_an_error_rises_where_the_value_is_taken() -> None:
    def read(key: int) -> int:
        raise InputError(f"block {key} is damaged")

    prefetcher = Prefetcher(read)
    prefetcher.prefetch([7])
    with pytest.raises(InputError, match="block 7 is damaged"):
        prefetcher.get(7)


def test_what_is_no_longer_expected_is_let_go_of() -> None:
    kept: list[weakref.ref[Value]] = []

    def read(key: int) -> Value:
        value = Value(key)
        kept.append(weakref.ref(value))
        return value

    prefetcher = Prefetcher(read)
    prefetcher.prefetch([1, 2])
    prefetcher.prefetch([2])
    assert prefetcher.get(2).key == 2
    prefetcher.prefetch([])
    gc.collect()
    assert all(reference() is None for reference in kept)


@given(st.lists(st.one_of(st.lists(st.integers(0, 5), unique=True), st.integers(0, 5)), max_size=12))
def test_any_order_of_expecting_and_taking_gives_what_reading_gives(calls: list[list[int] | int]) -> None:
    prefetcher = Prefetcher(lambda key: key * key)
    for call in calls:
        if isinstance(call, int):
            assert prefetcher.get(call) == call * call
        else:
            prefetcher.prefetch(call)
