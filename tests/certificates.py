"""Certificate authorities of the tests, and what they signed, as the files that settings name."""

from dataclasses import astuple, dataclass
from datetime import datetime
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

    def become(self, other: "Signed") -> None:
        """A renewal: each file is another from now on, one after the other."""
        for mine, renewed in zip(astuple(self), astuple(other), strict=True):
            replace(mine, renewed.read_bytes())


def replace(path: Path, content: bytes) -> None:
    """As careful programs write: whoever reads sees all of it, or what was there before."""
    aside = path.with_suffix(".new")
    aside.write_bytes(content)
    aside.replace(path)


def sign(folder: Path, name: str = "127.0.0.1", not_after: datetime | None = None) -> Signed:
    """A new authority and one certificate."""
    folder.mkdir()
    files = Signed(folder / "ca.pem", folder / "cert.pem", folder / "key.pem")
    authority = trustme.CA()
    certificate = authority.issue_cert(name, not_after=not_after)
    authority.cert_pem.write_to_path(files.ca)
    certificate.private_key_pem.write_to_path(files.key)
    for blob in certificate.cert_chain_pems:
        blob.write_to_path(files.cert, append=True)
    return files
