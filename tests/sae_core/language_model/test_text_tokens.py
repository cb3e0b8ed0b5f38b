"""Texts that grow: always the tokens of the whole text, read from near their end."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from sae_core.errors import TokenizerError
from sae_core.language_model import tokenizer as ours
from sae_core.language_model.text_tokens import (
    _WORD_EXPRESSIONS,
    NOTHING,
    MergeSplits,
    WordSplits,
    continued,
    split_rule,
)
from sae_core.testing.models import tiny_tokenizer

PROSE = (
    "The monitor reads what the model reads; it's not theirs.  Don't panic, we'll see:\n\n"
    "\tTausend Zürcher Straßen e\u0301te\u0301, привет мир 你好世界。测试 12345 66 <b>table</b>\n"
    "aaaa aa aaa    a  <<<<>>>> ==== \U0001f600\U0001f600 \U0001f469\u200d\U0001f680 ▁▁ ▁x "
    "\u00a0\u00a0y"
)
ADDED = ["\n\n", "<b>", "▁▁", "See you", AddedToken("<end>", special=True)]


def trained(tokenizer: Tokenizer) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<unk>", "<0x>"],
        initial_alphabet=["a", "b", "e", "t", "▁", " ", "<", ">", "\n"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([PROSE.replace("😀", "")] * 3, trainer)
    return tokenizer


def merged_over_the_text(*, prepends: bool = False, has_bytes: bool = True) -> Tokenizer:
    """As SentencePiece models are converted: no words, spaces as ▁, other characters as bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer = trained(tokenizer)
    content = json.loads(tokenizer.to_str())
    if has_bytes:
        vocab = content["model"]["vocab"]
        vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
        content["model"]["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    if prepends:
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.add_tokens(ADDED)
    return tokenizer


def merged_in_words(expression: str, *, composes: bool = False) -> Tokenizer:
    """Byte-level, its words cut out by an expression."""
    tokenizer = Tokenizer(models.BPE())
    if composes:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(expression), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer = trained(tokenizer)
    tokenizer.add_tokens(ADDED)
    return tokenizer


def byte_level() -> Tokenizer:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(ADDED)
    return tokenizer


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "merges": merged_over_the_text,
    "merges, prepended": lambda: merged_over_the_text(prepends=True),
    "merges, one unknown": lambda: merged_over_the_text(has_bytes=False),
    "GPT-2's words": byte_level,
    "Llama 3's words": lambda: merged_in_words(_WORD_EXPRESSIONS[0]),
    "Qwen 2's words": lambda: merged_in_words(_WORD_EXPRESSIONS[1], composes=True),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def backend(request: pytest.FixtureRequest) -> Tokenizer:
    made: Tokenizer = TOKENIZERS[request.param]()
    return made


def whole(backend: Tokenizer, text: str) -> list[int]:
    return list(backend.encode(text, add_special_tokens=False).ids)


pieces_of_text = st.lists(
    st.one_of(
        st.sampled_from(PROSE),
        st.sampled_from([" ", "  ", "\n", "▁", "<", "b", ">", "a", "t", "the", " the", "<end>"]),
        st.sampled_from(["See", " you", "'", "s", "\u0301", "\u00a0", "é", "12", "\r\n", "\x1c"]),
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6),
        st.integers(0, len(PROSE) - 9).map(lambda i: PROSE[i : i + 8]),
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=100, deadline=None)
@given(pieces=pieces_of_text)
@example(pieces=["See", " ", "you", " See", " yo", "u", "\n", "\n", "\n"])
@example(pieces=[" ", " ", "a", " ", "<", "b", ">", " ", "e", "\u0301", " ", "x"])
def test_a_growing_text_has_the_tokens_of_the_whole(backend: Tokenizer, pieces: list[str]) -> None:
    rule = split_rule(backend, backend.get_vocab())
    assert rule is not None
    tokens, text = NOTHING, ""
    for piece in pieces:
        text += piece
        before, tokens = tokens, continued(tokens, text, backend, rule)
        assert tokens.ids == whole(backend, text)
        assert tokens.ids[: tokens.n_kept] == before.ids[: tokens.n_kept]


def test_a_long_text_is_read_from_near_its_end(backend: Tokenizer) -> None:
    rule = split_rule(backend, backend.get_vocab())
    tokens, text = NOTHING, ""
    for word in (PROSE + " ") * 20:
        text += word
        tokens = continued(tokens, text, backend, rule)
    assert tokens.ids == whole(backend, text)
    assert len(text) - tokens.anchor < 3 * len(PROSE)  # trained on it, pieces are long
    assert tokens.n_kept > 0.8 * len(tokens.ids)


def test_a_text_is_split_where_no_piece_reaches_across() -> None:
    pieces = ["<unk>", "t", "h", "e", "▁", "th", "the", "▁the"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    backend = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>")
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    rule = split_rule(backend, backend.get_vocab())
    assert isinstance(rule, MergeSplits)
    assert rule.splits("the the").tolist() == [3]
    assert rule.splits("the? the").tolist() == []  # "?" has no piece of its own
    words = split_rule(byte_level(), byte_level().get_vocab())
    assert isinstance(words, WordSplits)
    assert words.splits("the  See you the\n x").tolist() == [12]  # "e " is within "See you"


def with_normalizer(normalizer: Any) -> Tokenizer:
    tokenizer = merged_over_the_text()
    tokenizer.normalizer = normalizer
    return tokenizer


def with_pre_tokenizer(pre_tokenizer: Any) -> Tokenizer:
    tokenizer = merged_over_the_text()
    tokenizer.pre_tokenizer = pre_tokenizer
    return tokenizer


def with_added(token: AddedToken) -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.add_tokens([token])
    return tokenizer


UNPROVEN: dict[str, Callable[[], Tokenizer]] = {
    "another model": lambda: Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)),
    "random merges": lambda: Tokenizer(models.BPE(dropout=0.1)),
    "word ends": lambda: Tokenizer(models.BPE(end_of_word_suffix="</w>")),
    "takes spaces along": lambda: with_added(AddedToken("<x>", rstrip=True)),
    "whole words only": lambda: with_added(AddedToken("<x>", single_word=True)),
    "strips": lambda: with_normalizer(normalizers.Strip()),
    "replaces by an expression": lambda: with_normalizer(normalizers.Replace(Regex(" +"), "▁")),
    "cuts by an unknown expression": lambda: with_pre_tokenizer(
        pre_tokenizers.Split(Regex("a b"), "isolated")
    ),
    "unknown words of bytes": lambda: merged_in_words(r"\S+ \S+|\s+"),
}


@pytest.mark.parametrize("name", UNPROVEN)
def test_without_a_proof_the_whole_text_is_read(name: str) -> None:
    backend = UNPROVEN[name]()
    assert split_rule(backend, backend.get_vocab()) is None
    tokens = continued(NOTHING, "a b ", backend, None)
    tokens = continued(tokens, "a b a b", backend, None)
    assert (tokens.anchor, tokens.n_kept) == (0, 0)


def test_half_a_surrogate_pair_is_refused() -> None:
    tokenizer = ours.Tokenizer(tiny_tokenizer(), bos_id=None, template=None)
    tokens = tokenizer.continued(NOTHING, "the the")
    assert tokens.ids == tokenizer.encode("the the")
    with pytest.raises(TokenizerError, match="half of a surrogate pair"):
        tokenizer.continued(tokens, "the the \ud83d")
