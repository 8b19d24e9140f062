"""Certificate authorities of the tests, and what they signed, as the files that settings name."""

from dataclasses import dataclass
from pathlib import Path

import grpc
import trustme


@dataclass(frozen=True, slots=True)
class Signed:
    """PEM files: an authority, and a certificate of it for `name`."""

    ca: Path
    cert: Path
    key: Path

    def channel_credentials(self, own: bool = False) -> grpc.ChannelCredentials:
        """What trusts the authority; with `own`, it shows the certificate when asked."""
        if not own:
            return grpc.ssl_channel_credentials(self.ca.read_bytes())
        return grpc.ssl_channel_credentials(self.ca.read_bytes(), self.key.read_bytes(), self.cert.read_bytes())


def sign(folder: Path, name: str = "127.0.0.1") -> Signed:
    """A new authority and one certificate."""
    folder.mkdir()
    files = Signed(folder / "ca.pem", folder / "cert.pem", folder / "key.pem")
    authority = trustme.CA()
    certificate = authority.issue_cert(name)
    authority.cert_pem.write_to_path(files.ca)
    certificate.private_key_pem.write_to_path(files.key)
    for blob in certificate.cert_chain_pems:
        blob.write_to_path(files.cert, append=True)
    return files
