"""What one answer may go on with: its grammar, its allowed tokens and its forbidden texts, as masks of the vocabulary.

Owns the state that follows the answer's tokens. Knows nothing of steps, batches or threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from llguidance import LLMatcher

from servd.grammar import GrammarError, fill_mask
from servd.outputs import NewRequestData
from servd.worker.forbidden_texts import ForbiddenTexts, Int32s, mask_of


@dataclass(slots=True)
class Constraints:
    """The parts of a guide that take long to make."""

    matcher: LLMatcher | None = None
    forbidden: ForbiddenTexts | None = None


class Guide:
    """Follows one answer. Tokens that it is shown are never taken back, but for guesses."""

    def __init__(self, new: NewRequestData, constraints: Constraints, num_words: int) -> None:
        """`num_words`: of a mask, 32 tokens each."""
        params = new.sampling_params
        self._matcher = constraints.matcher
        self._forbidden = constraints.forbidden
        self._num_consumed = 0  # tokens of the answer
        self._num_in_matcher = 0  # of these: what follows the end of a complete grammar is not for it
        self._min_tokens = params.min_tokens
        self._allowed: Int32s | None = None
        if params.allowed_token_ids is not None:
            self._allowed = mask_of(params.allowed_token_ids, num_words)
        ends = set(new.eos_token_ids)
        self._held_always = ~mask_of(ends if params.ignore_eos else (), num_words)
        self._held_at_first = ~mask_of(ends | set(new.stop_token_ids), num_words)

    def fill(self, answer: Sequence[int], drafts: Sequence[int], masks: Int32s) -> None:
        """Write what may follow the `answer` and each of the guesses behind it into `masks` [1 + num_drafts, words].

        `answer` holds all of its tokens so far. What follows a guess that is ruled out stays as it is: it cannot come
        to be sampled. Raises GrammarError if the grammar meets a limit, or the answer does not follow it.
        """
        self._catch_up(answer)
        tail = self._forbidden.tail if self._forbidden is not None else b""
        num_in_matcher = self._num_in_matcher
        for i, mask in enumerate(masks):
            self._fill_one(mask, len(answer) + i)
            if i == len(drafts) or not _has(mask, drafts[i]):
                break
            self._consume([drafts[i]])
        if self._matcher is not None and self._num_in_matcher > num_in_matcher:
            self._matcher.rollback(self._num_in_matcher - num_in_matcher)
            self._num_in_matcher = num_in_matcher
        if self._forbidden is not None:
            self._forbidden.tail = tail

    def forced(self, answer: Sequence[int]) -> list[int]:
        """The tokens that the grammar leaves no choice about behind the `answer`: guesses that are nearly always right.

        Like all guesses they are only what is computed ahead: others that spell the same text stay allowed. Raises
        GrammarError.
        """
        self._catch_up(answer)
        if self._matcher is None or self._matcher.is_stopped():
            return []
        return self._matcher.compute_ff_tokens()

    def _catch_up(self, answer: Sequence[int]) -> None:
        self._consume(answer[self._num_consumed :])
        self._num_consumed = len(answer)

    def _consume(self, token_ids: Sequence[int]) -> None:
        for token_id in token_ids if self._matcher is not None else ():
            assert self._matcher is not None
            if self._matcher.is_stopped() and not self._matcher.is_error():
                break  # complete: steps in flight still sample an end-of-text or two
            if not self._matcher.consume_token(token_id):
                raise GrammarError(f"it met a limit: {self._matcher.get_error()[:300]}")
            self._num_in_matcher += 1
        if self._forbidden is not None:
            self._forbidden.consume(token_ids)

    def _fill_one(self, mask: Int32s, num_output_tokens: int) -> None:
        if self._matcher is None:
            mask[:] = -1
        else:
            fill_mask(self._matcher, mask)
            kept = mask & self._held_always
            if num_output_tokens < self._min_tokens:
                kept &= self._held_at_first
            if kept.any():  # else nothing but its end is left
                mask[:] = kept
        if self._allowed is not None:
            mask &= self._allowed
        if self._forbidden is not None:
            self._forbidden.forbid(mask)


def _has(mask: Int32s, token_id: int) -> bool:
    return bool(mask[token_id // 32] >> np.int32(token_id % 32) & 1)
