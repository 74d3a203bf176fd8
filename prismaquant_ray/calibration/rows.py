"""Rows of text or chat as token sequences.

A chat is rendered by the tokenizer's own template, and no special token is added to what the template wrote: servers do
the same. A text gets what the tokenizer begins and ends a document with, see `document`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prismaquant_ray.calibration.files import loading
from prismaquant_ray.calibration.reading import RawRow
from prismaquant_ray.calibration.text import first_tokens, token_ids
from prismaquant_ray.errors import InputError
from prismaquant_ray.parsing import MalformedError, parse_json, parse_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FIELDS = ("text", "prompt", "completion", "messages")
FORMS = "text, prompt and completion, or messages"


def document(where: str, raw: RawRow, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a row, with its own special tokens exactly once; none where it has no text.

    Raises:
        InputError: it is no such row, or the tokenizer cannot render it.
    """
    row = _parsed(where, raw)
    if all(row.get(key) is None for key in _FIELDS) and any(key in row for key in _FIELDS):
        return []  # of a table
    messages = _messages(where, row)
    if messages is not None:
        return _chat(where, row, messages, tokenizer) if messages else []
    text = row["text"]
    if not isinstance(text, str):
        raise InputError(f"{where}: text is no string; write rows with {FORMS}")
    return _bounded(token_ids(tokenizer, text, add_special_tokens=False), tokenizer) if text.strip() else []


def _bounded(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A document between the token that the tokenizer begins texts with, if any, and EOS; neither one twice."""
    start, end = first_tokens(tokenizer), tokenizer.eos_token_id
    begun = ids if not start or ids[:1] == start else [*start, *ids]
    return begun if end is None or begun[-1:] == [end] else [*begun, end]


def _parsed(where: str, raw: RawRow) -> dict[str, Any]:
    if not isinstance(raw, str):
        return dict(raw)
    try:
        return parse_object(raw)
    except MalformedError as error:
        raise InputError(f"{where} {error}; write one JSON object a line, with {FORMS}") from error


def _messages(where: str, row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The messages of a row that is a chat, None for one that is a text."""
    if row.get("messages") is not None:
        return _checked(where, "messages", row["messages"])
    halves = [row.get(key) for key in ("prompt", "completion")]
    if all(half is not None for half in halves):
        joined: list[dict[str, Any]] = []
        for key, role, half in zip(("prompt", "completion"), ("user", "assistant"), halves, strict=True):
            if not isinstance(half, str):
                joined += _checked(where, key, half)
            elif half.strip():
                joined.append({"role": role, "content": half})
        return joined
    if row.get("text") is None:
        lacking = [key for key, half in zip(("prompt", "completion"), halves, strict=True) if half is None]
        if len(lacking) == 1:
            raise InputError(f"{where}: there is no {lacking[0]}; write rows with {FORMS}")
        known = ", ".join(sorted(map(str, row))[:8]) or "nothing"
        raise InputError(f"{where}: has {known}; write rows with {FORMS}")
    return None


def _checked(where: str, key: str, found: object) -> list[dict[str, Any]]:
    if not isinstance(found, list | tuple):
        raise InputError(f'{where}: {key} is no list; write [{{"role": "user", "content": "…"}}, …]')
    for message in found:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f'{where}: a message in {key} has no role; write {{"role": "user", "content": "…"}}')
    return [_without_nulls(message) for message in found]


def _without_nulls(value: Any) -> Any:
    """Without the keys that are null: tables have every key in every row, and templates ask whether one is there."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None or key == "content"}
    return [_without_nulls(each) for each in value] if isinstance(value, list | tuple) else value


def _chat(
    where: str, row: Mapping[str, Any], messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    if not has_template(tokenizer):
        raise InputError(
            f"{where}: is a chat, and the tokenizer of {tokenizer.name_or_path} has no chat template; add its "
            "chat_template.jinja, or give rows with text"
        )
    tools = row.get("tools") or None
    if isinstance(tools, str):  # tables have them as JSON
        try:
            tools = parse_json(tools) or None
        except MalformedError as error:
            raise InputError(f"{where}: tools {error}") from error
    if not (tools is None or isinstance(tools, list | tuple)):
        raise InputError(f"{where}: tools is no list; give the schemas of functions")
    with loading(lambda error: f"{where}: the chat template does not take it ({' '.join(str(error).split())[:200]})"):
        rendered = tokenizer.apply_chat_template(messages, tools=_without_nulls(tools), tokenize=False)
    text = str(rendered)
    return token_ids(tokenizer, text, add_special_tokens=False) if text.strip() else []


def has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer can render chats."""
    return bool(tokenizer.chat_template)
