"""/v2: the Open Inference Protocol over HTTP, its binary tensors and Triton's generate endpoints."""

from __future__ import annotations

import asyncio
import json
import struct
from pathlib import Path
from typing import Any

import pytest

import servd
from servd.api.http.context import SERVICE
from servd.config import ServerConfig
from tests.api.http.serving import Reply, Served, serve

INFER = "/v2/models/fake/infer"
GENERATE = "/v2/models/fake/generate"
HEADER = "Inference-Header-Content-Length"
REPLIES = {"capital": "Paris – 🗼!"}
TEXT = {"name": "text_input", "shape": [1], "datatype": "BYTES", "data": ["The capital?"]}


def run(test: Any) -> None:
    asyncio.run(test())


def body_of(*extra: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"inputs": [TEXT, *extra], "parameters": {"max_tokens": 50}} | fields


def flag(name: str, value: bool) -> dict[str, Any]:
    return {"name": name, "shape": [1], "datatype": "BOOL", "data": [value]}


def protocol_error(reply: Reply) -> str:
    """The text of an error that has the protocol's shape, exactly."""
    assert list(reply.json()) == ["error"], reply.body
    return str(reply.json()["error"])


def test_what_is_served(tmp_path: Path) -> None:
    async def test() -> None:
        async with serve(tmp_path) as s:
            assert (await s.request("GET", "/v2/health/live")).json() == {"live": True}
            assert (await s.request("GET", "/v2/health/ready")).json() == {"ready": True}
            for path in ("/v2/models/fake/ready", "/v2/models/fake/versions/1/ready"):
                assert (await s.request("GET", path)).json() == {"name": "fake", "ready": True}
            server = (await s.request("GET", "/v2")).json()
            assert (server["name"], server["version"]) == ("servd", servd.__version__)
            for path in ("/v2/models/fake", "/v2/models/fake/versions/1"):
                model = (await s.request("GET", path)).json()
                assert (model["name"], model["versions"]) == ("fake", ["1"])
                assert {"name": "text_input", "datatype": "BYTES", "shape": [1]} in model["inputs"]
                assert {"name": "text_output", "datatype": "BYTES", "shape": [-1]} in model["outputs"]
            config = (await s.request("GET", "/v2/models/fake/config")).json()
            assert [i["name"] for i in config["input"] if not i["optional"]] == ["text_input"]
            index = await s.request("POST", "/v2/repository/index")
            assert index.json() == [{"name": "fake", "version": "1", "state": "READY"}]
            await s.post(INFER, body_of())
            (stats,) = (await s.request("GET", "/v2/models/stats")).json()["model_stats"]
            assert (stats["name"], stats["inference_count"]) == ("fake", 1)
            s.engine.state = "draining"
            assert (await s.request("GET", "/v2/health/ready")).status == 503
            assert (await s.request("GET", "/v2/models/fake/ready")).status == 503
            assert (await s.post("/v2/repository/index", {"ready": True})).json() == []
            assert (await s.post(INFER, body_of())).status == 503
            s.engine.state = "ready"

    run(test)


def test_errors_of_the_layers_around_have_the_protocols_shape(tmp_path: Path) -> None:
    async def test() -> None:
        async with serve(tmp_path, server=ServerConfig(port=0, api_key="key-of-a-test")) as s:
            for path in ("/v2/health/live", "/v2/health/ready"):
                assert (await s.request("GET", path)).status == 200
            for path in ("/v2", "/v2/models/fake", "/v2/nowhere"):
                reply = await s.request("GET", path)
                assert reply.status == 401 and "key" in protocol_error(reply)
            headers = {"Authorization": "Bearer key-of-a-test"}
            assert "no such endpoint" in protocol_error(await s.request("GET", "/v2/nowhere", headers=headers))
            assert (await s.request("GET", "/v2", headers=headers)).status == 200

    run(test)


@pytest.mark.parametrize("path", ["/v2/models/other", "/v2/models/fake/versions/2", "/v2/models/a/b/ready"])
def test_another_model_or_version_is_not_found(path: str, tmp_path: Path) -> None:
    async def test() -> None:
        async with serve(tmp_path) as s:
            reply = await s.request("GET", path)
            assert reply.status == 404
            assert "does not exist" in protocol_error(reply)

    run(test)


def test_a_model_whose_name_has_slashes(tmp_path: Path) -> None:
    async def test() -> None:
        async with serve(tmp_path) as s:
            s.runner.app[SERVICE].model_name = "org/fake"
            assert (await s.request("GET", "/v2/models/org/fake/versions/1")).json()["name"] == "org/fake"
            assert (await s.request("GET", "/v2/models/org/fake/ready")).status == 200
            assert (await s.post("/v2/models/org/fake/infer", body_of())).status == 200
            assert (await s.post("/v2/models/org%2Ffake/versions/1/infer", body_of())).status == 200

    run(test)


def test_infer_with_json_tensors(tmp_path: Path) -> None:
    async def test() -> None:
        async with serve(tmp_path, replies=REPLIES) as s:
            reply = (await s.post(INFER, body_of(id="r1"))).json()
            assert reply == {
                "model_name": "fake", "model_version": "1", "id": "r1",
                "outputs": [{
                    "name": "text_output", "datatype": "BYTES", "shape": [1], "data": ["The capital?Paris – 🗼!"]
                }],
            }  # fmt: skip
            extra = (flag("exclude_input_in_output", True), flag("return_num_output_tokens", True))
            outputs = (await s.post(INFER, body_of(*extra))).json()["outputs"]
            assert [output["data"] for output in outputs] == [["Paris – 🗼!"], [len("Paris – 🗼!".encode()) + 1]]

    run(test)


def test_infer_with_binary_tensors(tmp_path: Path) -> None:
    async def test() -> None:
        async with serve(tmp_path, replies=REPLIES) as s:
            text = b"The capital?"
            binary = struct.pack("<I", len(text)) + text + b"\1"
            inputs = [
                {"name": "text_input", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": 16}},
                {"name": "exclude_input_in_output", "shape": [1], "datatype": "BOOL",
                 "parameters": {"binary_data_size": 1}},
            ]  # fmt: skip
            parameters = {"max_tokens": 50, "binary_data_output": True}
            header = json.dumps({"inputs": inputs, "parameters": parameters}).encode()
            reply = await s.post(INFER, header + binary, headers={HEADER: str(len(header))})
            assert reply.status == 200, reply.body
            size = int(reply.headers[HEADER])
            answer = "Paris – 🗼!".encode()
            (output,) = json.loads(reply.body[:size])["outputs"]
            assert output["parameters"] == {"binary_data_size": 4 + len(answer)} and "data" not in output
            assert reply.body[size:] == struct.pack("<I", len(answer)) + answer

    run(test)


def test_generate_and_generate_stream(tmp_path: Path) -> None:
    async def test() -> None:
        async with serve(tmp_path, replies=REPLIES) as s:
            body = {"id": "7", "text_input": "The capital?", "max_tokens": 50, "exclude_input_in_output": True}
            assert (await s.post(GENERATE, body)).json() == {
                "model_name": "fake", "model_version": "1", "id": "7", "text_output": "Paris – 🗼!"
            }  # fmt: skip
            body = {"text_input": "The capital?", "parameters": {"stream": True, "max_tokens": 50, "temperature": 0}}
            events = (await s.post(f"{GENERATE}_stream", body)).events()
            assert len(events) > 1
            assert "".join(event["text_output"] for event in events) == "Paris – 🗼!"
            several = {"text_input": "x", "parameters": {"n": 2, "max_tokens": 3}}
            assert len((await s.post(GENERATE, several)).json()["text_output"]) == 2

    run(test)


def test_a_failure_in_mid_stream_is_an_event(tmp_path: Path) -> None:
    async def test() -> None:
        async with serve(tmp_path, step_delay=0.01) as s:
            body = {"text_input": "x", "stream": True, "max_tokens": 1500, "timeout": 150_000}
            events = (await s.post(f"{GENERATE}_stream", body)).events()
            assert "deadline of 0.15 s" in events[-1]["error"]
            assert all("text_output" in event for event in events[:-1])

    run(test)


WRONG: dict[str, tuple[str, Any, dict[str, str], str]] = {
    "no inputs": (INFER, {"parameters": {}}, {}, "inputs"),
    "unknown field": (INFER, body_of(prompt="x"), {}, "prompt"),
    "no shape": (INFER, {"inputs": [{"name": "text_input"}]}, {}, "shape"),
    "wrong shape": (INFER, {"inputs": [TEXT | {"shape": [2]}]}, {}, "inputs[0].shape"),
    "unknown datatype": (INFER, {"inputs": [TEXT | {"datatype": "STRING"}]}, {}, "inputs[0].datatype"),
    "data of another kind": (INFER, {"inputs": [TEXT | {"data": [5]}]}, {}, "inputs[0].data"),
    "too much data": (INFER, {"inputs": [TEXT | {"data": ["a", "b"]}]}, {}, "inputs[0].data"),
    "no data": (INFER, {"inputs": [TEXT | {"data": None}]}, {}, "inputs[0].data"),
    "duplicate input": (INFER, {"inputs": [TEXT, TEXT]}, {}, "inputs[1].name"),
    "duplicate output": (INFER, body_of(outputs=[{"name": "text_output"}] * 2), {}, "outputs[1].name"),
    "unknown parameter": (INFER, body_of(parameters={"temprature": 1}), {}, "temprature"),
    "parameter out of range": (INFER, body_of(parameters={"top_p": 3}), {}, "top_p"),
    "a stream": (INFER, body_of(flag("stream", True)), {}, "stream"),
    "classification": (INFER, body_of(outputs=[{"name": "text_output", "parameters": {"classification": 1}}]), {},
                       "outputs[0].parameters"),
    "shared memory": (INFER, {"inputs": [TEXT | {"parameters": {"shared_memory_region": "x"}}]}, {},
                      "inputs[0].parameters"),
    "binary size beyond the body": (INFER, {"inputs": [TEXT | {"data": None, "parameters": {"binary_data_size": 9}}]},
                                    {}, "binary_data_size"),
    "header length beyond the body": (INFER, body_of(), {HEADER: "99999"}, HEADER),
    "header length no number": (INFER, body_of(), {HEADER: "-1"}, HEADER),
    "bytes of nobody": (INFER, json.dumps(body_of()).encode() + b"xx",
                        {HEADER: str(len(json.dumps(body_of()).encode()))}, "belong to no input"),
    "binary_data_output no flag": (INFER, body_of(parameters={"binary_data_output": 1}), {}, "binary_data_output"),
    "generate without text": (GENERATE, {"max_tokens": 3}, {}, "text_input"),
    "generate with a number": (GENERATE, {"text_input": 3}, {}, "text_input"),
    "generate given twice": (GENERATE, {"text_input": "x", "n": 1, "parameters": {"n": 1}}, {}, "n"),
    "generate with parameters of no kind": (GENERATE, {"text_input": "x", "parameters": 3}, {}, "parameters"),
    "generate that streams": (GENERATE, {"text_input": "x", "stream": True}, {}, "stream"),
    "generate_stream refused at once": (f"{GENERATE}_stream", {"text_input": "", "stream": True}, {}, "text_input"),
    "not JSON": (GENERATE, b"{", {}, "JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_named(case: str, tmp_path: Path) -> None:
    path, body, headers, named = WRONG[case]

    async def test() -> None:
        async with serve(tmp_path) as s:
            reply = await s.post(path, body, headers=headers)
            assert reply.status == 400, reply.body
            assert named in protocol_error(reply)

    run(test)


def test_a_full_queue_says_when_to_come_back(tmp_path: Path) -> None:
    async def test() -> None:
        async with serve(tmp_path, settings={"max_num_seqs": 1, "max_num_queued_reqs": 1}) as s:
            s.executor.gate.clear()
            calls = []
            for i in range(2):
                calls.append(asyncio.create_task(s.post(INFER, body_of())))
                await s.fake.wait_until(lambda i=i: (s.engine.stats().running, s.engine.stats().waiting) == (1, i))
            reply = await s.post(INFER, body_of())
            assert (reply.status, reply.headers["Retry-After"]) == (429, "1")
            assert "waiting" in protocol_error(reply)
            s.executor.gate.set()
            assert [(await call).status for call in calls] == [200, 200]

    run(test)


async def _read_one(s: Served) -> None:
    async with s.session.post(
        s.url + f"{GENERATE}_stream", json={"text_input": "x", "stream": True, "max_tokens": 1500}
    ) as response:
        await response.content.readany()


def test_a_client_that_leaves_frees_the_request(tmp_path: Path) -> None:
    async def test() -> None:
        async with serve(tmp_path, step_delay=0.002) as s:
            await _read_one(s)
            await s.fake.wait_idle()

    run(test)
