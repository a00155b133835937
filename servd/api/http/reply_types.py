"""The shapes of replies, for /openapi.json: what handlers build as plain data, written down as types.

Nothing is made of these at run time; a field with UNSET as default may be missing.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType


class PromptTokensDetails(msgspec.Struct):
    """Of the prompt's tokens, those found in the prefix cache."""

    cached_tokens: int


class Usage(msgspec.Struct):
    """Tokens of a call; a prompt counts once however many answers it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TokenLogprob(msgspec.Struct):
    """A token's log-probability, nats."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(TokenLogprob):
    """With the best alternatives at its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(msgspec.Struct):
    """One entry a token."""

    content: list[ChatTokenLogprob] | None
    refusal: list[ChatTokenLogprob] | None | UnsetType = UNSET


class FunctionCallReply(msgspec.Struct):
    """`arguments` is JSON text."""

    name: str
    arguments: str


class ToolCallReply(msgspec.Struct):
    """A function that the answer wants called."""

    id: str
    type: Literal["function"]
    function: FunctionCallReply


class AnswerMessage(msgspec.Struct):
    """The answer."""

    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    tool_calls: list[ToolCallReply] | None | UnsetType = UNSET
    reasoning_content: str | None | UnsetType = UNSET


class ChatChoice(msgspec.Struct):
    """One of n answers."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: str | int | None
    token_ids: list[int] | UnsetType = UNSET


class PromptLogprob(msgspec.Struct):
    """vLLM's: of one token at one place of the prompt."""

    logprob: float
    rank: int
    decoded_token: str


class ChatCompletion(msgspec.Struct):
    """The reply of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | UnsetType = UNSET


class ChatDelta(msgspec.Struct):
    """What is new."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | None | UnsetType = UNSET
    reasoning_content: str | None | UnsetType = UNSET
    tool_calls: list[dict[str, Any]] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct):
    """News of one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    stop_reason: str | int | None | UnsetType = UNSET


class ChatCompletionChunk(msgspec.Struct):
    """One event of a streamed chat completion; the last one's data is [DONE], a failure's an ErrorReply."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | None | UnsetType = UNSET


class LegacyLogprobs(msgspec.Struct):
    """OpenAI's older shape: parallel arrays, one entry a token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(msgspec.Struct):
    """An answer, or news of it in a stream, where finish_reason is null until the last."""

    index: int
    text: str
    logprobs: LegacyLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | int | None | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | UnsetType = UNSET


class Completion(msgspec.Struct):
    """The reply of /v1/completions, and one event of its stream (which ends in [DONE])."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None | UnsetType = UNSET


class Model(msgspec.Struct):
    """What is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int  # tokens of prompt and answer together


class ModelList(msgspec.Struct):
    """All models."""

    object: Literal["list"]
    data: list[Model]


class TokenizeReply(msgspec.Struct):
    """Token ids of a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeReply(msgspec.Struct):
    """The text of token ids."""

    prompt: str


class Health(msgspec.Struct):
    """Whether requests are taken: starting, ready, recovering, draining or dead."""

    state: str


class Version(msgspec.Struct):
    """The server's version."""

    version: str


class EmbeddingEntry(msgspec.Struct):
    """One input's vector: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(msgspec.Struct):
    """Tokens of all inputs."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(msgspec.Struct):
    """A vector an input, in order."""

    object: Literal["list"]
    data: list[EmbeddingEntry]
    model: str
    usage: EmbeddingUsage


class Prefix(msgspec.Struct):
    """A pin; times are seconds since 1970."""

    id: str
    object: Literal["prefix"]
    name: str | None
    state: str
    num_tokens: int
    num_blocks: int
    bytes: int
    created_at: int
    expires_at: int


class PrefixList(msgspec.Struct):
    """Oldest first."""

    object: Literal["list"]
    data: list[Prefix]


class DeletedPrefix(msgspec.Struct):
    """What was let go of."""

    id: str
    object: Literal["prefix"]
    deleted: bool


class RequestSummary(msgspec.Struct):
    """A request in a list; `created` is in seconds since 1970."""

    id: str
    object: Literal["request"]
    state: Literal["waiting", "running", "finished"]
    created: float
    age_seconds: float


class RequestList(msgspec.Struct):
    """Newest first."""

    object: Literal["list"]
    data: list[RequestSummary]


class BatchSizes(msgspec.Struct):
    """Requests in the steps that an answer took part in."""

    min: int
    mean: float
    max: int


class PrefillChunk(msgspec.Struct):
    """A part of the prompt; `at_seconds` after arrival its step, which took `seconds`, was over."""

    step: int
    tokens: int
    at_seconds: float
    seconds: float
    batch_size: int


class Preemption(msgspec.Struct):
    """The answer lost its blocks."""

    at_seconds: float
    reason: str


class Gaps(msgspec.Struct):
    """Seconds between steps that gave tokens."""

    median: float | None
    max: float | None


class Stall(msgspec.Struct):
    """A gap far longer than the usual one."""

    at_seconds: float
    seconds: float
    cause: str
    detail: dict[str, Any] | UnsetType = UNSET


class AnswerDescription(msgspec.Struct):
    """One answer; all times are from the call's arrival, and `seconds`, by phase, add up to `total_seconds`."""

    prompt: int
    index: int
    state: Literal["waiting", "running", "finished"]
    finish_reason: str | None
    created: float
    total_seconds: float
    seconds: dict[str, float]
    waited_for: dict[str, float]  # of the time in the queue
    time_to_first_token_seconds: float | None
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int | None
    num_steps: int
    batch_size: BatchSizes | None
    num_prefill_chunks: int
    prefill_chunks: list[PrefillChunk]
    num_preemptions: int
    preemptions: list[Preemption]
    num_worker_deaths: int
    accepted_draft_tokens: int
    gap_seconds: Gaps
    unread_seconds: float  # that the client left news unread
    num_stalls: int
    stalls: list[Stall]


class RequestDescription(msgspec.Struct):
    """What became of a request, and where its time went."""

    id: str
    object: Literal["request"]
    state: Literal["waiting", "running", "finished"]
    answers: list[AnswerDescription]


class KServeErrorReply(msgspec.Struct):
    """The body of a reply that is not a success, in the Open Inference Protocol's shape."""

    error: str
