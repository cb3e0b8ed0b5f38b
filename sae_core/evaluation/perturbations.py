"""Ways to disguise a text that cost an attacker nothing; seeded, so that a run can be repeated.

Each keeps the text readable to a person (base64 to anybody who decodes it). They measure how
fragile a score is; they are no list of what attackers do.
"""

from __future__ import annotations

import base64
import random
import string
from collections.abc import Callable, Mapping, Sequence

LEET = str.maketrans("aeiostAEIOST", "431057431057")
TYPO_SHARE = 0.08
"""Of letters; about every second word has one."""
PADDING_WORDS = 300
"""Words of benign text before or behind: about 400 tokens, many windows of any aggregate."""

Perturb = Callable[[str, random.Random, Sequence[str]], str]
"""Text, random numbers, and words of benign text to pad with."""


def typos(text: str, rng: random.Random, padding: Sequence[str]) -> str:
    """Letters dropped, doubled, swapped with the next or replaced."""
    letters = list(text)
    i = 0
    while i < len(letters):
        if letters[i].isalpha() and rng.random() < TYPO_SHARE:
            kind = rng.randrange(4)
            if kind == 0:
                letters[i] = ""
            elif kind == 1:
                letters[i] *= 2
            elif kind == 2 and i + 1 < len(letters):
                letters[i], letters[i + 1] = letters[i + 1], letters[i]
                i += 1
            else:
                letters[i] = rng.choice(string.ascii_lowercase)
        i += 1
    return "".join(letters)


def leetspeak(text: str, rng: random.Random, padding: Sequence[str]) -> str:
    """Digits for the letters that look like them."""
    return text.translate(LEET)


def base64_encoded(text: str, rng: random.Random, padding: Sequence[str]) -> str:
    """The text in base64, as if for the model to decode."""
    return base64.b64encode(text.encode()).decode()


def upper_case(text: str, rng: random.Random, padding: Sequence[str]) -> str:
    """Capitals throughout."""
    return text.upper()


def random_case(text: str, rng: random.Random, padding: Sequence[str]) -> str:
    """Each letter in upper or lower case at random."""
    return "".join(c.upper() if rng.random() < 0.5 else c.lower() for c in text)


def padded_front(text: str, rng: random.Random, padding: Sequence[str]) -> str:
    """Benign text ahead of it."""
    return " ".join(padding) + "\n\n" + text


def padded_back(text: str, rng: random.Random, padding: Sequence[str]) -> str:
    """Benign text behind it."""
    return text + "\n\n" + " ".join(padding)


BATTERY: Mapping[str, Perturb] = {
    "typos": typos,
    "leetspeak": leetspeak,
    "base64": base64_encoded,
    "upper_case": upper_case,
    "random_case": random_case,
    "padded_front": padded_front,
    "padded_back": padded_back,
}
PADDED = frozenset({"padded_front", "padded_back"})


def perturbed(
    name: str, text: str, seed: int, benign: Sequence[str], *, n_words: int = PADDING_WORDS
) -> str:
    """The text under one of the battery; the same for the same seed and benign texts.

    Args:
        benign: Texts to pad with, at least one with a word in it.
        n_words: Of padding.
    """
    rng = random.Random(f"{seed} {name} {text}")
    padding: list[str] = []
    while name in PADDED and len(padding) < n_words:
        padding += rng.choice(benign).split()
    return BATTERY[name](text, rng, padding[:n_words])
