"""What one more row costs a step, measured while running, and how sure a guess must be to be worth it.

Knows nothing of where guesses come from.
"""

from __future__ import annotations

FADING = 0.98  # weight of a step after the next one: the last 50 or so count
# Before anything is known, a step costs as much as so many rows and each row one more; in rows squared, this counts
# as much as what was seen in a few steps of different sizes.
PRIOR_FIXED_ROWS = 20.0
PRIOR_WEIGHT = 10.0


class StepCost:
    """Seconds of a step as `fixed + slope * rows`: least squares over the last steps, older ones fading.

    The goodput of Liu et al. 2024, "Optimizing Speculative Decoding for Serving LLMs Using Goodput", for guesses one by
    one: a right guess spares its request one row of a later step and 1/num_reqs of what such a step costs besides.
    """

    def __init__(self) -> None:
        self._weight = self._rows = self._seconds = self._rows_rows = self._rows_seconds = 0.0

    def observe(self, num_rows: int, seconds: float) -> None:
        """Count a step whose rows all sampled: a prompt's rows are cheaper, and come in other numbers."""
        if self._weight:  # a step that something else held up must not stop all guessing for long
            fixed, slope = self._fit()
            seconds = min(seconds, 2 * (fixed + slope * num_rows))
        self._weight = FADING * self._weight + 1
        self._rows = FADING * self._rows + num_rows
        self._seconds = FADING * self._seconds + seconds
        self._rows_rows = FADING * self._rows_rows + num_rows * num_rows
        self._rows_seconds = FADING * self._rows_seconds + num_rows * seconds

    def break_even(self, num_reqs: int) -> float:
        """The probability of being right at which one more guess costs a step of `num_reqs` what it brings."""
        if not self._weight:
            return num_reqs / (num_reqs + PRIOR_FIXED_ROWS)
        fixed, slope = self._fit()
        return slope * num_reqs / (fixed + slope * num_reqs)

    def _fit(self) -> tuple[float, float]:
        """Seconds a step costs whatever its rows, and seconds a row."""
        mean_rows, mean_seconds = self._rows / self._weight, self._seconds / self._weight
        prior = mean_seconds / (mean_rows + PRIOR_FIXED_ROWS)
        variance = self._rows_rows - self._rows * mean_rows
        covariance = self._rows_seconds - self._rows * mean_seconds
        slope = (covariance + PRIOR_WEIGHT * prior) / (variance + PRIOR_WEIGHT)
        slope = min(max(slope, prior / 10), mean_seconds / mean_rows)
        return mean_seconds - slope * mean_rows, slope
