"""TLS of both fronts: who gets in, with which versions, and certificates that change while the server runs.

Fault 44: plain HTTP on the TLS port, TLS 1.0, rotated certificates. Needs the openssl command.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import uvloop

from servd.api import tls
from servd.api.grpc._pb.servd.v1 import inference_pb2 as pb
from servd.api.grpc._pb.servd.v1 import inference_pb2_grpc as pb_grpc
from servd.api.grpc.server import start_grpc
from servd.api.http.app import start_http, stop_http
from servd.api.service import InferenceService
from servd.api.tls import TlsFiles
from servd.cli import main as servd_main
from servd.config import ServerConfig
from servd.errors import ConfigError
from tests.api.certificates import Authority, openssl
from tests.fakes import FakeEngine

GET_HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path).make()


@asynccontextmanager
async def serving(folder: Path, **flags: Any) -> AsyncIterator[tuple[int, int]]:
    """HTTP's port and gRPC's."""
    config = ServerConfig(port=0, grpc_port=0, **{name: str(value) for name, value in flags.items()})
    async with FakeEngine(folder) as fake:
        service = InferenceService(fake.engine, "fake")
        runner, port = await start_http(service, config)
        server, grpc_port = await start_grpc(service, config)
        try:
            yield port, grpc_port
        finally:
            await server.stop(0)
            await stop_http(runner)


def client_context(authority: Authority, identity: tuple[Path, Path] | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=authority.cert)
    if identity is not None:
        context.load_cert_chain(*identity)
    return context


async def serial_and_answer(port: int, context: ssl.SSLContext) -> tuple[str, bytes]:
    """The serial number of the server's certificate, and what it answers."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    try:
        serial = writer.get_extra_info("peercert")["serialNumber"]
        writer.write(GET_HEALTH)
        return serial, await reader.read()
    finally:
        writer.close()


async def grpc_models(port: int, authority: Authority, identity: tuple[Path, Path] | None = None) -> int:
    cert, key = (None, None) if identity is None else (path.read_bytes() for path in identity)
    credentials = grpc.ssl_channel_credentials(authority.cert.read_bytes(), key, cert)
    async with grpc.aio.secure_channel(f"localhost:{port}", credentials) as channel:
        stub = pb_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
        return len((await stub.ListModels(pb.ListModelsRequest(), timeout=5)).models)


def test_both_fronts_speak_tls_and_nothing_else(tmp_path: Path, authority: Authority) -> None:
    cert, key = authority.issue("server")

    async def main() -> None:
        async with serving(tmp_path, tls_cert=cert, tls_key=key) as (port, grpc_port):
            _, answer = await serial_and_answer(port, client_context(authority))
            assert answer.startswith(b"HTTP/1.1 200")
            assert await grpc_models(grpc_port, authority) == 1
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(GET_HEALTH)
            assert not (await reader.read()).startswith(b"HTTP/1.1 2"), "plain HTTP gets no answer"
            writer.close()
            async with grpc.aio.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
                stub = pb_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.ListModels(pb.ListModelsRequest(), timeout=5)
                assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            _, answer = await serial_and_answer(port, client_context(authority))
            assert answer.startswith(b"HTTP/1.1 200")

    uvloop.run(main())


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
def test_old_versions_are_refused(tmp_path: Path, authority: Authority, version: ssl.TLSVersion) -> None:
    cert, key = authority.issue("server")

    async def main() -> None:
        async with serving(tmp_path, tls_cert=cert, tls_key=key) as ports:
            for port in ports:
                context = client_context(authority)
                context.set_ciphers("ALL:@SECLEVEL=0")
                context.minimum_version = context.maximum_version = version
                with pytest.raises((ssl.SSLError, ConnectionError)):
                    await serial_and_answer(port, context)

    uvloop.run(main())
    assert TlsFiles(cert, key).make_context().minimum_version >= ssl.TLSVersion.TLSv1_2


def test_clients_must_show_a_certificate_where_that_is_asked_for(tmp_path: Path, authority: Authority) -> None:
    cert, key = authority.issue("server")
    known = authority.issue("client")
    stranger = Authority(tmp_path, "strangers").make().issue("stranger")

    async def main() -> None:
        async with serving(tmp_path, tls_cert=cert, tls_key=key, tls_client_ca=authority.cert) as (port, grpc_port):
            _, answer = await serial_and_answer(port, client_context(authority, known))
            assert answer.startswith(b"HTTP/1.1 200")
            assert await grpc_models(grpc_port, authority, known) == 1
            for identity in (None, stranger):
                with pytest.raises((ssl.SSLError, ConnectionError)):
                    _, answer = await serial_and_answer(port, client_context(authority, identity))
                    assert answer == b""
                    raise ConnectionError("closed without an answer")
                with pytest.raises(grpc.aio.AioRpcError):
                    await grpc_models(grpc_port, authority, identity)

    uvloop.run(main())


def test_certificates_are_read_again_when_they_change(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("servd.api.http.app.RELOAD_SECONDS", 0.01)
    cert, key = authority.issue("server", serial=0xA1)
    context = client_context(authority)

    async def main() -> None:
        async with serving(tmp_path, tls_cert=cert, tls_key=key) as (port, grpc_port):
            assert (await serial_and_answer(port, context))[0] == "A1"
            authority.issue("server", serial=0xB2)
            async with asyncio.timeout(5):
                while (await serial_and_answer(port, context))[0] != "B2":
                    await asyncio.sleep(0.01)
            pem = ssl.get_server_certificate(("127.0.0.1", grpc_port))
            assert pem.strip() in cert.read_text()
            good = key.read_text()
            key.write_text("torn")
            async with asyncio.timeout(5):
                while "stays in use" not in caplog.text:
                    await asyncio.sleep(0.01)
            assert (await serial_and_answer(port, context))[0] == "B2"
            assert await grpc_models(grpc_port, authority) == 1
            key.write_text(good)

    uvloop.run(main())


def request_in(
    context: ssl.SSLContext, port: int, session: ssl.SSLSession | None
) -> tuple[bytes, ssl.SSLSession | None]:
    """The answer and the session of a connection that takes a former session up; b"" if there is none."""
    try:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=5) as plain,
            context.wrap_socket(plain, server_hostname="localhost", session=session) as secure,
        ):
            secure.sendall(GET_HEALTH)
            answer = b"".join(iter(lambda: secure.recv(1000), b""))
            found = secure.session
            with suppress(ssl.SSLError, OSError):
                secure.unwrap()  # a session that is not ended in good order is not kept
            return answer, found
    except (ssl.SSLError, ConnectionError):
        return b"", None


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_former_session_does_not_stand_for_a_certificate(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch, version: ssl.TLSVersion
) -> None:
    monkeypatch.setattr("servd.api.http.app.RELOAD_SECONDS", 0.01)
    cert, key = authority.issue("server")
    others = Authority(tmp_path, "others").make()
    trusted = tmp_path / "trusted.pem"
    trusted.write_bytes(authority.cert.read_bytes())
    ours, theirs = (client_context(authority, a.issue(f"client-{a.name}")) for a in (authority, others))
    ours.maximum_version = version

    async def main() -> None:
        async with serving(tmp_path, tls_cert=cert, tls_key=key, tls_client_ca=trusted) as (port, _):
            answer, session = await asyncio.to_thread(request_in, ours, port, None)
            assert answer.startswith(b"HTTP/1.1 200")
            trusted.write_bytes(others.cert.read_bytes())
            async with asyncio.timeout(5):
                while not (await asyncio.to_thread(request_in, theirs, port, None))[0]:
                    await asyncio.sleep(0.01)
            assert (await asyncio.to_thread(request_in, ours, port, session))[0] == b""

    uvloop.run(main())


def test_an_authority_that_is_taken_out_lets_nobody_in(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("servd.api.http.app.RELOAD_SECONDS", 0.01)
    cert, key = authority.issue("server")
    others = Authority(tmp_path, "others").make()
    trusted = tmp_path / "trusted.pem"
    trusted.write_bytes(authority.cert.read_bytes())
    ours, theirs = (client_context(authority, a.issue(f"client-{a.name}")) for a in (authority, others))

    async def answers(port: int, context: ssl.SSLContext) -> bool:
        try:
            return (await serial_and_answer(port, context))[1].startswith(b"HTTP/1.1 200")
        except (ssl.SSLError, ConnectionError):
            return False

    async def main() -> None:
        async with serving(tmp_path, tls_cert=cert, tls_key=key, tls_client_ca=trusted) as (port, _):
            assert (await answers(port, ours), await answers(port, theirs)) == (True, False)
            trusted.write_bytes(others.cert.read_bytes())
            async with asyncio.timeout(5):
                while not await answers(port, theirs):
                    await asyncio.sleep(0.01)
            assert not await answers(port, ours)

    uvloop.run(main())


def test_files_that_cannot_be_used_are_told_in_one_line(
    tmp_path: Path, authority: Authority, capsys: pytest.CaptureFixture[str]
) -> None:
    cert, key = map(str, authority.issue("server"))
    other = str(authority.issue("other")[1])
    torn = tmp_path / "torn.pem"
    torn.write_text("-----BEGIN CERTIFICATE-----\nxx\n")
    for flags, reason in (
        (["--tls-cert", cert], "--tls-cert and --tls-key: allowed are both"),
        (["--tls-client-ca", cert], "--tls-cert and --tls-key: allowed are both"),
        (["--tls-cert", cert, "--tls-key", "/none"], "--tls-key /none cannot be read: No such file"),
        (["--tls-cert", str(tmp_path), "--tls-key", key], "cannot be read: Is a directory"),
        (["--tls-cert", cert, "--tls-key", other], "is not the key of"),
        (["--tls-cert", str(torn), "--tls-key", key], "is not in PEM form"),
        (["--tls-cert", key, "--tls-key", cert], "is not in PEM form"),
        (["--tls-cert", cert, "--tls-key", key, "--tls-client-ca", key], "holds no certificate"),
    ):
        assert servd_main(["serve", "no-such-model", "--port", "0", "--grpc-port", "0", *flags]) == 2
        out, err = capsys.readouterr()
        assert out == "" and reason in err and err.count("\n") == 1, err


def test_an_encrypted_key_does_not_ask_at_the_terminal(tmp_path: Path, authority: Authority) -> None:
    cert, key = authority.issue("server")
    locked = tmp_path / "locked.key"
    openssl("ec", "-in", str(key), "-aes256", "-passout", "pass:x", "-out", str(locked))
    with pytest.raises(ConfigError, match="is encrypted"):
        tls.TlsFiles(cert, locked).make_context()
