"""The arithmetic of beam search: which continuations live on, which are complete, and when the search is over.

Knows nothing of requests, blocks or text. The rules are those of `generate(num_beams=...)` in Hugging Face
transformers, so that both find the same sequences; scores are sums in double precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from servd.outputs import TokenLogprobs
from servd.request import FinishReason


@dataclass(frozen=True, slots=True)
class Beam:
    """A sequence of generated tokens, as a link to the one before; the root has neither."""

    parent: Beam | None = None
    entry: TokenLogprobs | None = None  # of the last token
    logprob: float = 0.0  # of all tokens together
    length: int = 0

    def entries(self) -> list[TokenLogprobs]:
        """Of all generated tokens, in order."""
        found, beam = [], self
        while beam.parent is not None and beam.entry is not None:
            found.append(beam.entry)
            beam = beam.parent
        return found[::-1]

    @property
    def token_id(self) -> int:
        """The last token. The root has none."""
        assert self.entry is not None, "the root of a search has no token"
        return self.entry.token_id


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A complete sequence."""

    beam: Beam
    score: float  # logprob / length ** length_penalty
    finish_reason: FinishReason


@dataclass(slots=True)
class BeamState:
    """One search. `advance` it with what the model says after each of `beams`, until these are none.

    width: sequences kept alive, and complete ones kept. max_length: of the generated tokens. early_stopping: True ends
    as soon as `width` sequences are complete, False when no beam could beat the worst of them at its present length,
    "never" when none could at any length (if length_penalty is above 0). stop_token_ids end a sequence, but for its
    first `min_length` tokens.
    """

    width: int
    max_length: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    stop_token_ids: frozenset[int] = frozenset()
    min_length: int = 0
    num_top: int = 0  # alternatives to keep with each token
    beams: list[Beam] = field(default_factory=lambda: [Beam()])
    complete: list[Hypothesis] = field(default_factory=list)  # best first

    @property
    def num_alternatives(self) -> int:
        """How many of the likeliest next tokens of each beam `advance` needs.

        `width` that go on, behind all that stop; and what is to be shown.
        """
        return max(self.width + len(self.stop_token_ids), self.num_top)

    def advance(self, alternatives: Sequence[TokenLogprobs]) -> list[tuple[int, Beam]]:
        """Take in the next tokens of each of `beams`; returns the new ones, each with its parent's index.

        An empty list: the search is over, and `complete` holds its result.
        """
        length = self.beams[0].length + 1
        candidates = [
            (beam.logprob + logprob, index, rank, token_id)
            for index, (beam, found) in enumerate(zip(self.beams, alternatives, strict=True))
            for rank, (token_id, logprob) in enumerate(zip(found.top_token_ids, found.top_logprobs, strict=True))
            if length > self.min_length or token_id not in self.stop_token_ids
        ]
        candidates.sort(key=lambda candidate: (-candidate[0], candidate[1], candidate[2]))
        was_full = len(self.complete) == self.width
        ended: list[Hypothesis] = []
        going_on: list[tuple[int, Beam]] = []
        for place, (logprob, index, rank, token_id) in enumerate(candidates):
            if len(going_on) == self.width and place >= self.width:
                break
            entry = _entry(alternatives[index], rank, self.num_top)
            beam = Beam(self.beams[index], entry, logprob, length)
            stops = token_id in self.stop_token_ids
            if not stops and length < self.max_length:
                going_on.append((index, beam))
            elif place < self.width:  # worse ones are there only to have `width` that go on
                reason = FinishReason.STOP if stops else FinishReason.LENGTH
                ended.append(Hypothesis(beam, self._score(logprob, length), reason))
        if not (was_full and self.early_stopping is True):
            self.complete = sorted(self.complete + ended, key=lambda one: -one.score)[: self.width]
        going_on = going_on[: self.width]
        self.beams = [beam for _, beam in going_on]
        if self._is_over(length):
            self.beams = []
        return going_on if self.beams else []

    def _is_over(self, length: int) -> bool:
        if not self.beams:
            return True
        if len(self.complete) < self.width:
            return False
        if self.early_stopping is True:
            return True
        farthest = self.max_length if self.early_stopping == "never" and self.length_penalty > 0 else length
        return self._score(self.beams[0].logprob, farthest) <= self.complete[-1].score

    def _score(self, logprob: float, length: int) -> float:
        return logprob / float(length**self.length_penalty)


def _entry(alternatives: TokenLogprobs, rank: int, num_top: int) -> TokenLogprobs:
    return TokenLogprobs(
        alternatives.top_token_ids[rank],
        alternatives.top_logprobs[rank],
        rank + 1,
        alternatives.top_token_ids[:num_top],
        alternatives.top_logprobs[:num_top],
    )
