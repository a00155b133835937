"""Engine outputs of one call to Chunk messages: text told apart from reasoning and tool calls, lists kept short.

Knows nothing of streams or requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from servd.api.chat.parts import AnswerReader, Part, ReasoningPart, TextPart, ToolCallPart
from servd.api.grpc._pb.servd.v1 import inference_pb2 as pb
from servd.engine.tokenizer import Tokenizer
from servd.outputs import RequestOutput, TokenLogprobs
from servd.request import FinishReason

# A client takes 4 MiB a message unless told otherwise; an entry with 20 alternatives has about 600 bytes.
MAX_ENTRIES = 2048

_FINISH_REASONS = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
    FinishReason.DEADLINE: pb.FINISH_REASON_DEADLINE,
    FinishReason.ERROR: pb.FINISH_REASON_ERROR,
}


class ChunkWriter:
    """Makes the chunks of one call, all of its answers."""

    def __init__(
        self, request_id: str, model: str, tokenizer: Tokenizer, new_reader: Callable[[], AnswerReader] | None
    ) -> None:
        """`new_reader`: makes what reads an answer's text; None: all text is the answer's own."""
        self._request_id = request_id
        self._model = model
        self._tokenizer = tokenizer
        self._new_reader = new_reader
        self._readers: dict[int, AnswerReader] = {}  # by answer
        self._have_called: set[int] = set()  # answers with a tool call

    def chunks_of(self, output: RequestOutput) -> Iterator[pb.Chunk]:
        """The output as messages: one, unless it reports the log-probabilities of very many tokens."""
        prompt = [entry for entry in output.prompt_logprobs or () if entry is not None]
        for piece in _pieces(prompt):
            yield self._chunk(output.index, prompt_logprobs=self._logprobs(piece))
        start = 0
        while len(output.logprobs) - start > MAX_ENTRIES:
            end = start + MAX_ENTRIES
            entries = self._logprobs(output.logprobs[start:end])
            yield self._chunk(output.index, token_ids=output.token_ids[start:end], logprobs=entries)
            start = end
        chunk = self._chunk(
            output.index, token_ids=output.token_ids[start:], logprobs=self._logprobs(output.logprobs[start:])
        )
        self._add_text(chunk, output)
        _add_end(chunk, output, output.index in self._have_called)
        yield chunk

    def _chunk(
        self,
        index: int,
        *,
        token_ids: Sequence[int] = (),
        logprobs: Sequence[pb.TokenLogprobs] = (),
        prompt_logprobs: Sequence[pb.TokenLogprobs] = (),
    ) -> pb.Chunk:
        return pb.Chunk(
            request_id=self._request_id, model=self._model, index=index,
            token_ids=token_ids, logprobs=logprobs, prompt_logprobs=prompt_logprobs,
        )  # fmt: skip

    def _add_text(self, chunk: pb.Chunk, output: RequestOutput) -> None:
        if self._new_reader is None:
            chunk.text = output.text
            return
        reader = self._readers.get(output.index)
        if reader is None:
            reader = self._readers[output.index] = self._new_reader()
        parts: list[Part] = reader.push(output.text)
        if output.finish_reason is not None:
            parts += reader.finish()
        chunk.text = "".join(part.text for part in parts if isinstance(part, TextPart))
        chunk.reasoning = "".join(part.text for part in parts if isinstance(part, ReasoningPart))
        for part in parts:
            if isinstance(part, ToolCallPart):
                self._have_called.add(output.index)
                chunk.tool_calls.add(
                    index=part.index, id=part.id or "", name=part.name or "", arguments=part.arguments
                )

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> list[pb.TokenLogprobs]:
        text = self._tokenizer.token_text
        return [
            pb.TokenLogprobs(
                token_id=entry.token_id,
                token=text(entry.token_id),
                logprob=entry.logprob,
                rank=entry.rank,
                top_logprobs=[
                    pb.TopLogprob(token_id=i, token=text(i), logprob=p)
                    for i, p in zip(entry.top_token_ids, entry.top_logprobs, strict=True)
                ],
            )
            for entry in entries
        ]


def _add_end(chunk: pb.Chunk, output: RequestOutput, has_called: bool) -> None:
    """Why the answer ended, if it has."""
    if output.finish_reason is None:
        return
    chunk.finish_reason = _FINISH_REASONS[output.finish_reason]
    if has_called and output.finish_reason is FinishReason.STOP:
        chunk.finish_reason = pb.FINISH_REASON_TOOL_CALLS
    chunk.usage.prompt_tokens = output.num_prompt_tokens
    chunk.usage.completion_tokens = output.num_output_tokens
    chunk.usage.cached_tokens = output.num_cached_tokens
    if isinstance(output.stop_reason, str):
        chunk.stop_text = output.stop_reason
    elif output.stop_reason is not None:
        chunk.stop_token_id = output.stop_reason


def _pieces(entries: Sequence[TokenLogprobs]) -> Iterator[Sequence[TokenLogprobs]]:
    for start in range(0, len(entries), MAX_ENTRIES):
        yield entries[start : start + MAX_ENTRIES]
