"""Encryption of what is stored, and the key that the embedded database brings."""

from __future__ import annotations

import base64
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from pokestrator.errors import SecretKeyError, StoreUnavailable
from pokestrator.setting_checks import check_secret_key
from pokestrator.store.secrets import KEY_FILE, Vault, key_in, new_key

CANARY = "sk_canary_7f3a9c"


def test_what_is_encrypted_comes_back_and_looks_different_each_time() -> None:
    vault = Vault(new_key())
    one, other = vault.encrypt(f"{CANARY} ünïcode\n"), vault.encrypt(f"{CANARY} ünïcode\n")
    assert one != other
    assert CANARY not in one
    assert vault.decrypt(one) == vault.decrypt(other) == f"{CANARY} ünïcode\n"


def test_another_key_is_an_error_that_names_the_setting_and_shows_nothing() -> None:
    stored = Vault(new_key()).encrypt(CANARY)
    with pytest.raises(SecretKeyError, match="another POKESTRATOR_SECRET_KEY") as caught:
        Vault(new_key()).decrypt(stored)
    assert stored[10:30] not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("stored", ["fernet:", "fernet:!!", "fernet:gAAAA", "fernet:ü"])
def test_what_is_damaged_is_the_same_error(stored: str) -> None:
    with pytest.raises(SecretKeyError, match="POKESTRATOR_SECRET_KEY"):
        Vault(new_key()).decrypt(stored)


def test_the_first_key_encrypts_and_the_others_still_decrypt() -> None:
    old, new = new_key(), new_key()
    both = Vault(f"{new}, {old}")
    assert both.decrypt(Vault(old).encrypt(CANARY)) == CANARY
    assert Vault(new).decrypt(both.encrypt(CANARY)) == CANARY
    with pytest.raises(SecretKeyError):
        Vault(old).decrypt(both.encrypt(CANARY))


def test_what_render_generates_is_a_key() -> None:
    generated = base64.b64encode(bytes([0xFB, 0xFF] * 16)).decode()  # 256 bits in standard base64
    assert {"+", "/"} <= set(generated)
    assert check_secret_key(generated) == generated
    assert Vault(generated).decrypt(Vault(generated).encrypt(CANARY)) == CANARY


GOOD = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFQ="


@pytest.mark.parametrize("bad", ["short", "x" * 44, GOOD[:-1], f"{GOOD},", f"{GOOD} {GOOD}", "ü"])
def test_what_is_no_key_is_refused_with_the_command_that_makes_one(bad: str) -> None:
    assert check_secret_key(GOOD) == GOOD
    with pytest.raises(ValueError, match="credentials new-key"):
        check_secret_key(bad)


def test_without_a_key_nothing_is_encrypted_but_a_token_passes_as_it_is() -> None:
    vault = Vault()
    assert not vault.can_store
    with pytest.raises(SecretKeyError, match="POKESTRATOR_SECRET_KEY is not set"):
        vault.encrypt(CANARY)
    assert vault.seal("token-1") == "token-1"
    with pytest.raises(SecretKeyError, match="POKESTRATOR_SECRET_KEY is not set"):
        vault.unseal(Vault(new_key()).seal("token-1"))


def test_a_token_that_was_stored_in_the_clear_is_still_read() -> None:
    vault = Vault(new_key())
    assert vault.unseal("token-1") == "token-1"
    sealed = vault.seal("token-1")
    assert "token-1" not in sealed
    assert vault.unseal(sealed) == "token-1"
    assert vault.unseal(vault.seal("fernet:token")) == "fernet:token"


# the embedded database's key ---------------------------------------------------------------------------------------


def test_many_who_make_the_key_at_once_get_the_same_one_that_only_this_user_reads(tmp_path: Path) -> None:
    folder, together = tmp_path / "data", Barrier(8)

    def get(_: int) -> str:
        together.wait()
        return key_in(folder)

    with ThreadPoolExecutor(8) as threads:
        keys = set(threads.map(get, range(8)))
    assert keys == {key_in(folder)}
    assert Vault(keys.pop()).can_store
    assert [path.name for path in folder.iterdir()] == [KEY_FILE]
    assert stat.S_IMODE((folder / KEY_FILE).stat().st_mode) == 0o600


@pytest.mark.parametrize("content", [b"", b"half a ke", b"\xff\xfe" * 22])
def test_a_broken_key_file_is_named_and_never_overwritten(tmp_path: Path, content: bytes) -> None:
    (tmp_path / KEY_FILE).write_bytes(content)
    with pytest.raises(StoreUnavailable, match=f"{tmp_path}/{KEY_FILE} is broken"):
        key_in(tmp_path)
    assert (tmp_path / KEY_FILE).read_bytes() == content


def test_a_folder_that_cannot_be_written_is_named() -> None:
    with pytest.raises(StoreUnavailable, match=f"POKESTRATOR_DATA_DIR=/proc/nowhere: {KEY_FILE}: "):
        key_in(Path("/proc/nowhere"))
