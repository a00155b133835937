"""Stand-ins below the engine for tests without torch: a byte tokenizer, and an executor that follows plans exactly.

They stand in for the model alone: engine, scheduler, cache and fronts above them are the real ones.
"""

from __future__ import annotations

import asyncio
import json
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from servd.config import EngineConfig
from servd.engine.async_engine import AsyncEngine
from servd.errors import InvalidRequestError, WorkerDied
from servd.executor.base import Executor, ProgressCallback
from servd.hub.files import ModelFiles
from servd.outputs import ModelRunnerOutput, NewRequestData, SchedulerOutput, TokenLogprobs, WorkerInfo
from servd.sampling_params import SamplingParams

EOS = 256
HIDDEN_SIZE = 8
VOCAB_SIZE = 257
TEMPLATE_ERROR = "<template error>"  # a message with this text makes the chat template refuse


class ByteTokenizer:
    """256 byte tokens and an end-of-text token: token ids of a text are its UTF-8 bytes."""

    vocab_size = VOCAB_SIZE
    eos_token_ids = frozenset((EOS,))
    special_token_ids = frozenset((EOS,))
    bos_token_id: int | None = None
    num_stripped_spaces = 0
    has_chat_template = True
    template_variables: frozenset[str] = frozenset()
    template_source = ""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        kept = [i for i in ids if not (skip_special_tokens and i in self.special_token_ids)]
        return b"".join(self.token_bytes(i) for i in kept).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return b"<eos>" if token_id == EOS else bytes([token_id])

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_id(self, text: str) -> int | None:
        return None

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        if any(TEMPLATE_ERROR in message["content"] for message in messages):
            raise InvalidRequestError("messages are refused by the chat template", param="messages")
        extra = f"[{json.dumps(dict(template_kwargs), sort_keys=True)}]\n" if template_kwargs else ""
        turns = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
        if continue_final_message:
            return extra + turns.removesuffix("\n")
        return extra + turns + ("assistant: " if add_generation_prompt else "")

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        return self.encode(self.apply_chat_template(messages, **options))


@dataclass
class FakeRequest:
    """What the fake worker knows of a request, as a real one would."""

    request_id: str
    token_ids: list[int]  # prompt and all tokens sampled so far
    num_prompt_tokens: int
    params: SamplingParams
    seed: int
    stop_token_ids: list[int]
    block_ids: list[int]
    max_total_tokens: int
    num_pooled: int = 0  # prompt positions seen since it started, if it is pooled

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def prompt(self) -> str:
        return bytes(i for i in self.token_ids[: self.num_prompt_tokens] if i < 256).decode("utf-8", "replace")


NextToken = Callable[[FakeRequest], int]


def letters(request: FakeRequest) -> int:
    """An endless answer in lower-case letters that depends on prompt, position and, when sampling, on the seed."""
    seed = request.seed if request.params.temperature > 0 else 0
    prompt = sum(request.token_ids[: request.num_prompt_tokens])
    return ord("a") + (seed + 7 * len(request.token_ids) + prompt) % 26


class FakeExecutor(Executor):
    """Answers plans without a model, and keeps a model of the KV cache to prove that each plan was right.

    replies: part of a prompt → the answer to it, which ends in end-of-text; other prompts get `next_token`'s.
    step_delay: seconds a step takes. `gate`: cleared, no step ends. `on_step`: called with each plan; may raise.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        num_blocks: int = 513,
        replies: Mapping[str, str] | None = None,
        next_token: NextToken = letters,
        step_delay: float = 0.0,
        on_step: Callable[[SchedulerOutput], None] | None = None,
    ) -> None:
        super().__init__(config)
        self.num_blocks = num_blocks
        self.replies = dict(replies or {})
        self.next_token = next_token
        self.step_delay = step_delay
        self.on_step = on_step
        self.gate = asyncio.Event()
        self.gate.set()
        self.num_starts = 0
        self.plans: list[SchedulerOutput] = []
        self.requests: dict[str, FakeRequest] = {}
        self._kv: dict[tuple[int, int], int] = {}  # (block, offset) → token whose KV is there
        self._queue: list[tuple[SchedulerOutput, asyncio.Future[ModelRunnerOutput]]] = []
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self, progress: ProgressCallback | None = None) -> WorkerInfo:
        await self.close()
        self.num_starts += 1
        self.requests.clear()
        self._kv.clear()
        self._task = asyncio.create_task(self._run())
        return WorkerInfo("fake", "float32", self.num_blocks, 1024, "fake", hidden_size=HIDDEN_SIZE)

    def submit(self, plan: SchedulerOutput) -> asyncio.Future[ModelRunnerOutput]:
        future: asyncio.Future[ModelRunnerOutput] = asyncio.get_running_loop().create_future()
        if self._task is None:
            future.set_exception(WorkerDied("the fake worker is dead"))
        else:
            self._queue.append((plan, future))
            self._news.set()
        return future

    def die(self) -> None:
        """End as a killed worker does: all that it held is lost, and somebody is told."""
        was_idle = self._task is not None and not self._queue
        error = WorkerDied("the fake worker was killed")
        self._stop(error)
        if was_idle and self.on_idle_death is not None:
            self.on_idle_death(error)

    async def kill(self) -> bool:
        self._stop(WorkerDied("the fake worker was killed"))
        return True

    async def close(self) -> None:
        task = self._task
        self._stop(WorkerDied("the fake worker was shut down"))
        if task is not None:
            await asyncio.gather(task, return_exceptions=True)

    def _stop(self, error: WorkerDied) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None
        for _, future in self._queue:
            if not future.done():
                future.set_exception(error)
        self._queue.clear()

    async def _run(self) -> None:
        while True:
            while not self._queue:
                self._news.clear()
                await self._news.wait()
            await asyncio.sleep(self.step_delay)
            await self.gate.wait()
            plan, future = self._queue[0]
            try:
                if self.on_step is not None:
                    self.on_step(plan)
                output = self._step(plan)
            except WorkerDied:
                self.die()
                return
            except Exception as error:
                self._queue.pop(0)
                future.set_exception(error)
            else:
                self._queue.pop(0)
                future.set_result(output)

    # -- a step ------------------------------------------------------------------------------------------------------

    def _step(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        self.plans.append(plan)
        for request_id in plan.dropped_request_ids:
            self.requests.pop(request_id, None)
        for new in plan.new_requests:
            self._add(new)
        for request_id, index, block_id in plan.replaced_blocks:
            self.requests[request_id].block_ids[index] = block_id
        size = self.config.cache.block_size
        for source, destination in plan.block_copies:
            for offset in range(size):
                if (source, offset) in self._kv:
                    self._kv[destination, offset] = self._kv[source, offset]
        output = ModelRunnerOutput(plan.step_id, [], [], {}, {}, {}, self.step_delay)
        scheduled = plan.scheduled
        for i, request_id in enumerate(scheduled.request_ids):
            request = self.requests[request_id]
            request.block_ids += scheduled.new_block_ids[i]
            start, count = scheduled.num_computed_tokens[i], scheduled.num_scheduled_tokens[i]
            if scheduled.samples[i]:
                assert start + count <= len(request.token_ids), f"{request_id} samples at {start} + {count}: {request}"
                start = len(request.token_ids) - count
            if len(request.token_ids) == request.max_total_tokens > request.num_prompt_tokens:
                continue  # drafts brought its last token after this was planned
            self._compute(request, start, start + count)
            self._pool(request, start, start + count, output)
            if request.params.prompt_logprobs is not None:
                output.prompt_logprobs[request_id] = [
                    _logprobs(request.token_ids[p + 1], request.params.prompt_logprobs)
                    for p in range(start, min(start + count, request.num_prompt_tokens - 1))
                ]
            if scheduled.samples[i]:
                granted = scheduled.num_draft_tokens[i] if scheduled.num_draft_tokens else 0
                self._sample_all(request, granted, output)
        output.num_draft_tokens = sum(scheduled.num_draft_tokens)
        if not output.num_draft_tokens:
            output.num_accepted_tokens.clear()
        return output

    def _pool(self, request: FakeRequest, start: int, end: int, output: ModelRunnerOutput) -> None:
        """The vector of a pooled prompt, once all of it that its pooling needs was computed."""
        pooling = request.params.pooling
        if pooling is None:
            return
        request.num_pooled += end - start
        if end == request.num_prompt_tokens:
            assert pooling == "last" or request.num_pooled == end, f"{pooling} saw {request.num_pooled} of {end}"
            output.embeddings[request.request_id] = fake_embedding(request.token_ids, pooling).tobytes()

    def _sample_all(self, request: FakeRequest, num_drafts: int, output: ModelRunnerOutput) -> None:
        """The next token, and as many more as a guess that is sometimes right gives."""
        size = self.config.cache.block_size
        room = min(num_drafts, request.max_total_tokens - len(request.token_ids) - 1)
        num_right = len(request.token_ids) % (room + 1)
        for i in range(1 + num_right):
            token_id = self._sample(request)
            request.token_ids.append(token_id)
            output.sampled_token_ids.append(token_id)
            if request.params.logprobs is not None:
                output.logprobs.setdefault(request.request_id, []).append(_logprobs(token_id, request.params.logprobs))
            if i < num_right:
                self._compute(request, len(request.token_ids) - 1, len(request.token_ids))
        output.request_ids.append(request.request_id)
        output.num_accepted_tokens.append(num_right)
        for position in range(len(request.token_ids) - 1, len(request.token_ids) - 1 + room - num_right):
            self._kv[request.block_ids[position // size], position % size] = -1  # wrong guesses

    def _add(self, new: NewRequestData) -> None:
        assert new.request_id not in self.requests, f"{new.request_id} is known already"
        self.requests[new.request_id] = FakeRequest(
            new.request_id, list(new.token_ids), new.num_prompt_tokens, new.sampling_params, new.seed,
            list(new.stop_token_ids), list(new.block_ids), new.max_total_tokens,
        )  # fmt: skip

    def _compute(self, request: FakeRequest, start: int, end: int) -> None:
        """Write the new tokens' KV, then check that attention would find every earlier token of this request."""
        size = self.config.cache.block_size
        assert end <= len(request.token_ids), f"{request.request_id}: tokens up to {end} planned, known {request}"
        assert len(request.block_ids) * size >= end, f"{request.request_id}: {end} tokens in {request.block_ids}"
        for position in range(start, end):
            self._kv[request.block_ids[position // size], position % size] = request.token_ids[position]
        # All of it at each chunk and now and then; else what was written last: a long answer would cost its square.
        first = 0 if end - start > 1 or end % 64 == 0 else max(end - 2 * size, 0)
        for position in range(first, end):
            found = self._kv.get((request.block_ids[position // size], position % size))
            assert found == request.token_ids[position], f"{request.request_id}: wrong KV at {position}: {found}"

    def _sample(self, request: FakeRequest) -> int:
        for token_id, bias in (request.params.logit_bias or {}).items():
            if bias == 100.0:
                return token_id
        held_back = request.stop_token_ids if request.num_output_tokens < request.params.min_tokens else []
        token_id = self._reply_token(request)
        token_id = ord(".") if token_id in held_back else token_id
        allowed = request.params.allowed_token_ids
        return token_id if allowed is None or token_id in allowed else min(allowed)

    def _reply_token(self, request: FakeRequest) -> int:
        for part, reply in self.replies.items():
            if part in request.prompt:
                data = reply.encode()
                done = request.num_output_tokens
                return data[done] if done < len(data) else EOS
        return self.next_token(request)


def fake_embedding(token_ids: Sequence[int], pooling: str) -> array[float]:
    """Before it is cut and normalized: depends on every token and on the pooling."""
    base = sum((i + 1) * t for i, t in enumerate(token_ids)) + len(pooling) * ord(pooling[0])
    return array("f", ((base * (k + 1)) % 97 - 48.0 for k in range(HIDDEN_SIZE)))


def _logprobs(token_id: int, num_top: int) -> TokenLogprobs:
    """Made-up values: the token is the likeliest, its successors in the vocabulary follow."""
    top = [(token_id + k) % VOCAB_SIZE for k in range(num_top)]
    return TokenLogprobs(token_id, -0.5, 1, top, [-0.5 - k for k in range(num_top)])


@dataclass
class FakeEngine:
    """A real AsyncEngine over the fakes; `async with` starts and closes it."""

    folder: Path  # for the model's config.json
    settings: dict[str, Any] = field(default_factory=dict)  # flat EngineConfig names
    max_position_embeddings: int = 2048
    executor_options: dict[str, Any] = field(default_factory=dict)  # keywords of FakeExecutor
    tokenizer: ByteTokenizer = field(default_factory=ByteTokenizer)

    async def __aenter__(self) -> FakeEngine:
        (self.folder / "config.json").write_text(
            json.dumps({"max_position_embeddings": self.max_position_embeddings, "vocab_size": VOCAB_SIZE})
        )
        config = EngineConfig.from_flat(**self.settings)
        self.executor = FakeExecutor(config, **self.executor_options)
        files = ModelFiles("fake", self.folder, ())
        self.engine = AsyncEngine(config, files, self.tokenizer, self.executor)  # type: ignore[arg-type]
        await self.engine.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.engine.close()

    async def wait_until(self, condition: Callable[[], bool], seconds: float = 5.0) -> None:
        """Wait for something that must come soon; raises TimeoutError if it does not."""
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.002)

    async def wait_idle(self, seconds: float = 5.0) -> None:
        """Wait until no request is alive and no block is used."""
        stats = self.engine.stats
        await self.wait_until(lambda: (stats().running, stats().waiting, stats().kv_blocks_used) == (0, 0, 0), seconds)
        self.engine.core.scheduler.cache.check_integrity()
