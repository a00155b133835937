"""`servd chat`: a conversation in the terminal, against a running server or one that it starts.

Speaks the OpenAI-compatible HTTP API like any other client. Knows nothing of the engine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from servd.cli.command import COMMANDS, Command
from servd.cli.signals import ended_by_signals
from servd.cli.url import DEFAULT_URL, check_url
from servd.errors import ConfigError, EngineUnavailableError, RequestFailedError, ServdError

HELP_LINE = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"
CONNECT_SECONDS = 2.0
STOP_SECONDS = 10.0
# A model's text must not be able to move the cursor or retitle the terminal.
PRINTABLE = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


class ChatCommand(Command):
    """Reads lines, streams answers."""

    help = "talk to a model in the terminal"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Which server, which model, how to sample."""
        parser.add_argument(
            "model", nargs="?", metavar="MODEL",
            help="start a server of its own for this model [default: a running server's, else the starter model]",
        )  # fmt: skip
        parser.add_argument(
            "--url", metavar="URL", help=f"server to talk to [default: {DEFAULT_URL} if one runs there]"
        )
        parser.add_argument("--api-key", metavar="TEXT", help="key of the server [default: SERVD_API_KEY]")
        parser.add_argument("--system", metavar="TEXT", help="system message [default: the chat template's own]")
        parser.add_argument("--max-tokens", type=int, metavar="TOKENS", help="longest answer [default: the context]")
        parser.add_argument("--temperature", type=float, metavar="X", help="0 is greedy [default: the server's]")
        parser.add_argument("--seed", type=int, metavar="N", help="makes the answers repeatable [default: none]")

    def run(self, arguments: argparse.Namespace) -> int:
        """Converse until the input ends."""
        if arguments.url is not None:
            if arguments.model is not None:
                raise ConfigError(
                    f"--url {arguments.url} is a server that runs, MODEL {arguments.model} would start one: "
                    "give one of the two"
                )
            check_url(arguments.url)
        api_key = arguments.api_key or os.environ.get("SERVD_API_KEY")
        client = _Client(arguments.url or DEFAULT_URL, api_key)
        with asyncio.Runner() as runner:
            try:
                if arguments.model is None and (arguments.url or runner.run(client.answers())):
                    return _converse(runner, client, arguments)
                with ended_by_signals(), _own_server(arguments.model) as client.url:
                    return _converse(runner, client, arguments)
            finally:
                runner.run(client.close())


COMMANDS.register("chat")(ChatCommand())


class _Client:
    """The three calls of the API that a conversation needs."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session: Any = None

    async def session(self) -> Any:
        """The connection pool, made on the event loop."""
        import aiohttp

        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
            self._session = aiohttp.ClientSession(headers=self._headers, timeout=timeout)
        return self._session

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    async def answers(self) -> bool:
        """Whether a server listens at the URL."""
        import aiohttp

        try:
            async with (await self.session()).get(f"{self.url}/health"):
                return True
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def model_name(self) -> str:
        """The first served model. Raises EngineUnavailableError if nothing listens."""
        import aiohttp

        try:
            async with (await self.session()).get(f"{self.url}/v1/models") as response:
                await _check(response)
                name: str = (await response.json())["data"][0]["id"]
                return name
        except (aiohttp.ClientError, TimeoutError) as error:
            raise EngineUnavailableError(f"no server answers at {self.url}: {error}") from None

    async def stream(self, body: dict[str, Any]) -> AsyncIterator[str]:
        """The pieces of an answer. Raises RequestFailedError with the server's message."""
        import aiohttp

        session = await self.session()
        try:
            async with session.post(f"{self.url}/v1/chat/completions", json=body | {"stream": True}) as response:
                await _check(response)
                async for line in response.content:
                    data = line.decode().strip().removeprefix("data: ")
                    if data == "[DONE]":
                        return
                    if not data.startswith("{"):
                        continue
                    event = json.loads(data)
                    if "error" in event:
                        raise RequestFailedError(event["error"]["message"])
                    for choice in event["choices"]:
                        yield choice["delta"].get("content") or ""
        except (aiohttp.ClientError, TimeoutError) as error:
            raise RequestFailedError(f"the connection to {self.url} broke: {error}") from None


async def _check(response: Any) -> None:
    if response.status == 200:
        return
    try:
        message = (await response.json(content_type=None))["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.reason
    raise RequestFailedError(f"the server answered {response.status}: {message}")


def _converse(runner: asyncio.Runner, client: _Client, arguments: argparse.Namespace) -> int:
    """The exit code: 1 if a message of a script was not answered. At a terminal the user saw it and went on."""
    body: dict[str, Any] = {"model": runner.run(client.model_name())}
    for name in ("max_tokens", "temperature", "seed"):
        if (value := getattr(arguments, name)) is not None:
            body[name] = value
    beginning = [{"role": "system", "content": arguments.system}] if arguments.system else []
    messages = list(beginning)
    interactive = sys.stdin.isatty()
    if interactive:
        sys.stdout.write(f"{body['model']} at {client.url}. {HELP_LINE}\n")
    code = 0
    for line in _lines(interactive):
        if line == "/exit":
            break
        if line == "/reset":
            messages = list(beginning)
            sys.stdout.write("(the conversation is forgotten)\n")
            continue
        if line.startswith("/"):
            sys.stdout.write(f"unknown command {line.split()[0]}; {HELP_LINE}\n")
            continue
        messages.append({"role": "user", "content": line})
        answer, failed = _answer(runner, client, body | {"messages": messages})
        if failed and not interactive:
            code = 1
        if answer:
            messages.append({"role": "assistant", "content": answer})
        else:
            messages.pop()
    return code


def _lines(interactive: bool) -> Iterator[str]:
    """What the user types, without empty lines, until the input ends."""
    if interactive:
        import readline  # noqa: F401  (gives input() its editing and history)
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            sys.stdout.write("\n" if interactive else "")
            return
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            continue
        if line:
            yield line


def _answer(runner: asyncio.Runner, client: _Client, body: dict[str, Any]) -> tuple[str, bool]:
    """Stream one answer to the terminal; what came of it, and whether it failed."""
    pieces: list[str] = []
    failed = False

    async def show() -> None:
        async for piece in client.stream(body):
            pieces.append(piece)
            sys.stdout.write(piece.translate(PRINTABLE))
            sys.stdout.flush()

    try:
        runner.run(show())
        sys.stdout.write("\n")
    except KeyboardInterrupt:  # leaving the stream closes its connection, and the server aborts the request
        sys.stdout.write(" (stopped)\n")
    except ServdError as error:
        sys.stdout.write("\n" if pieces else "")
        sys.stderr.write(f"servd: error: {error.message}\n")
        failed = True
    return "".join(pieces), failed


@contextmanager
def _own_server(model: str | None) -> Iterator[str]:
    """The URL of a server that lives as long as the block. Raises EngineUnavailableError if it does not start."""
    command = [sys.executable, "-m", "servd.cli", "serve", *([model] if model else [])]
    command += ["--port", "0", "--grpc-port", "-1", "--log-level", "warning"]
    # A process group of its own: Ctrl-C stops an answer, not the server.
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0) as process:
        assert process.stdout is not None
        try:
            url = process.stdout.readline().strip()
            if not url:
                raise EngineUnavailableError(f"the server did not start (exit code {process.wait()}); see above")
            yield url
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
