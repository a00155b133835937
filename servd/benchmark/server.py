"""What a server tells of itself before any load: its model, its context, its tokenizer, what it refuses.

Knows nothing of runs. Everything here is asked once, so it is written for clear errors rather than for speed.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec

from servd.benchmark.client import PATHS, RequestOptions, ask_quietly, base_url, words_of
from servd.benchmark.corpus import Corpus
from servd.benchmark.requests import BenchRequest
from servd.errors import ConfigError, EngineUnavailableError, RequestFailedError

TOKENIZE_CHARS = 60_000  # a call: below every known server's limit
CORPUS_CHARS = 240_000  # about 60,000 tokens: enough that stretches seldom overlap


@dataclass(frozen=True, slots=True)
class Server:
    """One endpoint, found alive."""

    url: str
    model: str
    max_model_len: int | None  # tokens; None if it does not say
    software: str  # its Server header and "owned_by"
    tokenizes: bool  # POST /tokenize works


async def find_server(url: str, model: str | None, options: RequestOptions) -> Server:
    """Ask for the models and try the tokenizer. `model` None takes the first one listed.

    Raises EngineUnavailableError if nothing answers, RequestFailedError with the server's words, ConfigError for a
    model that is not listed.
    """
    url = base_url(url)
    try:
        async with options.session() as session:
            async with session.get(f"{url}/v1/models", allow_redirects=False) as response:
                if response.status != 200:
                    raise RequestFailedError(f"{url}/v1/models answered {response.status}: {await words_of(response)}")
                listed = _models(await response.read(), url)
                software = response.headers.get("Server", "")
            entry = _choose(listed, model, url)
            software = " ".join(dict.fromkeys(filter(None, (str(entry.get("owned_by") or ""), software))))
            server = Server(url, str(entry["id"]), _context(entry), software, tokenizes=False)
            tokenizes = await _tokenize(session, server, "a word") is not None
            return dataclasses.replace(server, tokenizes=tokenizes)
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise EngineUnavailableError(f"no server answers at {url}: {error or type(error).__name__}") from None


def _models(body: bytes, url: str) -> list[dict[str, Any]]:
    try:
        listed = msgspec.json.decode(body)["data"]
        if listed and all("id" in entry for entry in listed):
            return list(listed)
    except (ValueError, KeyError, TypeError):
        pass
    raise RequestFailedError(f"{url}/v1/models lists no model: {body[:200]!r}")


def _choose(listed: list[dict[str, Any]], model: str | None, url: str) -> dict[str, Any]:
    if model is None:
        return listed[0]
    for entry in listed:
        if entry["id"] == model:
            return entry
    names = ", ".join(str(entry["id"]) for entry in listed)
    raise ConfigError(f"--model is {model!r}; {url} serves: {names}")


def _context(entry: dict[str, Any]) -> int | None:
    """vLLM's and servd's field, or llama.cpp's."""
    meta = entry.get("meta")
    for value in (entry.get("max_model_len"), meta.get("n_ctx") if isinstance(meta, dict) else None):
        if isinstance(value, int) and value > 0:
            return value
    return None


async def _tokenize(session: aiohttp.ClientSession, server: Server, text: str) -> list[int] | None:
    """Token ids by vLLM's shape of the route, or llama.cpp's; None if the server has neither."""
    for body in (
        {"model": server.model, "prompt": text, "add_special_tokens": False},
        {"content": text, "add_special": False},
    ):
        json = msgspec.json.encode(body)
        async with session.post(f"{server.url}/tokenize", data=json, allow_redirects=False) as response:
            data = await response.read()
            if response.status != 200:
                continue
        try:
            tokens = msgspec.json.decode(data)["tokens"]
        except (ValueError, KeyError, TypeError):
            continue
        if tokens and all(isinstance(token, int) for token in tokens):
            return list(tokens)
    return None


async def tokenize(server: Server, texts: list[str], options: RequestOptions) -> list[list[int]]:
    """Token ids of each text. Raises RequestFailedError if the server fails at one."""
    found: list[list[int]] = []
    try:
        async with options.session() as session:
            for text in texts:
                token_ids: list[int] = []
                for start in range(0, len(text), TOKENIZE_CHARS):
                    part = await _tokenize(session, server, text[start : start + TOKENIZE_CHARS])
                    if part is None:
                        raise RequestFailedError(f"{server.url}/tokenize failed for {len(text)} characters")
                    token_ids += part
                found.append(token_ids)
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise RequestFailedError(f"{server.url}/tokenize failed: {error or type(error).__name__}") from None
    return found


async def read_corpus(server: Server, text: str, options: RequestOptions, *, as_ids: bool) -> Corpus:
    """What prompts are cut from: token ids of the text, or its words, counted by the tokenizer if there is one."""
    text = text[:CORPUS_CHARS]
    if not server.tokenizes:
        if as_ids:
            raise ConfigError(f"--prompt ids: {server.url} has no /tokenize; allowed there: text")
        return Corpus.of_text(text)
    if as_ids:
        return Corpus.of_ids((await tokenize(server, [text], options))[0])
    joined = " ".join(text.split())
    return Corpus.of_text(joined, len((await tokenize(server, [joined], options))[0]))


async def check_options(server: Server, request: BenchRequest, options: RequestOptions) -> RequestOptions:
    """The options without what this server refuses. Raises RequestFailedError if it does not answer even so.

    One short request tells: a server that does not know `ignore_eos` may answer 400 or 422.
    """
    url = server.url + PATHS[options.endpoint]
    short = dataclasses.replace(request, output_tokens=2)
    async with options.session() as session:
        row = await ask_quietly(session, url, options.body(server.model, short), short)
        if row.error in ("http 400", "http 422") and options.ignore_eos and "ignore_eos" in (row.message or ""):
            options = dataclasses.replace(options, ignore_eos=False)
            row = await ask_quietly(session, url, options.body(server.model, short), short)
    if row.error is not None and row.error != "empty":
        raise RequestFailedError(f"{url} does not answer: {row.error}: {' '.join((row.message or '').split())}")
    return options
