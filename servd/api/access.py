"""Who calls, and what that entitles to.

Knows nothing of headers and metadata: transports find the key, this tells whose it is.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
import time
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from servd.api.keys import MAX_KEY_CHARS, KeyEntry, read_keys
from servd.api.rate_limits import Limits
from servd.config import ServerConfig
from servd.errors import AuthenticationError, ConfigError

RELOAD_SECONDS = 1.0  # the key file is looked at no more often

logger = logging.getLogger("servd.access")


@dataclass(frozen=True, slots=True)
class Caller:
    """The holder of an API key, or everybody where none is asked for."""

    name: str = "anonymous"
    tenant: str = ""  # callers of one tenant share cached prefixes, pins and stored answers; others never see them
    models: frozenset[str] | None = None  # None: all
    limits: Limits | None = field(default=None, compare=False)

    def may_use(self, model: str) -> bool:
        """Whether the model is in the key's scope."""
        return self.models is None or model in self.models

    def cache_salt(self, salt: str) -> str:
        """The request's salt, joined with the tenant so that no two pairs give the same."""
        return f"{self.tenant}\0{salt}" if self.tenant or salt else ""  # a tenant's name has no NUL


ANONYMOUS = Caller()

# Not an argument: a route that forgot to pass it on would share a tenant's cache with everybody, and charge nobody.
_current: ContextVar[Caller] = ContextVar("servd_caller", default=ANONYMOUS)


def current_caller() -> Caller:
    """Who made the call that this task, or the one that started it, works on."""
    return _current.get()


def set_caller(caller: Caller) -> None:
    """Called by a transport, in the task of each call, before anything is done for it."""
    _current.set(caller)


def count_request() -> None:
    """The current caller asks for work. Raises RateLimitedError.

    Reads, deletions and cancellations are free, on all fronts: who has used up a minute may still look, stop what runs,
    and read on where a stream was lost.
    """
    if (limits := current_caller().limits) is not None:
        limits.count_request()


class KeyRing:
    """The keys that open this server: `--api-key` and those of `--api-keys-file`, which is read again on change.

    A file that breaks later keeps the old keys, and says so in the log. Raises ConfigError if it is broken at first.
    """

    def __init__(self, api_key: str | None = None, file: Path | None = None) -> None:
        self._main_digest = None if api_key is None else _digest(api_key)
        self._main = Caller("api-key")
        self._file = file
        self._entries: list[KeyEntry] = []
        self._callers: dict[str, Caller] = {}  # by entry name
        self._known: dict[bytes, KeyEntry] = {}  # the keys seen so far, hashed with this process's own secret
        self._secret = secrets.token_bytes(32)
        self._stamp: tuple[int, ...] | None = None
        self._looked = time.monotonic()
        if file is not None:
            self._stamp = _stamp(file)
            self._take(read_keys(file))

    @classmethod
    def of(cls, config: ServerConfig) -> KeyRing:
        """The ring that the flags describe. Raises ConfigError."""
        return cls(config.api_key, None if config.api_keys_file is None else Path(config.api_keys_file))

    @property
    def is_open(self) -> bool:
        """Whether everybody may call: no key was configured."""
        return self._main_digest is None and self._file is None

    def caller(self, offered: Iterable[str]) -> Caller:
        """Whose keys these are: the first that is known. Raises AuthenticationError; the message holds no key."""
        if self.is_open:
            return ANONYMOUS
        self._reload()
        reason = None
        for key in offered:
            if self._main_digest is not None and hmac.compare_digest(_digest(key), self._main_digest):
                return self._main
            if (entry := self._find(key)) is not None:
                reason = entry.void_because(datetime.now(UTC))
                if reason is None:
                    return self._callers[entry.name]
        if reason is not None:
            raise AuthenticationError(f"the API key {reason}")
        raise AuthenticationError("no valid API key; send it as Authorization: Bearer API_KEY, or as x-api-key")

    def _find(self, key: str) -> KeyEntry | None:
        if len(key) > MAX_KEY_CHARS:  # a thousand hashes of kilobytes would hold all others up
            return None
        seen = hmac.digest(self._secret, key.encode(errors="surrogateescape"), "sha256")
        if (found := self._known.get(seen)) is None:
            for entry in self._entries:  # all of them: the time must not tell which one it was
                if entry.is_key(key):
                    found = entry
            if found is not None:
                self._known[seen] = found
        return found

    def _reload(self) -> None:
        now = time.monotonic()
        if self._file is None or now - self._looked < RELOAD_SECONDS:
            return
        self._looked = now
        stamp = _stamp(self._file)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._take(read_keys(self._file))
        except ConfigError as error:
            logger.error("the old API keys stay in use: %s", error.message)
        else:
            logger.info("API keys read again: %d", len(self._entries))

    def _take(self, entries: list[KeyEntry]) -> None:
        self._callers = {entry.name: self._caller_of(entry) for entry in entries}
        self._entries = entries
        self._known.clear()

    def _caller_of(self, entry: KeyEntry) -> Caller:
        numbers = (entry.requests_per_minute, entry.tokens_per_minute, entry.max_concurrent)
        before = self._callers.get(entry.name)
        limits = before.limits if before is not None else None
        if limits is not None:
            limits.change(*numbers)  # the same object: requests in work still count
        elif numbers != (None, None, None):
            limits = Limits(*numbers)
        models = None if entry.models is None else frozenset(entry.models)
        return Caller(entry.name, entry.tenant or entry.name, models, limits)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def _stamp(file: Path) -> tuple[int, ...] | None:
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
