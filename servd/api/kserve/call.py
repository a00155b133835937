"""From tensors and parameters to a checked call: what to continue, how to sample it, and which outputs to give.

Knows nothing of transports; fields are named as the protocol's JSON has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from servd.api.kserve.model import (
    FLAGS,
    INPUTS,
    OUTPUTS,
    RETURNS,
    SAMPLING_PARAMETERS,
    TEXT_INPUT,
    TEXT_OUTPUT,
    check_model,
)
from servd.api.kserve.settings import json_object, settings_from
from servd.api.kserve.tensors import DATATYPES, Tensor, TensorSpec, decode
from servd.api.service import InferenceService
from servd.errors import InvalidRequestError
from servd.sampling_params import SamplingParams

MAX_ID_CHARS = 256
MAX_TENSORS = 64


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A request as any transport brings it."""

    model_name: str
    model_version: str
    id: str
    parameters: Mapping[str, Any]
    inputs: Sequence[Tensor]
    outputs: Sequence[str]  # names; empty: the model's own choice


@dataclass(frozen=True, slots=True)
class InferCall:
    """A checked request."""

    id: str
    text: str
    params: SamplingParams
    streams: bool  # many replies, with new text alone
    repeats_input: bool  # answers begin with the text that they continue
    outputs: tuple[str, ...]
    priority: int
    timeout: float | None  # seconds
    cache_salt: str
    kept_tokens: int | None  # of the prompt, its last ones; None: all
    guidance_param: str  # what errors call the field behind `params.guidance`


def input_spec(name: str, datatype: str, shape: Sequence[int], where: str) -> TensorSpec:
    """What the model takes under that name. Raises InvalidRequestError for another datatype or shape, or no such name.

    To be asked before values are read: how many there are follows from it.
    """
    spec = INPUTS.get(name)
    if spec is None:
        raise InvalidRequestError(
            f"{where}.name is {name[:100]!r}; allowed: {', '.join(INPUTS)}", param=f"{where}.name"
        )
    if datatype != spec.datatype:
        known = "" if datatype in DATATYPES else ", which servd does not know"
        raise InvalidRequestError(
            f"{where}.datatype is {datatype[:100]!r}{known}; allowed for {name}: {spec.datatype}",
            param=f"{where}.datatype",
        )
    if tuple(shape) != spec.shape:
        raise InvalidRequestError(
            f"{where}.shape is {list(shape[:8])}; allowed for {name}: {list(spec.shape)}", param=f"{where}.shape"
        )
    return spec


def raw_tensor(spec: TensorSpec, data: bytes, where: str) -> Tensor:
    """A tensor given as bytes. Raises InvalidRequestError."""
    return Tensor(spec.name, spec.datatype, spec.shape, decode(data, spec, where))


def check_count(num_tensors: int, field: str) -> None:
    """Raise InvalidRequestError for more than are looked at one by one."""
    if num_tensors > MAX_TENSORS:
        raise InvalidRequestError(f"{field} has {num_tensors} entries; allowed: at most {MAX_TENSORS}", param=field)


def call_from(request: InferRequest, service: InferenceService) -> InferCall:
    """The checked call. Raises InvalidRequestError naming the field, NotFoundError, OverloadedError."""
    check_model(service, request.model_name, request.model_version)
    if len(request.id) > MAX_ID_CHARS:
        raise InvalidRequestError(
            f"id has {len(request.id)} characters; allowed: at most {MAX_ID_CHARS}", param="id"
        )
    given = _given(request)
    if TEXT_INPUT not in given:
        raise InvalidRequestError(f"inputs lack {TEXT_INPUT}, which is required", param="inputs")
    text = _text(given.pop(TEXT_INPUT), TEXT_INPUT)
    flags = {name: _flag(given.pop(name), name) for name in FLAGS if name in given}
    streams = flags.get("stream", False)
    excludes_input = flags.get("exclude_input_in_output", streams)
    if streams and not excludes_input:
        raise InvalidRequestError(
            "exclude_input_in_output is false; allowed with stream: true, or not given",
            param="exclude_input_in_output",
        )
    settings = settings_from(_merged(given))
    engine = service.engine
    params = settings.sampling_params(engine.tokenizer.vocab_size, engine.sampling_defaults)
    engine.check_room(params)
    outputs = _outputs(request.outputs, flags)
    return InferCall(
        id=request.id,
        text=text,
        params=_with_logprobs(params, outputs),
        streams=streams,
        repeats_input=not excludes_input,
        outputs=outputs,
        priority=settings.priority,
        timeout=None if settings.timeout is None else settings.timeout / 1e6,
        cache_salt=settings.cache_salt,
        kept_tokens=service.num_kept_tokens(settings.truncate_prompt_tokens, params.max_tokens),
        guidance_param=settings.guidance_param,
    )


def _given(request: InferRequest) -> dict[str, Any]:
    """All that was given by name, as tensor or as parameter. Raises InvalidRequestError for what was given twice."""
    check_count(len(request.inputs), "inputs")
    given: dict[str, Any] = dict(request.parameters)
    for i, tensor in enumerate(request.inputs):
        if tensor.name in given:
            what = "a parameter too" if tensor.name in request.parameters else "the name of two inputs"
            where = f"inputs[{i}].name"
            raise InvalidRequestError(f"{where} is {tensor.name!r}, which is {what}", param=where)
        given[tensor.name] = tensor.values[0]
    return given


def _merged(given: dict[str, Any]) -> dict[str, Any]:
    """Parameters and the contents of `sampling_parameters` together."""
    packed = given.pop(SAMPLING_PARAMETERS, None)
    if packed is None:
        return given
    unpacked = packed if isinstance(packed, dict) else json_object(packed, SAMPLING_PARAMETERS)
    for name in unpacked:
        if name in given:
            raise InvalidRequestError(
                f"{name[:100]} is in {SAMPLING_PARAMETERS} and a parameter too; allowed: one of the two",
                param=name[:100],
            )
    return given | unpacked


def _text(value: Any, name: str) -> str:
    try:
        return value.decode() if isinstance(value, bytes) else msgspec.convert(value, str)
    except (UnicodeDecodeError, msgspec.ValidationError):
        raise InvalidRequestError(f"{name} is not a text of valid UTF-8", param=name) from None


def _flag(value: Any, name: str) -> bool:
    try:
        return msgspec.convert(value, bool, strict=False)
    except msgspec.ValidationError:
        raise InvalidRequestError(f"{name} is {repr(value)[:100]}; allowed: true or false", param=name) from None


def _outputs(asked: Sequence[str], flags: Mapping[str, bool]) -> tuple[str, ...]:
    check_count(len(asked), "outputs")
    for i, name in enumerate(asked):
        if name not in OUTPUTS:
            raise InvalidRequestError(
                f"outputs[{i}].name is {name[:100]!r}; allowed: {', '.join(OUTPUTS)}", param=f"outputs[{i}].name"
            )
        if name in asked[:i]:
            raise InvalidRequestError(f"outputs[{i}].name is {name!r} a second time", param=f"outputs[{i}].name")
    return tuple(asked) or (TEXT_OUTPUT, *(name for flag, name in RETURNS.items() if flags.get(flag)))


def _with_logprobs(params: SamplingParams, outputs: tuple[str, ...]) -> SamplingParams:
    """The settings that give the outputs what they show. Raises InvalidRequestError."""
    if params.logprobs is None and "logprobs" in outputs:
        raise InvalidRequestError(
            "logprobs is not set; needed for output logprobs: a number of alternatives, 0 to 20", param="logprobs"
        )
    if params.logprobs is None and "cumulative_logprob" in outputs:
        return msgspec.structs.replace(params, logprobs=0)
    return params
