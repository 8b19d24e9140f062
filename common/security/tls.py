"""gRPC credentials from a part's PEM files."""

import time

import grpc

from common.security.certificates import Certificates
from common.security.pem import Own, Pem
from common.security.security_config import TlsConfig

# When gRPC is given new certificates it frees the old ones at once, although a connection that another thread has
# accepted may be about to use them; then the process crashes: https://github.com/grpc/grpc/issues/36693. So such
# connections get some time first. New connections wait meanwhile; streams do not.
PAUSE_SECONDS = 0.5


def server_credentials(certificates: Certificates) -> grpc.ServerCredentials | None:
    """Credentials of a server, which shows each connection the current certificates; None for plain text."""
    given = certificates.now()
    if given.own is None:
        return None

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        # gRPC calls this before each connection's handshake, on one of its threads, one call at a time.
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
    """Credentials for calling others; None for plain text."""
    if pem.ca is None:
        return None
    if pem.own is None:
        return grpc.ssl_channel_credentials(pem.ca)
    return grpc.ssl_channel_credentials(pem.ca, pem.own.key, pem.own.certificate)


def channel_options(config: TlsConfig) -> tuple[tuple[str, str], ...]:
    """Channel options that expect `tls_server_name` in the other side's certificate."""
    if config.tls_ca is None or config.tls_server_name is None:
        return ()
    return (("grpc.ssl_target_name_override", config.tls_server_name),)


def _configuration(own: Own, client_ca: bytes | None) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(own.key, own.certificate)], client_ca)
