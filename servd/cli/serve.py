"""`servd serve`: from flags to a server that answers.

Owns the order of start-up (cheap checks, model files, worker, then the slow imports) and what is printed.
Knows nothing of requests.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import ipaddress
import json
import os
import shlex
import sys
from typing import TYPE_CHECKING

from servd.cli.command import COMMANDS, Command
from servd.cli.flags import add_flags, read_flags
from servd.cli.progress import progress_display
from servd.cli.signals import ended_by_signals
from servd.config import (
    CacheConfig,
    EngineConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    ServerConfig,
    check_limits,
)
from servd.errors import ConfigError

if TYPE_CHECKING:
    from servd.api.lifecycle import Ready
    from servd.executor.base import Executor

API_KEY_VARIABLE = "SERVD_API_KEY"


class ServeCommand(Command):
    """Serves one model over HTTP and gRPC."""

    help = "serve a model over HTTP (OpenAI-compatible) and gRPC"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Every field of every config section."""
        for section in (ModelConfig, ServerConfig, CacheConfig, SchedulerConfig, ParallelConfig):
            add_flags(parser, section)

    def run(self, arguments: argparse.Namespace) -> int:
        """Serve until SIGTERM or SIGINT."""
        config, server_config = read_configs(arguments)
        check_addresses(server_config)
        check_access(server_config)

        from servd.executor.base import EXECUTORS
        from servd.log import setup_logging

        setup_logging(server_config.log_level)
        executor = EXECUTORS.get(config.parallel.executor)(config)
        executor.launch()  # the worker imports torch while this process finds the model and imports its servers
        _serve(config, server_config, executor)
        return 0


COMMANDS.register("serve")(ServeCommand())


def read_configs(arguments: argparse.Namespace) -> tuple[EngineConfig, ServerConfig]:
    """Checked configs of the parsed flags. Raises ConfigError naming the flag."""
    config = EngineConfig(
        model=read_flags(arguments, ModelConfig),
        cache=read_flags(arguments, CacheConfig),
        scheduler=read_flags(arguments, SchedulerConfig),
        parallel=read_flags(arguments, ParallelConfig),
    ).resolve()
    server_config = read_flags(arguments, ServerConfig)
    api_key = server_config.api_key or os.environ.get(API_KEY_VARIABLE) or None
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and " " not in api_key):
        # HTTP would carry more, but not gRPC's metadata. The key itself is not repeated: errors end up in logs.
        raise ConfigError("--api-key holds a character no header can carry; allowed: printable ASCII without spaces")
    server_config = dataclasses.replace(server_config, api_key=api_key)
    check_limits(server_config)
    return config, server_config


def check_access(server_config: ServerConfig) -> None:
    """Raise ConfigError for a key file, a certificate or origins that cannot be used. Slow starts come after it."""
    from servd.api.access import KeyRing
    from servd.api.http.cors import parse_origins
    from servd.api.tls import TlsFiles

    KeyRing.of(server_config)
    if (tls := TlsFiles.of(server_config)) is not None:
        tls.make_context()
    if "*" in parse_origins(server_config.cors_origin) and not asks_for_key(server_config):
        raise ConfigError("--cors-origin is *, which lets every web page in; allowed only where a key is needed")


def check_addresses(server_config: ServerConfig) -> None:
    """Raise ConfigError for a port that is taken or the same twice; warn of an open door."""
    from servd.api.sockets import check_listenable

    host, port, grpc_port = server_config.host, server_config.port, server_config.grpc_port
    if port == grpc_port != 0:
        raise ConfigError(f"--grpc-port is {grpc_port}, the same as --port; allowed: another one, or -1 for no gRPC")
    check_listenable(host, port, "--port")
    if grpc_port >= 0:
        check_listenable(host, grpc_port, "--grpc-port")
    elif grpc_port != -1:
        raise ConfigError(f"--grpc-port is {grpc_port}; allowed: -1 to 65535")
    if not _is_loopback(host) and not asks_for_key(server_config):
        if not server_config.insecure_no_auth:
            raise ConfigError(
                f"--host is {host}, which other machines can reach, and there is no key; set --api-key (or "
                f"{API_KEY_VARIABLE}), --api-keys-file or --tls-client-ca, or say --insecure-no-auth to let anyone in"
            )
        sys.stderr.write(f"servd: warning: anyone who can reach {host} can use this server: --insecure-no-auth\n")


def asks_for_key(server_config: ServerConfig) -> bool:
    """Whether a caller must have something that not everybody has."""
    return any((server_config.api_key, server_config.api_keys_file, server_config.tls_client_ca))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _serve(config: EngineConfig, server_config: ServerConfig, executor: Executor) -> None:
    import uvloop

    from servd.api.lifecycle import run_server
    from servd.hub import resolve_model

    def print_ready(ready: Ready) -> None:
        sys.stdout.write("\n".join(ready_lines(ready, server_config)) + "\n")
        sys.stdout.flush()

    with progress_display() as progress:
        try:
            # Before the event loop: a download in one of its threads could not be interrupted.
            with ended_by_signals():
                files = resolve_model(config.model.model, progress=progress)
        except BaseException:
            asyncio.run(executor.close())
            raise
        uvloop.run(run_server(config, server_config, files, executor, on_ready=print_ready, progress=progress))


def ready_lines(ready: Ready, server_config: ServerConfig) -> tuple[str, str, str]:
    """The three lines of a server that is ready: its URL, a curl that works, its gRPC address."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(server_config.host, server_config.host)
    host = f"[{host}]" if ":" in host else host
    url = f"{'https' if server_config.tls_cert else 'http'}://{host}:{ready.http_port}"
    body: dict[str, object] = {"model": ready.model_name}
    if ready.has_chat_template:
        path, body["messages"] = "chat/completions", [{"role": "user", "content": "What is the capital of France?"}]
    else:
        path, body["prompt"] = "completions", "Once upon a time"
    body |= {"max_tokens": 64, "temperature": 0}
    needs_key = server_config.api_key or server_config.api_keys_file
    key = f' -H "Authorization: Bearer ${API_KEY_VARIABLE}"' if needs_key else ""
    trust = f" --cacert {shlex.quote(server_config.tls_cert)}" if server_config.tls_cert else ""
    curl = f"curl{trust} {url}/v1/{path}{key} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"
    grpc = "off" if ready.grpc_port is None else f"{host}:{ready.grpc_port}"
    return url, curl, f"gRPC {grpc}"
