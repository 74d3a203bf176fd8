"""What publishing did."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """Files that were sent, that were there already, and that an earlier version left and were removed.

    `place` is where people find it; `public` is None where that is not this project's to say.
    """

    place: str
    sent: tuple[str, ...]
    present: tuple[str, ...]
    removed: tuple[str, ...]
    bytes_sent: int
    public: bool | None = None
