"""All settings, as frozen dataclasses; the command line's flags are generated from these fields.

Owns names, defaults, units and start-up checks. Knows nothing of torch: dtypes and devices are names here.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field, fields
from typing import Any

from servd.errors import ConfigError
from servd.sampling_params import POOLINGS

GIB = 1 << 30
DAY_SECONDS = 86_400
MAX_DRAFTS = 32  # guesses in a step; on no machine seen do so many pay for themselves
QUANTIZATIONS = ("auto", "none", "stored", "w8a8", "w4a8", "w4a16", "int8")
KV_CACHE_DTYPES = ("auto", "float32", "bfloat16", "float16", "fp8_e4m3", "int8", "int4")


def flag(default: Any, help: str, *, choices: tuple[str, ...] | None = None, unit: str = "") -> Any:
    """A dataclass field that becomes a command-line flag with this help text and unit."""
    return field(default=default, metadata={"help": help, "choices": choices, "unit": unit})


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Which weights to serve and how to compute with them."""

    model: str = field(
        default="smollm2-135m-instruct",
        metadata={"help": "catalogue name, folder, .gguf file or hub id", "positional": True},
    )
    served_model_name: str | None = flag(None, "name that clients use; default: from MODEL")
    dtype: str = flag(
        "auto",
        "compute dtype; auto: the checkpoint's own, bfloat16 for quantized GGUF",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    quantization: str = flag(
        "auto",
        "how weights are held and multiplied: in the compute dtype (none), as a GGUF file has them with int8 "
        "activations (stored), or converted at load; auto: none for plain floats, for float32 and on a GPU; a "
        "quantized GGUF as stored; a catalogue model in its fastest form within 1 % of float32's perplexity (starter: "
        "w8a8)",
        choices=QUANTIZATIONS,
    )
    max_model_len: int | None = flag(None, "longest prompt plus output; default: the model's own", unit="tokens")
    deterministic: bool = flag(
        True, "the same bits for a request whatever the batch; off, on a GPU: the vendor's matrix products"
    )
    replay_steps: bool = flag(True, "replay recorded steps: as CUDA graphs on a GPU, as native calls on a CPU")
    device: str = flag("auto", "where the model runs; auto: a GPU if there is one", choices=("auto", "cpu", "cuda"))
    generation_config: str = flag(
        "auto",
        "sampling defaults for requests that do not set them; auto: the model's generation_config.json; none: OpenAI's",
        choices=("auto", "none"),
    )
    embedding_pooling: str = flag(
        "last",
        "which hidden states make an embedding, unless a request says: the last token's, all (mean), the first's (cls)",
        choices=POOLINGS,
    )
    seed: int | None = flag(None, "makes requests without a seed of their own repeatable, in order of arrival")


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """The paged KV cache."""

    block_size: int = flag(16, "tokens in a KV block", unit="tokens")
    kv_cache_dtype: str = flag(
        "auto",
        f"KV storage: {', '.join(KV_CACHE_DTYPES[1:])}, auto (the compute dtype), or each its own: k=int8,v=int4",
    )
    kv_cache_skip_layers: str = flag("", "layers whose KV stays in the compute dtype, e.g. 0,1,28-29")
    kv_shadow_rate: float = flag(
        0.0, "share of steps in which one request is computed again without KV quantization, and compared (metrics)"
    )
    kv_cache_memory: int | None = flag(
        None, "memory for KV blocks, e.g. 2GiB; default on CPU: a quarter of RAM, at most 4GiB", unit="bytes"
    )
    gpu_memory_utilization: float = flag(0.9, "share of the card that weights, activations and KV may take")
    max_pinned_share: float = flag(0.25, "share of the KV blocks that pinned prefixes may hold, all together")
    max_tenant_pinned_share: float = flag(0.25, "share of the KV blocks that one tenant's pinned prefixes may hold")
    enable_prefix_caching: bool = flag(True, "reuse the KV blocks of equal prompt beginnings")


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Who runs in a step, and how much of it."""

    max_num_seqs: int = flag(64, "requests that run at once", unit="requests")
    max_num_batched_tokens: int = flag(512, "token budget of one step, prefill and decode together", unit="tokens")
    long_prefill_token_threshold: int = flag(
        0, "largest share of a step that one prompt may take; 0: no limit", unit="tokens"
    )
    num_speculative_tokens: int = flag(
        7,
        "most tokens a step guesses ahead of an answer by prompt look-up, and checks (on a GPU such a step is not "
        "replayed from a graph); 0: off",
        unit="tokens",
    )
    scheduling_policy: str = flag("fcfs", "order of the waiting queue (a file of servd/scheduler/policies)")
    max_num_queued_reqs: int = flag(1024, "waiting requests beyond which new ones get 429", unit="requests")


@dataclass(frozen=True, slots=True)
class ParallelConfig:
    """Which processes and threads do the work."""

    executor: str = flag("multiproc", "where the model runs (a file of servd/executor)")
    threads: int | None = flag(None, "compute threads of a CPU worker; default: the cores this process may use")
    max_worker_restarts: int = flag(3, "worker restarts within ten minutes before the server gives up")
    step_timeout: float = flag(
        120.0,
        "a worker process that computes no step for so long is killed and restarted (the first step gets five times "
        "as long); 0: never",
        unit="seconds",
    )


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """The HTTP and gRPC front."""

    host: str = flag("127.0.0.1", "address to listen on")
    port: int = flag(8000, "HTTP port; 0 picks a free one")
    grpc_port: int = flag(8001, "gRPC port; 0 picks a free one, -1 turns gRPC off")
    api_key: str | None = flag(None, "clients must send this key (also from SERVD_API_KEY); default: none needed")
    api_keys_file: str | None = flag(
        None, "keys with names, scopes and limits, as `servd keys` makes them; read again when it changes"
    )
    insecure_no_auth: bool = flag(False, "let other machines use this server without a key")
    cors_origin: str = flag("", "web pages that may call from a browser, e.g. https://a.example,http://b.example:3000")
    tls_cert: str | None = flag(None, "PEM file of a certificate chain: TLS for HTTP and gRPC; read again on change")
    tls_key: str | None = flag(None, "PEM file of the certificate's private key")
    tls_client_ca: str | None = flag(None, "PEM file of authorities: clients must have a certificate of one of them")
    tool_call_parser: str = flag(
        "auto",
        "how the model writes tool calls (a file of servd/api/chat/tool_parsers); auto: as its chat template tells, "
        "else hermes; none: tools are refused",
    )
    reasoning_parser: str = flag(
        "auto",
        "how the model writes what it thinks (a file of servd/api/chat/reasoning_parsers); auto: as its chat template "
        "tells; none: it is part of the answer",
    )
    max_body_bytes: int = flag(8 << 20, "largest request body", unit="bytes")
    max_body_chunks: int = flag(16384, "most chunks of a chunked body")
    max_json_depth: int = flag(128, "how deep arrays and objects of a body may be nested")
    max_prompts: int = flag(256, "most prompts of one completions call")
    max_request_line: int = flag(8190, "longest request line", unit="bytes")
    max_header_bytes: int = flag(16384, "longest header", unit="bytes")
    max_headers: int = flag(100, "most headers of a request")
    sse_keep_alive: float = flag(15.0, "an event stream that waits gets a comment this often; 0: never", unit="seconds")
    resume_seconds: float = flag(
        30.0, "a resumable stream (stream_options.resumable) goes on for so long without a client; 0: none are allowed",
        unit="seconds",
    )
    resume_buffer_bytes: int = flag(64 << 20, "most that is kept of all resumable streams", unit="bytes")
    shutdown_grace: float = flag(30.0, "time that running requests get after SIGTERM", unit="seconds")
    log_level: str = flag("info", "least severe log line shown", choices=("debug", "info", "warning", "error"))
    log_steps: bool = flag(False, "log one line a step: what was in the batch")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything an engine needs; `resolve()` returns a new, checked one with no default left open."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    @classmethod
    def from_flat(cls, **settings: Any) -> EngineConfig:
        """Build from flat names (`EngineConfig.from_flat(model=..., block_size=32)`).

        Raises ConfigError for a name that no section has.
        """
        sections: dict[str, Any] = {}
        for section in fields(cls):
            section_class = section.default_factory
            assert isinstance(section_class, type), section.name
            names = {f.name for f in fields(section_class)}
            sections[section.name] = section_class(**{n: settings.pop(n) for n in names & settings.keys()})
        if settings:
            raise ConfigError(f"unknown setting(s): {', '.join(sorted(settings))}")
        return cls(**sections)

    def resolve(self) -> EngineConfig:
        """Check ranges and fill defaults that depend on the machine. Raises ConfigError naming the flag."""
        cache, scheduler, model = self.cache, self.scheduler, self.model
        for section in (model, cache, scheduler, self.parallel):
            _check_kinds_and_choices(section)
        _require("--block-size", cache.block_size, 1 <= cache.block_size <= 256, "1 to 256")
        _require("--max-num-seqs", scheduler.max_num_seqs, scheduler.max_num_seqs >= 1, "at least 1")
        _require(
            "--max-num-batched-tokens", scheduler.max_num_batched_tokens,
            scheduler.max_num_batched_tokens >= scheduler.max_num_seqs,
            f"at least --max-num-seqs ({scheduler.max_num_seqs}), or running requests would starve",
        )  # fmt: skip
        threshold = scheduler.long_prefill_token_threshold
        _require("--long-prefill-token-threshold", threshold, threshold >= 0, "0 (no limit) or more")
        drafts = scheduler.num_speculative_tokens
        _require("--num-speculative-tokens", drafts, 0 <= drafts <= MAX_DRAFTS, f"0 (off) to {MAX_DRAFTS}")
        queued, restarts = scheduler.max_num_queued_reqs, self.parallel.max_worker_restarts
        _require("--max-num-queued-reqs", queued, queued >= 1, "at least 1")
        _require("--max-worker-restarts", restarts, restarts >= 0, "0 or more")
        seconds = self.parallel.step_timeout
        _require("--step-timeout", seconds, 0 <= seconds < float("inf"), "0 (never) or more")
        if model.max_model_len is not None:
            _require("--max-model-len", model.max_model_len, model.max_model_len >= 2, "at least 2")
        if cache.kv_cache_memory is not None:
            _require("--kv-cache-memory", cache.kv_cache_memory, cache.kv_cache_memory > 0, "more than 0 bytes")
        parse_kv_cache_dtype(cache.kv_cache_dtype)
        parse_layers(cache.kv_cache_skip_layers)
        _require("--kv-shadow-rate", cache.kv_shadow_rate, 0 <= cache.kv_shadow_rate <= 1, "0 to 1")
        for name in ("max_pinned_share", "max_tenant_pinned_share"):
            share = getattr(cache, name)
            _require("--" + name.replace("_", "-"), share, 0 <= share <= 0.9, "0 to 0.9")
        utilization = cache.gpu_memory_utilization
        _require("--gpu-memory-utilization", utilization, 0 < utilization <= 1, "more than 0, at most 1")
        threads = self.parallel.threads
        if threads is None:
            threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        _require("--threads", threads, threads >= 1, "at least 1")
        return dataclasses.replace(self, parallel=dataclasses.replace(self.parallel, threads=threads))


def check_limits(config: ServerConfig) -> None:
    """Raise ConfigError naming the flag whose number makes no sense."""
    for name, low, high in (
        ("max_body_bytes", 1024, GIB),
        ("max_body_chunks", 1, 1 << 24),
        ("max_json_depth", 8, 512),  # the parser itself stops near 1000
        ("max_prompts", 1, 1024),  # as many answers as a call may have
        ("max_request_line", 256, 1 << 20),
        ("max_header_bytes", 256, 1 << 20),
        ("max_headers", 10, 10_000),
        ("resume_buffer_bytes", 1024, 1 << 40),
        ("sse_keep_alive", 0, DAY_SECONDS),  # a NaN is in no range
        ("resume_seconds", 0, DAY_SECONDS),
        ("shutdown_grace", 0, DAY_SECONDS),
    ):
        value = getattr(config, name)
        _require(f"--{name.replace('_', '-')}", value, low <= value <= high, f"{low} to {high}")


def default_cpu_kv_memory() -> int:
    """A quarter of the machine's RAM, at most 4 GiB, in bytes."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(total // 4, 4 * GIB)


def parse_kv_cache_dtype(text: str) -> tuple[str, str]:
    """'int8' or 'k=int8,v=int4' to the storage types of keys and of values. Raises ConfigError."""
    if "=" not in text:
        key = value = text
    else:
        sides = dict(part.partition("=")[::2] for part in text.replace(" ", "").split(","))
        if sides.keys() - {"k", "v"}:
            raise ConfigError(f"--kv-cache-dtype is {text!r}; allowed: one type, or k=TYPE,v=TYPE")
        key, value = sides.get("k", "auto"), sides.get("v", "auto")
    for name in (key, value):
        if name not in KV_CACHE_DTYPES:
            raise ConfigError(f"--kv-cache-dtype is {text!r}; allowed: {', '.join(KV_CACHE_DTYPES)}, or k=TYPE,v=TYPE")
    return key, value


def parse_layers(text: str) -> frozenset[int]:
    """'0,1,28-29' to layer numbers. Raises ConfigError."""
    layers: set[int] = set()
    for part in filter(None, text.replace(" ", "").split(",")):
        first, _, last = part.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal() or int(last or first) < int(first):
            raise ConfigError(f"--kv-cache-skip-layers is {text!r}; allowed: numbers and ranges, e.g. 0,1,28-29")
        layers |= set(range(int(first), int(last or first) + 1))
    return frozenset(layers)


def parse_bytes(text: str) -> int:
    """'2GiB', '512M', '1e9' or '1048576' to bytes (K, M, G, T are powers of 1024). Raises ConfigError."""
    number = text.strip().lower().removesuffix("b").removesuffix("i")
    scale = 1
    if number and number[-1] in "kmgt":
        scale = 1024 ** ("kmgt".index(number[-1]) + 1)
        number = number[:-1]
    try:
        return int(float(number) * scale)
    except (ValueError, OverflowError):
        raise ConfigError(f"{text!r} is not a size in bytes; write 2GiB, 512MiB or a number") from None


_KINDS: dict[str, type | tuple[type, ...]] = {"int": int, "float": (int, float), "str": str, "bool": bool}


def _check_kinds_and_choices(section: Any) -> None:
    """A flag cannot have a wrong type, but `LLM(max_num_seqs="8")` can."""
    for f in fields(section):
        name, value = "--" + f.name.replace("_", "-"), getattr(section, f.name)
        kind, _, optional = str(f.type).partition(" | ")
        if optional and value is None:
            continue
        is_bool_for_number = isinstance(value, bool) and kind != "bool"
        _require(name, repr(value), isinstance(value, _KINDS[kind]) and not is_bool_for_number, str(f.type))
        choices = f.metadata.get("choices")
        _require(name, value, not choices or value in choices, ", ".join(choices or ()))


def _require(name: str, value: object, ok: bool, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"{name} is {value}; allowed: {allowed}")
