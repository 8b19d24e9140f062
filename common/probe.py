"""`python -m common.probe HOST:PORT [SERVICE]`: asks a part's health once, for container health checks.

Exits with 0 when grpc.health.v1 says SERVING, else with 1 and a line that says why.
"""

import sys

import grpc
from grpc_health.v1 import health_pb2

TIMEOUT_SECONDS = 3


def probe(address: str, service: str) -> str | None:
    """None when the service at `address` ("host:port") is serving, else a sentence."""
    with grpc.insecure_channel(address) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        try:
            response = check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT_SECONDS)
        except grpc.RpcError as error:
            return f"{address} {service}: {error.code().name}: {error.details()}"
    if response.status == health_pb2.HealthCheckResponse.SERVING:
        return None
    return f"{address} {service}: {health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)}"


def main() -> None:
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    sys.exit(probe(sys.argv[1], sys.argv[2] if len(sys.argv) == 3 else ""))


if __name__ == "__main__":
    main()
