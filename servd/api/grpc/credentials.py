"""What a gRPC server listens with: TLS from the same files as HTTP, taken in anew when they change.

Knows nothing of calls.
"""

from __future__ import annotations

import logging

import grpc

from servd.api.tls import TlsFiles
from servd.errors import ConfigError

logger = logging.getLogger("servd.tls")


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Credentials whose certificate follows the files. Raises ConfigError if they cannot be used now."""
    files.make_context()  # the same checks, in the same words, as for HTTP
    last = [files.stamp()]

    def news() -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC before each handshake, in threads of its own; None: nothing has changed."""
        stamp = files.stamp()
        if stamp == last[0]:
            return None
        last[0] = stamp
        try:
            files.make_context()
            return _configuration(files)
        except (ConfigError, OSError) as error:
            logger.error("the old certificate stays in use: %s", error)
            return None

    return grpc.dynamic_ssl_server_credentials(
        _configuration(files),
        news,  # type: ignore[arg-type]  # the stubs forget None
        files.client_ca is not None,
    )


def _configuration(files: TlsFiles) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(files.key.read_bytes(), files.cert.read_bytes())],
        root_certificates=None if files.client_ca is None else files.client_ca.read_bytes(),
    )
