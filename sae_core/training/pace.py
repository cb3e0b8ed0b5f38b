"""How fast a training run is, and how long it will take.

Two costs, because a buffer of activations is read long before the run has trained on them: by
tokens trained on alone, the first estimate would be thirty times too long.
"""

from __future__ import annotations


class Pace:
    """Seconds a token takes to be read and to be trained on, so far."""

    def __init__(self) -> None:
        self._n_read = self._n_trained = 0
        self._reading = self._training = 0.0

    def read(self, n_tokens: int, seconds: float) -> None:
        """So many activations were computed."""
        self._n_read += n_tokens
        self._reading += seconds

    def trained(self, n_tokens: int, seconds: float) -> None:
        """So many tokens were trained on."""
        self._n_trained += n_tokens
        self._training += seconds

    @property
    def tokens_per_second(self) -> float:
        """Of tokens that are read and trained on; 0 before the first."""
        if not self._n_trained:
            return 0.0
        each = self._training / self._n_trained
        if self._n_read:
            each += self._reading / self._n_read
        return 1.0 / each if each else 0.0

    def seconds_left(self, n_to_read: int, n_to_train: int) -> float | None:
        """For the rest; None while nothing is known of a part of it."""
        if not self._n_trained or (n_to_read and not self._n_read):
            return None
        left = n_to_train * self._training / self._n_trained
        return left + n_to_read * self._reading / self._n_read if n_to_read else left
