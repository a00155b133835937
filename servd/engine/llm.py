"""Offline use: `LLM(model).generate([...])`, the same engine on an event loop of its own thread.

Knows nothing of servers; the model runs in this process (`executor="inproc"`) unless told otherwise.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import uuid
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

from servd.config import EngineConfig
from servd.engine.async_engine import AsyncEngine
from servd.engine.embeddings import Embedding, check_dimensions, embed_all, pooling_params
from servd.engine.result_stream import ResultStream
from servd.errors import EngineUnavailableError, InvalidRequestError
from servd.hub import ModelFiles, resolve_model
from servd.outputs import TokenLogprobs
from servd.request import FinishReason
from servd.sampling_params import SamplingParams

T = TypeVar("T")
Prompt = str | Sequence[int]


@dataclass(slots=True)
class Answer:
    """One of the n answers to a prompt."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # one a token, if asked for
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass(slots=True)
class Generation:
    """A prompt and its answers."""

    prompt: Prompt
    prompt_token_ids: list[int]
    answers: list[Answer]
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0

    @property
    def text(self) -> str:
        """The first answer's text."""
        return self.answers[0].text


class LLM:
    """A model for offline use. `settings` are EngineConfig's flat names, e.g. `dtype="float32"`, `max_num_seqs=32`.

    Raises ConfigError if the model or a setting is wrong. Close it, or use it as a context manager. Several threads may
    call it at once.
    """

    def __init__(self, model: str | os.PathLike[str] = "smollm2-135m-instruct", **settings: Any) -> None:
        config = EngineConfig.from_flat(model=os.fspath(model), **{"executor": "inproc", **settings})
        self._loop = asyncio.new_event_loop()
        self._close_lock = threading.Lock()
        self._room = asyncio.Condition()  # all on the loop: answers that may still be queued
        self._num_answers = 0
        self._thread = threading.Thread(target=self._loop.run_forever, name="servd-llm", daemon=True)
        self._thread.start()
        try:
            files = resolve_model(config.model.model)
            self.engine = self._call(_start(config, files))
        except BaseException:
            self._stop_loop()
            raise
        # Who forgets to close it, or leaves the interpreter, must not be told of pending tasks.
        weakref.finalize(self, _cancel_tasks, self._loop)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
    ) -> list[Generation]:
        """Answer one prompt or many (texts or token id lists), in order; many run in one batch.

        Without `sampling_params`, the model's own defaults hold (`engine.sampling_defaults`).
        `progress` shows a bar on stderr; by default for more than one prompt on a terminal. Raises
        InvalidRequestError naming the field, before anything runs, and RequestFailedError. An exception, Ctrl-C
        included, ends all prompts of the call.
        """
        batch: list[Prompt] = [prompts] if _is_one_prompt(prompts) else list(prompts)  # type: ignore[list-item,arg-type]
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = [sampling_params or SamplingParams(**self.engine.sampling_defaults)] * len(batch)
        else:
            params = list(sampling_params)
        if len(params) != len(batch):
            raise InvalidRequestError(
                f"sampling_params has {len(params)} entries; allowed: one, or one a prompt ({len(batch)})",
                param="sampling_params",
            )
        show = len(batch) > 1 and sys.stderr.isatty() if progress is None else progress
        return self._call(self._generate_all(batch, params, show))

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: str | None = None,
        dimensions: int | None = None,
        normalize: bool = True,
    ) -> list[list[float]]:
        """One vector a prompt, in order: the model's hidden states, pooled.

        pooling: last, mean or cls (None: the setting `embedding_pooling`). dimensions: only the first so many values.
        normalize: to length 1, after the cut. Raises InvalidRequestError naming the field, and RequestFailedError.
        """
        batch: list[Prompt] = [prompts] if _is_one_prompt(prompts) else list(prompts)  # type: ignore[list-item,arg-type]
        params = pooling_params(self.engine.config.model.embedding_pooling if pooling is None else pooling)
        embeddings = self._call(self._embed_all(batch, params, dimensions, normalize))
        return [embedding.values.tolist() for embedding in embeddings]

    def close(self) -> None:
        """Stop the engine and free the model; calls that run end with EngineUnavailableError. Safe to call twice."""
        with self._close_lock:
            if not self._loop.is_closed():
                self._call(self.engine.close())
                self._stop_loop()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _generate_all(self, prompts: list[Prompt], params: list[SamplingParams], show: bool) -> list[Generation]:
        inputs = self.engine.inputs
        names = ["prompt"] if len(prompts) == 1 else [f"prompts[{i}]" for i in range(len(prompts))]
        encoded = [inputs.encode_prompt(prompt, param=name) for prompt, name in zip(prompts, names, strict=True)]
        for token_ids, one, name in zip(encoded, params, names, strict=True):
            inputs.check(len(token_ids), one, prompt_param=name)
            await self.engine.check_guidance(one)
        with _progress_bar(len(prompts), show) as advance:

            async def answer(prompt: Prompt, token_ids: list[int], one: SamplingParams) -> Generation:
                async with self._room_for(one.num_sequences):
                    generation = await self._generate(prompt, token_ids, one)
                    advance()
                    return generation

            tasks = [asyncio.ensure_future(answer(*each)) for each in zip(prompts, encoded, params, strict=True)]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:  # one failed: do not leave the others running
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _embed_all(
        self, prompts: list[Prompt], params: SamplingParams, dimensions: int | None, normalize: bool
    ) -> list[Embedding]:
        inputs = self.engine.inputs
        check_dimensions(dimensions, self.engine.info.hidden_size)
        encoded = [inputs.encode_prompt(prompt, param=f"prompts[{i}]") for i, prompt in enumerate(prompts)]
        for i, token_ids in enumerate(encoded):
            inputs.check(len(token_ids), params, prompt_param=f"prompts[{i}]")

        def start(number: int) -> ResultStream:
            return self.engine.generate(encoded[number], params, request_id=f"llm-{uuid.uuid4().hex}")

        at_once = min(self.engine.config.scheduler.max_num_seqs, self.engine.config.scheduler.max_num_queued_reqs)
        async with self._room_for(at_once):
            return await embed_all(
                start, len(encoded), num_at_once=at_once, dimensions=dimensions, normalize=normalize
            )

    @asynccontextmanager
    async def _room_for(self, num_answers: int) -> AsyncIterator[None]:
        """As many at once, of all calls, as the engine's queue takes; the rest follow as these finish."""
        limit = self.engine.config.scheduler.max_num_queued_reqs
        async with self._room:
            # More than all of it is let through, for the engine to refuse.
            await self._room.wait_for(lambda: not self._num_answers or self._num_answers + num_answers <= limit)
            self._num_answers += num_answers
        try:
            yield
        finally:
            self._num_answers -= num_answers
            async with self._room:
                self._room.notify_all()

    async def _generate(self, prompt: Prompt, token_ids: list[int], params: SamplingParams) -> Generation:
        generation = Generation(prompt, token_ids, [Answer() for _ in range(params.n)])
        async with self.engine.generate(token_ids, params, request_id=f"llm-{uuid.uuid4().hex}") as stream:
            async for output in stream:
                if output.error is not None:
                    raise output.error
                answer = generation.answers[output.index]
                answer.text += output.text
                answer.token_ids += output.token_ids
                answer.logprobs += output.logprobs
                answer.finish_reason, answer.stop_reason = output.finish_reason, output.stop_reason
                generation.num_cached_tokens = max(generation.num_cached_tokens, output.num_cached_tokens)
                if output.prompt_logprobs is not None:
                    generation.prompt_logprobs = output.prompt_logprobs
        return generation

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop.is_closed():
            work.close()
            raise EngineUnavailableError("the LLM is closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C came to this thread alone
            raise

    def _stop_loop(self) -> None:
        """Let what other threads wait for come to its end (the engine is closed: with an error), then end the loop."""
        asyncio.run_coroutine_threadsafe(_rest_of_tasks(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _cancel_tasks(loop: asyncio.AbstractEventLoop) -> None:
    """End what runs on the loop of an LLM that was not closed, and the loop itself."""

    async def cancel() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    if not loop.is_closed():
        asyncio.run_coroutine_threadsafe(cancel(), loop).result()
        loop.call_soon_threadsafe(loop.stop)


async def _start(config: EngineConfig, files: ModelFiles) -> AsyncEngine:
    engine = AsyncEngine(config, files)
    await engine.start()
    return engine


async def _rest_of_tasks() -> None:
    await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()}, return_exceptions=True)


def _is_one_prompt(prompts: Prompt | Sequence[Prompt]) -> bool:
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))


@contextmanager
def _progress_bar(total: int, show: bool) -> Iterator[Callable[[], None]]:
    """Yields a function to call when one more prompt is done."""
    if not show:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)
