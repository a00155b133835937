"""One rank: loads the model, sizes the KV cache, executes plans.

Knows nothing of the process or thread it runs in, nor of who sends the plans.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from servd_kernels import native
from servd_kernels.kv_format import KVFormat
from servd_kernels.paged_attention import OP as PAGED_ATTENTION
from torch import Tensor

from servd.attention.kv_dtype import KVCacheDtype
from servd.attention.metadata import AttentionMetadata
from servd.config import EngineConfig, default_cpu_kv_memory
from servd.errors import ConfigError
from servd.models.base import Model
from servd.models.loader import Progress
from servd.outputs import ModelRunnerOutput, SchedulerOutput, WorkerInfo
from servd.worker.cuda_graph import CudaCapture, DecodeGraphs
from servd.worker.device import load_on_device
from servd.worker.drafter import Drafter
from servd.worker.kv_cache import PagedKVCache, num_blocks_for
from servd.worker.kv_shadow import KVShadow
from servd.worker.model_runner import ModelRunner, StepReplay
from servd.worker.recorded_steps import RecordedSteps

if TYPE_CHECKING:
    from servd.hub.files import ModelFiles  # the control plane's: only its shape is used here

logger = logging.getLogger(__name__)


class Worker:
    """A loaded model with its KV cache. All calls come from the thread that made it: torch's threads belong to it."""

    def __init__(self, config: EngineConfig, files: ModelFiles, progress: Progress | None = None) -> None:
        """Load everything. Raises ConfigError naming the flag or the file that is wrong."""
        self.model = load_on_device(config, files, progress)
        self.device = self.model.device
        self.max_model_len = _max_model_len(config.model.max_model_len, self.model)
        self._formats = self.model.bind_kv_cache(KVCacheDtype.from_config(config.cache))
        max_num_seqs = config.scheduler.max_num_seqs
        num_blocks = num_blocks_for(
            self._kv_memory(config),
            sum(kv_format.block_bytes for kv_format in self._formats),
            block_size=config.cache.block_size,
            max_model_len=self.max_model_len,
            max_num_seqs=max_num_seqs,
        )
        self.kv_cache = PagedKVCache(self._formats, num_blocks, self.device)
        self.runner = ModelRunner(
            self.model,
            self.kv_cache,
            max_num_seqs=max_num_seqs,
            max_model_len=self.max_model_len,
            device=self.device,
            replay=self._step_replay(config),
            shadow=self._shadow(config),
            drafter=Drafter() if config.scheduler.num_speculative_tokens else None,
            tokenizer_path=files.folder / "tokenizer.json",
        )

    def _step_replay(self, config: EngineConfig) -> StepReplay | None:
        max_num_seqs = config.scheduler.max_num_seqs
        max_blocks = -(-self.max_model_len // self.kv_cache.block_size)
        forward, caches = self.model.forward, self.kv_cache.layers
        if self.device.type == "cpu" and config.model.replay_steps and native.library() is not None:
            return RecordedSteps(
                forward, caches, max_tokens=config.scheduler.max_num_batched_tokens, max_num_seqs=max_num_seqs,
                max_blocks=max_blocks,
            )  # fmt: skip
        if self.device.type == "cuda" and config.model.replay_steps:
            return DecodeGraphs(
                forward, caches, max_num_seqs=max_num_seqs, max_blocks=max_blocks, device=self.device,
                capture=CudaCapture(),
            )  # fmt: skip
        return None

    def _shadow(self, config: EngineConfig) -> KVShadow | None:
        kv_dtype = KVCacheDtype.from_config(config.cache)
        rate = config.cache.kv_shadow_rate
        if rate and not kv_dtype.is_quantized:
            raise ConfigError(f"--kv-shadow-rate is {rate} with an unquantized KV cache; allowed: 0")
        return KVShadow(self.model, kv_dtype, rate) if rate else None

    def info(self) -> WorkerInfo:
        """What the engine must know before it plans."""
        return WorkerInfo(
            device=str(self.device),
            dtype=str(self.model.dtype).removeprefix("torch."),
            num_blocks=self.kv_cache.num_blocks,
            block_bytes=self.kv_cache.block_bytes,
            kernel_backend=kernel_backend(self.device, self.model.dtype, self._formats[0]),
            hidden_size=self.model.hidden_size,
        )

    def execute(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        """Run one step; see ModelRunner.execute."""
        return self.runner.execute(plan)

    def _kv_memory(self, config: EngineConfig) -> int:
        """Bytes for KV blocks: as asked, else by the rule of the device."""
        if config.cache.kv_cache_memory is not None:
            return config.cache.kv_cache_memory
        if self.device.type == "cpu":
            return default_cpu_kv_memory()
        return _free_gpu_memory(config, self.model, self._formats)


def kernel_backend(device: torch.device, dtype: torch.dtype, kv_format: KVFormat) -> str:
    """Which kernels serve this device, e.g. 'cpu (avx512)', judged by paged attention."""
    for name in PAGED_ATTENTION.candidates(device.type):
        if PAGED_ATTENTION.reason_against(name, device.type, dtype, kv_format=kv_format) is None:
            library = native.library() if name == "cpu" else None
            return f"{name} ({library.isa})" if library else name
    return "none"


def _max_model_len(asked: int | None, model: Model) -> int:
    limit = model.max_position_embeddings
    if asked is not None and asked > limit:
        raise ConfigError(f"--max-model-len is {asked}; allowed: at most the model's {limit}")
    return limit if asked is None else asked


@torch.inference_mode()
def _free_gpu_memory(config: EngineConfig, model: Model, formats: list[KVFormat]) -> int:
    """Bytes left for KV blocks in this process's share of the card, after the largest step has run once."""
    device = model.device
    torch.cuda.reset_peak_memory_stats(device)
    layers = [kv_format.allocate(1, device) for kv_format in formats]
    num_tokens = config.scheduler.max_num_batched_tokens

    def ints(count: int, value: int, dtype: torch.dtype) -> Tensor:
        return torch.full((count,), value, dtype=dtype, device=device)

    metadata = AttentionMetadata(  # requests of one token each, which write nothing
        cu_seqlens_q=torch.arange(num_tokens + 1, dtype=torch.int32, device=device),
        seq_lens=ints(num_tokens, 1, torch.int32),
        block_tables=ints(num_tokens, 0, torch.int32).unsqueeze(1),
        slot_mapping=ints(num_tokens, -1, torch.int64),
    )
    zeros = ints(num_tokens, 0, torch.int64)
    hidden = model.forward(zeros, zeros, metadata, layers)
    scheduler = config.scheduler
    logits = model.compute_logits(hidden[: scheduler.max_num_seqs * (1 + scheduler.num_speculative_tokens)])
    torch.softmax(logits.double(), dim=-1).cumsum(dim=-1)  # what the sampler needs besides
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    not_torch = total - free - torch.cuda.memory_reserved(device)  # the context, kernels, other processes
    peak = torch.cuda.max_memory_allocated(device)
    budget = int(total * config.cache.gpu_memory_utilization) - not_torch - peak
    logger.info("GPU memory: %d MiB peak in a step, %d MiB left for KV", peak >> 20, budget >> 20)
    del layers, hidden, logits
    torch.cuda.empty_cache()
    return max(budget, 0)
