"""The file of API keys, read and read again."""

import asyncio
import errno
from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from common.security.security_config import SettingsError
from router.callers import api_keys
from router.callers.api_keys import ApiKeys, make
from router.callers.limits import Limits
from tests.router.cluster import eventually


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.toml"


def test_a_key_is_known_by_its_hash(path: Path) -> None:
    key, lines = make("alice")
    other, other_lines = make("bob-2_B")
    limits = "requests_per_minute = 60\nconcurrent_requests = 4\ntokens_per_minute = 9000\n"
    path.write_text(f'{lines}{limits}\n{other_lines}cache_group = "alice"\n')
    keys = ApiKeys(path)
    alice, bob = keys.caller(key), keys.caller(other)
    assert alice is not None
    assert bob is not None
    assert (alice.name, alice.cache_group, alice.limits) == ("alice", "alice", Limits(60, 4, 9000))
    assert (bob.name, bob.cache_group, bob.limits) == ("bob-2_B", "alice", Limits())
    assert key.partition(".")[2] not in path.read_text()
    assert len(key) == len("alice.") + 43  # 256 bits


def test_what_is_not_quite_a_key_is_nobodys(path: Path) -> None:
    key, lines = make("alice")
    other, other_lines = make("bob")
    path.write_text(lines + other_lines)
    keys = ApiKeys(path)
    secret, other_secret = key.partition(".")[2], other.partition(".")[2]
    wrong = ["", ".", "alice", "alice.", key[:-1], f"{key}x", secret, f"bob.{secret}", f"alice.{other_secret}", "ü.ü"]
    assert [keys.caller(given) for given in [*wrong, make("alice")[0], make("carol")[0]]] == [None] * (len(wrong) + 2)


@pytest.mark.parametrize("name", ["", "a b", "a.b", "a" * 65, "ä", "a\n"])
def test_a_name_is_simple(name: str) -> None:
    with pytest.raises(SettingsError, match="is not a key name: use 1 to 64 letters"):
        make(name)


HASH = make("alice")[1]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[alice", "is not TOML"),
        (b"\xff", "is not TOML"),
        ("alice = 1", r"alice: must be a table: \[alice\]"),
        ('["a b"]', "a b: the name of a key"),
        ("[alice]", "alice: hash must be as `twostroke key alice` prints it"),
        ('[alice]\nhash = "blake2b:00:00"', "hash must be"),
        (HASH + "requests_per_minute = 0", "requests_per_minute must be a whole number from 1 on"),
        (HASH + "tokens_per_minute = true", "tokens_per_minute must be a whole number"),
        (HASH + "concurrent_requests = 1.5", "concurrent_requests must be a whole number"),
        (HASH + "request_per_minute = 1", "there is no setting 'request_per_minute'"),
        (HASH + "cache_group = ''", "cache_group has up to 64 letters"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_the_reason(path: Path, content: str | bytes, sentence: str) -> None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SettingsError, match=f"--api-keys: .*{sentence}"):
        ApiKeys(path)


def test_a_file_that_is_missing_is_named(path: Path) -> None:
    with pytest.raises(SettingsError, match=r"--api-keys: cannot read .*keys\.toml: No such file"):
        ApiKeys(path)


def write(path: Path, text: str) -> None:
    path.write_text(text)


async def test_a_change_is_noticed_and_a_wrong_one_is_not_followed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_keys, "LOOK_SECONDS", 0.01)
    key, lines = make("alice")
    write(path, lines)
    keys = ApiKeys(path)
    before = keys.caller(key)
    assert before is not None
    watching = asyncio.create_task(keys.watch())
    try:
        with capture_logs() as logs, before.generating(1):
            write(path, f"{lines}concurrent_requests = 1\n")
            await eventually(lambda: keys.caller(key) != before)
            after = keys.caller(key)
            assert after is not None
            assert after.usage.running == 1  # what ran before still counts
            changes: list[Callable[[], object]] = [lambda: write(path, "[alice"), path.unlink]
            for change in changes:
                logs.clear()
                change()
                await eventually(lambda: any(entry["log_level"] == "error" for entry in logs))
                assert keys.caller(key) is after
            write(path, make("bob")[1])
            await eventually(lambda: keys.caller(key) is None)
    finally:
        watching.cancel()


async def test_a_change_that_cannot_be_read_at_first_is_followed_once_it_can(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_keys, "LOOK_SECONDS", 0.01)
    key, lines = make("alice")
    write(path, lines)
    keys = ApiKeys(path)
    looks = 0

    def unreadable(_: Path) -> str:
        nonlocal looks
        looks += 1
        raise PermissionError(errno.EACCES, "Permission denied")

    watching = asyncio.create_task(keys.watch())
    try:
        with capture_logs() as logs:
            with monkeypatch.context() as for_now:  # as root may read everything
                for_now.setattr(Path, "read_text", unreadable)
                write(path, make("bob")[1])
                await eventually(lambda: looks >= 3)
            assert keys.caller(key) is not None
            await eventually(lambda: keys.caller(key) is None)
        assert [entry["log_level"] for entry in logs] == ["error", "info"]
    finally:
        watching.cancel()
