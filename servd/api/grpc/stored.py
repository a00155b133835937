"""Calls whose replies are whole: Embed, and those about kept prefixes and past requests.

Knows nothing of pooling, blocks and quotas.
"""

from __future__ import annotations

from typing import Any

from servd.api.chat.call import ChatCall
from servd.api.chat.plan import plan_chat
from servd.api.grpc import convert
from servd.api.grpc._pb.servd.v1 import inference_pb2 as pb
from servd.api.grpc._pb.servd.v1 import inference_pb2_grpc as pb_grpc
from servd.api.grpc.status import Context, errors_as_status
from servd.api.service import InferenceService
from servd.engine.prefix_pins import DEFAULT_TTL_SECONDS, PrefixPin
from servd.engine.request_log import MAX_FINISHED
from servd.errors import InvalidRequestError
from servd.sampling_params import SamplingParams

MAX_INPUTS = 2048  # of one Embed
STATES = ("waiting", "running", "finished")
DEFAULT_RECORDS = 100

_POOLINGS = {pb.POOLING_UNSPECIFIED: None, pb.POOLING_LAST: "last", pb.POOLING_MEAN: "mean", pb.POOLING_CLS: "cls"}


class StoredCalls(pb_grpc.InferenceServicer):
    """Embed, and the calls about prefixes and records, of servd.v1.Inference."""

    service: InferenceService

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse | None:
        """One vector an input."""
        async with errors_as_status(context, ""):
            self.service.check_model(request.model)
            if not 1 <= len(request.inputs) <= MAX_INPUTS:
                raise InvalidRequestError(
                    f"inputs has {len(request.inputs)} entries; allowed: 1 to {MAX_INPUTS}", param="inputs"
                )
            if request.pooling not in _POOLINGS:
                raise InvalidRequestError(
                    f"pooling is {request.pooling}; allowed: 0 to {max(_POOLINGS)}", param="pooling"
                )
            self.service.engine.check_room()
            names, prompts, limit = [], [], self.service.engine.max_model_len
            for i, given in enumerate(request.inputs):
                name, prompt = convert.prompt_from(given, "input", limit, before=f"inputs[{i}].")
                add_special_tokens = convert.or_true(request, "add_special_tokens")
                prompts.append(
                    await self.service.encode_prompt(prompt, add_special_tokens=add_special_tokens, param=name)
                )
                names.append(name)
            embeddings = await self.service.embed(
                prompts,
                request_id=self.service.new_request_id("embd"),
                pooling=_POOLINGS[request.pooling],
                dimensions=request.dimensions if request.HasField("dimensions") else None,
                normalize=convert.or_true(request, "normalize"),
                priority=request.priority,
                timeout=context.time_remaining(),
                cache_salt=convert.salt_from(request),
                prompt_params=names,
            )
            usage = pb.Usage(
                prompt_tokens=sum(one.num_prompt_tokens for one in embeddings),
                cached_tokens=sum(one.num_cached_tokens for one in embeddings),
            )
            vectors = [pb.Embedding(index=i, values=one.values) for i, one in enumerate(embeddings)]
            return pb.EmbedResponse(model=self.service.model_name, embeddings=vectors, usage=usage)
        return None

    async def CreatePrefix(self, request: pb.CreatePrefixRequest, context: Context) -> pb.Prefix | None:
        """Answers when the prefix is computed; one that is kept already lives on from now."""
        async with errors_as_status(context):
            self.service.check_model(request.model)
            self.service.engine.check_room()
            name, token_ids = await self._prefix_tokens(request)
            pin = await self.service.create_prefix(
                token_ids,
                ttl_seconds=request.ttl_seconds if request.HasField("ttl_seconds") else DEFAULT_TTL_SECONDS,
                name=request.name or None,
                cache_salt=convert.salt_from(request),
                prompt_param=name,
            )
            return _prefix(pin)
        return None

    async def _prefix_tokens(self, request: pb.CreatePrefixRequest) -> tuple[str, list[int]]:
        """The field that was given, and its tokens."""
        if request.WhichOneof("prefix") == "conversation":
            messages = convert.chat_messages_from(request.conversation.messages, "conversation.messages")
            call = ChatCall(messages, SamplingParams(), add_generation_prompt=False)
            return "conversation.messages", (await plan_chat(self.service, call)).prompt_token_ids
        name, prompt = convert.prompt_from(request, "prefix", self.service.engine.max_model_len)
        return name, await self.service.encode_prompt(prompt, param=name)

    async def ListPrefixes(
        self, request: pb.ListPrefixesRequest, context: Context
    ) -> pb.ListPrefixesResponse | None:
        """All that the caller's tenant keeps, oldest first."""
        async with errors_as_status(context):
            return pb.ListPrefixesResponse(prefixes=[_prefix(pin) for pin in self.service.list_prefixes()])
        return None

    async def GetPrefix(self, request: pb.GetPrefixRequest, context: Context) -> pb.Prefix | None:
        """One of them."""
        async with errors_as_status(context):
            return _prefix(self.service.get_prefix(request.id))
        return None

    async def DeletePrefix(
        self, request: pb.DeletePrefixRequest, context: Context
    ) -> pb.DeletePrefixResponse | None:
        """Let go of one; requests that use its blocks keep them."""
        async with errors_as_status(context):
            self.service.delete_prefix(request.id)
            return pb.DeletePrefixResponse()
        return None

    async def GetRequestRecord(
        self, request: pb.GetRequestRecordRequest, context: Context
    ) -> pb.RequestRecord | None:
        """Why a request of the caller's tenant was slow."""
        async with errors_as_status(context):
            return _record(self.service.describe_request(request.request_id))
        return None

    async def ListRequestRecords(
        self, request: pb.ListRequestRecordsRequest, context: Context
    ) -> pb.ListRequestRecordsResponse | None:
        """The tenant's requests, in short."""
        async with errors_as_status(context):
            if request.state not in ("", *STATES):
                raise InvalidRequestError(
                    f"state is {request.state[:100]!r}; allowed: {', '.join(STATES)}, or none", param="state"
                )
            limit = request.limit if request.HasField("limit") else DEFAULT_RECORDS
            if not 1 <= limit <= MAX_FINISHED:
                raise InvalidRequestError(f"limit is {limit}; allowed: 1 to {MAX_FINISHED}", param="limit")
            found = self.service.list_requests(state=request.state or None, limit=limit)
            return pb.ListRequestRecordsResponse(records=[_record(one) for one in found])
        return None


def _record(described: dict[str, Any]) -> pb.RequestRecord:
    record = pb.RequestRecord(request_id=described["id"])
    record.record.update(described)
    return record


def _prefix(pin: PrefixPin) -> pb.Prefix:
    return pb.Prefix(
        id=pin.id, name=pin.name or "", num_tokens=pin.num_tokens, num_blocks=pin.num_blocks, bytes=pin.num_bytes,
        created_at=pin.created_at, expires_at=pin.expires_at, state=pin.state,
    )  # fmt: skip
