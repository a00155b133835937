"""The URL of a running server, as a command takes it.

Knows nothing of what is asked of the server.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from servd.errors import ConfigError

DEFAULT_URL = "http://127.0.0.1:8000"


def check_url(url: str) -> None:
    """Raises ConfigError for a --url that names no HTTP server."""
    try:
        parts = urlsplit(url)
        is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port beyond 65535, half an IPv6 address
        is_usable = False
    if not is_usable:
        raise ConfigError(f"--url is {url!r}; allowed: http://HOST:PORT, like {DEFAULT_URL}")
