"""The calls that generate: Generate, Chat and Abort.

Owns a stream's life: deadline, cancellation, a client that does not read. Knows nothing of scheduling.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing

from servd.api.access import Caller, current_caller
from servd.api.chat.call import ChatCall
from servd.api.chat.parts import AnswerReader
from servd.api.chat.plan import plan_chat
from servd.api.grpc import convert
from servd.api.grpc._pb.servd.v1 import inference_pb2 as pb
from servd.api.grpc._pb.servd.v1 import inference_pb2_grpc as pb_grpc
from servd.api.grpc.chunks import ChunkWriter
from servd.api.grpc.status import Context, errors_as_status
from servd.api.grpc.writing import TimedWriter
from servd.api.service import REQUEST_ID_SHAPE, InferenceService
from servd.errors import InvalidRequestError
from servd.sampling_params import SamplingParams

DEFAULT_MAX_TOKENS = SamplingParams().max_tokens  # of Generate; Chat goes on to the end of the context


class GenerationCalls(pb_grpc.InferenceServicer):
    """The generating calls of servd.v1.Inference."""

    def __init__(self, service: InferenceService, write_timeout: float) -> None:
        self.service = service
        self._write_timeout = write_timeout  # seconds
        self._running: dict[str, Caller] = {}  # request id → whose it is

    def _params(self, message: pb.SamplingParams, max_tokens: int | None) -> SamplingParams:
        """Settings of a call for which there is room in the queue."""
        params = convert.sampling_params_from(message, self.service.engine.sampling_defaults, max_tokens=max_tokens)
        self.service.engine.check_room(params)
        return params

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        """Stream the continuation of a prompt."""
        async with errors_as_status(context):
            self.service.check_model(request.model)
            params = self._params(request.sampling_params, DEFAULT_MAX_TOKENS)
            params, param = convert.with_guidance(params, request.sampling_params)
            await self.service.engine.check_guidance(params, param=param)
            kept = self.service.num_kept_tokens(convert.kept_tokens_from(request), params.max_tokens)
            field, prompt = convert.prompt_from(request, "prompt", self.service.engine.max_model_len, kept=kept)
            add_special_tokens = convert.or_true(request, "add_special_tokens")
            token_ids = await self.service.encode_prompt(prompt, add_special_tokens=add_special_tokens, param=field)
            if kept is not None:
                token_ids = token_ids[-kept:]
            await self._stream(request, context, token_ids, params, field, None)

    async def Chat(self, request: pb.ChatRequest, context: Context) -> None:
        """Stream the answer to a conversation."""
        async with errors_as_status(context):
            self.service.check_model(request.model)
            params = self._params(request.sampling_params, None)
            if request.continue_final_message and request.add_generation_prompt:
                raise InvalidRequestError(
                    "continue_final_message and add_generation_prompt are true; allowed: one of the two",
                    param="continue_final_message",
                )
            call = ChatCall(
                convert.chat_messages_from(request.messages, "messages"),
                params,
                tools=convert.tools_from(request),
                tool_choice=convert.tool_choice_from(request.tool_choice),
                answer_format=convert.answer_format_from(request.sampling_params),
                add_generation_prompt=convert.or_true(request, "add_generation_prompt"),
                continue_final_message=request.continue_final_message,
                template_kwargs=convert.template_kwargs_from(request),
                reasoning_effort=request.reasoning_effort or None,
                truncate_prompt_tokens=convert.kept_tokens_from(request),
            )
            plan = await plan_chat(self.service, call)
            await self._stream(request, context, plan.prompt_token_ids, plan.params, "messages", plan.new_reader)

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse | None:
        """End a request of the same tenant."""
        async with errors_as_status(context):
            owner = self._running.get(request.request_id)
            is_own = owner is not None and owner.tenant == current_caller().tenant
            return pb.AbortResponse(aborted=is_own and self.service.engine.abort(request.request_id))
        return None

    async def _stream(
        self,
        request: pb.GenerateRequest | pb.ChatRequest,
        context: Context,
        token_ids: list[int],
        params: SamplingParams,
        prompt_param: str,
        new_reader: Callable[[], AnswerReader] | None,
    ) -> None:
        # A coroutine that writes, not a generator: grpc cancels this task when the client leaves or its deadline
        # passes, also while it waits for flow control, and the iterator is closed (the request aborted) at once.
        request_id = self._request_id(request)
        outputs = self.service.generate(
            token_ids,
            params,
            request_id=request_id,
            priority=request.priority,
            timeout=context.time_remaining(),
            cache_salt=convert.salt_from(request),
            prompt_param=prompt_param,
        )
        chunks = ChunkWriter(request_id, self.service.model_name, self.service.engine.tokenizer, new_reader)
        self._running[request_id] = current_caller()
        try:
            async with aclosing(outputs):
                with TimedWriter(context, self._write_timeout) as line:
                    async for output in outputs:
                        for chunk in chunks.chunks_of(output):
                            await line.write(chunk)
                        if output.error is not None:
                            raise output.error
        finally:
            del self._running[request_id]

    def _request_id(self, request: pb.GenerateRequest | pb.ChatRequest) -> str:
        if not request.request_id:
            return self.service.new_request_id("grpc")
        if not REQUEST_ID_SHAPE.fullmatch(request.request_id):
            raise InvalidRequestError(
                f"request_id is {request.request_id[:200]!r}; allowed: 1 to 128 of A-Z a-z 0-9 . _ -",
                param="request_id",
            )
        return request.request_id
