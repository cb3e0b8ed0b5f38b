"""What a caller sends, as tokens with the stage that each one counts in.

BOS, template and system tokens are read by the model and left out of scores: their stage is None.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from monitor.errors import FingerprintError, InvalidRequestError, PayloadTooLargeError
from monitor.records import ActivationsOpen, Message, ScoreRequest, Stage
from sae_core.errors import TokenizerError
from sae_core.language_model.tokenizer import Tokenizer

_STAGE_OF_ROLE = {
    "user": Stage.PROMPT,
    "tool": Stage.PROMPT,
    "assistant": Stage.COMPLETION,
    "system": None,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenInput:
    """Tokens ready for the engine."""

    token_ids: list[int]
    """Empty where activations were given without ids."""
    stages: list[Stage | None]
    """One per token; None is read and not scored."""


class InputReader:
    """Turns requests into tokens, or says what is wrong with them.

    Args:
        vocab_size: rows of the model's embedding; ids must be below.
        max_request_tokens: the most tokens of one request or stream.
    """

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, max_request_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_request_tokens = max_request_tokens

    def read(self, request: ScoreRequest, stages: Sequence[Stage | None] = ()) -> TokenInput:
        """The request's tokens.

        Args:
            stages: one for each of `token_ids`, in place of the request's stage.

        Raises:
            InvalidRequestError: none or several inputs, empty input, ids out of the vocabulary,
                an unknown role, stages that are not one a token id.
            FingerprintError: token ids of another tokenizer.
            PayloadTooLargeError: more tokens than the limit.
        """
        given = [
            name for name in ("text", "messages", "token_ids") if getattr(request, name) is not None
        ]
        if len(given) != 1:
            raise InvalidRequestError(
                "input",
                " and ".join(given) or "nothing",
                "exactly one of text, messages, token_ids",
            )
        if request.text is not None:
            tokens = self.text(request.text, request.stage)
        elif request.messages is not None:
            tokens = self.messages(request.messages)
        else:
            self.check_fingerprint(request.tokenizer_fingerprint)
            tokens = self.ids(request.token_ids or (), request.stage)
            if stages:
                if len(stages) != len(tokens.token_ids):
                    expected = f"{len(tokens.token_ids)}, one a token id"
                    raise InvalidRequestError("stages", f"{len(stages)} entries", expected)
                tokens = replace(tokens, stages=list(stages))
        self.check_length(len(tokens.token_ids))
        return tokens

    def text(self, text: str, stage: Stage, *, add_bos: bool = True) -> TokenInput:
        """BOS (where asked for and the model has one) and the text's tokens."""
        if not text:
            raise InvalidRequestError("text", "an empty string", "at least one character")
        token_ids = self.tokenizer.encode(text, add_bos=add_bos)
        has_bos = (
            add_bos
            and self.tokenizer.bos_id is not None
            and token_ids[:1] == [self.tokenizer.bos_id]
        )
        return TokenInput(
            token_ids=token_ids,
            stages=[None if has_bos and i == 0 else stage for i in range(len(token_ids))],
        )

    def messages(self, messages: Sequence[Message], *, open_completion: bool = False) -> TokenInput:
        """A conversation under the model's chat template.

        Args:
            open_completion: end with what the template puts before the assistant's next turn.
        """
        if not messages:
            raise InvalidRequestError("messages", "an empty list", "at least one message")
        for index, message in enumerate(messages):
            if message.role not in _STAGE_OF_ROLE:
                raise InvalidRequestError(
                    f"messages[{index}].role",
                    repr(message.role[:40]),
                    "one of " + ", ".join(sorted(_STAGE_OF_ROLE)),
                )
            if not message.content.strip():
                raise InvalidRequestError(
                    f"messages[{index}].content", "no text", "at least one visible character"
                )
        try:
            chat = self.tokenizer.render_chat(
                [(m.role, m.content) for m in messages], add_generation_prompt=open_completion
            )
        except TokenizerError as error:
            raise InvalidRequestError(
                "messages", str(error), "turns the chat template takes"
            ) from error
        return TokenInput(
            token_ids=chat.ids,
            stages=[None if role is None else _STAGE_OF_ROLE[role] for role in chat.roles],
        )

    def ids(self, token_ids: Sequence[int], stage: Stage) -> TokenInput:
        """Vocabulary ids as they are; control tokens among them are not scored."""
        if not len(token_ids):
            raise InvalidRequestError("token_ids", "an empty list", "at least one id")
        array = np.asarray(token_ids, dtype=np.int64)
        wrong = np.flatnonzero((array < 0) | (array >= self.vocab_size))
        if len(wrong):
            index = int(wrong[0])
            raise InvalidRequestError(
                f"token_ids[{index}]", str(array[index]), f"0 <= id < {self.vocab_size}"
            )
        control = self.tokenizer.special_ids
        return TokenInput(
            token_ids=array.tolist(),
            stages=[None if i in control else stage for i in array.tolist()],
        )

    def activations(self, opened: ActivationsOpen) -> TokenInput:
        """The tokens of given activations; without ids, their stages alone.

        Raises:
            InvalidRequestError: no rows, or ids or stages that are not one a row.
            FingerprintError, PayloadTooLargeError: as `read`.
        """
        if opened.n_tokens < 1:
            raise InvalidRequestError("n_tokens", str(opened.n_tokens), "at least 1")
        self.check_length(opened.n_tokens)
        for name, rows in (("token_ids", opened.token_ids), ("stages", opened.stages or None)):
            if rows is not None and len(rows) != opened.n_tokens:
                raise InvalidRequestError(
                    name, f"{len(rows)} entries", f"{opened.n_tokens} (n_tokens), or none"
                )
        tokens = TokenInput(token_ids=[], stages=[opened.stage] * opened.n_tokens)
        if opened.token_ids is not None:
            self.check_fingerprint(opened.tokenizer_fingerprint)
            tokens = self.ids(opened.token_ids, opened.stage)
        return replace(tokens, stages=list(opened.stages)) if opened.stages else tokens

    def check_fingerprint(self, fingerprint: str | None) -> None:
        """Raises FingerprintError where ids come from another tokenizer, or nobody says which."""
        if fingerprint != self.tokenizer.fingerprint:
            raise FingerprintError(
                f"tokenizer_fingerprint: found {fingerprint or 'none'}, expected "
                f"{self.tokenizer.fingerprint} (GetServerInfo tells it)"
            )

    def check_length(self, n_tokens: int) -> None:
        """Raises PayloadTooLargeError above the limit of one request or stream."""
        if n_tokens > self.max_request_tokens:
            raise PayloadTooLargeError(
                f"tokens: found {n_tokens}, expected at most {self.max_request_tokens}"
            )


def input_digest(token_ids: Sequence[int]) -> str:
    """sha256 over the ids as little-endian uint32; what the audit log keeps of an input."""
    return hashlib.sha256(np.asarray(token_ids, dtype="<u4").tobytes()).hexdigest()
