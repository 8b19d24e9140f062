"""gRPC credentials from PEM files that were checked before: gRPC itself says little about a file that is wrong."""

import ssl
from pathlib import Path

import grpc

from common.security_config import SecurityConfig, SettingsError, TlsConfig


def server_credentials(config: SecurityConfig) -> grpc.ServerCredentials | None:
    """What to listen with; None for plain text.

    Raises:
        SettingsError: a file is missing, unreadable or not what it should be, or one is given without another.
    """
    pair = _own_certificate(config)
    if pair is None:
        if config.tls_client_ca is not None:
            raise SettingsError("--tls-client-ca asks callers for certificates: set --tls-cert and --tls-key, too")
        return None
    certificate, key = pair
    authorities = None if config.tls_client_ca is None else _authorities("--tls-client-ca", config.tls_client_ca)
    return grpc.ssl_server_credentials([(key, certificate)], authorities, require_client_auth=authorities is not None)


def channel_credentials(config: TlsConfig) -> grpc.ChannelCredentials | None:
    """What to call others with; None for plain text.

    Raises:
        SettingsError: as `server_credentials`.
    """
    pair = _own_certificate(config)
    if config.tls_ca is None:
        return None
    authorities = _authorities("--tls-ca", config.tls_ca)
    certificate, key = pair or (None, None)
    return grpc.ssl_channel_credentials(authorities, key, certificate)


def channel_options(config: TlsConfig) -> tuple[tuple[str, str], ...]:
    """The options that make a channel's TLS look for `tls_server_name`."""
    if config.tls_ca is None or config.tls_server_name is None:
        return ()
    return (("grpc.ssl_target_name_override", config.tls_server_name),)


def _own_certificate(config: TlsConfig) -> tuple[bytes, bytes] | None:
    """Certificate and key, found to belong together."""
    match config.tls_cert, config.tls_key:
        case None, None:
            return None
        case Path() as certificate, Path() as key:
            content = _read("--tls-cert", certificate), _read("--tls-key", key)
            try:
                # The password is for keys that are encrypted, for which Python would ask at the terminal.
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
            except ssl.SSLError as error:
                reason = error.reason or "is there a password on the key?"
                raise SettingsError(
                    f"--tls-cert {certificate} and --tls-key {key} are no PEM files of a certificate and its key: "
                    f"{reason}"
                ) from error
            return content
    raise SettingsError("--tls-cert and --tls-key belong together: set both or none")


def _authorities(flag: str, path: Path) -> bytes:
    content = _read(flag, path)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError as error:
        raise SettingsError(f"{flag} {path} is no PEM file of certificates: {error.reason}") from error
    return content


def _read(flag: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{flag}: cannot read {path}: {error.strerror}") from error
