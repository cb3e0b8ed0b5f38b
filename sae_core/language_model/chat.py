"""Chat templates: a conversation -> one text, and which of its characters are whose content.

Rendering is transformers' own. Contents are located by rendering again with placeholders in their
place, so that what the template wrote and what a message said are never confused. Knows characters,
not tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from sae_core.errors import TokenizerError

_render_jinja: Callable[..., Any] = render_jinja_template  # its annotations say less than it does

Message = tuple[str, str]
"""Role and content."""

Span = tuple[int, int, str]
"""Where a content begins and ends in the rendered text, and its role."""


class ChatTemplate:
    """A Jinja template, with the special tokens that it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._source = source
        self._special_tokens = dict(special_tokens)

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool
    ) -> tuple[str, list[Span]]:
        """The text, and the span of every message's content in it, in order.

        Raises:
            TokenizerError: The template refuses the messages or leaves a content out.
        """
        text = self._text(messages, add_generation_prompt)
        spans = self._spans_at_once(text, messages, add_generation_prompt)
        if spans is None:
            spans = self._spans_one_by_one(text, messages, add_generation_prompt)
        return text, spans

    def _text(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        conversation = [{"role": role, "content": content} for role, content in messages]
        try:
            rendered, _ = _render_jinja(
                conversations=[conversation],
                chat_template=self._source,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise TokenizerError(f"chat template: {' '.join(str(error).split())}") from error
        return str(rendered[0])

    def _spans_at_once(
        self, text: str, messages: Sequence[Message], add_generation_prompt: bool
    ) -> list[Span] | None:
        """All spans from one rendering of placeholders; None where that does not explain `text`.

        It does when the template writes the same around any content and changes nothing of it
        but white space at its ends.
        """
        marks = [_placeholder(i) for i in range(len(messages))]
        blank = [not content.strip() for _, content in messages]
        skeleton = self._text(
            [
                (role, content if is_blank else mark)
                for (role, content), mark, is_blank in zip(messages, marks, blank, strict=True)
            ],
            add_generation_prompt,
        )
        literals, contents = [], []
        for (role, content), mark, is_blank in zip(messages, marks, blank, strict=True):
            if is_blank:
                continue
            before, found, skeleton = skeleton.partition(mark)
            if not found or mark in skeleton:
                return None
            literals.append(before)
            contents.append((role, content))
        literals.append(skeleton)
        spans: list[Span] = []
        at = len(literals[0])
        if not text.startswith(literals[0]):
            return None
        for (role, content), following in zip(contents, literals[1:], strict=True):
            variants = (content, content.strip(), content.lstrip(), content.rstrip())
            length = next((len(v) for v in variants if text.startswith(v + following, at)), None)
            if length is None:
                return None
            spans.append((at, at + length, role))
            at += length + len(following)
        return spans if at == len(text) else None

    def _spans_one_by_one(
        self, text: str, messages: Sequence[Message], add_generation_prompt: bool
    ) -> list[Span]:
        """Each span from a rendering where only that content is a placeholder.

        For templates whose output depends on contents, as where earlier reasoning is dropped.
        """
        spans: list[Span] = []
        for index, (role, content) in enumerate(messages):
            if not content.strip():
                continue
            mark = _placeholder(index)
            changed = [*messages[:index], (role, mark), *messages[index + 1 :]]
            before, found, after = self._text(changed, add_generation_prompt).partition(mark)
            is_explained = text.startswith(before) and text.endswith(after)
            if not found or not is_explained or len(before) + len(after) > len(text):
                raise TokenizerError(
                    f"messages[{index}]: the chat template's text does not show where "
                    f"the content of this {role} message is"
                )
            spans.append((len(before), len(text) - len(after), role))
        return spans


def read_chat_template(
    folder: Path, config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> ChatTemplate | None:
    """The template in chat_template.jinja or in tokenizer_config.json; None when there is none."""
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return ChatTemplate(path.read_text(encoding="utf-8"), special_tokens)
        except (OSError, ValueError) as error:
            raise TokenizerError(f"{path}: cannot be read ({error})") from error
    source = config.get("chat_template")
    if isinstance(source, list):
        named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
        source = named.get("default")
    if source is not None and not isinstance(source, str):
        raise TokenizerError(
            f"{folder / 'tokenizer_config.json'}: chat_template is {type(source).__name__}, "
            "expected text"
        )
    return None if source is None else ChatTemplate(source, special_tokens)


def role_of_each(offsets: Sequence[tuple[int, int]], spans: Sequence[Span]) -> list[str | None]:
    """The role of each token, from its range of characters.

    A token belongs to the first content that it shares a character with. Tokenizers may trim
    spaces from a token's range, so what lies between two ranges is counted to the second.
    """
    roles: list[str | None] = []
    previous_stop, index = 0, 0
    for start, stop in offsets:
        start = min(start, previous_stop)
        while index < len(spans) and spans[index][1] <= start:
            index += 1
        is_inside = index < len(spans) and spans[index][0] < stop
        roles.append(spans[index][2] if is_inside else None)
        previous_stop = max(previous_stop, stop)
    return roles


def _placeholder(index: int) -> str:
    """Letters from the private use area: nothing that a template would trim, split or look for."""
    return f"\ue000{index}\ue001"
