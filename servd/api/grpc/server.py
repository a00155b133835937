"""The gRPC server: servd.v1.Inference over the shared service, health, reflection, API key.

Owns the calls' life (deadline, cancellation, status). Knows nothing of scheduling nor of HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

import servd
from servd.api.access import KeyRing, current_caller, set_caller
from servd.api.grpc import convert
from servd.api.grpc._pb.servd.v1 import inference_pb2 as pb
from servd.api.grpc._pb.servd.v1 import inference_pb2_grpc as pb_grpc
from servd.api.grpc.credentials import server_credentials
from servd.api.grpc.status import Context, abort_with, errors_as_status
from servd.api.service import InferenceService
from servd.api.sockets import check_listenable
from servd.api.tls import TlsFiles
from servd.config import ServerConfig
from servd.errors import ConfigError, ServdError
from servd.sampling_params import SamplingParams

SERVICE_NAME = "servd.v1.Inference"
HEALTH_METHODS = "/grpc.health.v1.Health/"
HEALTH_POLL_SECONDS = 0.5
MAX_OFFERED_KEYS = 4  # each unknown one is compared with all of the key file
Metadata = Sequence[tuple[str, str | bytes]] | None
DEFAULT_MAX_TOKENS = SamplingParams().max_tokens  # of Generate; Chat goes on to the end of the context


class InferenceServicer(pb_grpc.InferenceServicer):
    """The calls of servd.v1.Inference; see proto/servd/v1/inference.proto."""

    def __init__(self, service: InferenceService) -> None:
        self.service = service

    def _params(self, message: pb.SamplingParams, max_tokens: int | None) -> SamplingParams:
        """Settings of a call for which there is room in the queue."""
        defaults = {"max_tokens": max_tokens, **self.service.engine.sampling_defaults}
        params = convert.sampling_params_from(message, defaults)
        self.service.engine.check_room(params.n)
        return params

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        """Stream the continuation of a prompt."""
        async with errors_as_status(context):
            self.service.check_model(request.model)
            params = self._params(request.sampling_params, DEFAULT_MAX_TOKENS)
            field, prompt = convert.prompt_from(request)
            add_special_tokens = _or_true(request, "add_special_tokens")
            token_ids = await self.service.encode_prompt(prompt, add_special_tokens=add_special_tokens, param=field)
            await self._stream(request, context, token_ids, params, field)

    async def Chat(self, request: pb.ChatRequest, context: Context) -> None:
        """Stream the answer to a conversation."""
        async with errors_as_status(context):
            self.service.check_model(request.model)
            params = self._params(request.sampling_params, None)
            token_ids = await self.service.encode_chat(
                convert.chat_messages_from(request),
                add_generation_prompt=_or_true(request, "add_generation_prompt"),
                template_kwargs=convert.template_kwargs_from(request),
            )
            await self._stream(request, context, token_ids, params, "messages")

    async def _stream(
        self,
        request: pb.GenerateRequest | pb.ChatRequest,
        context: Context,
        token_ids: list[int],
        params: SamplingParams,
        prompt_param: str,
    ) -> None:
        # A coroutine that writes, not a generator: grpc cancels this task when the client leaves or its deadline
        # passes, also while it waits for flow control, and the iterator is closed (the request aborted) at once.
        request_id = self.service.new_request_id("grpc")
        outputs = self.service.generate(
            token_ids,
            params,
            request_id=request_id,
            priority=request.priority,
            timeout=context.time_remaining(),
            cache_salt=request.cache_salt,
            prompt_param=prompt_param,
        )
        tokenizer = self.service.engine.tokenizer
        async with aclosing(outputs):
            async for output in outputs:
                await context.write(convert.chunk_from(output, request_id, self.service.model_name, tokenizer))
                if output.error is not None:
                    raise output.error

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse | None:
        """Token ids of a text."""
        async with errors_as_status(context):
            self.service.check_model(request.model)
            add_special_tokens = _or_true(request, "add_special_tokens")
            token_ids = await self.service.tokenize(
                request.text, add_special_tokens=add_special_tokens, param="text"
            )
            return pb.TokenizeResponse(token_ids=token_ids, max_model_len=self.service.engine.max_model_len)
        return None

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse | None:
        """Text of token ids."""
        async with errors_as_status(context):
            self.service.check_model(request.model)
            text = await self.service.detokenize(
                request.token_ids, skip_special_tokens=request.skip_special_tokens, param="token_ids"
            )
            return pb.DetokenizeResponse(text=text)
        return None

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        """The one model there is, if the caller may use it."""
        if not current_caller().may_use(self.service.model_name):
            return pb.ListModelsResponse()
        model = pb.Model(
            name=self.service.model_name,
            max_model_len=self.service.engine.max_model_len,
            created=self.service.created,
        )
        return pb.ListModelsResponse(models=[model])

    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.GetStatusResponse:
        """Queue lengths and KV use."""
        stats = self.service.stats()
        return pb.GetStatusResponse(
            state=convert.ENGINE_STATES[stats.state],
            version=servd.__version__,
            requests_running=stats.running,
            requests_waiting=stats.waiting,
            kv_blocks_used=stats.kv_blocks_used,
            kv_blocks_cached=stats.kv_blocks_cached,
            kv_blocks_free=stats.kv_blocks_free,
            block_size=stats.block_size,
        )


def _or_true(request: Any, field: str) -> bool:
    value: bool = getattr(request, field)
    return value if request.HasField(field) else True


class ApiKeyInterceptor(grpc.aio.ServerInterceptor):
    """Lets a call pass if its metadata carry a key: `authorization: Bearer KEY` or `x-api-key: KEY`."""

    def __init__(self, keys: KeyRing) -> None:
        self._keys = keys

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The method's own handler, or one that refuses. Health stays open: probes carry no key."""
        if not handler_call_details.method.startswith(HEALTH_METHODS):
            try:
                admit_call(self._keys, handler_call_details.invocation_metadata)
            except ServdError as error:
                return grpc.unary_unary_rpc_method_handler(_refusal(error))
        return await continuation(handler_call_details)


def admit_call(keys: KeyRing, metadata: Metadata) -> None:
    """Make the key's holder the caller of this task, and count the call.

    Raises AuthenticationError, or RateLimitedError.
    """
    caller = keys.caller(_offered_keys(metadata))
    if caller.limits is not None:
        caller.limits.count_request()
    set_caller(caller)


def _offered_keys(metadata: Metadata) -> list[str]:
    offered = []
    for name, value in metadata or ():
        text = value if isinstance(value, str) else value.decode("latin-1")
        scheme, _, key = ("Bearer", "", text) if name == "x-api-key" else text.partition(" ")
        if name in ("authorization", "x-api-key") and scheme.lower() == "bearer":
            offered.append(key)
    return offered[:MAX_OFFERED_KEYS]


def _refusal(error: ServdError) -> Callable[[bytes, Context], Awaitable[None]]:
    async def refuse(request: bytes, context: Context) -> None:
        await abort_with(context, error)

    return refuse


class GrpcServer:
    """A listening server and the task that keeps its health service up to date."""

    def __init__(self, service: InferenceService, config: ServerConfig, keys: KeyRing) -> None:
        self.service = service
        self._server = grpc.aio.server(
            interceptors=[ApiKeyInterceptor(keys)],
            options=[
                ("grpc.max_receive_message_length", config.max_body_bytes),
                ("grpc.so_reuseport", 0),  # or a second server would silently share the port
            ],
        )
        self._health = health.aio.HealthServicer()
        self._health_task: asyncio.Task[None] | None = None
        pb_grpc.add_InferenceServicer_to_server(InferenceServicer(service), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
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
        for name in ("", SERVICE_NAME):
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
    service: InferenceService, config: ServerConfig, *, keys: KeyRing | None = None
) -> tuple[GrpcServer, int]:
    """Start the gRPC front on `config.host:config.grpc_port` (0: a free port); the server and its port.

    Raises ConfigError if it cannot listen there. The engine need not be ready: calls get UNAVAILABLE until it is.
    """
    server = GrpcServer(service, config, KeyRing.of(config) if keys is None else keys)
    await server.start()
    return server, server.port
