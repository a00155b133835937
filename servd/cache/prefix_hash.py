"""Content hashes of KV blocks: each covers its block's tokens and, by chaining, all tokens before.

SHA-256, because a collision would show one user's context to another (CVE-2025-25183); salted per process and tenant.
"""

from __future__ import annotations

import hashlib
import os
from array import array

PROCESS_SALT = os.urandom(16)


def root_hash(cache_salt: str) -> bytes:
    """Parent of a request's first block. Requests with different salts never share blocks."""
    return hashlib.sha256(PROCESS_SALT + cache_salt.encode("utf-8", "surrogatepass")).digest()


def block_hash(parent: bytes, token_ids: list[int]) -> bytes:
    """Hash of a full block given its predecessor's hash."""
    return hashlib.sha256(parent + array("I", token_ids).tobytes()).digest()
