"""Grammars that an answer must follow, as the text that the worker compiles (llguidance's serialized form).

Owns the building of that text, its check, and the verdicts on texts seen lately. Knows nothing of requests; importing
it does not import torch.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from llguidance import LLMatcher, LLTokenizer, regex_to_lark

from servd.engine.json_schema import OWN_KEYWORD, bound_integers, check_keywords
from servd.errors import InvalidRequestError, OverloadedError, UnsupportedError
from servd.grammar import (
    LIMITS,
    MAX_GRAMMAR_CHARS,
    GrammarError,
    compile_grammar,
    fill_mask,
    load_vocabulary,
    reason_of,
)
from servd.sampling_params import is_utf8

ANY_JSON_OBJECT: Mapping[str, Any] = {"type": "object"}
# JSON on one line, with or without a space behind commas and colons: no model can write whitespace for ever.
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
MAX_VERDICTS = 4096
MAX_PENDING = 64  # checks; each takes 1 ms, at the limits some 0.3 s


def from_json_schema(schema: Mapping[str, Any], *, param: str = "guidance") -> str:
    """Answers are JSON that follows `schema`, properties in its order. Raises InvalidRequestError, blaming `param`.

    Integers without limits stay within 2^53. Annotations such as `title` are fine; keywords that cannot be honoured
    are refused by the check.
    """
    if not isinstance(schema, Mapping):
        raise InvalidRequestError(f"{param} is {type(schema).__name__}; allowed: a JSON schema (object)", param=param)
    if OWN_KEYWORD in schema:
        raise UnsupportedError(f"{param} holds {OWN_KEYWORD!r}, which clients cannot set", param=param)
    try:
        own = msgspec.json.decode(msgspec.json.encode(schema))
        bound_integers(own)
        data = msgspec.json.encode({"grammars": [{"json_schema": {**own, OWN_KEYWORD: JSON_STYLE}}]})
    except (RecursionError, OverflowError, TypeError, ValueError) as error:
        raise InvalidRequestError(f"{param} is no JSON schema: {error}", param=param) from None
    return data.decode()


def from_regex(pattern: str, *, param: str = "guidance") -> str:
    r"""Answers match `pattern` as a whole (Rust's regex syntax without look-around; \d, \w and \s are ASCII)."""
    if not isinstance(pattern, str) or not is_utf8(pattern) or (len(pattern) - len(pattern.rstrip("\\"))) % 2:
        raise InvalidRequestError(f"{param} is {str(pattern)[:100]!r}; allowed: a regular expression", param=param)
    return from_lark(f"start: /{regex_to_lark(pattern, 'dws')}/")


def from_choice(texts: Sequence[str], *, param: str = "guidance") -> str:
    """Answers are one of `texts`. Raises InvalidRequestError, blaming `param`."""
    if isinstance(texts, str) or not texts or not all(isinstance(text, str) for text in texts):
        raise InvalidRequestError(f"{param} is {str(texts)[:100]!r}; allowed: at least one string", param=param)
    return from_lark("start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts))


def from_lark(grammar: str) -> str:
    """Answers follow a grammar in llguidance's Lark dialect."""
    return json.dumps({"grammars": [{"lark_grammar": grammar}]}, ensure_ascii=False)


class GuidanceChecker:
    """Judges grammars on a thread of its own, once each. Belongs to one event loop.

    A text that passed compiles in the worker as well: both use the same limits and the same vocabulary.
    """

    def __init__(self, tokenizer_path: Path, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        """The tokenizer is read when the first grammar comes; if there is no such file, no vocabulary is looked at."""
        self._tokenizer_path = tokenizer_path
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._vocabulary: LLTokenizer | None = None  # the thread's
        self._verdicts: OrderedDict[bytes, InvalidRequestError | None] = OrderedDict()  # by hash; the last used last
        self._pending: dict[bytes, asyncio.Future[InvalidRequestError | None]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="servd-grammar-check")

    async def check(self, text: str, param: str) -> None:
        """Raise InvalidRequestError or UnsupportedError, blaming `param`, unless answers can follow `text`.

        Raises OverloadedError if too many checks are waiting.
        """
        _check_size(text, param)
        key = _key(text)
        if key not in self._verdicts:
            pending = self._pending.get(key)
            if pending is None:
                if len(self._pending) >= MAX_PENDING:
                    raise OverloadedError(f"{MAX_PENDING} grammars are waiting to be checked")
                pending = asyncio.get_running_loop().run_in_executor(self._thread, self._judge, text)
                self._pending[key] = pending
                pending.add_done_callback(lambda done: self._judged(key, done))
            verdict = await asyncio.shield(pending)
        else:
            verdict = self._verdict(key)
        _raise(verdict, param)

    def require(self, text: str, param: str) -> None:
        """Raise InvalidRequestError unless `check` has let this text pass; never waits."""
        _check_size(text, param)
        key = _key(text)
        if key not in self._verdicts:
            raise InvalidRequestError(f"{param}: the grammar was not checked (see check_guidance)", param=param)
        _raise(self._verdict(key), param)

    def _verdict(self, key: bytes) -> InvalidRequestError | None:
        self._verdicts.move_to_end(key)
        return self._verdicts[key]

    def close(self) -> None:
        """Drop the checks that have not begun."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _judged(self, key: bytes, done: asyncio.Future[InvalidRequestError | None]) -> None:
        del self._pending[key]
        if not done.cancelled() and done.exception() is None:
            self._verdicts[key] = done.result()
            if len(self._verdicts) > MAX_VERDICTS:
                self._verdicts.popitem(last=False)

    def _judge(self, text: str) -> InvalidRequestError | None:
        """What is wrong with the text, if anything is; runs in the thread."""
        try:
            if not self._eos_token_ids:
                raise UnsupportedError("the model has no end-of-text token to end an answer with")
            _check_schemas(text)
            self._compile(text)
        except InvalidRequestError as error:
            return error
        except GrammarError as error:
            words = str(error)
            is_unsupported = any(mark in words for mark in ("Unimplemented", "not supported", "Unknown format"))
            return (UnsupportedError if is_unsupported else InvalidRequestError)(words)
        return None

    def _compile(self, text: str) -> None:
        if not self._tokenizer_path.is_file():
            is_error, messages = LLMatcher.validate_grammar_with_warnings(text, limits=LIMITS)
            if is_error:
                raise GrammarError(reason_of(messages[0]))
            return
        if self._vocabulary is None:
            self._vocabulary = load_vocabulary(self._tokenizer_path, self._vocab_size, sorted(self._eos_token_ids))
        matcher = compile_grammar(text, self._vocabulary)
        fill_mask(matcher, np.zeros(-(-self._vocab_size // 32), np.int32))


def _check_schemas(text: str) -> None:
    try:
        found = json.loads(text)
        grammars = found["grammars"]
        schemas = [grammar["json_schema"] for grammar in grammars if grammar.get("json_schema") is not None]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise InvalidRequestError("it is no grammar in llguidance's serialized form") from None
    for schema in schemas:
        if isinstance(schema, dict) and schema.get(OWN_KEYWORD, JSON_STYLE) != JSON_STYLE:
            raise UnsupportedError(f"it sets {OWN_KEYWORD!r}, which clients cannot")
        check_keywords(schema)


def _check_size(text: str, param: str) -> None:
    if len(text) > MAX_GRAMMAR_CHARS:
        raise InvalidRequestError(
            f"{param} has {len(text)} characters as a grammar; allowed: at most {MAX_GRAMMAR_CHARS}", param=param
        )


def _key(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _raise(verdict: InvalidRequestError | None, param: str) -> None:
    if verdict is not None:
        raise type(verdict)(f"{param}: {verdict.message}", param=param)
