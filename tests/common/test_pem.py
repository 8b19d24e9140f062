"""Files that are wrong are named, with their flag, before anything listens or calls."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from common.security.pem import Own, read
from common.security.security_config import SecurityConfig, SettingsError, TlsConfig
from tests.certificates import Signed, sign

THEN = datetime(2031, 2, 3, 4, 5, 6)


@pytest.fixture
def signed(tmp_path: Path) -> Signed:
    return sign(tmp_path / "signed", not_after=THEN)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"tls_cert": "cert"}, "--tls-cert and --tls-key belong together"),
        ({"tls_key": "key"}, "--tls-cert and --tls-key belong together"),
        ({"tls_client_ca": "ca"}, "--tls-client-ca asks callers for certificates: set --tls-cert"),
        ({"tls_cert": "nowhere", "tls_key": "key"}, "--tls-cert: cannot read .*nowhere.*: No such file"),
        ({"tls_cert": "cert", "tls_key": "nowhere"}, "--tls-key: cannot read .*nowhere"),
        ({"tls_cert": "key", "tls_key": "cert"}, "are no PEM files of a certificate and its key"),
        ({"tls_cert": "no pem", "tls_key": "key"}, "--tls-cert .*no pem is no PEM file$"),
        ({"tls_cert": "cert", "tls_key": "no pem"}, "--tls-key .*no pem is no PEM file$"),
        ({"tls_cert": "cert", "tls_key": "other key"}, "KEY_VALUES_MISMATCH"),
        ({"tls_cert": "cert", "tls_key": "locked"}, "and its key: (is there a password on the key|BAD_PASSWORD_READ)"),
        ({"tls_cert": "cert", "tls_key": "key", "tls_client_ca": "key"}, "--tls-client-ca .* is no PEM file of cert"),
        ({"tls_ca": "."}, "--tls-ca: cannot read"),
        ({"tls_ca": "key"}, "--tls-ca .* is no PEM file of certificates"),
    ],
)
def test_what_is_wrong_is_said(signed: Signed, tmp_path: Path, given: dict[str, str], sentence: str) -> None:
    other = sign(tmp_path / "other")
    (tmp_path / "no pem").write_text("[alice]\n")
    (tmp_path / "locked").write_bytes(locked(signed.key.read_bytes()))
    files = {"ca": signed.ca, "cert": signed.cert, "key": signed.key, "other key": other.key}
    paths: dict[str, Any] = {flag: files.get(name, tmp_path / name) for flag, name in given.items()}
    with pytest.raises(SettingsError, match=sentence):
        read(SecurityConfig(**paths))


def locked(key: bytes) -> bytes:
    how = serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"word")
    return serialization.load_pem_private_key(key, None).private_bytes(serialization.Encoding.PEM, *how)


def test_commands_have_no_callers(signed: Signed) -> None:
    found = read(TlsConfig(tls_ca=signed.ca, tls_cert=signed.cert, tls_key=signed.key))
    assert (found.ca, found.client_ca) == (signed.ca.read_bytes(), None)


@pytest.mark.parametrize("year", [2001, 2031, 2071])
def test_it_is_known_when_a_certificate_expires(tmp_path: Path, year: int) -> None:
    """Also of one that has."""
    then = THEN.replace(year=year)
    signed = sign(tmp_path / "signed", not_after=then)
    found = read(SecurityConfig(tls_cert=signed.cert, tls_key=signed.key, tls_client_ca=signed.ca))
    assert found.own == Own(signed.cert.read_bytes(), signed.key.read_bytes(), then.replace(tzinfo=UTC).timestamp())


def test_a_certificate_for_callers_only_is_read_all_the_same(tmp_path: Path) -> None:
    """Python does not tell when it expires."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, datetime(2001, 1, 1), THEN)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (tmp_path / "cert").write_bytes(certificate.public_bytes(pem))
    (tmp_path / "key").write_bytes(key.private_bytes(pem, *plain))
    own = read(TlsConfig(tls_cert=tmp_path / "cert", tls_key=tmp_path / "key")).own
    assert own is not None
    assert own.expires is None
