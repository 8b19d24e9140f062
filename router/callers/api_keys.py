"""The file of API keys: names, hashes and limits.

A key is a name and 256 random bits: `alice.N3v...`. The entry is found by the name, so one hash is computed however
many keys there are. A fast hash, BLAKE2b (RFC 7693), is enough: unlike a password, 256 random bits can't be guessed.
The salt hides whether two entries, of this file or another, have the same key.
"""

import asyncio
import hmac
import re
import secrets
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from hashlib import blake2b
from pathlib import Path

import structlog

from common.security import file_state
from common.security.security_config import SettingsError
from router.callers.limits import Caller, Limits, Usage

log = structlog.get_logger(__name__)

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
KEY_BYTES = 32
SALT_BYTES = 16
DIGEST_BYTES = 32
LOOK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Entry:
    salt: bytes
    digest: bytes
    caller: Caller


# Keys with an unknown name are compared with this, so that they take as long to refuse as others.
NOBODY = Entry(secrets.token_bytes(SALT_BYTES), secrets.token_bytes(DIGEST_BYTES), Caller("nobody"))


def make(name: str) -> tuple[str, str]:
    """Returns a new key, and the lines for it in the keys file.

    Raises:
        SettingsError: the name is not valid.
    """
    if not NAME.fullmatch(name):
        raise SettingsError(f"{name!r} is not a key name: use 1 to 64 letters, digits, - and _")
    key, salt = f"{name}.{secrets.token_urlsafe(KEY_BYTES)}", secrets.token_bytes(SALT_BYTES)
    return key, f'[{name}]\nhash = "blake2b:{salt.hex()}:{_digest(key, salt).hex()}"\n'


class ApiKeys:
    """The keys in a file.

    Raises:
        SettingsError: the file cannot be read, or an entry in it is wrong.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._usage: dict[str, Usage] = {}
        self._seen = file_state.of(path)
        self._entries = self._read()

    def caller(self, key: str) -> Caller | None:
        """Whose key this is; None if it is not valid."""
        entry = self._entries.get(key.partition(".")[0], NOBODY)
        return entry.caller if hmac.compare_digest(_digest(key, entry.salt), entry.digest) else None

    async def watch(self) -> None:
        """Reads the file again whenever it changes, until cancelled. While it can't be read the keys stay as they were,
        and it is tried every second, changed or not: its permissions may be what is wrong."""
        problem = ""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            known, problem = problem, ""
            if (state := file_state.of(self._path)) == self._seen:
                continue
            try:
                self._entries, self._seen = self._read(), state
                log.info("API keys read again", keys=len(self._entries))
            except SettingsError as error:
                problem = str(error)
                if problem != known:
                    log.error("the API keys stay as they were", reason=problem)

    def _read(self) -> dict[str, Entry]:
        try:
            tables = tomllib.loads(self._path.read_text())
        except OSError as error:
            raise SettingsError(f"--api-keys: cannot read {self._path}: {error.strerror}") from error
        except ValueError as error:
            raise SettingsError(f"--api-keys: {self._path} is not TOML: {error}") from error
        entries = {}
        for name, table in tables.items():
            try:
                entries[name] = _entry(name, table, self._usage.setdefault(name, Usage()))
            except ValueError as error:
                raise SettingsError(f"--api-keys: {self._path}: {name}: {error}") from error
        return entries


def _entry(name: str, table: object, usage: Usage) -> Entry:
    """
    Raises:
        ValueError: says what is wrong with the entry.
    """
    if not NAME.fullmatch(name):
        raise ValueError("the name of a key has up to 64 letters, digits, - and _")
    if not isinstance(table, Mapping):
        raise ValueError(f"must be a table: [{name}]")
    limits = {limit.name: table[limit.name] for limit in fields(Limits) if limit.name in table}
    if unknown := set(table) - set(limits) - {"hash", "cache_group"}:
        raise ValueError(f"there is no setting {min(unknown)!r}")
    for setting, value in limits.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{setting} must be a whole number from 1 on; without the line there is no limit")
    group = table.get("cache_group", name)
    if not isinstance(group, str) or not NAME.fullmatch(group):
        raise ValueError("cache_group has up to 64 letters, digits, - and _")
    algorithm, _, rest = str(table.get("hash")).partition(":")
    salt, _, digest = rest.partition(":")
    if algorithm != "blake2b" or not re.fullmatch("[0-9a-f]{32}", salt) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError(f"hash must be as `twostroke key {name}` prints it")
    return Entry(bytes.fromhex(salt), bytes.fromhex(digest), Caller(name, group, Limits(**limits), usage))


def _digest(key: str, salt: bytes) -> bytes:
    return blake2b(key.encode(), salt=salt, digest_size=DIGEST_BYTES).digest()
