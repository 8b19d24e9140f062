"""A part's certificate files while it runs: what is taken, what is not, and what the log says."""

import re
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest
import structlog
from structlog.testing import capture_logs

from common.security import certificates, file_state, pem
from common.security.certificates import Certificates
from common.security.security_config import SecurityConfig, SettingsError, TlsConfig
from tests.certificates import Signed, replace, sign

READ_AGAIN = {
    "event": "certificates read again",
    "log_level": "info",
    "expires": "2031-02-03T04:05:06+00:00",
}


@pytest.fixture(autouse=True)
def every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificates, "LOOK_SECONDS", 0.0)


@pytest.fixture
def signed(tmp_path: Path) -> Signed:
    return sign(tmp_path / "signed")


@pytest.fixture
def renewed(tmp_path: Path) -> Signed:
    return sign(tmp_path / "renewed", not_after=datetime(2031, 2, 3, 4, 5, 6))


@pytest.fixture
def logs() -> Iterator[list[structlog.typing.EventDict]]:
    with capture_logs() as logs:
        yield logs


def following(files: Signed) -> Certificates:
    return Certificates(SecurityConfig(tls_cert=files.cert, tls_key=files.key, tls_ca=files.ca, tls_client_ca=files.ca))


def holds(files: Certificates, what: Signed) -> bool:
    found = files.now()
    assert found.own is not None
    contents = (found.own.certificate, found.own.key, found.ca, found.client_ca)
    return contents == tuple(path.read_bytes() for path in (what.cert, what.key, what.ca, what.ca))


def test_without_files_there_is_nothing() -> None:
    assert Certificates(SecurityConfig()).now() == pem.Pem(None, None, None, None)


def test_files_that_are_wrong_at_the_start_are_not_waited_for(signed: Signed) -> None:
    signed.key.unlink()
    with pytest.raises(SettingsError, match="--tls-key: cannot read"):
        following(signed)


def test_renewed_files_are_taken(signed: Signed, renewed: Signed, logs: list[structlog.typing.EventDict]) -> None:
    files = following(signed)
    before = files.now()
    assert files.now() is before
    signed.become(renewed)
    assert holds(files, renewed)
    assert files.now() is not before
    assert logs == [READ_AGAIN]


def test_a_certificate_whose_key_is_still_to_come_waits_for_it(
    signed: Signed, renewed: Signed, tmp_path: Path, logs: list[structlog.typing.EventDict]
) -> None:
    files, first = following(signed), sign(tmp_path / "first")
    first.become(signed)
    replace(signed.cert, renewed.cert.read_bytes())
    for _ in range(3):
        assert holds(files, first)
    assert [(entry["event"], entry["log_level"]) for entry in logs] == [("the certificates stay as they were", "error")]
    with pytest.raises(SettingsError) as at_a_start:
        following(signed)
    assert logs[0]["reason"] == str(at_a_start.value)
    assert "KEY_VALUES_MISMATCH" in logs[0]["reason"]
    signed.become(renewed)
    assert holds(files, renewed)
    assert logs[1:] == [READ_AGAIN]


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda files: files.cert.unlink(), "--tls-cert: cannot read"),
        (lambda files: files.key.write_bytes(files.key.read_bytes()[:90]), "are no PEM files of a certificate and its"),
        (lambda files: files.ca.write_text(""), "--tls-ca .* is no PEM file of certificates"),
    ],
)
def test_wrong_files_change_nothing_until_they_are_repaired(
    signed: Signed,
    renewed: Signed,
    logs: list[structlog.typing.EventDict],
    spoil: Callable[[Signed], object],
    sentence: str,
) -> None:
    files = following(signed)
    before = files.now()
    for times in (1, 2):
        spoil(signed)
        for _ in range(2):
            assert files.now() is before
        assert len(logs) == 2 * times - 1
        assert re.search(sentence, logs[-1]["reason"])
        signed.become(renewed)
        assert holds(files, renewed)
        assert logs[-1] == READ_AGAIN
        before = files.now()


def test_files_that_are_put_back_were_never_wrong(signed: Signed, logs: list[structlog.typing.EventDict]) -> None:
    files = following(signed)
    before = files.now()
    for times in (1, 2):
        signed.key.rename(signed.key.with_suffix(".away"))
        assert files.now() is before
        assert len(logs) == times
        signed.key.with_suffix(".away").rename(signed.key)
        assert files.now() is before
        assert len(logs) == times


def test_what_mends_without_a_change_of_the_file_is_taken(
    signed: Signed, renewed: Signed, monkeypatch: pytest.MonkeyPatch, logs: list[structlog.typing.EventDict]
) -> None:
    """As permissions do, or a process's limit of open files."""
    files = following(signed)

    def unreadable(config: TlsConfig) -> pem.Pem:
        raise SettingsError("unreadable")

    signed.become(renewed)
    with monkeypatch.context() as patch:
        patch.setattr(pem, "read", unreadable)
        assert not holds(files, renewed)
    assert holds(files, renewed)
    assert [entry["event"] for entry in logs] == ["the certificates stay as they were", READ_AGAIN["event"]]


def test_files_that_change_while_they_are_read_are_read_again(
    signed: Signed, renewed: Signed, monkeypatch: pytest.MonkeyPatch, logs: list[structlog.typing.EventDict]
) -> None:
    """Or a certificate of before would be taken with the key that was checked with the one of now."""
    files, before, read_bytes = following(signed), signed.cert.read_bytes(), Path.read_bytes
    replace(signed.ca, renewed.ca.read_bytes())

    def renewal_meanwhile(path: Path) -> bytes:
        content = read_bytes(path)
        if path == signed.cert:
            monkeypatch.setattr(Path, "read_bytes", read_bytes)
            signed.become(renewed)
        return content

    monkeypatch.setattr(Path, "read_bytes", renewal_meanwhile)
    found = files.now().own
    assert found is not None
    assert found.certificate == before
    assert not logs
    assert holds(files, renewed)
    assert logs == [READ_AGAIN]


def test_files_that_vanish_while_they_are_read_are_no_fault(
    signed: Signed, monkeypatch: pytest.MonkeyPatch, logs: list[structlog.typing.EventDict]
) -> None:
    files, read_bytes = following(signed), Path.read_bytes
    before = files.now()
    replace(signed.ca, signed.ca.read_bytes())

    def gone(path: Path) -> bytes:
        content = read_bytes(path)
        if path == signed.key:
            path.unlink()
        return content

    monkeypatch.setattr(Path, "read_bytes", gone)
    assert files.now() is before
    assert not logs
    assert files.now() is before
    assert "--tls-key: cannot read" in logs[0]["reason"]


def test_a_folder_behind_a_link_is_renewed_at_once(
    signed: Signed, renewed: Signed, tmp_path: Path, logs: list[structlog.typing.EventDict]
) -> None:
    """As Kubernetes renews a volume of a secret."""
    link = tmp_path / "data"
    link.symlink_to(signed.cert.parent)
    files = following(Signed(*(link / path.name for path in (signed.ca, signed.cert, signed.key))))
    (tmp_path / "data.new").symlink_to(renewed.cert.parent)
    (tmp_path / "data.new").replace(link)
    assert holds(files, renewed)
    assert logs == [READ_AGAIN]


def test_files_are_looked_at_once_a_second(signed: Signed, renewed: Signed, monkeypatch: pytest.MonkeyPatch) -> None:
    now, looked, state_of = 1000.0, [], file_state.of
    monkeypatch.setattr(certificates, "LOOK_SECONDS", 1.0)
    monkeypatch.setattr("time.monotonic", lambda: now)
    files = following(signed)
    before = files.now()
    signed.become(renewed)
    monkeypatch.setattr(file_state, "of", lambda path: looked.append(path) or state_of(path))
    now = 1000.9
    assert files.now() is before
    assert not looked
    now = 1001.0
    assert holds(files, renewed)
    looked.clear()
    now = 1001.9
    for _ in range(10):
        files.now()
    assert not looked
    now = 1002.0
    for _ in range(10):
        files.now()
    assert sorted(looked) == sorted([signed.ca, signed.ca, signed.cert, signed.key])
