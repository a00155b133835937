"""What the engine is doing, for people who look: requests, last steps, the KV blocks as a map, latencies.

Only reads, and only while somebody looks. Knows nothing of HTTP; texts and tokens are not in it. Requests are listed
for their own tenant alone: others see how many there are.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable
from functools import partial
from itertools import islice, pairwise

import msgspec
import prometheus_client

from servd.cache.block import KVCacheBlock
from servd.cache.block_pool import BlockPool
from servd.engine.async_engine import AsyncEngine
from servd.engine.core import MAX_STEP_RECORDS, StepRecord
from servd.errors import EngineUnavailableError, OverloadedError
from servd.request import Request

MAX_LISTENERS = 64
FRAME_SECONDS = 0.25  # between frames while there is work
IDLE_SECONDS = 1.0  # and while there is none
MAX_REQUESTS = 200  # listed of the running, and of the waiting
MAX_STEPS = 64  # in one frame; of more, the newest
MAX_PARTS = 64  # requests of one step; the rest is in its totals
MAX_CELLS = 4096  # of the map
MAX_LOOKED_AT = 8192  # blocks that are looked at for a map, so that drawing one costs a millisecond at most
RATE_SECONDS = 3.0  # what tokens per second are averaged over

IsOwn = Callable[[str], bool]
"""Whether an answer, by its id, is the listener's tenant's."""

FREE, CACHED, USED, SHARED = range(4)  # a cell's states, in the order in which one hides another


class RequestView(msgspec.Struct):
    """One answer being made, or waiting to be."""

    id: str
    state: str  # waiting, preempted, prefill or decode
    prompt_tokens: int
    computed_tokens: int  # of prompt and answer
    output_tokens: int
    cached_tokens: int  # of the prompt, from the prefix cache
    age_seconds: float  # since arrival
    preemptions: int


class PartView(msgspec.Struct, array_like=True):
    """A request's part of a step, as [id, prefill, decode, right, wrong]."""

    id: str
    prefill: int  # tokens of the prompt, or of a recomputation
    decode: int  # 1 or 0
    right: int  # drafts that were accepted
    wrong: int  # drafts that were not, at most: the worker may have guessed fewer


class StepView(msgspec.Struct):
    """One step that ended."""

    step: int
    milliseconds: float
    requests: int
    prefill_tokens: int
    decode_tokens: int
    draft_tokens: int
    accepted_tokens: int
    parts: list[PartView]  # of the listener's tenant, the first 64


class KVView(msgspec.Struct):
    """The KV blocks. `map` is base64: cell i is two bits of byte i // 4, from bit 2 (i % 4); 0 free, 1 cached, 2 used,
    3 shared by several requests.

    A cell stands for `blocks_per_cell` blocks in a row, and shows the highest state among those looked at.
    """

    num_blocks: int
    block_size: int  # tokens
    used: int  # blocks of requests
    shared: int  # of these, blocks of several requests; estimated where not every block is looked at
    cached: int  # free to be taken, but findable until then
    free: int
    cells: int
    blocks_per_cell: int
    map: str


class HistogramView(msgspec.Struct):
    """Counts since the start: counts[i] of values up to bounds[i] and above bounds[i − 1]; the last are above all."""

    bounds: list[float]  # seconds
    counts: list[int]
    sum: float


class EngineView(msgspec.Struct):
    """The engine at one moment."""

    time: float  # seconds since 1970
    model: str
    version: str
    state: str  # starting, ready, recovering, draining or dead
    num_running: int
    num_waiting: int
    max_running: int
    running: list[RequestView]  # of the listener's tenant
    waiting: list[RequestView]  # of the same
    steps: list[StepView]  # since the frame before
    kv: KVView | None
    input_tokens_per_second: float  # computed of prompts, over the last seconds
    output_tokens_per_second: float
    prompt_tokens: int  # since the start, like all that follows
    output_tokens: int
    preemptions: int
    worker_restarts: int
    time_to_first_token: HistogramView
    inter_token: HistogramView


class EngineObserver:
    """Looks at one engine."""

    def __init__(self, engine: AsyncEngine, model_name: str, version: str) -> None:
        self._engine = engine
        self._model_name = model_name
        self._version = version

    def last_step(self) -> int:
        """Number of the last step that ended; −1: none yet."""
        try:
            step_log = self._engine.core.step_log
        except EngineUnavailableError:
            return -1
        return step_log[-1].step_id if step_log else -1

    @property
    def is_busy(self) -> bool:
        """Whether any request is alive."""
        try:
            return self._engine.core.scheduler.has_work()
        except EngineUnavailableError:
            return False

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen: the engine is dead, or drained."""
        state = self._engine.state
        return state == "dead" or (state == "draining" and not self.is_busy)

    def views(self, tenants: Iterable[str], after_step: int = -1) -> dict[str, EngineView]:
        """The engine now, as each tenant may see it, with the steps after `after_step`, of more than MAX_STEPS the
        newest."""
        shared = self._shared()
        try:
            core = self._engine.core
        except EngineUnavailableError:
            return dict.fromkeys(tenants, shared)  # the model is being loaded
        scheduler = core.scheduler
        newest = [record for record in islice(reversed(core.step_log), MAX_STEPS) if record.step_id > after_step]
        newest.reverse()
        found = {}
        for tenant in tenants:
            is_own = partial(self._is_of, tenant)
            found[tenant] = msgspec.structs.replace(
                shared,
                running=_requests(scheduler.running, is_own),
                waiting=_requests(scheduler.waiting, is_own),
                steps=[_step(record, is_own) for record in newest],
            )
        return found

    def _is_of(self, tenant: str, answer_id: str) -> bool:
        return self._engine.request_log.tenant_of(answer_id) == tenant

    def _shared(self) -> EngineView:
        """What all may see."""
        metrics = self._engine.metrics
        view = EngineView(
            time.time(), self._model_name, self._version, self._engine.state, 0, 0,
            self._engine.config.scheduler.max_num_seqs, [], [], [], None, 0.0, 0.0,
            _total(metrics.prompt_tokens), _total(metrics.generation_tokens), _total(metrics.preemptions),
            _total(metrics.worker_restarts), _histogram(metrics.time_to_first_token),
            _histogram(metrics.inter_token_latency),
        )  # fmt: skip
        try:
            core = self._engine.core
        except EngineUnavailableError:
            return view
        scheduler = core.scheduler
        view.num_running, view.num_waiting = len(scheduler.running), len(scheduler.waiting)
        view.kv = _kv(scheduler.cache.pool, scheduler.cache.block_size)
        view.input_tokens_per_second, view.output_tokens_per_second = _rates(core.step_log)
        return view


class EngineFeed:
    """Frames for any number of listeners, each rendered once a tenant; none is rendered for nobody."""

    def __init__(self, observer: EngineObserver, *, frame_seconds: float = FRAME_SECONDS) -> None:
        self._observer = observer
        self._frame_seconds = frame_seconds
        self._listeners: Counter[str] = Counter()  # by tenant
        self._frames: dict[str, bytes] = {}  # by tenant
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def num_listeners(self) -> int:
        """Who looks now."""
        return self._listeners.total()

    def check_room(self) -> None:
        """Raise OverloadedError if one more listener is one too many."""
        if self.num_listeners >= MAX_LISTENERS:
            raise OverloadedError(f"{self.num_listeners} listeners follow the engine; allowed: {MAX_LISTENERS}")

    async def frames(self, tenant: str = "") -> AsyncGenerator[bytes, None]:
        """EngineViews as JSON, as the tenant may see them, until the engine is over.

        A slow listener misses those in between. Close it (`aclose`) when done. Raises OverloadedError.
        """
        self.check_room()
        self._listeners[tenant] += 1
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._render(), name="servd-engine-feed")
        try:
            seen = b""
            while not self._observer.is_over:
                if self._task.done():
                    self._task.result()
                frame = self._frames.get(tenant, seen)
                if frame is not seen:
                    seen = frame
                    yield seen
                else:
                    await self._news.wait()
        finally:
            self._listeners[tenant] -= 1
            if not self._listeners[tenant]:
                del self._listeners[tenant]
                self._frames.pop(tenant, None)
            if not self._listeners and self._task is not None:
                self._task.cancel()
                self._task = None

    async def _render(self) -> None:
        try:
            await self._render_for_ever()
        except Exception:
            self._wake()  # nobody may wait for a frame that cannot come
            raise

    async def _render_for_ever(self) -> None:
        last_step, last_time, was_busy = -1, -IDLE_SECONDS, False
        while True:
            now, is_busy = time.monotonic(), self._observer.is_busy
            newest = self._observer.last_step()
            if is_busy or was_busy or newest != last_step or now >= last_time + IDLE_SECONDS or self._observer.is_over:
                views = self._observer.views(self._listeners, last_step)
                self._frames = {tenant: msgspec.json.encode(view) for tenant, view in views.items()}
                last_step, last_time, was_busy = newest, now, is_busy
                self._wake()
            await asyncio.sleep(self._frame_seconds)

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


def _requests(requests: Iterable[Request], is_own: IsOwn) -> list[RequestView]:
    now = time.monotonic()
    return [
        RequestView(
            request.request_id, _state(request), request.num_prompt_tokens,
            min(request.num_computed_tokens, request.num_tokens), len(request.output_token_ids),
            request.num_cached_tokens, round(now - request.arrival_time, 3), request.num_preemptions,
        )
        for request in islice((one for one in requests if is_own(one.request_id)), MAX_REQUESTS)
    ]  # fmt: skip


def _state(request: Request) -> str:
    if request.status.value == "running":
        return "decode" if request.num_computed_tokens >= request.num_prompt_tokens else "prefill"
    return "preempted" if request.num_preemptions else "waiting"


def _step(record: StepRecord, is_own: IsOwn) -> StepView:
    plan, accepted = record.plan, {}
    if record.num_accepted_by_request:
        accepted = dict(zip(record.sampled_request_ids, record.num_accepted_by_request, strict=True))
    parts: list[PartView] = []
    for i, request_id in enumerate(plan.request_ids):
        if len(parts) == MAX_PARTS:
            break
        if not is_own(request_id):
            continue
        count = plan.num_scheduled_tokens[i]
        granted = plan.num_draft_tokens[i] if plan.num_draft_tokens and record.num_draft_tokens else 0
        right = accepted.get(request_id, 0)
        is_decode = count == 1
        parts.append(PartView(request_id, 0 if is_decode else count, int(is_decode), right, max(granted - right, 0)))
    return StepView(
        record.step_id, round(1000 * record.compute_seconds, 3), record.num_reqs, record.num_prefill_tokens,
        record.num_decode_tokens, record.num_draft_tokens, record.num_accepted_tokens, parts,
    )  # fmt: skip


def _rates(step_log: Iterable[StepRecord]) -> tuple[float, float]:
    """Prompt and answer tokens per second over the last seconds, as far as the log goes back."""
    now = time.monotonic()
    window = [record for record in step_log if record.end_time >= now - RATE_SECONDS]
    if not window:
        return 0.0, 0.0
    # A log that is full of newer steps does not reach back so far.
    seconds = RATE_SECONDS
    if len(window) == MAX_STEP_RECORDS:
        seconds = max(now - (window[0].end_time - window[0].compute_seconds), 0.001)
    prefill = sum(record.num_prefill_tokens for record in window)
    decode = sum(record.num_decode_tokens + record.num_accepted_tokens for record in window)
    return round(prefill / seconds, 2), round(decode / seconds, 2)


def _kv(pool: BlockPool, block_size: int) -> KVView:
    blocks = pool.blocks
    num_blocks = pool.num_usable
    stride = -(-num_blocks // MAX_LOOKED_AT)  # 1: every block is looked at
    states = [_block_state(block) for block in islice(blocks, 1, None, stride)]
    per_cell = -(-len(states) // MAX_CELLS)
    cells = states
    if per_cell > 1:
        cells = [max(states[i : i + per_cell]) for i in range(0, len(states), per_cell)]
    padded = cells + [FREE] * (-len(cells) % 4)
    packed = bytes(
        a | b << 2 | c << 4 | d << 6
        for a, b, c, d in zip(padded[::4], padded[1::4], padded[2::4], padded[3::4], strict=True)
    )
    used, cached = num_blocks - pool.num_free, pool.num_cached
    return KVView(
        num_blocks, block_size, used, min(states.count(SHARED) * stride, used), cached, pool.num_free - cached,
        len(cells), per_cell * stride, base64.b64encode(packed).decode(),
    )  # fmt: skip


def _block_state(block: KVCacheBlock) -> int:
    if block.ref_count:
        return SHARED if block.ref_count > 1 else USED
    return FREE if block.block_hash is None else CACHED


def _total(counter: prometheus_client.Counter) -> int:
    return int(next(iter(counter.collect())).samples[0].value)


def _histogram(histogram: prometheus_client.Histogram) -> HistogramView:
    samples = next(iter(histogram.collect())).samples
    buckets = [sample for sample in samples if sample.name.endswith("_bucket")]
    cumulative = [0, *(int(sample.value) for sample in buckets)]
    total = next(sample.value for sample in samples if sample.name.endswith("_sum"))
    return HistogramView(
        [float(sample.labels["le"]) for sample in buckets[:-1]],
        [later - earlier for earlier, later in pairwise(cumulative)],
        round(total, 6),
    )
