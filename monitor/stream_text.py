"""The text of one stream as it grows, and its tokens."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from monitor.inputs import InputReader, TokenInput
from monitor.records import Stage
from sae_core.language_model.text_tokens import NOTHING, TextTokens


class TextReading(NamedTuple):
    """The stream's tokens, context included, after a piece of text."""

    tokens: TokenInput
    n_kept: int
    """Leading tokens that are those of the reading before."""


class StreamText:
    """Text in pieces; its tokens, behind those of the context, when they are asked for.

    Args:
        context: tokens before the text; where there are none it begins with BOS.
    """

    def __init__(self, reader: InputReader, stage: Stage, context: TokenInput) -> None:
        self._tokenizer = reader.tokenizer
        self._stage = stage
        self._context = context
        bos_id = reader.tokenizer.bos_id
        if not context.token_ids and bos_id is not None:
            self._context = TokenInput(token_ids=[bos_id], stages=[None])
        self._text = ""
        self._n_read = 0
        self._tokens = NOTHING

    def append(self, piece: str) -> None:
        """Takes the next piece."""
        self._text += piece

    @property
    def is_unread(self) -> bool:
        """Whether there is text whose tokens are not known yet."""
        return self._n_read < len(self._text)

    async def read(self) -> TextReading:
        """Reads all that is there, off the event loop; cancelled, it has read nothing."""
        text = self._text
        tokens = await asyncio.to_thread(self._tokenizer.continued, self._tokens, text)
        return self._taken(tokens, len(text))

    def read_at_once(self) -> TextReading:
        """The same on the calling thread."""
        return self._taken(self._tokenizer.continued(self._tokens, self._text), len(self._text))

    def _taken(self, tokens: TextTokens, n_read: int) -> TextReading:
        self._tokens, self._n_read = tokens, n_read
        context = self._context
        return TextReading(
            TokenInput(
                token_ids=context.token_ids + tokens.ids,
                stages=context.stages + [self._stage] * len(tokens.ids),
            ),
            n_kept=len(context.token_ids) + tokens.n_kept,
        )
