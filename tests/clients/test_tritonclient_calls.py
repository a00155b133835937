"""Triton's client, its further calls: asyncio, tensors in JSON, the index of models, statistics, errors.

Knows nothing of servd.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.grpc.aio as triton_aio
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

from tests.clients.conftest import KEY, MODEL, Server

PROMPT = "The capital of France is"
SAMPLING = {"temperature": "0", "max_tokens": "12"}  # as text, as the example of Triton's vLLM backend has it


def headers() -> dict[str, str]:
    """New ones for each call: the HTTP client leaves the length of its JSON in them."""
    return {"authorization": f"Bearer {KEY}"}


def inputs(module: Any, *, stream: bool, **options: Any) -> list[Any]:
    """The tensors that the backend's example sends; `options` are set_data_from_numpy's."""
    values = {
        "text_input": np.array([PROMPT.encode()], dtype=np.object_),
        "sampling_parameters": np.array([json.dumps(SAMPLING).encode()], dtype=np.object_),
        "stream": np.array([stream]),
        "exclude_input_in_output": np.array([True]),
    }
    made = []
    for name, value in values.items():
        tensor = module.InferInput(name, [1], "BOOL" if value.dtype == bool else "BYTES")
        tensor.set_data_from_numpy(value, **options)
        made.append(tensor)
    return made


def whole_text(server: Server) -> str:
    client = triton_grpc.InferenceServerClient(f"127.0.0.1:{server.grpc_port}")
    reply = client.infer(MODEL, inputs(triton_grpc, stream=False), headers=headers())
    return str(reply.as_numpy("text_output")[0].decode())


def test_the_asyncio_clients_stream(server: Server) -> None:
    async def streamed() -> list[str]:
        async def requests() -> Any:
            yield {"model_name": MODEL, "inputs": inputs(triton_aio, stream=True), "request_id": "one"}

        texts = []
        async with triton_aio.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client:
            async for result, error in client.stream_infer(requests(), headers=headers()):
                assert error is None, error
                assert result.get_response().id == "one"
                texts.append(result.as_numpy("text_output")[0].decode())
        return texts

    texts = asyncio.run(streamed())
    assert len(texts) > 1
    assert "".join(texts) == whole_text(server)


def test_http_with_binary_and_with_json_tensors(server: Server) -> None:
    client = triton_http.InferenceServerClient(f"127.0.0.1:{server.port}")
    binary = client.infer(MODEL, inputs(triton_http, stream=False), headers=headers())
    outputs = [triton_http.InferRequestedOutput("text_output", binary_data=False)]
    json_inputs = inputs(triton_http, stream=False, binary_data=False)
    in_json = client.infer(MODEL, json_inputs, outputs=outputs, headers=headers())
    assert binary.as_numpy("text_output")[0].decode() == in_json.as_numpy("text_output")[0] == whole_text(server)


def test_the_index_and_the_statistics(server: Server) -> None:
    whole_text(server)
    over_grpc = triton_grpc.InferenceServerClient(f"127.0.0.1:{server.grpc_port}")
    over_http = triton_http.InferenceServerClient(f"127.0.0.1:{server.port}")
    (entry,) = over_grpc.get_model_repository_index(headers=headers()).models
    assert (entry.name, entry.state) == (MODEL, "READY")
    listed = over_http.get_model_repository_index(headers=headers())
    assert listed == [{"name": MODEL, "version": "1", "state": "READY"}]
    (counts,) = over_grpc.get_inference_statistics(MODEL, headers=headers()).model_stats
    assert counts.inference_count > 0
    (shown,) = over_http.get_inference_statistics(MODEL, headers=headers())["model_stats"]
    assert shown["inference_count"] >= counts.inference_count
    assert over_http.get_model_config(MODEL, headers=headers())["max_batch_size"] == 0


def test_errors_name_what_is_wrong(server: Server) -> None:
    over_grpc = triton_grpc.InferenceServerClient(f"127.0.0.1:{server.grpc_port}")
    over_http = triton_http.InferenceServerClient(f"127.0.0.1:{server.port}")
    for client, module in ((over_grpc, triton_grpc), (over_http, triton_http)):
        with pytest.raises(InferenceServerException, match="no-such-model") as error:
            client.infer("no-such-model", inputs(module, stream=False), headers=headers())
        assert error.value.status() in ("StatusCode.NOT_FOUND", "404")
        with pytest.raises(InferenceServerException, match="top_p is 7"):
            client.infer(MODEL, inputs(module, stream=False), headers=headers(), parameters={"top_p": 7.0})
