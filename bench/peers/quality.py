"""How much of the model each peer's weights and arithmetic leave, so that no speed stands alone.

Questions are asked of every peer over HTTP, as clients would; perplexity is servd's own, by `servd eval`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from bench.peers.base import Home, Peer
from bench.peers.engines.servd import ServdPeer
from bench.peers.load import ask_all
from bench.peers.results import Quality
from servd.engine.tokenizer import Tokenizer
from servd.eval.questions import MAX_ANSWER_TOKENS, questions, score
from servd.hub.files import ModelFiles

ASK_CONCURRENCY = 8


def ask_questions(url: str, files: ModelFiles, tokenizer: Tokenizer, concurrency: int) -> Quality:
    """The share of right answers of a running server, greedy."""
    prompts = [tokenizer.encode_chat([{"role": "user", "content": question.prompt}]) for question in questions()]
    answers = ask_all(url, files.name, prompts, MAX_ANSWER_TOKENS, min(ASK_CONCURRENCY, concurrency))
    return Quality(num_right=sum(score(answers)), num_questions=len(answers))


def add_perplexity(quality: Quality, peer: Peer, home: Home, files: ModelFiles) -> None:
    """For servd: what `servd eval` says of the same flags, against float32. Raises ConfigError if it fails."""
    if not isinstance(peer, ServdPeer):
        return
    folder = home.folder / "quality"
    folder.mkdir(parents=True, exist_ok=True)
    reference, found = folder / f"{files.name}-float32.json", folder / f"{files.name}-{peer.name}.json"
    if not reference.is_file():
        _evaluate(home, files, ["--dtype", "float32", "--quantization", "none"], "none", reference)
    _evaluate(home, files, list(peer.flags), str(reference), found)
    comparison = msgspec.json.decode(found.read_bytes())["comparison"]
    quality.perplexity_change = comparison["perplexity_change"]
    quality.is_faithful = comparison["faithful"]


def _evaluate(home: Home, files: ModelFiles, flags: list[str], against: str, result: Path) -> None:
    argv = [sys.executable, "-m", "servd.cli", "eval", str(files.weights[0]), *flags, "--against", against]
    home.call("eval", [*argv, "--json", str(result)])
