"""The served model as the protocol sees it: its tensors, metadata, configuration and counts.

The tensors are those of Triton's vLLM backend. Knows nothing of requests.
"""

from __future__ import annotations

from dataclasses import dataclass

from servd.api.kserve.tensors import TensorSpec
from servd.api.service import InferenceService
from servd.errors import NotFoundError

PLATFORM = "servd"
VERSION = "1"
EXTENSIONS = ("model_configuration", "model_repository", "statistics", "generate", "binary_tensor_data", "parameters")

# Inputs that are true or false, and the output that each asks for.
RETURNS = {
    "return_finish_reason": "finish_reason",
    "return_cumulative_logprob": "cumulative_logprob",
    "return_logprobs": "logprobs",
    "return_num_input_tokens": "num_input_tokens",
    "return_num_output_tokens": "num_output_tokens",
}
TEXT_INPUT = "text_input"
SAMPLING_PARAMETERS = "sampling_parameters"
FLAGS = ("stream", "exclude_input_in_output", *RETURNS)
TEXT_OUTPUT = "text_output"

INPUTS = {
    spec.name: spec
    for spec in (
        TensorSpec(TEXT_INPUT, "BYTES"),
        TensorSpec(SAMPLING_PARAMETERS, "BYTES"),
        *(TensorSpec(name, "BOOL") for name in FLAGS),
    )
}
OUTPUTS = {
    spec.name: spec
    for spec in (
        TensorSpec(TEXT_OUTPUT, "BYTES", (-1,)),
        TensorSpec("finish_reason", "BYTES", (-1,)),
        TensorSpec("cumulative_logprob", "FP32", (-1,)),
        TensorSpec("logprobs", "BYTES", (-1,)),
        TensorSpec("num_input_tokens", "UINT32"),
        TensorSpec("num_output_tokens", "UINT32", (-1,)),
    )
}


@dataclass(frozen=True, slots=True)
class Statistics:
    """Finished answers of all dialects since the start; times in nanoseconds."""

    num_successes: int
    success_ns: int
    num_failures: int
    num_queued: int  # that left the queue
    queue_ns: int
    num_steps: int


def check_model(service: InferenceService, name: str, version: str) -> None:
    """Raise NotFoundError unless this is the served model ("" means: the one there is), in its one version."""
    service.check_model(name)
    if version not in ("", VERSION):
        raise NotFoundError(
            f"version {version[:100]!r} of model {service.model_name!r} does not exist; served here: {VERSION!r}",
            param="model_version",
        )


def is_ready(service: InferenceService) -> bool:
    """Whether requests are taken."""
    return service.engine.state in ("ready", "recovering")


def state_name(service: InferenceService) -> str:
    """Triton's word for the model's state."""
    if is_ready(service):
        return "READY"
    return "LOADING" if service.engine.state == "starting" else "UNAVAILABLE"


def statistics(service: InferenceService) -> Statistics:
    """Counts and times, from the engine's metrics."""

    def value(name: str, **labels: str) -> float:
        return service.engine.metrics.registry.get_sample_value(name, labels) or 0.0

    def finished(*reasons: str) -> int:
        return int(sum(value("servd_requests_finished_total", reason=reason) for reason in reasons))

    return Statistics(
        num_successes=finished("stop", "length"),
        success_ns=int(1e9 * value("servd_request_e2e_seconds_sum")),
        num_failures=finished("abort", "deadline", "error"),
        num_queued=int(value("servd_request_queue_seconds_count")),
        queue_ns=int(1e9 * value("servd_request_queue_seconds_sum")),
        num_steps=int(value("servd_step_seconds_count")),
    )
