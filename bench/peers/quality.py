"""How much of the model each peer's weights and arithmetic leave, so that no speed stands alone.

Questions are asked of every peer over HTTP, as clients would; perplexity is servd's own, by `servd eval`.
"""

from __future__ import annotations

import sys
from typing import Any

import msgspec

from bench.peers.base import Home, Peer
from bench.peers.engines.servd import ServdPeer, model_argument
from bench.peers.load import ask_all
from bench.peers.results import Quality
from servd.cli.eval import encode_question
from servd.engine.tokenizer import Tokenizer
from servd.eval.questions import MAX_ANSWER_TOKENS, questions, score
from servd.hub.files import ModelFiles

ASK_CONCURRENCY = 8


def ask_questions(url: str, files: ModelFiles, tokenizer: Tokenizer, concurrency: int) -> Quality:
    """The right answers of a running server, greedy."""
    prompts = [encode_question(tokenizer, question.prompt) for question in questions()]
    answers = ask_all(url, files.name, prompts, MAX_ANSWER_TOKENS, min(ASK_CONCURRENCY, concurrency))
    return Quality(num_right=sum(score(answers)), num_questions=len(answers))


class Perplexity:
    """What `servd eval` says of servd's own settings; float32 is measured with the first one and serves them all."""

    def __init__(self, home: Home, files: ModelFiles) -> None:
        self._home = home
        self._files = files
        self._against = "float32"
        self._found: dict[tuple[str, ...], Any] = {}  # by flags: scheduling changes nothing

    def add_to(self, quality: Quality, peer: Peer) -> None:
        """Fill in what is known of servd alone. Raises ConfigError if it cannot be measured."""
        if not isinstance(peer, ServdPeer):
            return
        if peer.flags not in self._found:
            self._found[peer.flags] = self._compare(peer)
        comparison = self._found[peer.flags]
        quality.perplexity_change = comparison["perplexity_change"]
        quality.is_faithful = comparison["faithful"]

    def _compare(self, peer: ServdPeer) -> Any:
        result = self._home.folder / "quality" / f"{self._files.name}-{peer.name}.json"
        result.parent.mkdir(parents=True, exist_ok=True)
        argv = [sys.executable, "-m", "servd.cli", "eval", model_argument(self._files), *peer.flags]
        self._home.call("eval", [*argv, "--against", self._against, "--json", str(result)])
        self._against = str(result)
        return msgspec.json.decode(result.read_bytes())["comparison"]
