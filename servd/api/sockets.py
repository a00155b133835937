"""Asks the system whether an address can be listened on, before anything slow is started.

Knows nothing of HTTP and gRPC.
"""

from __future__ import annotations

import socket

from servd.errors import ConfigError


def check_listenable(host: str, port: int, flag: str) -> None:
    """Raise ConfigError, naming the flag and the system's reason, if nothing can listen on host:port now."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"{flag} is {port}; allowed: 0 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            probe.listen(1)  # two sockets with SO_REUSEADDR may bind one port; only one may listen
    except OSError as error:
        raise ConfigError(f"{flag} is {port}: cannot listen on {host}:{port}: {error.strerror or error}") from None
