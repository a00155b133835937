"""TLS for both fronts, from PEM files: at least 1.2, client certificates if asked for, read again when they change.

Knows nothing of HTTP and gRPC. A file that breaks later leaves the old certificate in use, and is told in the log.
"""

from __future__ import annotations

import logging
import os
import ssl
from dataclasses import dataclass
from pathlib import Path

from servd.config import ServerConfig
from servd.errors import ConfigError

RELOAD_SECONDS = 1.0  # how often the files are looked at

logger = logging.getLogger("servd.tls")

_Stamp = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Where certificate chain, key and, for mutual TLS, the authorities of clients lie."""

    cert: Path
    key: Path
    client_ca: Path | None = None

    @classmethod
    def of(cls, config: ServerConfig) -> TlsFiles | None:
        """The files that the flags name; None: no TLS. Raises ConfigError for one without the others."""
        if config.tls_cert is None and config.tls_key is None and config.tls_client_ca is None:
            return None
        if config.tls_cert is None or config.tls_key is None:
            raise ConfigError("--tls-cert and --tls-key: allowed are both or, without --tls-client-ca, neither")
        client_ca = None if config.tls_client_ca is None else Path(config.tls_client_ca)
        return cls(Path(config.tls_cert), Path(config.tls_key), client_ca)

    def make_context(self) -> ssl.SSLContext:
        """What an HTTP server needs. Raises ConfigError in one line that names the file."""
        for flag, path in (("--tls-cert", self.cert), ("--tls-key", self.key), ("--tls-client-ca", self.client_ca)):
            if path is not None:
                _check_readable(flag, path)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        self._load_into(context)
        if self.client_ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            context.num_tickets = 0  # a former session would stand for a certificate that is not trusted any more
            context.options |= ssl.OP_NO_TICKET
            try:
                context.load_verify_locations(self.client_ca)
            except (ssl.SSLError, OSError):
                raise ConfigError(f"--tls-client-ca {self.client_ca} holds no certificate in PEM form") from None
        return context

    def _load_into(self, context: ssl.SSLContext) -> None:
        def no_password() -> str:
            raise ConfigError(f"--tls-key {self.key} is encrypted; allowed: a key without a password")

        try:
            context.load_cert_chain(self.cert, self.key, no_password)
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                raise ConfigError(f"--tls-key {self.key} is not the key of --tls-cert {self.cert}") from None
            raise ConfigError(f"--tls-cert {self.cert} or --tls-key {self.key} is not in PEM form") from None
        except OSError as error:
            raise ConfigError(f"--tls-cert or --tls-key cannot be read: {error.strerror or error}") from None

    def stamp(self) -> _Stamp | None:
        """Changes when one of the files does; None if one is gone."""
        try:
            found = [os.stat(path) for path in (self.cert, self.key, self.client_ca) if path is not None]
        except OSError:
            return None
        return tuple((stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in found)


class TlsContext:
    """An HTTP server's ssl context: new connections get the certificate that is on disk now."""

    def __init__(self, files: TlsFiles) -> None:
        self.files = files
        self._stamp = files.stamp()
        self.context = files.make_context()
        self._is_renewed = False

    def is_void(self, connection: ssl.SSLObject) -> bool:
        """Whether it takes up a session from when other clients may have been trusted: TLS 1.2 knows those by number.

        OpenSSL keeps them with the context that listens, whatever takes its place in the handshake.
        """
        return self._is_renewed and self.files.client_ca is not None and bool(connection.session_reused)

    def refresh(self) -> None:
        """Take new files in if they are whole; connections that are open keep the old certificate."""
        stamp = self.files.stamp()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            fresh = self.files.make_context()  # all that may go wrong goes wrong here
        except ConfigError as error:
            logger.error("the old certificate stays in use: %s", error.message)
            return

        def hand_over(connection: ssl.SSLObject, server_name: str | None, context: ssl.SSLContext) -> None:
            connection.context = fresh

        self._is_renewed = True
        # Not load_cert_chain on the old context: it would go on to trust authorities that were taken out.
        self.context.sni_callback = hand_over
        logger.info("certificate read again")


def _check_readable(flag: str, path: Path) -> None:
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise ConfigError(f"{flag} {path} cannot be read: {error.strerror or error}") from None
