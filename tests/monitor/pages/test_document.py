from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitor.pages.document import HERE, inert_json, render, visible


@settings(deadline=None)
@given(st.recursive(st.text() | st.integers(), lambda inner: st.lists(inner), max_leaves=5))
def test_json_that_cannot_end_its_element_is_still_the_same(value: object) -> None:
    text = inert_json(value)
    assert not set("<>&") & set(text)
    assert json.loads(text) == value


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\n\ttext ✓", "plain\n\ttext ✓"),
        ("\u202eevil", "⟨U+202E⟩evil"),
        ("a\u200bb\x00", "a⟨U+200B⟩b⟨U+0000⟩"),
        ("\u2028", "⟨U+2028⟩"),
    ],
)
def test_what_shows_nothing_is_spelt_out(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_the_policy_names_the_style_and_the_script_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "page.html.j2").write_text("{{ policy }}|{{ style }}|{{ script }}|{{ name }}")
    (tmp_path / "page.css").write_text("p { color: #111; }")
    without = render(tmp_path, name="<b>").split("|")
    assert "script-src" not in without[0]
    assert without[3] == "&lt;b&gt;"
    (tmp_path / "page.js").write_text('"use strict"; if (1 < 2 && 3) {}')
    policy, style, script, _ = render(tmp_path, name="").split("|", 3)
    assert style == (HERE / "base.css").read_text() + "p { color: #111; }"
    for text in (style, script.split("|")[0]):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
