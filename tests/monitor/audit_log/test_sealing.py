from __future__ import annotations

import base64

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from monitor.audit_log.sealing import KeyRing, new_key, pack, unpack
from monitor.errors import AuditError, SettingsError

VALUE = {"token_ids": [2, 7, 9], "texts": ["<bos>", "un", "glück"]}
SECRET = base64.b64encode(b"s" * 32).decode()


def test_what_was_sealed_opens_again() -> None:
    ring = KeyRing.parse(f"# keys\n\n{new_key('2026')}\n", "test")
    sealed = ring.seal(VALUE, "d1")
    assert b"gl" not in sealed
    assert ring.open(sealed, "2026", "d1") == VALUE
    assert ring.seal(VALUE, "d1") != sealed


def test_the_documented_layout_opens_without_our_code() -> None:
    sealed = KeyRing.parse(f"a:{SECRET}", "test").seal(VALUE, "d1")
    salt, nonce, rest = sealed[:16], sealed[16:28], sealed[28:]
    context = b"sae-monitor audit sealed v1"
    key = HKDF(algorithm=SHA256(), length=32, salt=salt, info=context).derive(b"s" * 32)
    assert unpack(AESGCM(key).decrypt(nonce, rest, context + b"\nd1")) == VALUE


def test_a_new_first_key_seals_and_the_old_one_still_opens() -> None:
    old = new_key("old")
    sealed = KeyRing.parse(old, "test").seal(VALUE, "d1")
    ring = KeyRing.parse(f"{new_key('new')}\n{old}", "test")
    assert ring.active == "new"
    assert ring.open(sealed, "old", "d1") == VALUE


def test_a_deleted_key_makes_its_records_unreadable() -> None:
    sealed = KeyRing.parse(new_key("old"), "test").seal(VALUE, "d1")
    with pytest.raises(AuditError, match="'d1': sealed under key 'old', expected one of new"):
        KeyRing.parse(new_key("new"), "test").open(sealed, "old", "d1")


def test_another_key_of_the_same_name_or_another_decision_does_not_open() -> None:
    ring = KeyRing.parse(new_key("a"), "test")
    sealed = ring.seal(VALUE, "d1")
    for other, decision in ((KeyRing.parse(new_key("a"), "test"), "d1"), (ring, "d2")):
        with pytest.raises(AuditError, match="do not open under key 'a'"):
            other.open(sealed, "a", decision)
    with pytest.raises(AuditError, match="do not open"):
        ring.open(sealed[:20], "a", "d1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found no key"),
        ("# only words", "found no key"),
        (SECRET, "line 1: found no name"),
        (f"a b:{SECRET}", "line 1: found no name"),
        ("a:c2hvcnQ=", "line 1: key 'a' has 5 bytes, expected 32"),
        ("a:!!!", "line 1: key 'a' is no base64"),
        (f"a:{SECRET}\na:{SECRET}", "line 2: key 'a' is there twice"),
    ],
)
def test_a_bad_ring_is_refused_without_showing_its_secrets(text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        KeyRing.parse(text, "keys.txt")
    assert str(caught.value).startswith("keys.txt")
    assert SECRET not in str(caught.value)


def test_bytes_that_hold_no_value_are_refused() -> None:
    assert unpack(pack(VALUE)) == VALUE
    with pytest.raises(AuditError, match="hold no value"):
        unpack(b"junk")
