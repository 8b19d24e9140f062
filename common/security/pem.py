"""PEM files of certificates, checked as they are read, because gRPC says little about a wrong file."""

import ssl
from dataclasses import dataclass
from pathlib import Path

from common.security import expiry
from common.security.security_config import SecurityConfig, SettingsError, TlsConfig


@dataclass(frozen=True, slots=True)
class Own:
    """A certificate and its key, found to belong together."""

    certificate: bytes
    key: bytes
    expires: float | None
    """As `expiry.of`."""


@dataclass(frozen=True, slots=True)
class Pem:
    """What the files hold; None for those that are not set."""

    own: Own | None
    ca: bytes | None
    client_ca: bytes | None
    context: ssl.SSLContext | None
    """For servers other than gRPC's."""


def read(config: TlsConfig) -> Pem:
    """Reads and checks the files that `config` names.

    Raises:
        SettingsError: a file is missing, unreadable or not what it should be, or one is set without another.
        OSError: a file went away while it was read.
    """
    own, context = _own(config)
    client_ca = config.tls_client_ca if isinstance(config, SecurityConfig) else None
    if client_ca is not None:
        if context is None:
            raise SettingsError("--tls-client-ca asks callers for certificates: set --tls-cert and --tls-key, too")
        context.verify_mode = ssl.CERT_REQUIRED
    return Pem(
        own=own,
        ca=_authorities("--tls-ca", config.tls_ca, ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)),
        client_ca=_authorities("--tls-client-ca", client_ca, context),
        context=context,
    )


def _own(config: TlsConfig) -> tuple[Own, ssl.SSLContext] | tuple[None, None]:
    match config.tls_cert, config.tls_key:
        case None, None:
            return None, None
        case Path() as certificate, Path() as key:
            content = _read("--tls-cert", certificate), _read("--tls-key", key)
            for flag, path, text in zip(("--tls-cert", "--tls-key"), (certificate, key), content, strict=True):
                if b"-----BEGIN " not in text:
                    raise SettingsError(f"{flag} {path} is no PEM file")
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            try:
                # Without a password, Python would ask for that of an encrypted key at the terminal.
                context.load_cert_chain(certificate, key, password="")
            except ssl.SSLError as error:
                reason = error.reason or "is there a password on the key?"
                raise SettingsError(
                    f"--tls-cert {certificate} and --tls-key {key} are no PEM files of a certificate and its key: "
                    f"{reason}"
                ) from error
            return Own(*content, expiry.of(context, certificate)), context
    raise SettingsError("--tls-cert and --tls-key belong together: set both or none")


def _authorities(flag: str, path: Path | None, trusting: ssl.SSLContext | None) -> bytes | None:
    if path is None or trusting is None:
        return None
    content = _read(flag, path)
    try:
        trusting.load_verify_locations(path)
    except ssl.SSLError as error:
        raise SettingsError(f"{flag} {path} is no PEM file of certificates: {error.reason}") from error
    return content


def _read(flag: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{flag}: cannot read {path}: {error.strerror}") from error
