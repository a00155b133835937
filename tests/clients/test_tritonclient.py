"""Triton's client, over gRPC and HTTP: metadata, readiness, inference, the stream of a decoupled model."""

from __future__ import annotations

import json
import queue
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

from tests.clients.conftest import KEY, MODEL, Server

HEADERS = {"authorization": f"Bearer {KEY}"}
SAMPLING = {"max_tokens": 12, "temperature": 0}


def inputs(module: Any, stream: bool) -> list[Any]:
    texts = {"text_input": "The sea is", "sampling_parameters": json.dumps(SAMPLING)}
    made = []
    for name, text in texts.items():
        tensor = module.InferInput(name, [1], "BYTES")
        tensor.set_data_from_numpy(np.array([text.encode()], dtype=np.object_))
        made.append(tensor)
    flag = module.InferInput("stream", [1], "BOOL")
    flag.set_data_from_numpy(np.array([stream]))
    return [*made, flag]


@pytest.fixture
def client(server: Server) -> triton_grpc.InferenceServerClient:
    return triton_grpc.InferenceServerClient(f"127.0.0.1:{server.grpc_port}")


def test_readiness_and_metadata(client: triton_grpc.InferenceServerClient) -> None:
    assert client.is_server_live(headers=HEADERS)
    assert client.is_server_ready(headers=HEADERS)
    assert client.is_model_ready(MODEL, headers=HEADERS)
    metadata = client.get_model_metadata(MODEL, headers=HEADERS)
    assert metadata.name == MODEL
    assert "text_input" in [tensor.name for tensor in metadata.inputs]
    assert client.get_server_metadata(headers=HEADERS).name == "servd"
    assert client.get_model_config(MODEL, headers=HEADERS).config.name == MODEL


def test_the_stream_is_the_whole_answer_in_pieces(client: triton_grpc.InferenceServerClient) -> None:
    whole = client.infer(MODEL, inputs(triton_grpc, False), headers=HEADERS, request_id="one")
    text = whole.as_numpy("text_output")[0].decode()
    assert whole.get_response().id == "one"
    replies: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: replies.put(error or result), headers=HEADERS)
    client.async_stream_infer(MODEL, inputs(triton_grpc, True), enable_empty_final_response=True)
    pieces = []
    while True:
        reply = replies.get(timeout=60)
        assert not isinstance(reply, Exception), reply
        response = reply.get_response()
        output = reply.as_numpy("text_output")
        pieces += [] if output is None else [piece.decode() for piece in output]
        if response.parameters["triton_final_response"].bool_param:
            break
    client.stop_stream()
    assert len(pieces) > 1
    # As Triton's own LLM backends do, the whole answer of `infer` begins with the prompt.
    assert text.endswith("".join(pieces).removeprefix("The sea is"))


def test_http(server: Server) -> None:
    client = triton_http.InferenceServerClient(f"127.0.0.1:{server.port}")
    assert client.is_server_ready(headers=HEADERS)
    assert client.get_model_metadata(MODEL, headers=HEADERS)["name"] == MODEL
    reply = client.infer(MODEL, inputs(triton_http, False), headers=HEADERS)
    assert reply.as_numpy("text_output").shape == (1,)


def test_a_missing_key_is_refused(client: triton_grpc.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="key"):
        client.get_model_metadata(MODEL)
