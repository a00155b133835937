"""inference.GRPCInferenceService: the Open Inference Protocol's messages around the shared calls.

Owns the life of Triton's stream, which carries many requests at once. Knows nothing of what a request means.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc.aio

import servd
from servd.api.access import count_request
from servd.api.grpc._pb.inference import grpc_service_pb2 as pb
from servd.api.grpc._pb.inference import grpc_service_pb2_grpc as pb_grpc
from servd.api.grpc.status import Context, errors_as_status, status_message
from servd.api.grpc.writing import TimedWriter
from servd.api.kserve import model
from servd.api.kserve.answers import InferReply, replies_to, whole_reply
from servd.api.kserve.call import InferRequest, call_from, check_count, input_spec, raw_tensor
from servd.api.kserve.tensors import Tensor, TensorSpec, encode
from servd.api.service import InferenceService
from servd.errors import DeadlineExceededError, InvalidRequestError, NotFoundError, RequestFailedError, ServdError

MAX_REQUESTS_IN_STREAM = 1024  # at once; beyond it the next one is read when one has ended

_log = logging.getLogger("servd.grpc")

_DATA_TYPES = {"BOOL": pb.TYPE_BOOL, "BYTES": pb.TYPE_STRING, "UINT32": pb.TYPE_UINT32, "FP32": pb.TYPE_FP32}
_CONTENTS = {"BOOL": "bool_contents", "BYTES": "bytes_contents"}


class KServeServicer(pb_grpc.GRPCInferenceServiceServicer):
    """The calls of inference.GRPCInferenceService; see proto/inference/grpc_service.proto."""

    def __init__(self, service: InferenceService, write_timeout: float) -> None:
        self.service = service
        self._write_timeout = write_timeout  # seconds

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:
        """Who answers is alive."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Context) -> pb.ServerReadyResponse:
        """Whether requests are taken."""
        return pb.ServerReadyResponse(ready=model.is_ready(self.service))

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Context) -> pb.ModelReadyResponse:
        """Whether requests for the model are taken; of one that does not exist, they are not."""
        try:
            model.check_model(self.service, request.name, request.version)
        except NotFoundError:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=model.is_ready(self.service))

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Context) -> pb.ServerMetadataResponse:
        """Name, version, extensions."""
        return pb.ServerMetadataResponse(name="servd", version=servd.__version__, extensions=model.EXTENSIONS)

    async def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: Context
    ) -> pb.ModelMetadataResponse | None:
        """The model's tensors."""
        async with errors_as_status(context, "parameters"):
            model.check_model(self.service, request.name, request.version)
            return pb.ModelMetadataResponse(
                name=self.service.model_name, versions=[model.VERSION], platform=model.PLATFORM,
                inputs=[_metadata(spec) for spec in model.INPUTS.values()],
                outputs=[_metadata(spec) for spec in model.OUTPUTS.values()],
            )  # fmt: skip
        return None

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: Context) -> pb.ModelConfigResponse | None:
        """The same in Triton's words."""
        async with errors_as_status(context, "parameters"):
            model.check_model(self.service, request.name, request.version)
            inputs = [
                pb.ModelInput(
                    name=spec.name, data_type=_DATA_TYPES[spec.datatype], dims=spec.shape,
                    optional=spec.name != model.TEXT_INPUT,
                )
                for spec in model.INPUTS.values()
            ]  # fmt: skip
            outputs = [
                pb.ModelOutput(name=spec.name, data_type=_DATA_TYPES[spec.datatype], dims=spec.shape)
                for spec in model.OUTPUTS.values()
            ]
            config = pb.ModelConfig(
                name=self.service.model_name, platform=model.PLATFORM, backend=model.PLATFORM,
                input=inputs, output=outputs,
                model_transaction_policy=pb.ModelTransactionPolicy(decoupled=True),
            )  # fmt: skip
            return pb.ModelConfigResponse(config=config)
        return None

    async def ModelStatistics(
        self, request: pb.ModelStatisticsRequest, context: Context
    ) -> pb.ModelStatisticsResponse | None:
        """Counts and times since the start."""
        async with errors_as_status(context, "parameters"):
            model.check_model(self.service, request.name, request.version)
            counts = model.statistics(self.service)
            times = pb.InferStatistics(
                success=pb.StatisticDuration(count=counts.num_successes, ns=counts.success_ns),
                fail=pb.StatisticDuration(count=counts.num_failures),
                queue=pb.StatisticDuration(count=counts.num_queued, ns=counts.queue_ns),
            )
            stats = pb.ModelStatistics(
                name=self.service.model_name, version=model.VERSION, inference_count=counts.num_successes,
                execution_count=counts.num_steps, inference_stats=times,
            )  # fmt: skip
            return pb.ModelStatisticsResponse(model_stats=[stats])
        return None

    async def RepositoryIndex(
        self, request: pb.RepositoryIndexRequest, context: Context
    ) -> pb.RepositoryIndexResponse | None:
        """The one model."""
        async with errors_as_status(context, "parameters"):
            if request.repository_name:
                raise NotFoundError(
                    f"repository {request.repository_name[:100]!r} does not exist; allowed: the empty name",
                    param="repository_name",
                )
            if request.ready and not model.is_ready(self.service):
                return pb.RepositoryIndexResponse()
            index = pb.RepositoryIndexResponse.ModelIndex(
                name=self.service.model_name, version=model.VERSION, state=model.state_name(self.service)
            )
            return pb.RepositoryIndexResponse(models=[index])
        return None

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse | None:
        """One request, one reply."""
        async with errors_as_status(context, "parameters"):
            call = call_from(_request_from(request), self.service)
            if call.streams:
                raise InvalidRequestError(
                    "stream is true; allowed with ModelStreamInfer; ModelInfer gives one reply", param="stream"
                )
            reply = await whole_reply(self.service, call, context.time_remaining())
            return _response(self.service, request.id, reply)
        return None

    async def ModelStreamInfer(self, requests: AsyncIterator[pb.ModelInferRequest], context: Context) -> None:
        """Many requests at once, each with its replies."""
        async with errors_as_status(context, "parameters"):
            with TimedWriter(context, self._write_timeout) as line:
                await _InferStream(self.service, context, line).run(requests)


class _InferStream:
    """One ModelStreamInfer call: a task for each request, and one writer at a time."""

    def __init__(self, service: InferenceService, context: Context, line: TimedWriter) -> None:
        self._service = service
        self._context = context
        self._line = line
        self._room = asyncio.Semaphore(MAX_REQUESTS_IN_STREAM)
        self._writing = asyncio.Lock()

    async def run(self, requests: AsyncIterator[pb.ModelInferRequest]) -> None:
        """Until the client sends no more and all is answered. Raises DeadlineExceededError if it does not read."""
        try:
            async with asyncio.TaskGroup() as tasks:
                async for request in requests:
                    await self._room.acquire()
                    tasks.create_task(self._answer(request))
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _answer(self, request: pb.ModelInferRequest) -> None:
        try:
            count_request()
            call = call_from(_request_from(request), self._service)
            async with aclosing(replies_to(self._service, call, self._context.time_remaining())) as replies:
                async for reply in replies:
                    response = _response(self._service, request.id, reply)
                    response.parameters["triton_final_response"].bool_param = reply.is_final
                    await self._write(pb.ModelStreamInferResponse(infer_response=response))
        except _UnreadError:
            raise
        except ServdError as error:
            await self._write_error(request.id, error)
        except grpc.aio.BaseError:
            raise  # of the stream itself
        except Exception:
            _log.exception("unexpected error in ModelStreamInfer")
            await self._write_error(
                request.id, RequestFailedError("internal error; the server's log has the details")
            )
        finally:
            self._room.release()

    async def _write_error(self, request_id: str, error: ServdError) -> None:
        response = pb.ModelInferResponse(id=request_id)
        response.parameters["triton_final_response"].bool_param = True
        await self._write(
            pb.ModelStreamInferResponse(error_message=status_message(error), infer_response=response)
        )

    async def _write(self, message: pb.ModelStreamInferResponse) -> None:
        async with self._writing:
            try:
                await self._line.write(message)
            except DeadlineExceededError as error:
                raise _UnreadError(error.message) from None


class _UnreadError(DeadlineExceededError):
    """The client does not read: that ends the whole stream, and not one request alone."""


def _metadata(spec: TensorSpec) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(name=spec.name, datatype=spec.datatype, shape=spec.shape)


def _request_from(message: pb.ModelInferRequest) -> InferRequest:
    """A transport-neutral request. Raises InvalidRequestError naming the field."""
    check_count(len(message.inputs), "inputs")
    check_count(len(message.outputs), "outputs")
    num_raw = len(message.raw_input_contents)
    if num_raw not in (0, len(message.inputs)):
        raise InvalidRequestError(
            f"raw_input_contents has {num_raw} entries; allowed: none, or one for each of {len(message.inputs)} inputs",
            param="raw_input_contents",
        )
    for i, output in enumerate(message.outputs):
        _refuse_parameters(output.parameters, f"outputs[{i}]")
    return InferRequest(
        model_name=message.model_name,
        model_version=message.model_version,
        id=message.id,
        parameters={name: _value(parameter, name) for name, parameter in message.parameters.items()},
        inputs=[_tensor(message, i) for i in range(len(message.inputs))],
        outputs=[output.name for output in message.outputs],
    )


def _refuse_parameters(parameters: Any, where: str) -> None:
    for name in parameters:
        raise InvalidRequestError(
            f"{where}.parameters holds {name[:100]!r}; allowed: none", param=f"{where}.parameters"
        )


def _value(parameter: pb.InferParameter, name: str) -> bool | int | float | str:
    kind = parameter.WhichOneof("parameter_choice")
    if kind is None:
        raise InvalidRequestError(f"parameters[{name[:100]!r}] has no value", param=name[:100])
    value: bool | int | float | str = getattr(parameter, kind)
    return value


def _tensor(message: pb.ModelInferRequest, index: int) -> Tensor:
    tensor, where = message.inputs[index], f"inputs[{index}]"
    spec = input_spec(tensor.name, tensor.datatype, tensor.shape, where)
    _refuse_parameters(tensor.parameters, where)
    contents = {descriptor.name: values for descriptor, values in tensor.contents.ListFields()}
    if message.raw_input_contents:
        if contents:
            raise InvalidRequestError(
                f"{where}.contents is set beside raw_input_contents; allowed: one of the two",
                param=f"{where}.contents",
            )
        return raw_tensor(spec, message.raw_input_contents[index], f"raw_input_contents[{index}]")
    wanted = _CONTENTS[spec.datatype]
    values = list(contents.pop(wanted, ()))
    if contents or len(values) != 1:
        held = ", ".join([f"{len(values)} {wanted}", *contents])
        raise InvalidRequestError(
            f"{where}.contents ({spec.name}) holds {held}; allowed: 1 {wanted}, for shape {list(spec.shape)} of "
            f"{spec.datatype}",
            param=f"{where}.contents",
        )
    return Tensor(spec.name, spec.datatype, spec.shape, values)


def _response(service: InferenceService, request_id: str, reply: InferReply) -> pb.ModelInferResponse:
    outputs = [
        pb.ModelInferResponse.InferOutputTensor(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        for tensor in reply.outputs
    ]
    return pb.ModelInferResponse(
        model_name=service.model_name, model_version=model.VERSION, id=request_id, outputs=outputs,
        raw_output_contents=[encode(tensor) for tensor in reply.outputs],
    )  # fmt: skip
