"""`python -m common.probe HOST:PORT [SERVICE]`: asks once for a part's health, for health checks of containers.

Exits with 0 if grpc.health.v1 says SERVING, else with 1 and a line that says why. For a part that serves TLS, it takes
the TLS settings from the environment (TWOSTROKE_TLS_CA and so on), as the part itself does.
"""

import os
import sys
from dataclasses import fields
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2

from common.network.grpc_options import DIRECT
from common.security import pem, tls
from common.security.security_config import SettingsError, TlsConfig

TIMEOUT_SECONDS = 3
PLAIN_TEXT = TlsConfig()


def service_of_process(pid: int) -> str:
    """The service name under which a router's health speaks for this one process. Whoever started it can so tell it
    from another router at the same address."""
    return f"process {pid}"


def probe(address: str, service: str, config: TlsConfig = PLAIN_TEXT) -> str | None:
    """None if the service at `address` ("host:port") is SERVING, else a sentence that says why not."""
    asked = f"{address} {service}".rstrip()
    credentials, options = tls.channel_credentials(pem.read(config)), [*tls.channel_options(config), *DIRECT]
    with (
        grpc.secure_channel(address, credentials, options) if credentials else grpc.insecure_channel(address, options)
    ) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        try:
            response = check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT_SECONDS)
        except grpc.RpcError as error:
            return f"{asked}: {error.code().name}: {error.details()}"
    if response.status == health_pb2.HealthCheckResponse.SERVING:
        return None
    return f"{asked}: {health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)}"


def main() -> None:
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    found = {field.name: os.environ.get(f"TWOSTROKE_{field.name.upper()}") for field in fields(TlsConfig)}
    paths = {name: Path(value) for name, value in found.items() if value and name != "tls_server_name"}
    try:
        config = TlsConfig(**paths, tls_server_name=found["tls_server_name"])
        sys.exit(probe(sys.argv[1], sys.argv[2] if len(sys.argv) == 3 else "", config))
    except SettingsError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
