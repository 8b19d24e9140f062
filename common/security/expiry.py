"""When a certificate expires. Python's ssl only tells that of a certificate that a peer has shown in a handshake."""

import ssl
from contextlib import suppress
from pathlib import Path

# OpenSSL's X509_V_FLAG_NO_CHECK_TIME, for which ssl has no name: expired certificates are read, too.
NO_CHECK_TIME = 0x200000


def of(own: ssl.SSLContext, certificate: Path) -> float | None:
    """Seconds since 1970; None for a certificate that callers would never accept.

    Args:
        own: a server's context with the certificate and its key, which asks callers for no certificate.
        certificate: the certificate's file.
    """
    caller = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    caller.check_hostname = False
    caller.load_verify_locations(certificate)
    caller.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | NO_CHECK_TIME
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    calling, called = caller.wrap_bio(back, there), own.wrap_bio(there, back, server_side=True)
    try:
        for side in (calling, called) * 3:
            with suppress(ssl.SSLWantReadError):
                side.do_handshake()
    except ssl.SSLError:
        return None
    shown = calling.getpeercert()
    return ssl.cert_time_to_seconds(str(shown["notAfter"])) if shown else None
