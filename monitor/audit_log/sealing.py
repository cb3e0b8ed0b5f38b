"""What people wrote, sealed: AES-256-GCM under one of several keys, each with a name.

A key ring is text of one key a line, `NAME:BASE64` with 32 bytes behind the base64; empty lines and
lines that begin with # are left out. The first key seals, all of them open. To rotate, put a new
line first; to make what a key sealed unreadable for ever, delete its line and every copy of it.

    sealed  = salt (16 random bytes) + nonce (12 random bytes) + ciphertext and tag
    key     = HKDF-SHA256(ring key, salt, b"sae-monitor audit sealed v1"), 32 bytes
    aad     = b"sae-monitor audit sealed v1\\n" + UTF-8 of the decision's id
    plain   = zlib of the canonical JSON of what is sealed

A key of its own for each record keeps random nonces safe for any number of records (NIST SP 800-38D
allows 2**32 under one key). Without a ring the plain bytes are stored as they are, under no name.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import zlib
from collections.abc import Mapping
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from monitor.audit_log.chain import Json, canonical_bytes
from monitor.errors import AuditError, SettingsError

KEY_BYTES = 32
SALT_BYTES = 16
NONCE_BYTES = 12
CONTEXT = b"sae-monitor audit sealed v1"

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


class KeyRing:
    """Named keys; the first one seals."""

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        """`keys` in order of preference; use `parse` for what an operator wrote."""
        self._keys = dict(keys)

    @classmethod
    def parse(cls, text: str, origin: str) -> KeyRing:
        """The ring that a text holds; `origin` says in errors where it came from.

        Raises:
            SettingsError: a line is no NAME:BASE64 of 32 bytes, a name comes twice, or there is no
                key. Messages never show what a line holds.
        """
        keys: dict[str, bytes] = {}
        for number, raw in enumerate(text.splitlines(), start=1):
            line = raw.strip()
            if not line or line.startswith("#"):
                continue
            name, colon, encoded = line.partition(":")
            if not colon or not _NAME.fullmatch(name):
                raise SettingsError(
                    f"{origin}, line {number}: found no name, expected NAME:BASE64 with a name of "
                    "1 to 64 letters, digits, dots, dashes and underscores"
                )
            try:
                key = base64.b64decode(encoded.strip(), validate=True)
            except binascii.Error:
                raise SettingsError(
                    f"{origin}, line {number}: key {name!r} is no base64, expected {KEY_BYTES} "
                    "bytes in base64"
                ) from None
            if len(key) != KEY_BYTES:
                raise SettingsError(
                    f"{origin}, line {number}: key {name!r} has {len(key)} bytes, expected "
                    f"{KEY_BYTES}"
                )
            if name in keys:
                raise SettingsError(f"{origin}, line {number}: key {name!r} is there twice")
            keys[name] = key
        if not keys:
            raise SettingsError(f"{origin}: found no key, expected at least one NAME:BASE64")
        return cls(keys)

    @property
    def active(self) -> str:
        """The name of the key that seals."""
        return next(iter(self._keys))

    def __contains__(self, name: str) -> bool:
        """Whether the ring has a key of this name."""
        return name in self._keys

    def seal(self, value: Json, decision_id: str) -> bytes:
        """Seals a JSON value under the active key, for this decision only."""
        salt, nonce = os.urandom(SALT_BYTES), os.urandom(NONCE_BYTES)
        cipher = AESGCM(_derived(self._keys[self.active], salt))
        return salt + nonce + cipher.encrypt(nonce, pack(value), _aad(decision_id))

    def open(self, sealed: bytes, name: str, decision_id: str) -> Any:
        """The value that was sealed under the key of this name.

        Raises:
            AuditError: the ring lacks the key, or the bytes are not what it sealed for this
                decision.
        """
        if name not in self._keys:
            raise AuditError(
                f"decision {decision_id!r}: sealed under key {name!r}, expected one of "
                f"{', '.join(sorted(self._keys))}; without that key it cannot be read"
            )
        salt, nonce = sealed[:SALT_BYTES], sealed[SALT_BYTES : SALT_BYTES + NONCE_BYTES]
        try:
            plain = AESGCM(_derived(self._keys[name], salt)).decrypt(
                nonce, sealed[SALT_BYTES + NONCE_BYTES :], _aad(decision_id)
            )
        except (InvalidTag, ValueError):
            raise AuditError(
                f"decision {decision_id!r}: its sealed bytes do not open under key {name!r}: "
                "another key of that name sealed them, or they were changed"
            ) from None
        return unpack(plain)


def pack(value: Json) -> bytes:
    """The bytes that are sealed, or stored as they are where there is no ring."""
    return zlib.compress(canonical_bytes({"value": value}), 1)


def unpack(plain: bytes) -> Any:
    """The value that `pack` was given; AuditError for other bytes."""
    try:
        return json.loads(zlib.decompress(plain))["value"]
    except (zlib.error, ValueError, KeyError, TypeError) as error:
        raise AuditError(f"sealed bytes hold no value: {error}") from error


def new_key(name: str) -> str:
    """A fresh line of a key ring; SettingsError for a name that one cannot have."""
    if not _NAME.fullmatch(name):
        raise SettingsError(
            f"key name: found {name!r}, expected 1 to 64 letters, digits, dots, dashes and "
            "underscores"
        )
    return f"{name}:{base64.b64encode(os.urandom(KEY_BYTES)).decode()}"


def _derived(key: bytes, salt: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt, info=CONTEXT).derive(key)


def _aad(decision_id: str) -> bytes:
    return CONTEXT + b"\n" + decision_id.encode()
