"""Which tokens a step guesses ahead of which requests: those that are likely enough to pay for their rows.

Owns the look-ups of the batch's rows. Tokens never depend on what is decided here: every guess is checked.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from servd.worker.draft_budget import StepCost
from servd.worker.prompt_lookup import PromptLookup

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]

FIRST_ODDS = 0.4  # that a guess after two equal tokens is right: between greedy text and text sampled at 1
SHARE_OF_ONE = 0.1  # of what one request taught, in what a new one begins with


class Drafter:
    """Guesses for the rows of an InputBatch."""

    def __init__(self) -> None:
        self.cost = StepCost()
        self._lookups: dict[int, PromptLookup] = {}  # by row
        self._odds = FIRST_ODDS

    def forget(self, row: int) -> None:
        """The row's request is gone."""
        lookup = self._lookups.pop(row, None)
        if lookup is not None:
            self._odds *= (lookup.odds / self._odds) ** SHARE_OF_ONE

    def draft(self, rows: Int64s, most: Int64s, tokens: Int32s, num_tokens: Int64s) -> Int64s:
        """Write guesses into `tokens` [all rows, max_model_len + 1], behind the first `num_tokens` of each row.

        `rows`, `most` and `num_tokens` are [num_reqs], of all requests that sample; returns [num_reqs], how many
        guesses were written, at most `most`.
        """
        counts = np.zeros(len(rows), np.int64)
        least = self.cost.break_even(len(rows))
        for i, (row, room, end) in enumerate(zip(rows.tolist(), most.tolist(), num_tokens.tolist(), strict=True)):
            if room <= 0:
                continue
            lookup = self._lookups.get(row)
            if lookup is None:
                lookup = self._lookups[row] = PromptLookup(self._odds)
            lookup.extend(tokens[row, len(lookup.tokens) : end].tolist())
            guessed = lookup.guess(room, least)
            if guessed:
                tokens[row, end : end + len(guessed)] = guessed
                counts[i] = len(guessed)
        return counts
