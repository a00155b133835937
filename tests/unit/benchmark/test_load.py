"""Load against real HTTP: what rows say, how many requests run at once, and every way in which a request can fail."""

from __future__ import annotations

import asyncio
import time

import pytest
from aiohttp import web

from servd.benchmark.client import LoadWatch, RequestOptions
from servd.benchmark.load import run_closed_loop, run_open_loop
from servd.benchmark.requests import BenchRequest
from servd.benchmark.server import check_options, find_server, read_corpus
from servd.errors import ConfigError, EngineUnavailableError, RequestFailedError
from tests.unit.benchmark.servers import DONE, event, scripted_server, streaming, text_event

REQUESTS = [BenchRequest(f"r{i}", tuple(range(65 + i, 75 + i)), 10, 3 + i % 4) for i in range(12)]
ONE = [BenchRequest("r0", (65, 66, 67), 3, 2)]
USAGE = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
ANSWER = (text_event("a"), text_event("b"), text_event("", "length"), event(USAGE), DONE)


def answer_from(*parts, requests=ONE, **settings):
    """The rows of a closed loop against a server that answers so."""

    async def main():
        async with scripted_server(v1_completions=streaming(*parts), v1_chat_completions=streaming(*parts)) as url:
            return await run_closed_loop(url, "m", requests, 1, options=RequestOptions(**settings))

    return asyncio.run(main()).rows


def test_a_closed_loop_answers_every_request_with_the_tokens_asked(servd):
    watch = LoadWatch()
    result = asyncio.run(run_closed_loop(servd.url, "fake", REQUESTS, 4, watch=watch))
    assert sorted(row.id for row in result.rows) == sorted(request.id for request in REQUESTS)
    for row in result.rows:
        request = next(request for request in REQUESTS if request.id == row.id)
        assert row.error is None
        assert (row.prompt_tokens, row.output_tokens, row.asked_tokens) == (10, *2 * (request.output_tokens,))
        assert row.has_usage
        assert 0 < row.ttft_ms <= row.ttft_ms + sum(row.itl_ms) <= row.e2e_ms + 0.01
        assert row.start_s + row.e2e_ms / 1e3 <= result.wall_s + 1e-6
    assert (watch.total, watch.done, watch.running, watch.failed) == (12, 12, 0, 0)
    assert result.load == "c=4"


def test_fresh_first_tokens_are_sent_and_what_follows_is_as_it_was(servd):
    asyncio.run(run_closed_loop(servd.url + "/v1/", "fake", ONE, 1, salt=5))
    first = [new.token_ids for plan in servd.fake.executor.plans for new in plan.new_requests]
    assert len(first) == 1
    assert list(first[0][2:3]) == [67]
    assert set(first[0][:2]) <= {65, 66, 67}


@pytest.mark.parametrize("concurrency", [1, 3, 50])
def test_no_more_than_the_concurrency_runs_at_once(concurrency):
    running, seen = 0, []

    async def handle(request: web.Request) -> web.StreamResponse:
        nonlocal running
        running += 1
        seen.append(running)
        response = await streaming(*ANSWER)(request)
        running -= 1
        return response

    async def main():
        async with scripted_server(v1_completions=handle) as url:
            return await run_closed_loop(url, "m", REQUESTS, concurrency)

    assert all(row.error is None for row in asyncio.run(main()).rows)
    assert max(seen) == min(concurrency, len(REQUESTS))


def test_an_open_loop_counts_from_the_planned_arrival_even_if_the_client_was_late():
    requests = [BenchRequest(f"r{i}", (1, 2), 2, 2, arrival_s=0.03 * i) for i in range(4)]

    async def main():
        async with scripted_server(v1_completions=streaming(*ANSWER)) as url:
            run = asyncio.create_task(run_open_loop(url, "m", requests, load="4 req/s"))
            await asyncio.sleep(0.01)
            time.sleep(0.2)  # a client that is stuck
            return await run

    result = asyncio.run(main())
    assert [row.start_s for row in result.rows] == pytest.approx([0, 0.03, 0.06, 0.09])
    assert result.rows[1].ttft_ms > 100
    assert result.max_send_delay_ms > 100


def test_pieces_are_timed_apart_and_together_and_across_packets():
    whole = b"".join(ANSWER)
    cut = len(ANSWER[0]) + 9
    for parts in (ANSWER, (whole,), (whole[:cut], whole[cut:]), (whole.replace(b"\n", b"\r\n"),)):
        (row,) = answer_from(*parts)
        assert row.error is None
        assert (row.prompt_tokens, row.output_tokens, len(row.itl_ms)) == (3, 2, 1)
    assert answer_from(whole)[0].itl_ms == [0.0]


def test_half_a_character_is_a_token_and_a_role_is_none():
    parts = (
        event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}),
        event({"choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": None}]}),
        event({"choices": [{"index": 0, "delta": {"reasoning_content": "hm"}, "finish_reason": None}]}),
        event({"choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": None}]}),
        event({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}),
        DONE,
    )
    (row,) = answer_from(*parts, endpoint="chat", requests=[BenchRequest("r", "Hi there you", 3, 3)])
    assert row.error is None
    assert not row.has_usage
    assert row.output_tokens == 3
    assert answer_from(text_event(""), text_event("é"), text_event("", "stop"), DONE)[0].output_tokens == 2


@pytest.mark.parametrize(
    ("parts", "kind", "message"),
    [
        ((text_event("a"), event({"error": {"message": "no more"}})), "event", "no more"),
        ((text_event("a"),), "cut off", "without a finish reason"),
        ((event({"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]}), DONE), "empty", "no token"),
        ((b"data: {broken\n\n",), "event", "broken"),
        ((b'data: {"choices": [{"text": "\xc3"}]}\n\n',), "event", "utf-8"),
    ],
)
def test_an_answer_that_is_not_whole_is_an_error_of_its_kind(parts, kind, message):
    (row,) = answer_from(*parts)
    assert row.error == kind
    assert message in row.message


def test_statuses_timeouts_and_lost_connections_are_errors_of_their_kinds():
    async def refuse(request: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": "too many"}}, status=429)

    async def hang(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(30)
        raise AssertionError

    async def vanish(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async def redirect(request: web.Request) -> web.StreamResponse:
        raise web.HTTPFound("http://192.0.2.1/")

    async def row_of(handler):
        async with scripted_server(v1_completions=handler) as url:
            return (await run_closed_loop(url, "m", ONE, 1, options=RequestOptions(timeout=0.3))).rows[0]

    async def main():
        rows = [await row_of(handler) for handler in (refuse, hang, vanish, redirect)]
        rows.append((await run_closed_loop("http://127.0.0.1:1", "m", ONE, 1)).rows[0])
        return rows

    rows = asyncio.run(main())
    assert [row.error for row in rows] == ["http 429", "timeout", "broken", "http 302", "refused"]
    assert "too many" in rows[0].message


def test_an_answer_is_whole_with_done_even_if_its_connection_is_not():
    async def hang_after_done(request: web.Request) -> web.StreamResponse:
        response = await streaming(*ANSWER)(request)
        await asyncio.sleep(30)
        return response

    async def main():
        async with scripted_server(v1_completions=hang_after_done) as url:
            return (await run_closed_loop(url, "m", ONE, 1, options=RequestOptions(timeout=0.5))).rows

    (row,) = asyncio.run(main())
    assert (row.error, row.output_tokens) == (None, 2)


def test_options_are_sent_as_they_are_documented():
    bodies = []

    async def handle(request: web.Request) -> web.StreamResponse:
        bodies.append((await request.json(), request.headers.get("Authorization")))
        return await streaming(*ANSWER)(request)

    async def main():
        async with scripted_server(v1_completions=handle, v1_chat_completions=handle) as url:
            await run_closed_loop(url, "m", ONE, 1)
            chat = RequestOptions(endpoint="chat", ignore_eos=False, extra_body={"temperature": 1, "x": 2}, api_key="k")
            await run_closed_loop(url, "m", [BenchRequest("r", "one two three", 3, 2)], 1, options=chat)

    asyncio.run(main())
    (plain, no_key), (chat, key) = bodies
    assert plain["ignore_eos"] is True
    assert (plain["model"], plain["max_tokens"], plain["temperature"], plain["stream"]) == ("m", 2, 0, True)
    assert plain["stream_options"] == {"include_usage": True}
    assert len(plain["prompt"]) == 3
    assert no_key is None
    assert "ignore_eos" not in chat and "prompt" not in chat
    assert (chat["temperature"], chat["x"], key) == (1, 2, "Bearer k")
    assert chat["messages"][0]["content"].endswith(" three")


def test_a_server_tells_its_model_context_and_tokenizer(servd):
    async def main():
        server = await find_server(servd.url + "/v1", None, RequestOptions())
        ids = await read_corpus(server, "some text", RequestOptions(), as_ids=True)
        words = await read_corpus(server, "some text", RequestOptions(), as_ids=False)
        return server, ids, words

    server, ids, words = asyncio.run(main())
    assert (server.url, server.model, server.max_model_len, server.tokenizes) == (servd.url, "fake", 2048, True)
    assert ids.pieces == tuple(b"some text")
    assert words.pieces == ("some", "text")
    assert words.tokens_a_piece == 4.5
    with pytest.raises(ConfigError, match="--model is 'other'; .* serves: fake"):
        asyncio.run(find_server(servd.url, "other", RequestOptions()))


def test_llama_cpps_shapes_are_understood_and_no_tokenizer_is_no_obstacle():
    async def models(request: web.Request) -> web.StreamResponse:
        return web.json_response({"data": [{"id": "m", "meta": {"n_ctx": 512}}]})

    async def tokenize(request: web.Request) -> web.StreamResponse:
        return web.json_response({"tokens": list((await request.json()).get("content", "").encode())})

    async def main():
        async with scripted_server(v1_models=models, tokenize=tokenize) as url:
            server = await find_server(url, None, RequestOptions())
            corpus = await read_corpus(server, "abc", RequestOptions(), as_ids=True)
        async with scripted_server(v1_models=models) as url:
            plain = await find_server(url, "m", RequestOptions())
            text = await read_corpus(plain, "some more text", RequestOptions(), as_ids=False)
            with pytest.raises(ConfigError, match="--prompt ids"):
                await read_corpus(plain, "some", RequestOptions(), as_ids=True)
        return server, corpus, plain, text

    server, corpus, plain, text = asyncio.run(main())
    assert (server.max_model_len, server.tokenizes, corpus.pieces) == (512, True, (97, 98, 99))
    assert not plain.tokenizes
    assert text.pieces == ("some", "more", "text")


def test_a_server_that_refuses_ignore_eos_is_asked_without_it():
    async def models(request: web.Request) -> web.StreamResponse:
        return web.json_response({"data": [{"id": "m"}]})

    async def strict(request: web.Request) -> web.StreamResponse:
        if "ignore_eos" in await request.json():
            return web.json_response({"error": {"message": "Unrecognized argument: ignore_eos"}}, status=400)
        return await streaming(*ANSWER)(request)

    async def broken(request: web.Request) -> web.StreamResponse:
        return web.Response(status=500, text="out of memory")

    async def main():
        async with scripted_server(v1_models=models, v1_completions=strict) as url:
            server = await find_server(url, None, RequestOptions())
            options = await check_options(server, ONE[0], RequestOptions())
        async with scripted_server(v1_models=models, v1_completions=broken) as url:
            server = await find_server(url, None, RequestOptions())
            with pytest.raises(RequestFailedError, match="http 500: out of memory"):
                await check_options(server, ONE[0], RequestOptions())
        return options

    assert asyncio.run(main()) == RequestOptions(ignore_eos=False)


def test_a_dead_server_and_one_without_models_are_told_apart():
    async def nothing(request: web.Request) -> web.StreamResponse:
        return web.json_response({"data": []})

    async def main():
        with pytest.raises(EngineUnavailableError, match="no server answers at http://127.0.0.1:1"):
            await find_server("http://127.0.0.1:1", None, RequestOptions())
        async with scripted_server(v1_models=nothing) as url:
            with pytest.raises(RequestFailedError, match="lists no model"):
                await find_server(url, None, RequestOptions())
        async with scripted_server() as url:
            with pytest.raises(RequestFailedError, match="/v1/models answered 404"):
                await find_server(url, None, RequestOptions())

    asyncio.run(main())
