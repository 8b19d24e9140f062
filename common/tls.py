"""gRPC credentials from a part's PEM files."""

import time

import grpc

from common.certificates import Certificates
from common.pem import Own, Pem
from common.security_config import TlsConfig

# gRPC frees what it had made of the files of before as soon as it is told of new ones, though a connection that another
# thread has accepted may be about to use it, which ends the process: https://github.com/grpc/grpc/issues/36693.
# So such connections first have time to get on. New ones wait meanwhile; streams do not.
PAUSE_SECONDS = 0.5


def server_credentials(certificates: Certificates) -> grpc.ServerCredentials | None:
    """What to listen with at one port, each connection with the certificates of its time; None for plain text."""
    given = certificates.now()
    if given.own is None:
        return None

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        # gRPC calls this before a connection's handshake, on a thread of its own, for one connection after the other.
        nonlocal given
        found = certificates.now()
        if found is given or found.own is None:
            return None
        given = found
        time.sleep(PAUSE_SECONDS)
        return _configuration(found.own, found.client_ca)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(given.own, given.client_ca),
        renewed,  # type: ignore[arg-type]  # its stub does not know that None means no change
        require_client_authentication=given.client_ca is not None,
    )


def channel_credentials(pem: Pem) -> grpc.ChannelCredentials | None:
    """What to call others with; None for plain text."""
    if pem.ca is None:
        return None
    if pem.own is None:
        return grpc.ssl_channel_credentials(pem.ca)
    return grpc.ssl_channel_credentials(pem.ca, pem.own.key, pem.own.certificate)


def channel_options(config: TlsConfig) -> tuple[tuple[str, str], ...]:
    """The options that make a channel's TLS look for `tls_server_name`."""
    if config.tls_ca is None or config.tls_server_name is None:
        return ()
    return (("grpc.ssl_target_name_override", config.tls_server_name),)


def _configuration(own: Own, client_ca: bytes | None) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(own.key, own.certificate)], client_ca)
