"""A program written for Triton's vLLM backend, with tritonclient alone: prints one JSON object of what it saw.

Runs in a process of its own: tritonclient and servd both bring stubs of package `inference`. Usage: HOST:GRPC_PORT
HOST:HTTP_PORT MODEL.
"""

from __future__ import annotations

import asyncio
import json
import queue
import sys
from typing import Any

import numpy as np
import tritonclient.grpc as grpc_client
import tritonclient.grpc.aio as aio_client
import tritonclient.http as http_client

PROMPT = "The capital of France is"
SAMPLING = {"temperature": "0", "max_tokens": "12"}


def inputs_of(module: Any, stream: bool) -> list[Any]:
    """The tensors that the backend's example client sends."""
    values = {
        "text_input": np.array([PROMPT.encode()], dtype=np.object_),
        "stream": np.array([stream], dtype=bool),
        "sampling_parameters": np.array([json.dumps(SAMPLING).encode()], dtype=np.object_),
        "exclude_input_in_output": np.array([True], dtype=bool),
    }
    inputs = []
    for name, value in values.items():
        tensor = module.InferInput(name, [1], "BOOL" if value.dtype == bool else "BYTES")
        tensor.set_data_from_numpy(value)
        inputs.append(tensor)
    return inputs


def text_of(result: Any) -> str:
    """The text of a reply."""
    text: str = result.as_numpy("text_output")[0].decode()
    return text


def over_grpc(address: str, model: str) -> dict[str, Any]:
    """Readiness, metadata, infer, a stream with callbacks, an error."""
    client = grpc_client.InferenceServerClient(address)
    seen: dict[str, Any] = {
        "ready": [client.is_server_live(), client.is_server_ready(), client.is_model_ready(model)],
        "metadata": client.get_model_metadata(model, as_json=True)["name"],
        "server": client.get_server_metadata(as_json=True)["name"],
        "decoupled": client.get_model_config(model).config.model_transaction_policy.decoupled,
        "index": client.get_model_repository_index(as_json=True)["models"][0]["state"],
        "infer": text_of(client.infer(model, inputs_of(grpc_client, False), request_id="one")),
        "statistics": int(client.get_inference_statistics(model).model_stats[0].inference_count) > 0,
    }
    replies: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(callback=lambda result, error: replies.put((result, error)))
    outputs = [grpc_client.InferRequestedOutput("text_output")]
    client.async_stream_infer(
        model, inputs_of(grpc_client, True), request_id="two", outputs=outputs, enable_empty_final_response=True
    )
    texts, is_final = [], False
    while not is_final:
        result, error = replies.get(timeout=60)
        assert error is None, error
        response = result.get_response()
        assert response.id == "two"
        texts.append(text_of(result))
        is_final = response.parameters["triton_final_response"].bool_param
    client.async_stream_infer("no-such-model", inputs_of(grpc_client, True), request_id="three")
    _, error = replies.get(timeout=60)
    client.stop_stream()
    seen["stream"], seen["num_replies"], seen["stream_error"] = "".join(texts), len(texts), str(error)
    try:
        client.infer("no-such-model", inputs_of(grpc_client, False))
    except grpc_client.InferenceServerException as failure:
        seen["status"] = failure.status()
    client.close()
    return seen


async def over_grpc_aio(address: str, model: str) -> str:
    """The asyncio client's stream."""

    async def requests() -> Any:
        yield {"model_name": model, "inputs": inputs_of(aio_client, True), "request_id": "four"}

    texts = []
    async with aio_client.InferenceServerClient(address) as client:
        async for result, error in client.stream_infer(requests()):
            assert error is None, error
            texts.append(text_of(result))
    return "".join(texts)


def over_http(address: str, model: str) -> dict[str, Any]:
    """Readiness, metadata, infer with binary and with JSON tensors, an error."""
    client = http_client.InferenceServerClient(address)
    json_inputs = []
    for tensor in inputs_of(http_client, False):
        value = np.array([PROMPT], dtype=np.object_)
        if tensor.name() == "text_input":
            tensor.set_data_from_numpy(value, binary_data=False)
        json_inputs.append(tensor)
    outputs = [http_client.InferRequestedOutput("text_output", binary_data=False)]
    seen: dict[str, Any] = {
        "ready": [client.is_server_live(), client.is_server_ready(), client.is_model_ready(model)],
        "metadata": client.get_model_metadata(model)["name"],
        "config": client.get_model_config(model)["max_batch_size"],
        "index": client.get_model_repository_index()[0]["state"],
        "statistics": client.get_inference_statistics(model)["model_stats"][0]["inference_count"] > 0,
        "infer": text_of(client.infer(model, inputs_of(http_client, False))),
    }
    seen["json"] = str(client.infer(model, json_inputs, outputs=outputs).as_numpy("text_output")[0])
    try:
        client.infer("no-such-model", inputs_of(http_client, False))
    except http_client.InferenceServerException as failure:
        seen["error"] = failure.message()
    client.close()
    return seen


def main() -> None:
    """Print all that was seen."""
    grpc_address, http_address, model = sys.argv[1:]
    seen = {
        "grpc": over_grpc(grpc_address, model),
        "aio": asyncio.run(over_grpc_aio(grpc_address, model)),
        "http": over_http(http_address, model),
    }
    sys.stdout.write(json.dumps(seen) + "\n")


if __name__ == "__main__":
    main()
