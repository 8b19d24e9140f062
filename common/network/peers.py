"""How a part of a cluster listens, how it calls the other parts, and how they know that it is one of theirs."""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import grpc

from common.network import listening
from common.network.addresses import is_unix
from common.security import cluster_secret, tls
from common.security.certificates import Certificates
from common.security.security_config import SecurityConfig
from common.start_error import AddressError

Options = Sequence[tuple[str, int | str]]


@dataclass(frozen=True, slots=True)
class Peers:
    """What a part needs to talk to the others: the cluster's secret and the part's certificates."""

    secret: str | None
    certificates: Certificates
    channel_options: Options

    @classmethod
    def of(cls, config: SecurityConfig) -> Self:
        """Reads the files that `config` names.

        Raises:
            SettingsError: a file is missing or wrong; the sentence names it and its flag.
        """
        return cls(
            secret=None if config.cluster_secret_file is None else cluster_secret.read(config.cluster_secret_file),
            certificates=Certificates(config),
            channel_options=tls.channel_options(config),
        )

    def listen(self, server: grpc.aio.Server, address: str) -> int:
        """Makes `server` listen on `address`, and returns the port.

        Raises:
            AddressError: the address cannot be listened on.
        """
        listening.check(address)
        credentials = tls.server_credentials(self.certificates)
        try:
            if credentials is None:
                return server.add_insecure_port(address)
            return server.add_secure_port(address, credentials)
        except RuntimeError as error:  # it has no details; gRPC has logged the reason
            raise AddressError(f"cannot listen on {address}") from error

    def channel(self, target: str, options: Options) -> grpc.aio.Channel:
        """A channel to another part. It reconnects with the certificates that it was made with, so make a new one for
        each connection."""
        options = [*options, *self.channel_options]
        credentials = tls.channel_credentials(self.certificates.now())
        if credentials is None:
            return grpc.aio.insecure_channel(target, options=options)
        return grpc.aio.secure_channel(target, credentials, options=options)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Metadata that calls to other parts carry."""
        return () if self.secret is None else ((cluster_secret.METADATA_KEY, self.secret),)


def only_local(listen: str) -> bool:
    """Whether only this machine can reach what listens at this address."""
    host = listen.rpartition(":")[0].strip("[]")
    if is_unix(listen) or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
