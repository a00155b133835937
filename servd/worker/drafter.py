"""Which tokens a step guesses ahead of which requests, and how many are worth their cost.

Owns the look-ups of the batch's rows. Tokens never depend on what is decided here: every guess is checked.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from servd.worker.prompt_lookup import PromptLookup

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]


class Drafter:
    """Guesses for the rows of an InputBatch."""

    def __init__(self) -> None:
        self._lookups: dict[int, PromptLookup] = {}  # by row

    def forget(self, row: int) -> None:
        """The row's request is gone."""
        self._lookups.pop(row, None)

    def draft(self, rows: Int64s, most: Int64s, tokens: Int32s, num_tokens: Int64s) -> Int64s:
        """Write guesses into `tokens` [all rows, max_model_len + 1], behind the first `num_tokens` of each row.

        `rows`, `most` and `num_tokens` are [num_reqs]; returns [num_reqs], how many were written, at most `most`.
        """
        counts = np.zeros(len(rows), np.int64)
        for i, (row, room, end) in enumerate(zip(rows.tolist(), most.tolist(), num_tokens.tolist(), strict=True)):
            if room <= 0:
                continue
            lookup = self._lookups.setdefault(row, PromptLookup())
            lookup.extend(tokens[row, len(lookup.tokens) : end].tolist())
            guessed = lookup.guess(room)
            tokens[row, end : end + len(guessed)] = guessed
            counts[i] = len(guessed)
        return counts
