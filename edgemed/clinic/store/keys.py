"""From a passphrase to the key that the file is encrypted with, and the small sealed box that stands between them.

    keys = derive(passphrase, salt, KdfCost())          # Argon2id: two keys, one for the store, one for its backups
    box = seal("store", data_key, keys.store, salt, KdfCost(), {"generation": 1})
    data_key = unseal(box, keys.store)                  # PassphraseError where the passphrase was another

The data key is 32 random bytes and never changes with the passphrase: changing that replaces one small file (the box), which is one
rename and cannot be torn. What follows from it: whoever has an *old* box and its old passphrase can still open the file. Restoring a
backup makes a new data key, which ends that. A backup has a data key of its own, sealed by another key of the passphrase, so that an
old backup and its old passphrase never open the store itself.

Everything else in the box (cost, salt, facts) is authenticated with it (AES-256-GCM), so that a changed box reads as a wrong
passphrase and says no more. Knows no file names and no SQLite.
"""

from __future__ import annotations

import json
import os
import unicodedata
from dataclasses import asdict, dataclass
from typing import Any, Literal

from edgemed.clinic.store.database import RESTORE
from edgemed.core.errors import MissingExtraError, PassphraseError, ResourceError, StoreError

FORMAT = "edgemed sealed key"
VERSION = 1
KEY_BYTES = 32
SALT_BYTES = 16
NONCE_BYTES = 12
SHORTEST_PASSPHRASE = 8
LONGEST_PASSPHRASE = 1024
WRONG_PASSPHRASE = "The passphrase is wrong."
# A box from outside asks for no more than this: Argon2id would otherwise take all memory before anything was proven.
_MOST_MEMORY_KIB = 1 << 20
_MOST_PASSES = 64
_MOST_LANES = 64

Purpose = Literal["store", "backup"]


@dataclass(frozen=True)
class KdfCost:
    """What one guess costs: the second recommended setting of RFC 9106, for machines with little memory."""

    memory_kib: int = 65536
    passes: int = 3
    lanes: int = 4


@dataclass(frozen=True)
class PassphraseKeys:
    """The two keys of a passphrase: one seals the store's data key, the other those of its backups."""

    store: bytes
    backup: bytes


@dataclass(frozen=True)
class SealedKey:
    """A data key that only its passphrase opens. `facts` lie open, but cannot be changed."""

    purpose: Purpose
    facts: dict[str, int | str]
    cost: KdfCost
    salt: bytes
    nonce: bytes
    sealed: bytes

    def authenticated(self) -> bytes:
        """All that is not secret, in one spelling."""
        shown = {
            "format": FORMAT,
            "version": VERSION,
            "purpose": self.purpose,
            "facts": self.facts,
            "kdf": {"name": "argon2id", "salt": self.salt.hex(), **asdict(self.cost)},
            "cipher": "AES-256-GCM",
        }
        return json.dumps(shown, sort_keys=True, separators=(",", ":")).encode()

    def to_json(self) -> bytes:
        """The box as it lies on disk."""
        return json.dumps(json.loads(self.authenticated()) | {"nonce": self.nonce.hex(), "sealed": self.sealed.hex()}, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes, what: str) -> SealedKey:
        """Read a box; StoreError about `what` where it is none."""
        try:
            return cls._parse(json.loads(data), what)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _damaged(what) from error

    @classmethod
    def _parse(cls, raw: dict[str, Any], what: str) -> SealedKey:
        if raw["format"] != FORMAT or raw["purpose"] not in ("store", "backup"):
            raise _damaged(what)
        if raw["version"] != VERSION:
            raise StoreError(f"Expected version {VERSION} in {what}, found {raw['version']!r}.", "Use the edgemed that wrote it.")
        kdf = raw["kdf"]
        cost = KdfCost(int(kdf["memory_kib"]), int(kdf["passes"]), int(kdf["lanes"]))
        box = cls(
            raw["purpose"], dict(raw["facts"]), cost, bytes.fromhex(kdf["salt"]), bytes.fromhex(raw["nonce"]), bytes.fromhex(raw["sealed"])
        )
        if not _is_sane(box):
            raise _damaged(what)
        return box


def _is_sane(box: SealedKey) -> bool:
    cost = box.cost
    lengths = (len(box.salt), len(box.nonce), len(box.sealed)) == (SALT_BYTES, NONCE_BYTES, KEY_BYTES + 16)
    return (
        lengths
        and 1 <= cost.lanes <= _MOST_LANES
        and 1 <= cost.passes <= _MOST_PASSES
        and 8 * cost.lanes <= cost.memory_kib <= _MOST_MEMORY_KIB
    )


def _damaged(what: str) -> StoreError:
    return StoreError(f"Expected a sealed key in {what}, found something else.", RESTORE)


def new_key() -> bytes:
    """A random key."""
    return os.urandom(KEY_BYTES)


def new_salt() -> bytes:
    """A random salt: each time that a passphrase is set."""
    return os.urandom(SALT_BYTES)


def check_passphrase(passphrase: str) -> None:
    """Refuse a new passphrase that is too short. Length is all that is asked for: sentences are better than symbols."""
    if not SHORTEST_PASSPHRASE <= len(_normal(passphrase)) <= LONGEST_PASSPHRASE:
        raise PassphraseError(
            f"Expected a passphrase of {SHORTEST_PASSPHRASE} to {LONGEST_PASSPHRASE} characters, found {len(_normal(passphrase))}.",
            "A few words that belong together only for you are easy to keep and hard to guess.",
        )


def _normal(passphrase: str) -> str:
    # The same letters typed on another keyboard: an accent can be a character of its own or part of its letter.
    return unicodedata.normalize("NFC", passphrase)


def derive(passphrase: str, salt: bytes, cost: KdfCost) -> PassphraseKeys:
    """Argon2id: the slow step that every guess has to pay."""
    try:
        from argon2.exceptions import HashingError
        from argon2.low_level import Type, hash_secret_raw
    except ImportError as error:
        raise MissingExtraError.of("The case store", "clinic") from error
    secret = _normal(passphrase)[:LONGEST_PASSPHRASE].encode("utf-8", "surrogatepass")
    try:
        both = hash_secret_raw(secret, salt, cost.passes, cost.memory_kib, cost.lanes, 2 * KEY_BYTES, Type.ID)
    except HashingError as error:
        raise ResourceError(
            f"The machine has too little memory for the passphrase: {cost.memory_kib // 1024} MiB are needed.", "Close other programs."
        ) from error
    return PassphraseKeys(both[:KEY_BYTES], both[KEY_BYTES:])


def seal(purpose: Purpose, key: bytes, wrapping: bytes, salt: bytes, cost: KdfCost, facts: dict[str, int | str]) -> SealedKey:
    """Put `key` into a box that `wrapping` opens."""
    nonce = os.urandom(NONCE_BYTES)
    open_box = SealedKey(purpose, facts, cost, salt, nonce, b"")
    return SealedKey(purpose, facts, cost, salt, nonce, _cipher(wrapping).encrypt(nonce, key, open_box.authenticated()))


def unseal(box: SealedKey, wrapping: bytes) -> bytes:
    """The key in the box. A changed box and a wrong passphrase are one and the same sentence."""
    cipher = _cipher(wrapping)
    from cryptography.exceptions import InvalidTag

    try:
        return bytes(cipher.decrypt(box.nonce, box.sealed, box.authenticated()))
    except InvalidTag:
        raise PassphraseError(WRONG_PASSPHRASE, "Check the keyboard's layout and Caps Lock, then try again.") from None


def _cipher(wrapping: bytes) -> Any:
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError as error:
        raise MissingExtraError.of("The case store", "clinic") from error
    return AESGCM(wrapping)
