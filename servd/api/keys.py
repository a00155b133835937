"""API keys at rest: how they are made and hashed, and the file that lists them.

Knows nothing of requests. A key itself is never stored, nor part of any message.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec

from servd.errors import ConfigError

KEY_PREFIX = "sk-servd-"
MIN_KEY_CHARS = 20  # a fast hash keeps only what cannot be guessed
MAX_KEY_CHARS = 512
MAX_KEYS = 1000  # an unknown key is compared with all of them
MAX_FILE_BYTES = 4 << 20
_SALT_BYTES = 16

_Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._@-]{1,64}$")]  # goes to logs, and into cache salts
_Hash = Annotated[str, msgspec.Meta(pattern=r"^sha256:[0-9a-f]{32}:[0-9a-f]{64}$")]
_Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]


class KeyEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One key of the file: a line of JSON, or a [[keys]] table of TOML.

    tenant: who shares cached prefixes and stored answers with it; by default it alone. models: those that it may use
    (None: all). Limits are of this key, None: no limit. expires: the first moment at which it is void.
    """

    name: _Name
    hash: _Hash  # of salt and key: sha256:SALT:DIGEST, in hexadecimal
    tenant: _Name | None = None
    models: list[str] | None = None
    requests_per_minute: _Count | None = None
    tokens_per_minute: _Count | None = None
    max_concurrent: _Count | None = None
    disabled: bool = False
    expires: datetime | None = None

    def is_key(self, key: str) -> bool:
        """Whether this is that key, found out in a time that tells nothing of it."""
        _, salt, digest = self.hash.split(":")
        return hmac.compare_digest(_digest(key, bytes.fromhex(salt)), digest)

    def void_because(self, now: datetime) -> str | None:
        """Why the key may not be used now; None: it may."""
        if self.disabled:
            return "is disabled"
        if self.expires is not None and now >= _with_zone(self.expires):
            return "has expired"
        return None


def _with_zone(time: datetime) -> datetime:
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time


def new_key() -> str:
    """A key of 256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def hash_key(key: str) -> str:
    """What the file holds instead of the key. Raises ConfigError for one that could be guessed from it, or is long."""
    if not MIN_KEY_CHARS <= len(key) <= MAX_KEY_CHARS:
        raise ConfigError(
            f"the key has {len(key)} characters; allowed: {MIN_KEY_CHARS} to {MAX_KEY_CHARS}, random ones "
            "(servd keys new)"
        )
    salt = secrets.token_bytes(_SALT_BYTES)
    return f"sha256:{salt.hex()}:{_digest(key, salt)}"


def _digest(key: str, salt: bytes) -> str:
    return hashlib.sha256(salt + key.encode(errors="surrogateescape")).hexdigest()


def read_keys(path: Path) -> list[KeyEntry]:
    """The entries of a .toml file, or of lines of JSON. Raises ConfigError naming file, place and what is wrong."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"--api-keys-file {path} cannot be read: {error.strerror or error}") from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"--api-keys-file {path} is too large; allowed: {MAX_FILE_BYTES} bytes")
    entries: list[KeyEntry] = []
    names: set[str] = set()
    for place, item in (_toml_items if path.suffix == ".toml" else _json_items)(path, data):
        try:
            entry = msgspec.convert(item, KeyEntry)
        except msgspec.ValidationError as error:
            raise ConfigError(f"--api-keys-file {path}, {place}: {error}") from None
        if entry.name in names:
            raise ConfigError(f"--api-keys-file {path}, {place}: the name {entry.name} occurs twice")
        names.add(entry.name)
        entries.append(entry)
    if len(entries) > MAX_KEYS:
        raise ConfigError(f"--api-keys-file {path} has {len(entries)} keys; allowed: {MAX_KEYS}")
    return entries


def _json_items(path: Path, data: bytes) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(data.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith(b"#"):
            try:
                yield f"line {number}", msgspec.json.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                raise ConfigError(f"--api-keys-file {path}, line {number}: not valid JSON") from None


def _toml_items(path: Path, data: bytes) -> Iterator[tuple[str, Any]]:
    try:
        tables = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"--api-keys-file {path} is not valid TOML: {error}") from None
    items = tables.pop("keys", [])
    if tables or not isinstance(items, list):
        raise ConfigError(f"--api-keys-file {path} holds more than [[keys]] tables")
    for number, item in enumerate(items, 1):
        yield f"key {number}", item
