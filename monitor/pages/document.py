"""A template, its style and its script as one page that allows nothing but these two.

The policy names style and script by their hashes and forbids requests, style attributes and event
attributes, so that texts of other people, which are hostile by nature, can do nothing in the page.
"""

from __future__ import annotations

import base64
import hashlib
import json
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

HERE = Path(__file__).resolve().parent
_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Categories of characters that show nothing, or turn what is around them."""


def render(
    folder: Path,
    *,
    filters: Mapping[str, Callable[..., Any]] | None = None,
    data: object = None,
    **context: Any,
) -> str:
    """The page of `page.html.j2`, `page.css` and, where there is one, `page.js` in a folder.

    Args:
        data: what the script reads, as JSON in the element `data`.
        context: what the template reads, beside `style`, `script`, `policy` and `data`.
    """
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters or {})
    style = _read(HERE / "base.css") + _read(folder / "page.css")
    script = _read(folder / "page.js") if (folder / "page.js").exists() else ""
    policy = f"default-src 'none'; style-src '{_digest(style)}'; "
    if script:
        policy += f"script-src '{_digest(script)}'; "
    return environment.get_template("page.html.j2").render(
        style=Markup(style),  # ours, as the script is, with no text of the data in them
        script=Markup(script),
        policy=Markup(policy + "base-uri 'none'; form-action 'none'"),
        data=Markup(inert_json(data)),
        **context,
    )


def inert_json(value: object) -> str:
    """JSON that cannot end the element it stands in."""
    text = json.dumps(value, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def visible(text: str) -> str:
    """The text with every character that shows nothing, or turns its surroundings, spelt out."""
    return "".join(
        f"\u27e8U+{ord(c):04X}\u27e9"
        if unicodedata.category(c) in _UNSEEN and c not in "\n\t"
        else c
        for c in text
    )


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
