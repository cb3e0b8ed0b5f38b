"""Text and conversations -> token ids, with the role that each token belongs to.

Reads tokenizer.json by the `tokenizers` library alone, which may be shared between threads, and
the chat template that lies beside it. Knows nothing of the model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from sae_core.errors import TokenizerError
from sae_core.language_model.chat import ChatTemplate, Message, read_chat_template, role_of_each
from sae_core.language_model.freed_memory import give_back_freed_memory
from sae_core.language_model.text_tokens import TextTokens, continued, split_rule

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_PENDING_TOKENS = 8
"""Tokens after which text that still ends in half a character is given out as it is: UTF-8 needs
at most four bytes, so what is not whole by then never will be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTokens:
    """A conversation as the model sees it."""

    ids: list[int]
    roles: list[str | None]
    """One per id: the role of the message whose content the token belongs to, None for BOS and
    everything else that the template put there."""
    special_positions: tuple[int, ...]
    """Where a message's own text holds a control token, such as an end-of-turn marker: the model
    obeys it, the role stays that of the message."""


class Tokenizer:
    """One tokenizer, for any number of threads."""

    def __init__(
        self, backend: tokenizers.Tokenizer, *, bos_id: int | None, template: ChatTemplate | None
    ) -> None:
        self._backend = backend
        self._template = template
        self.bos_id = bos_id
        """What the tokenizer puts in front of a text; None when it puts nothing there, even
        where the model has a token of that name (GPT-2, GPT-NeoX)."""
        pieces = backend.get_vocab(with_added_tokens=True)
        self._rule = split_rule(backend, pieces)
        self.vocab_size = max(pieces.values(), default=-1) + 1
        added = backend.get_added_tokens_decoder()
        self.special_ids: frozenset[int] = frozenset(i for i, t in added.items() if t.special)
        """Control tokens, BOS and padding among them."""
        self.fingerprint = _fingerprint(pieces, self.vocab_size)
        """sha256, hex, of what gives ids their meaning: the JSON list of pieces in order of id
        (null where an id has none), without white space, as UTF-8. How a file is laid out or which
        library wrote it makes no difference."""

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Token ids of `text`, after BOS where the tokenizer has one; control tokens are matched.

        Raises:
            TokenizerError: The text holds half of a surrogate pair, which is no character.
        """
        bos = [self.bos_id] if add_bos and self.bos_id is not None else []
        return bos + list(self._encode(text).ids)

    def continued(self, before: TextTokens, text: str) -> TextTokens:
        """The tokens of `text`, without BOS; those of the text it begins with are `before`.

        The ids are those of `encode`, at a cost that does not grow with what came before where the
        tokenizer allows it. Begin with `text_tokens.NOTHING`.

        Raises:
            TokenizerError: As `encode`.
        """
        _check_text(text[before.anchor :])
        return continued(before, text, self._backend, self._rule)

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """What each token adds to the decoded text; joined, they are the decoded text.

        A character that is spread over several tokens is given to the one that completes it.
        Control tokens appear by their name.
        """
        ids = list(token_ids)
        for position, token_id in enumerate(ids):
            if not 0 <= token_id < self.vocab_size:
                raise TokenizerError(
                    f"token id at position {position}: found {token_id}, "
                    f"expected 0 to {self.vocab_size - 1}"
                )
        texts: list[str] = []
        # Decoding is context dependent (a leading space may be dropped), so each token is read as
        # the growth of a short window that starts where the text was last known to be whole.
        start, whole = 0, 0
        for end in range(1, len(ids) + 1):
            before = self._decode(ids[start:whole])
            after = self._decode(ids[start:end])
            is_pending = after.endswith(_REPLACEMENT) and end - whole < _PENDING_TOKENS
            if is_pending and end < len(ids):
                texts.append("")
                continue
            texts.append(after[len(before) :])
            start, whole = whole, end
        return texts

    def render_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False
    ) -> ChatTokens:
        """A conversation under the model's chat template, each token with its role.

        A model without a template gets `role: content` and a newline for each message, after BOS.
        Which characters are content is read off the template, never searched for in the text, so
        content that looks like template text keeps its role.

        Args:
            messages: Pairs of role and content.
            add_generation_prompt: End with what comes before the assistant's next turn.

        Raises:
            TokenizerError: No messages, the template refuses them, or it hides a content.
        """
        if not messages:
            raise TokenizerError("messages: found none, expected at least one")
        if self._template is None:
            text, spans = _render_plain(messages, add_generation_prompt)
        else:
            text, spans = self._template.render(messages, add_generation_prompt)
        encoding = self._encode(text)
        ids: list[int] = list(encoding.ids)
        roles = role_of_each(encoding.offsets, spans)
        if self._template is None and self.bos_id is not None:
            ids, roles = [self.bos_id, *ids], [None, *roles]
        special = (i for i, t in enumerate(ids) if roles[i] is not None and t in self.special_ids)
        return ChatTokens(ids=ids, roles=roles, special_positions=tuple(special))

    def _encode(self, text: str) -> tokenizers.Encoding:
        _check_text(text)
        return self._backend.encode(text, add_special_tokens=False)

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._backend.decode(token_ids, skip_special_tokens=False))


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a model folder: tokenizer.json, and what lies beside it where it does.

    Raises:
        TokenizerError: A file is missing or cannot be read.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise TokenizerError(f"{path}: not found")
    config = _read_config(folder / "tokenizer_config.json")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise TokenizerError(f"{path}: not a tokenizer ({' '.join(str(error).split())})") from error
    backend.no_truncation()
    backend.no_padding()
    names = {
        name: token if isinstance(token, str) else (token or {}).get("content")
        for name, token in ((n, config.get(n)) for n in ("bos_token", "eos_token", "pad_token"))
    }
    template = read_chat_template(folder, config, {n: t for n, t in names.items() if t})
    bos_id = _bos_id(backend, config, names["bos_token"])
    tokenizer = Tokenizer(backend, bos_id=bos_id, template=template)
    give_back_freed_memory()
    return tokenizer


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"text: found half of a surrogate pair at character {error.start}, "
            "expected text that UTF-8 can carry"
        ) from error


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path}: cannot be read ({error})") from error
    if not isinstance(config, dict):
        raise TokenizerError(f"{path}: found {type(config).__name__}, expected an object")
    return config


def _bos_id(
    backend: tokenizers.Tokenizer, config: dict[str, Any], bos_token: str | None
) -> int | None:
    """The token that the tokenizer's own rules put first, by its post-processor or its config."""
    if config.get("add_bos_token") is False:
        return None
    bare: list[int] = backend.encode("a", add_special_tokens=False).ids
    full: list[int] = backend.encode("a", add_special_tokens=True).ids
    if len(full) > len(bare) and full[: len(bare)] != bare:
        return full[0]
    if config.get("add_bos_token") and bos_token is not None:
        found: int | None = backend.token_to_id(bos_token)
        return found
    return None


def _fingerprint(pieces: dict[str, int], vocab_size: int) -> str:
    by_id: list[str | None] = [None] * vocab_size
    for piece, token_id in pieces.items():
        by_id[token_id] = max(piece, by_id[token_id] or "")
    text = json.dumps(by_id, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _render_plain(
    messages: Sequence[Message], add_generation_prompt: bool
) -> tuple[str, list[tuple[int, int, str]]]:
    text, spans = "", []
    for role, content in messages:
        text += f"{role}: "
        spans.append((len(text), len(text) + len(content), role))
        text += f"{content}\n"
    return text + ("assistant:" if add_generation_prompt else ""), spans
