"""The engine's public face: start, generate, abort, drain, close, on one asyncio loop.

Owns the life of requests from validated tokens to the last output. Knows nothing of HTTP, gRPC or chat messages.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from servd.cache.kv_cache_manager import KVCacheManager
from servd.config import EngineConfig
from servd.engine.answers import new_answers
from servd.engine.beam_search import BeamSearches
from servd.engine.best_of import BestOf
from servd.engine.core import EngineCore
from servd.engine.input_processor import InputProcessor
from servd.engine.output_processor import OutputProcessor
from servd.engine.prefix_pins import PrefixPins
from servd.engine.request_log import RequestLog
from servd.engine.result_stream import ResultStream, Sink
from servd.engine.stats import EngineStats as EngineStats
from servd.engine.tokenizer import Tokenizer
from servd.errors import (
    ConfigError,
    DeadlineExceededError,
    EngineUnavailableError,
    InvalidRequestError,
    OverloadedError,
    ServdError,
    UnsupportedError,
)
from servd.executor.base import EXECUTORS, Executor, ProgressCallback
from servd.hub import ModelFiles
from servd.metrics import Metrics
from servd.outputs import WorkerInfo
from servd.request import FinishReason
from servd.sampling_params import SamplingParams
from servd.scheduler.plan import Update
from servd.scheduler.policies import POLICIES
from servd.scheduler.scheduler import Scheduler

logger = logging.getLogger("servd.engine")

T = TypeVar("T")
_ONE_ANSWER = SamplingParams()


def with_max_model_len(config: EngineConfig, files: ModelFiles) -> EngineConfig:
    """A config whose `max_model_len` is settled. Raises ConfigError if it is longer than the model can."""
    limit = files.config().get("max_position_embeddings")
    asked = config.model.max_model_len
    if asked is None and limit is None:
        raise ConfigError("the model's config.json has no max_position_embeddings; set --max-model-len")
    if asked is not None and limit is not None and asked > limit:
        raise ConfigError(f"--max-model-len is {asked}; allowed: at most the model's {limit}")
    model = dataclasses.replace(config.model, max_model_len=limit if asked is None else asked)
    return dataclasses.replace(config, model=model)


def _started(part: T | None) -> T:
    if part is None:
        raise EngineUnavailableError("the engine is starting")
    return part


@dataclass(slots=True)
class _Family:
    """The unfinished answers of one request, and its deadline's timer."""

    answer_ids: list[str]
    timer: asyncio.TimerHandle | None = None


class AsyncEngine:
    """A served model. All methods are called on the event loop that ran `start()`."""

    def __init__(
        self,
        config: EngineConfig,
        files: ModelFiles,
        tokenizer: Tokenizer | None = None,
        executor: Executor | None = None,
        *,
        log_steps: bool = False,
    ) -> None:
        self.config = with_max_model_len(config.resolve(), files)
        POLICIES.get(self.config.scheduler.scheduling_policy)  # an unknown one is told before the model is loaded
        self.files = files
        # Values of SamplingParams for requests that do not set them.
        self.sampling_defaults: dict[str, Any] = {}
        if config.model.generation_config == "auto":
            self.sampling_defaults = files.sampling_defaults()
        self.metrics = Metrics()
        self.request_log = RequestLog()
        self.state = "starting"
        self.executor = executor or EXECUTORS.get(self.config.parallel.executor)(self.config, files)
        self.executor.config, self.executor.files = self.config, files
        self._tokenizer = tokenizer
        self._text_threads = ThreadPoolExecutor(2, thread_name_prefix="servd-text")
        self._seeds = random.Random(self.config.model.seed)
        self._log_steps = log_steps
        self._info: WorkerInfo | None = None
        self._core: EngineCore | None = None
        self._inputs: InputProcessor | None = None
        self._outputs: OutputProcessor | None = None
        self._pins: PrefixPins | None = None
        self._beams: BeamSearches | None = None
        self._task: asyncio.Task[None] | None = None
        self._idle = asyncio.Event()
        self._died = asyncio.Event()
        self._families: dict[str, _Family] = {}  # by request id
        self._answers: dict[str, str] = {}  # answer id → request id

    # -- life ------------------------------------------------------------------------------------------------------

    async def start(self, progress: ProgressCallback | None = None) -> None:
        """Load tokenizer and model, then run. Raises ConfigError or WorkerDied; the engine is then closed.

        Raises EngineUnavailableError if it was closed or drained meanwhile.
        """
        try:
            if self._tokenizer is None:
                self._tokenizer, info = await asyncio.gather(
                    self.run_in_thread(Tokenizer.from_files, self.files), self.executor.start(progress)
                )
            else:
                info = await self.executor.start(progress)
            self._check_sampling_defaults()
            if self.state != "starting":
                raise EngineUnavailableError("the engine was shut down while it started")
        except BaseException:
            await self.close()
            raise
        self._info = info
        self._inputs = InputProcessor(self.tokenizer, self.max_model_len, self.files.folder / "tokenizer.json")
        cache = KVCacheManager(
            info.num_blocks, self.config.cache.block_size, enable_prefix_caching=self.config.cache.enable_prefix_caching
        )
        self._outputs = OutputProcessor(self.tokenizer, self.metrics)
        scheduler = Scheduler(self.config.scheduler, cache)
        self._beams = BeamSearches(scheduler)
        self._core = EngineCore(
            scheduler, self.executor, self.metrics, self.request_log,
            on_updates=self._take_updates, on_state=self._change_state,
            max_restarts=self.config.parallel.max_worker_restarts,
            step_timeout=self.config.parallel.step_timeout, log_steps=self._log_steps,
        )  # fmt: skip
        self._pins = PrefixPins(
            cache, self.generate, block_bytes=info.block_bytes, max_model_len=self.max_model_len,
            max_share=self.config.cache.max_pinned_share, max_tenant_share=self.config.cache.max_tenant_pinned_share,
            claim=self.request_log.claim,
        )  # fmt: skip
        self.metrics.follow_gauges(self.stats, lambda: len(self.pins))
        self._task = asyncio.create_task(self._run(), name="servd-engine")
        self.state = "ready"

    def _check_sampling_defaults(self) -> None:
        try:
            SamplingParams(**self.sampling_defaults).validate(self.tokenizer.vocab_size)
        except InvalidRequestError as error:
            raise ConfigError(
                f"generation_config.json of {self.files.name}: {error.message}; --generation-config none leaves it out"
            ) from None

    async def _run(self) -> None:
        try:
            await self.core.run()
        except Exception as error:  # a broken invariant: every caller must hear of it, none may hang
            logger.exception("the engine failed")
            self._change_state("dead", EngineUnavailableError(f"the engine failed: {type(error).__name__}: {error}"))
            raise

    async def drain(self, grace_seconds: float) -> None:
        """Take no more requests, let the running ones finish for so long, then abort the rest."""
        if self.state != "dead":
            self.state = "draining"
        self._idle.clear()
        if self._answers:
            try:
                await asyncio.wait_for(self._idle.wait(), grace_seconds)
            except TimeoutError:
                self._end_all(FinishReason.ABORT, EngineUnavailableError("the server is shutting down"))

    async def close(self) -> None:
        """Stop at once: unfinished requests get an error, the workers end. Safe to call twice."""
        self._end_all(FinishReason.ABORT, EngineUnavailableError("the engine was closed"))
        self.state = "dead"
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self.executor.close()
        if self._pins is not None:
            self._pins.close()
        self._text_threads.shutdown(wait=False)
        if self._inputs is not None:
            self._inputs.close()

    async def wait_dead(self) -> None:
        """Return when the engine has failed for good; a server should then exit and be restarted from outside."""
        await self._died.wait()

    # -- what callers ask ------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        timeout: float | None = None,
        cache_salt: str = "",
        prompt_param: str = "prompt",
        pin_id: str | None = None,
    ) -> ResultStream:
        """Check and queue a request; returns its stream of outputs.

        `timeout` in seconds ends it with FinishReason.DEADLINE. `prompt_param` is what errors call the prompt. `pin_id`
        is for PrefixPins: max_tokens is 0 then. A grammar in `params` must have passed `check_guidance`.
        Raises InvalidRequestError naming the field, EngineUnavailableError, OverloadedError.
        """
        core, outputs = self.core, self.outputs
        prompt_token_ids = list(prompt_token_ids)  # the caller's list may change
        self.inputs.check(len(prompt_token_ids), params, prompt_param=prompt_param)
        self.inputs.check_token_ids(prompt_token_ids, prompt_param)
        self.inputs.check_request_id(request_id)
        self.inputs.require_checked_guidance(params)
        if priority and not core.scheduler.policy.uses_priority:
            raise UnsupportedError(
                f"priority is {priority}; allowed: 0, unless the server runs with --scheduling-policy priority",
                param="priority",
            )
        count = params.n if params.use_beam_search else params.num_sequences
        self.inputs.check_beams(params, self.config.scheduler.max_num_seqs)
        self.check_room(params)
        self.inputs.check_not_empty(prompt_token_ids, prompt_param)
        if request_id in self._families:
            raise InvalidRequestError(f"request_id is {request_id!r}, which is running", param="request_id")
        stream = ResultStream(params.n, lambda: self.abort(request_id))
        sink: Sink = stream
        if count > params.n:
            sink = BestOf(stream, params)
            params = msgspec.structs.replace(params, logprobs=params.logprobs or 0)
        seed = params.seed if params.seed is not None else self._seeds.getrandbits(63)
        answers = new_answers(
            request_id, count, prompt_token_ids, params,
            seed=seed, eos_token_ids=self.tokenizer.eos_token_ids, max_model_len=self.max_model_len,
            priority=priority, cache_salt=cache_salt, pin_id=pin_id,
        )  # fmt: skip
        family = self._families[request_id] = _Family([answer.request_id for answer in answers])
        for index, answer in enumerate(answers):
            self._answers[answer.request_id] = request_id
            outputs.add(answer, index, sink)
            if not params.use_beam_search:
                core.scheduler.add(answer)
        if params.use_beam_search:
            self.beams.start(answers)
        records = self.request_log.begin(request_id, answers, stream.unread_since)
        stream.on_unread = lambda index, since, seconds: records[index].unread(since, seconds)
        if timeout is not None:
            family.timer = self._end_after(timeout, request_id)
        core.wake()
        return stream

    def _end_after(self, delay: float, request_id: str) -> asyncio.TimerHandle:
        error = DeadlineExceededError(f"the deadline of {delay:g} s passed")
        return asyncio.get_running_loop().call_later(max(delay, 0), self._end, request_id, FinishReason.DEADLINE, error)

    async def check_guidance(self, params: SamplingParams, *, param: str = "guidance") -> None:
        """Raise InvalidRequestError, blaming `param`, unless answers can follow the grammar that `params` may have."""
        await self.inputs.check_guidance(params, param)

    def check_room(self, params: SamplingParams = _ONE_ANSWER) -> None:
        """Raise OverloadedError if such a request finds the queue full, EngineUnavailableError if none is taken now.

        For transports to call before they do any work on a request; `generate` asks again.
        """
        if self.state not in ("ready", "recovering"):
            raise EngineUnavailableError(f"the engine takes no requests now: it is {self.state}")
        limit, num_waiting = self.config.scheduler.max_num_queued_reqs, len(self.core.scheduler.waiting)
        n, param = params.num_sequences, params.num_sequences_param
        if n > limit:
            raise InvalidRequestError(f"{param} is {n}; allowed: at most --max-num-queued-reqs ({limit})", param=param)
        if num_waiting + n > limit:
            raise OverloadedError(f"{num_waiting} requests are waiting; allowed: {limit}")

    def abort(self, request_id: str) -> bool:
        """End a request; its blocks are free at once. False if it is not known (finished, or never was)."""
        return self._end(request_id, FinishReason.ABORT, EngineUnavailableError("the request was aborted"))

    def stats(self) -> EngineStats:
        """Queue lengths and KV use now."""
        return EngineStats.read(self.state, self.core.scheduler)

    async def run_in_thread(self, function: Callable[..., T], *args: Any) -> T:
        """Run work on text in a thread, so that the loop goes on meanwhile."""
        return await asyncio.get_running_loop().run_in_executor(self._text_threads, function, *args)

    @property
    def core(self) -> EngineCore:
        """The engine loop. Raises EngineUnavailableError before `start()`."""
        return _started(self._core)

    @property
    def inputs(self) -> InputProcessor:
        """Tokenizes and checks requests. Raises EngineUnavailableError before `start()`."""
        return _started(self._inputs)

    @property
    def outputs(self) -> OutputProcessor:
        """The output processor. Raises EngineUnavailableError before `start()`."""
        return _started(self._outputs)

    @property
    def beams(self) -> BeamSearches:
        """The beam searches. Raises EngineUnavailableError before `start()`."""
        return _started(self._beams)

    @property
    def pins(self) -> PrefixPins:
        """The pinned prefixes. Raises EngineUnavailableError before `start()`."""
        return _started(self._pins)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises EngineUnavailableError before `start()`."""
        return _started(self._tokenizer)

    @property
    def info(self) -> WorkerInfo:
        """What the worker reported. Raises EngineUnavailableError before `start()`."""
        return _started(self._info)

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus output, in tokens."""
        assert self.config.model.max_model_len is not None
        return self.config.model.max_model_len

    # -- the loop's callbacks --------------------------------------------------------------------------------------

    def _take_updates(self, updates: list[Update]) -> list[str]:
        updates = self.beams.process(updates)
        stopped = self.outputs.process(updates)
        for update in updates:
            if update.finish_reason is not None:
                self._forget(update.request.request_id, update.finish_reason)
        for answer_id in stopped:
            self._forget(answer_id, FinishReason.STOP)
        return stopped

    def _change_state(self, state: str, error: ServdError | None) -> None:
        if self.state != "draining" or state == "dead":
            self.state = state
        if state == "dead":
            self._died.set()
            self._end_all(FinishReason.ERROR, error or EngineUnavailableError("the engine failed"))

    def _end(self, request_id: str, reason: FinishReason, error: ServdError) -> bool:
        family = self._families.get(request_id)
        answer_ids = [] if family is None else list(family.answer_ids)
        self._end_answers(answer_ids, reason, error)
        return bool(answer_ids)

    def _end_all(self, reason: FinishReason, error: ServdError) -> None:
        self._end_answers(list(self._answers), reason, error)

    def _end_answers(self, answer_ids: list[str], reason: FinishReason, error: ServdError) -> None:
        for answer_id in answer_ids:
            self.outputs.finish(answer_id, reason, error)
            self._forget(answer_id, reason)
        for answer_id in answer_ids:  # all have been told: a scheduler that is broken can keep nobody waiting
            self.core.scheduler.finish(answer_id, reason)
            self.beams.end(answer_id)
        if answer_ids:
            self.core.wake()

    def _forget(self, answer_id: str, reason: FinishReason) -> None:
        self.request_log.finish(answer_id, reason)
        request_id = self._answers.pop(answer_id, None)
        if request_id is None:
            return
        family = self._families[request_id]
        family.answer_ids.remove(answer_id)
        if not family.answer_ids:
            if family.timer is not None:
                family.timer.cancel()
            del self._families[request_id]
        if not self._answers:
            self._idle.set()
