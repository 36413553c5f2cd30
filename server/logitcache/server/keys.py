"""API keys of a store: made and revoked on the command line, known to the server by their hashes.

One file a key, ``STORE/.keys/NAME.json``, in a folder that its owner alone can read. A key is 256 random bits, so its
SHA-256 tells nothing about it, and needs no salt. What is in the folder counts within a second, without a restart.
Knows nothing of HTTP.
"""

import hashlib
import hmac
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from logitcache.labels.errors import InvalidRequest, NotFound, StorageFault, Unavailable
from logitcache.labels.identity import check_name
from logitcache.server.names import near_or_all
from logitcache.storage.files import Files, explained
from logitcache.storage.reading import names, read_file, refuse_links

FOLDER = ".keys"
"""In the store; no label set can have this name."""

KeyScope = Literal["read", "write", "admin"]
"""What a key may do; each contains those before it."""

PREFIX = "lck_"
"""Of every key, so that it is known for one where it should not be: in a log, in a repository."""

LOOK_EVERY_S = 0.5
"""When what was read of the folder is to be read again."""

TRUSTED_S = 1.0
"""How long what was read of the folder is believed, though it cannot be read again in time."""

AWAY_S = 5.0
"""When to ask again where the store is not there."""

MOST_BYTES = 4096
"""Of a key's file."""


class Key(BaseModel):
    """What is kept of a key: all but the key itself."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: str
    scope: KeyScope
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    made: float
    """Seconds since the epoch."""

    def allows(self, scope: KeyScope) -> bool:
        """Whether the key may do what needs this scope."""
        order = get_args(KeyScope)
        return order.index(self.scope) >= order.index(scope)


@dataclass
class Keys:
    """The keys of a store."""

    store: Path

    @property
    def folder(self) -> Path:
        """Where they are."""
        return self.store / FOLDER

    def make(self, name: str, scope: KeyScope) -> str:
        """A new key; it is told here and never again.

        Raises:
            InvalidName: it cannot be a name.
            InvalidRequest: there is a key of this name.
            StorageFault: as `Files` does.
        """
        check_name(name)
        secret = PREFIX + secrets.token_urlsafe(32)
        key = Key(name=name, scope=scope, sha256=_hash(secret), made=round(time.time(), 3))
        files, final = Files(), self.folder / f"{name}.json"
        if not self.folder.is_dir():
            files.make_folder(self.folder)
            files.fsync(self.store)
        refuse_links(self.folder)
        with explained(self.folder):
            self.folder.chmod(0o700)
        if final.exists():
            raise InvalidRequest(f"there is a key {name!r}; revoke it first, or give the new one another name")
        files.create(self.folder / f".{name}.{secrets.token_hex(8)}", final, key.model_dump_json().encode())
        return secret

    def revoke(self, name: str) -> None:
        """Forget a key: it is refused within a second.

        Raises:
            NotFound: there is none of this name.
            StorageFault: as `Files` does.
        """
        check_name(name)
        if name not in (names := self.names()):
            raise NotFound(f"there is no key {name!r}; {near_or_all(name, names)}")
        Files().remove(self.folder / f"{name}.json")
        Files().fsync(self.folder)

    def names(self) -> list[str]:
        """Of all keys, sorted.

        Raises:
            Unavailable: the store is not there: whether it has keys is not known.
            StorageFault: the folder cannot be read.
        """
        found = names(self.folder, self.folder)
        with explained(self.store):
            if not found and not self.store.is_dir():
                raise _away(f"there is no store {self.store} now, so its keys are not known", AWAY_S)
        return sorted(name.removesuffix(".json") for name in found if name.endswith(".json") and name[0] != ".")

    def read(self) -> list[Key]:
        """All keys, by name.

        Raises:
            Unavailable: as of `names`.
            StorageFault: one cannot be read, or is none.
        """
        return [key for name in self.names() if (key := self._read(name)) is not None]

    def _read(self, name: str) -> Key | None:
        """One key; None if it was revoked a moment ago."""
        path = self.folder / f"{name}.json"
        try:
            key = Key.model_validate_json(read_file(self.folder, path, MOST_BYTES))
        except FileNotFoundError:
            return None
        except ValidationError:
            key = None
        if key is None or key.name != name:
            raise StorageFault(f"{path} holds no key of that name; remove it, and make the key anew")
        return key


class KnownKeys:
    """The keys of a store as a server asks for them: `read_again` waits for the disk, and `find` never does."""

    def __init__(self, keys: Keys) -> None:
        self._keys, self._known, self._read_s = keys, list[Key](), float("-inf")

    @property
    def are_old(self) -> bool:
        """They may have changed, and are to be read again."""
        return time.monotonic() - self._read_s > LOOK_EVERY_S

    def read_again(self) -> None:
        """Read the keys.

        Raises:
            Unavailable: the store is not there, or the folder that had keys is not.
            StorageFault: the keys cannot be read: nobody is let in.
        """
        began_s = time.monotonic()
        known = self._keys.read()
        if self._known and not self._keys.folder.exists():
            raise _away(f"the keys of {self._keys.store} are away", AWAY_S)
        self._known, self._read_s = known, began_s

    def find(self, secret: str) -> Key | None:
        """The key that this is; None if it is none.

        All are compared, in constant time each, whichever it is.

        Raises:
            Unavailable: the keys were read too long ago.
        """
        if time.monotonic() - self._read_s > TRUSTED_S:
            raise _away("the keys cannot be read in time", TRUSTED_S)
        hashed, found = _hash(secret), None
        for key in self._known:
            if hmac.compare_digest(key.sha256, hashed):
                found = key
        return found


def _away(why: str, retry_after_s: float) -> Unavailable:
    error = Unavailable(f"{why}; try again")
    error.retry_after_s = retry_after_s
    return error


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
