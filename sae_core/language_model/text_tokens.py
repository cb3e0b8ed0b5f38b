"""Token ids of a text that grows, without reading all of it again at every piece.

What a new piece can change lies behind the last place where no token can reach across, whatever
comes. Such places are proven, not guessed, for two kinds of BPE: one that merges over the whole
text, as SentencePiece models do, and a byte-level one whose words a known expression cuts out.
Where nothing is proven the whole text is read each time. The ids are those of the whole text
always.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import tokenizers
from jaxtyping import Bool, Int64, Shaped, UInt32, UInt64

_UNICODE_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
_CODE_POINT_BITS = np.uint64(21)
_WORD_EXPRESSIONS = (
    # Llama 3, as its tokenizer.json has it
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    # Qwen 2 and 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
"""Expressions none of whose matches goes on from a visible character to a space, and which look at
nothing before a match; GPT-2's, built into `ByteLevel`, is another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTokens:
    """The tokens of a text so far; made by `continued`."""

    ids: list[int]
    """Without BOS; never changed."""
    n_kept: int
    """Leading ids that are those of the text before the last piece."""
    anchor: int
    """The character from which the text is read again: a split, or the start."""
    settled: int
    """The next split, from which on tokens are taken: at the anchor some tokenizers put a space
    that is not in the text."""
    n_settled: int
    """Tokens before `settled`."""


NOTHING = TextTokens(ids=[], n_kept=0, anchor=0, settled=0, n_settled=0)
"""The tokens of no text."""


def continued(
    before: TextTokens, text: str, backend: tokenizers.Tokenizer, rule: SplitRule | None
) -> TextTokens:
    """The tokens of `text`, which begins with the text that `before` is of.

    Args:
        rule: as `split_rule` gives it for the backend; None reads the whole text.
    """
    window = text[before.anchor :]
    encoding = backend.encode(window, add_special_tokens=False)
    ids: list[int] = encoding.ids
    if rule is None:
        return replace(NOTHING, ids=ids)
    starts = np.array([start for start, _ in encoding.offsets], np.int64) + before.anchor
    # All of the first window counts, what was put before its first character too.
    first = int(np.searchsorted(starts, before.settled)) if before.settled else 0
    whole = before.ids[: before.n_settled] + ids[first:]
    anchor, settled, n_settled = before.anchor, before.settled, before.n_settled
    splits = rule.splits(window) + before.anchor
    splits = splits[splits > settled]
    if len(splits):
        anchor = int(splits[-2]) if len(splits) > 1 else settled
        settled = int(splits[-1])
        n_settled += int(np.searchsorted(starts[first:], settled))
    return TextTokens(
        ids=whole,
        n_kept=before.n_settled,
        anchor=anchor,
        settled=settled,
        n_settled=n_settled,
    )


def split_rule(backend: tokenizers.Tokenizer, pieces: Collection[str]) -> SplitRule | None:
    """The rule of a tokenizer, by its parts; None where nothing can be proven of them.

    Args:
        pieces: its whole vocabulary, added tokens among them.
    """
    model = backend.model
    if not isinstance(model, tokenizers.models.BPE) or model.dropout:
        return None
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        return None
    added = backend.get_added_tokens_decoder().values()
    if any(token.lstrip or token.rstrip or token.single_word for token in added):
        return None  # they look at what stands around them
    normalizers = _parts(backend.normalizer, "normalizers")
    is_ascii = any(part["type"] in _UNICODE_FORMS for part in normalizers)
    replaced = _replaced(normalizers)
    if replaced is None:
        return None
    names = [token.content for token in added]
    names += [name.translate(replaced) for name in names]
    pre_tokenizers = _parts(backend.pre_tokenizer, "pretokenizers")
    if _cuts_known_words(pre_tokenizers):
        return None if replaced else WordSplits(_pairs(names), is_ascii)
    if not all(map(_cuts_at_one_character, pre_tokenizers)) or model.ignore_merges:
        return None
    known = np.unique(_code_points([piece for piece in pieces if len(piece) == 1]))
    return MergeSplits(_pairs([*pieces, *names]), known, replaced, is_ascii)


class WordSplits:
    """Before a space after a visible character, where words are cut before they are merged."""

    def __init__(self, joined: UInt64[np.ndarray, " n"], is_ascii: bool) -> None:
        self._joined = joined
        self._is_ascii = is_ascii

    def splits(self, text: str) -> Int64[np.ndarray, " n"]:
        """Ascending indices of characters before which tokens end, whatever follows the text."""
        points = _code_points([text])
        visible = np.array([not character.isspace() for character in text[:-1]], np.bool_)
        free = visible & (points[1:] == ord(" ")) & ~_among(_paired(points), self._joined)
        if self._is_ascii:
            free &= points[:-1] < 128
        return np.flatnonzero(free) + 1


class MergeSplits:
    """Between two characters that stand side by side in no piece: no merge can join them.

    Both have to be pieces of their own, as others become bytes, or one unknown token together.
    """

    def __init__(
        self,
        joined: UInt64[np.ndarray, " n"],
        known: UInt32[np.ndarray, " m"],
        replaced: dict[int, str],
        is_ascii: bool,
    ) -> None:
        self._joined = joined
        self._known = known
        self._replaced = replaced
        self._is_ascii = is_ascii

    def splits(self, text: str) -> Int64[np.ndarray, " n"]:
        """As `WordSplits.splits`."""
        raw, points = _code_points([text]), _code_points([text.translate(self._replaced)])
        known = _among(points, self._known)
        free = known[:-1] & known[1:]
        for some in (raw, points):
            free &= ~_among(_paired(some), self._joined)
        if self._is_ascii:
            free &= (raw[:-1] < 128) & (raw[1:] < 128)
        return np.flatnonzero(free) + 1


SplitRule: TypeAlias = WordSplits | MergeSplits
"""Where a text can be cut so that its parts' tokens are its tokens."""


def _parts(part: Any, name: str) -> list[dict[str, Any]]:
    """What a normalizer or pre-tokenizer consists of, sequences opened."""

    def opened(settings: dict[str, Any]) -> Iterable[dict[str, Any]]:
        if settings["type"] != "Sequence":
            return [settings]
        return [inner for one in settings[name] for inner in opened(one)]

    return [] if part is None else list(opened(json.loads(part.__getstate__())))


def _replaced(normalizers: Sequence[dict[str, Any]]) -> dict[int, str] | None:
    """What each replaced character becomes; None where a normalizer does more than that.

    What is put before a text, and Unicode forms of ASCII, change nothing at a split.
    """
    replaced: dict[int, str] = {}
    for part in normalizers:
        if part["type"] == "Replace":
            old, new = part["pattern"].get("String", ""), part["content"]
            if len(old) != 1 or len(new) != 1 or replaced:
                return None
            replaced[ord(old)] = new
        elif part["type"] not in ("Prepend", *_UNICODE_FORMS):
            return None
    return replaced


def _cuts_known_words(pre_tokenizers: Sequence[dict[str, Any]]) -> bool:
    if not pre_tokenizers or pre_tokenizers[-1]["type"] != "ByteLevel":
        return False
    *before, last = pre_tokenizers
    if last["use_regex"]:
        return not before
    return [_expression(part) in _WORD_EXPRESSIONS for part in before] == [True]


def _expression(part: dict[str, Any]) -> str | None:
    is_split = part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]
    return part["pattern"].get("Regex") if is_split else None


def _cuts_at_one_character(part: dict[str, Any]) -> bool:
    """A cut at a character more or less: it is seen from both sides of a split."""
    if part["type"] != "Split":
        return False
    is_kept = part["behavior"] in ("MergedWithPrevious", "MergedWithNext", "Isolated")
    return is_kept and not part["invert"] and len(part["pattern"].get("String", "")) == 1


def _code_points(texts: Sequence[str]) -> UInt32[np.ndarray, " n"]:
    """Of all texts, with 0 between them."""
    return np.frombuffer("\0".join(texts).encode("utf-32-le", "surrogatepass"), "<u4")


def _paired(points: UInt32[np.ndarray, " n"]) -> UInt64[np.ndarray, " m"]:
    """Each two neighbours as one number."""
    wide = points.astype(np.uint64)
    return (wide[:-1] << _CODE_POINT_BITS) | wide[1:]


def _pairs(texts: Sequence[str]) -> UInt64[np.ndarray, " m"]:
    """All neighbours within the texts, sorted, each once."""
    return np.unique(_paired(_code_points(texts)))


def _among(
    values: Shaped[np.ndarray, " n"], known: Shaped[np.ndarray, " m"]
) -> Bool[np.ndarray, " n"]:
    """Which values are in `known`, which is sorted."""
    if not len(known):
        return np.zeros(len(values), np.bool_)
    place = np.minimum(np.searchsorted(known, values), len(known) - 1)
    found: np.ndarray = known[place] == values
    return found
