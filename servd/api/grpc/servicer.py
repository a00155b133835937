"""The calls of servd.v1.Inference, these about text and the engine's state; see proto/servd/v1/inference.proto.

Knows nothing of sockets, keys or health.
"""

from __future__ import annotations

import servd
from servd.api.access import current_caller
from servd.api.grpc import convert
from servd.api.grpc._pb.servd.v1 import inference_pb2 as pb
from servd.api.grpc.generation import GenerationCalls
from servd.api.grpc.status import Context, errors_as_status
from servd.api.grpc.stored import StoredCalls


class InferenceServicer(GenerationCalls, StoredCalls):
    """All calls."""

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse | None:
        """Token ids of a text."""
        async with errors_as_status(context):
            self.service.check_model(request.model)
            add_special_tokens = convert.or_true(request, "add_special_tokens")
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

    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.GetStatusResponse | None:
        """Queue lengths and KV use; of an engine that starts, only that it does."""
        async with errors_as_status(context):
            state = convert.ENGINE_STATES[self.service.engine.state]
            if state == pb.ENGINE_STATE_STARTING:
                return pb.GetStatusResponse(state=state, version=servd.__version__)
            stats = self.service.stats()
            return pb.GetStatusResponse(
                state=state,
                version=servd.__version__,
                requests_running=stats.running,
                requests_waiting=stats.waiting,
                kv_blocks_used=stats.kv_blocks_used,
                kv_blocks_cached=stats.kv_blocks_cached,
                kv_blocks_free=stats.kv_blocks_free,
                block_size=stats.block_size,
            )
        return None
