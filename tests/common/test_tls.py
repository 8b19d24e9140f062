"""Files that are wrong are named, with their flag, before anything listens or calls."""

from pathlib import Path

import pytest

from common.security_config import SecurityConfig, SettingsError
from common.tls import channel_credentials, channel_options, server_credentials
from tests.certificates import Signed, sign


@pytest.fixture
def signed(tmp_path: Path) -> Signed:
    return sign(tmp_path / "signed")


def test_without_files_there_is_plain_text() -> None:
    assert server_credentials(SecurityConfig()) is None
    assert channel_credentials(SecurityConfig()) is None
    assert channel_options(SecurityConfig(tls_server_name="router")) == ()


def test_a_certificate_alone_serves_tls_and_calls_in_plain_text(signed: Signed) -> None:
    config = SecurityConfig(tls_cert=signed.cert, tls_key=signed.key)
    assert server_credentials(config) is not None
    assert channel_credentials(config) is None


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"tls_cert": "cert"}, "--tls-cert and --tls-key belong together"),
        ({"tls_key": "key"}, "--tls-cert and --tls-key belong together"),
        ({"tls_client_ca": "ca"}, "--tls-client-ca asks callers for certificates: set --tls-cert"),
        ({"tls_cert": "nowhere", "tls_key": "key"}, "--tls-cert: cannot read .*nowhere.*: No such file"),
        ({"tls_cert": "cert", "tls_key": "nowhere"}, "--tls-key: cannot read .*nowhere"),
        ({"tls_cert": "key", "tls_key": "cert"}, "are no PEM files of a certificate and its key"),
        ({"tls_cert": "cert", "tls_key": "other key"}, "KEY_VALUES_MISMATCH"),
        ({"tls_cert": "cert", "tls_key": "key", "tls_client_ca": "key"}, "--tls-client-ca .* is no PEM file of cert"),
    ],
)
def test_a_server_is_told_what_is_wrong(signed: Signed, tmp_path: Path, given: dict[str, str], sentence: str) -> None:
    other = sign(tmp_path / "other")
    files = {"ca": signed.ca, "cert": signed.cert, "key": signed.key, "other key": other.key}
    paths = {flag: files.get(name, tmp_path / name) for flag, name in given.items()}
    with pytest.raises(SettingsError, match=sentence):
        server_credentials(SecurityConfig(**paths))


def test_a_caller_is_told_what_is_wrong(signed: Signed, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--tls-ca: cannot read"):
        channel_credentials(SecurityConfig(tls_ca=tmp_path))
    with pytest.raises(SettingsError, match=r"--tls-ca .* is no PEM file of certificates"):
        channel_credentials(SecurityConfig(tls_ca=signed.key))
