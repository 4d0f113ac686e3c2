"""Secrets at rest: what is encrypted before it is written to PostgreSQL, and the key that is used (Fernet).

The embedded database brings a key of its own, in a file beside it; with another database the key is a setting.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from pokestrator.errors import SecretKeyError, StoreUnavailable
from pokestrator.setting_checks import MAKE_SECRET_KEY, secret_keys

KEY_FILE = "secret.key"  # in the data folder
ENCRYPTED = (
    "fernet:"  # before everything that is encrypted; tokens were stored in the clear once, and without a key are
)
NO_KEY = f"POKESTRATOR_SECRET_KEY is not set; `{MAKE_SECRET_KEY}` prints one"
NOT_OUR_KEY = (
    "it was encrypted with another POKESTRATOR_SECRET_KEY; that one, behind the present one with a comma between, "
    "makes it readable again"
)


class Vault:
    """Encrypts and decrypts. `keys` as in POKESTRATOR_SECRET_KEY: the first one encrypts, each of them decrypts.

    Without a key it can do neither.
    """

    def __init__(self, keys: str | None = None) -> None:
        self.keys = [key.decode() for key in secret_keys(keys)] if keys else []
        self._fernet = MultiFernet([Fernet(key) for key in self.keys]) if keys else None

    @property
    def can_store(self) -> bool:
        return self._fernet is not None

    def encrypt(self, text: str) -> str:
        """`text` as it may be stored. Raises SecretKeyError without a key."""
        if self._fernet is None:
            raise SecretKeyError(NO_KEY)
        return ENCRYPTED + self._fernet.encrypt(text.encode()).decode()

    def decrypt(self, stored: str) -> str:
        """What was encrypted. Raises SecretKeyError, which tells nothing of it, without its key."""
        if self._fernet is None:
            raise SecretKeyError(NO_KEY)
        try:
            return self._fernet.decrypt(stored.removeprefix(ENCRYPTED).encode()).decode()
        except InvalidToken:
            raise SecretKeyError(NOT_OUR_KEY) from None

    def seal(self, token: str) -> str:
        """A callback token as it is stored: encrypted where there is a key, else as it is."""
        return self.encrypt(token) if self.can_store else token

    def unseal(self, stored: str) -> str:
        """A callback token as it came. Raises SecretKeyError when it is encrypted and the key is another one."""
        return self.decrypt(stored) if stored.startswith(ENCRYPTED) else stored


def new_key() -> str:
    """A key for POKESTRATOR_SECRET_KEY."""
    return Fernet.generate_key().decode()


def key_in(folder: Path) -> str:
    """The key of the embedded database in `folder`; the first call makes it, readable by this user alone.

    Whoever makes it at the same moment, all get the same one; one that is there is never overwritten. Raises
    StoreUnavailable, which names the file, when it cannot be read, made or used.
    """
    path = folder / KEY_FILE
    try:
        if not path.exists():
            _make(path)
        key = path.read_bytes().decode("ascii", "replace").strip()
    except OSError as error:
        raise StoreUnavailable(f"POKESTRATOR_DATA_DIR={folder}: {KEY_FILE}: {error.strerror}") from None
    try:
        secret_keys(key)
    except ValueError:
        raise StoreUnavailable(
            f"{path} is broken: it must hold a key as `{MAKE_SECRET_KEY}` prints one. Put it back from a copy; without "
            "it what it has encrypted is lost, and a new file can be made by removing this one"
        ) from None
    return key


def _make(path: Path) -> None:
    """Write a new key; it appears under its name whole, and only if no other process was faster."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{KEY_FILE}.", dir=path.parent)  # 0600
    draft = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(f"{new_key()}\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            path.hardlink_to(draft)
        except FileExistsError:
            return
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # a key that a power cut takes away would take with it what it has encrypted since
        finally:
            os.close(folder)
    finally:
        draft.unlink()
