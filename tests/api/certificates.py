"""Certificates for tests of TLS, made by the openssl command."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Authority:
    """Signs certificates for localhost."""

    folder: Path
    name: str = "ca"

    @property
    def cert(self) -> Path:
        return self.folder / f"{self.name}.pem"

    def make(self) -> Authority:
        openssl(
            "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
            "-subj", f"/CN={self.name}", "-keyout", str(self.folder / f"{self.name}.key"), "-out", str(self.cert),
        )  # fmt: skip
        return self

    def issue(self, name: str, *, serial: int = 1) -> tuple[Path, Path]:
        """Certificate and key of `name`.pem and `name`.key, for localhost and 127.0.0.1."""
        cert, key, request = (self.folder / f"{name}.{suffix}" for suffix in ("pem", "key", "csr"))
        extensions = self.folder / f"{name}.ext"
        extensions.write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
        openssl(
            "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", f"/CN={name}",
            "-keyout", str(key), "-out", str(request),
        )  # fmt: skip
        openssl(
            "x509", "-req", "-in", str(request), "-CA", str(self.cert), "-CAkey", str(self.folder / f"{self.name}.key"),
            "-set_serial", str(serial), "-days", "2", "-extfile", str(extensions), "-out", str(cert),
        )  # fmt: skip
        return cert, key


def openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)
