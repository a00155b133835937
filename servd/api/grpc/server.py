"""The gRPC server: servd.v1.Inference and the Open Inference Protocol over the shared service, health, reflection.

Owns the listening port and its limits. Knows nothing of what calls do.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from servd.api.access import KeyRing
from servd.api.grpc._pb.inference import grpc_service_pb2_grpc as kserve_grpc
from servd.api.grpc._pb.servd.v1 import inference_pb2_grpc as pb_grpc
from servd.api.grpc.credentials import server_credentials
from servd.api.grpc.gate import Gate
from servd.api.grpc.kserve import KServeServicer
from servd.api.grpc.servicer import InferenceServicer
from servd.api.service import InferenceService
from servd.api.sockets import check_listenable
from servd.api.tls import TlsFiles
from servd.config import ServerConfig
from servd.errors import ConfigError

SERVICE_NAME = "servd.v1.Inference"
KSERVE_NAME = "inference.GRPCInferenceService"
HEALTH_POLL_SECONDS = 0.5
WRITE_SECONDS = 60.0  # that a client may leave its stream unread

_LIMITS = (
    ("grpc.so_reuseport", 0),  # or a second server would silently share the port
    ("grpc.max_concurrent_streams", 1024),  # a connection; more calls wait in the client
    ("grpc.max_metadata_size", 16 << 10),  # bytes
    ("grpc.max_send_message_length", 64 << 20),  # bytes
    # A peer that is gone, or no longer reads its socket, is noticed.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Clients may keep connections alive themselves; who pings without measure is sent away (ENHANCE_YOUR_CALM).
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 3),
)


class GrpcServer:
    """A listening server and the task that keeps its health service up to date."""

    def __init__(
        self, service: InferenceService, config: ServerConfig, keys: KeyRing, *, write_timeout: float
    ) -> None:
        self.service = service
        self._server = grpc.aio.server(
            interceptors=[Gate(keys)],
            options=[*_LIMITS, ("grpc.max_receive_message_length", config.max_body_bytes)],
        )
        self._health = health.aio.HealthServicer()
        self._health_task: asyncio.Task[None] | None = None
        pb_grpc.add_InferenceServicer_to_server(InferenceServicer(service, write_timeout), self._server)
        kserve_grpc.add_GRPCInferenceServiceServicer_to_server(KServeServicer(service, write_timeout), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE_NAME, KSERVE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        self.port = _listen(self._server, config.host, config.grpc_port, TlsFiles.of(config))

    async def start(self) -> None:
        """Take calls."""
        await self._set_health()
        await self._server.start()
        self._health_task = asyncio.create_task(self._poll_health(), name="grpc-health")

    async def report_not_serving(self) -> None:
        """Tell health checks, for good, that this server is about to end; calls go on."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace: float | None = None) -> None:
        """Report NOT_SERVING, refuse new calls, give running ones `grace` seconds, then cancel them."""
        await self.report_not_serving()
        if self._health_task is not None:
            self._health_task.cancel()
            with suppress(asyncio.CancelledError):
                await self._health_task
            self._health_task = None
        await self._server.stop(grace)

    async def _poll_health(self) -> None:
        while True:
            await asyncio.sleep(HEALTH_POLL_SECONDS)
            await self._set_health()

    async def _set_health(self) -> None:
        ready = self.service.engine.state == "ready"
        serving = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", SERVICE_NAME, KSERVE_NAME):
            await self._health.set(name, serving)


def _listen(server: grpc.aio.Server, host: str, port: int, tls: TlsFiles | None) -> int:
    """Bind; returns the port. Raises ConfigError with the system's reason."""
    # grpc says only "failed to bind", after log lines of its own; the system says why.
    check_listenable(host, port, "--grpc-port")
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if tls is not None:
            return server.add_secure_port(address, server_credentials(tls))
        return server.add_insecure_port(address)
    except RuntimeError as error:
        raise ConfigError(f"--grpc-port is {port}: cannot listen on {host}:{port}: {error}") from None


async def start_grpc(
    service: InferenceService,
    config: ServerConfig,
    *,
    keys: KeyRing | None = None,
    write_timeout: float = WRITE_SECONDS,
) -> tuple[GrpcServer, int]:
    """Start the gRPC front on `config.host:config.grpc_port` (0: a free port); the server and its port.

    `keys`: those of the config unless given. `write_timeout` in seconds. Raises ConfigError if it cannot listen there.
    The engine need not be ready: calls get UNAVAILABLE until it is.
    """
    keys = KeyRing.of(config) if keys is None else keys
    server = GrpcServer(service, config, keys, write_timeout=write_timeout)
    await server.start()
    return server, server.port
