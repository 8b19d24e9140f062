"""Settings of who may talk to whom, for the parts of a cluster and, in `TlsConfig`, for commands that call a router."""

from dataclasses import dataclass
from pathlib import Path

from common.start_error import StartError


class SettingsError(StartError, ValueError):
    """A setting is wrong; the sentence says which, and what would be right."""


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """How TLS is spoken with whatever is called."""

    tls_ca: Path | None = None
    """PEM file of the authorities that sign the certificates of what is called. Set: it is called with TLS."""

    tls_cert: Path | None = None
    """PEM file of this part's certificate and those between it and its authority. A part with one serves TLS only; a
    caller presents it when asked."""

    tls_key: Path | None = None
    """PEM file of that certificate's private key."""

    tls_server_name: str | None = None
    """Name in the certificates of what is called. Not set: the host that is called."""


@dataclass(frozen=True, slots=True)
class SecurityConfig(TlsConfig):
    """What every part of a cluster has: how it calls, and whom it lets in."""

    tls_client_ca: Path | None = None
    """PEM file of the authorities that sign callers' certificates. Set: nobody is served without one (mutual TLS)."""

    cluster_secret_file: Path | None = None
    """File of a secret that all routers and workers of a cluster have: they let in only one another. Make it with:
    openssl rand -hex 32"""
