"""Checkpoints: what a chain was at one moment, in a line that can be kept where nobody can edit it.

    body      = RFC 8785 canonical JSON of {chain, head_hash, key, root, sequence, time, time_us,
                version}
    signature = Ed25519( b"sae-monitor audit checkpoint v1\\n" + body ), in hexadecimal
    root      = the Merkle tree hash (`merkle`) of the records 1 to `sequence`
    key       = the signer's public key, 32 bytes in hexadecimal; null where nothing signs

A pruning says under b"sae-monitor audit pruning v1\\n" in the same way that the records up to a
checkpoint were deleted on purpose: {chain, head_hash, key, root, sequence, time, time_us, version}.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from monitor.audit_log.chain import canonical_bytes
from monitor.audit_log.merkle import Frontier
from monitor.audit_log.record import iso_time
from monitor.errors import AuditChainError, AuditError, SettingsError

CHECKPOINT_PREFIX = b"sae-monitor audit checkpoint v1\n"
PRUNING_PREFIX = b"sae-monitor audit pruning v1\n"
STATEMENT_VERSION = 1


class Signer:
    """An Ed25519 key that signs statements about a chain."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        """Use `load_signer` for a file."""
        self._key = key
        self.public_key = key.public_key().public_bytes_raw().hex()

    def sign(self, message: bytes) -> str:
        """The signature in hexadecimal."""
        return self._key.sign(message).hex()


def load_signer(path: Path) -> Signer:
    """The key in a PEM file (PKCS #8); SettingsError names what is wrong with it."""
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise SettingsError(f"signing key {path}: cannot be read: {error.strerror}") from None
    except (ValueError, TypeError):
        raise SettingsError(
            f"signing key {path}: found no unencrypted private key, expected Ed25519 in PEM"
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise SettingsError(f"signing key {path}: found {type(key).__name__}, expected Ed25519")
    return Signer(key)


def new_signing_key() -> tuple[bytes, str]:
    """A fresh key as PEM, and its public key in hexadecimal."""
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return pem, key.public_key().public_bytes_raw().hex()


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """A checkpoint or a pruning: that the chain had this head and root at this sequence."""

    chain: str
    sequence: int
    head_hash: str
    root: str
    time_us: int
    key: str | None
    body: bytes
    signature: str | None

    @classmethod
    def make(
        cls,
        prefix: bytes,
        *,
        chain: str,
        frontier: Frontier,
        head_hash: str,
        time_us: int,
        signer: Signer | None,
    ) -> Statement:
        """A statement about now, signed where there is a signer."""
        key = None if signer is None else signer.public_key
        body = canonical_bytes(
            {
                "chain": chain,
                "head_hash": head_hash,
                "key": key,
                "root": frontier.root().hex(),
                "sequence": frontier.size,
                "time": iso_time(time_us),
                "time_us": time_us,
                "version": STATEMENT_VERSION,
            }
        )
        return cls.read(body, None if signer is None else signer.sign(prefix + body))

    @classmethod
    def read(cls, body: bytes, signature: str | None) -> Statement:
        """The stored form, parsed; AuditError where it is not one. Nothing is verified."""
        try:
            found: dict[str, Any] = json.loads(body)
            return cls(
                chain=str(found["chain"]),
                sequence=int(found["sequence"]),
                head_hash=str(found["head_hash"]),
                root=str(found["root"]),
                time_us=int(found["time_us"]),
                key=None if found["key"] is None else str(found["key"]),
                body=body,
                signature=signature,
            )
        except (ValueError, KeyError, TypeError) as error:
            raise AuditError(f"a checkpoint cannot be read: {error}") from error

    def check_signature(self, prefix: bytes, public_key: str | None) -> None:
        """AuditChainError unless it is signed by this key; by its own key where None is given.

        An unsigned statement passes only where no key is given.
        """
        what = f"chain {self.chain!r}, checkpoint {self.sequence}"
        key = self.key if public_key is None else public_key
        if key is None and self.signature is None:
            return
        if key is None or self.signature is None:
            raise AuditChainError(
                f"{what}: signature: found none, expected one by {key}",
                chain=self.chain,
                sequence=self.sequence,
            )
        try:
            public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))
            public.verify(bytes.fromhex(self.signature), prefix + self.body)
        except (InvalidSignature, ValueError):
            raise AuditChainError(
                f"{what}: signature: it is not one by {key}",
                chain=self.chain,
                sequence=self.sequence,
            ) from None

    def to_json(self) -> dict[str, Any]:
        """As it is exported: the signed bytes as text, and the signature over them."""
        return {"checkpoint": self.body.decode(), "signature": self.signature}

    @classmethod
    def from_json(cls, exported: object) -> Statement:
        """What `to_json` gave, read back; AuditError for anything else."""
        if not isinstance(exported, dict) or not isinstance(exported.get("checkpoint"), str):
            raise AuditError(
                'a checkpoint cannot be read: expected {"checkpoint": ..., "signature": ...}'
            )
        signature = exported.get("signature")
        return cls.read(
            exported["checkpoint"].encode(), None if signature is None else str(signature)
        )
