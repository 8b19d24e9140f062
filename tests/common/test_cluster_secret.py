"""What the side that has the secret says of those that have it not."""

import grpc
import pytest
from grpc_health.v1 import health, health_pb2_grpc
from structlog.testing import capture_logs

from common.security import cluster_secret
from common.security.cluster_secret import SecretInterceptor
from tests.health import check


@pytest.mark.parametrize(("again", "told"), [(600.0, 1), (0.0, 3)])
async def test_refused_calls_of_a_host_are_told_once_in_a_while(
    monkeypatch: pytest.MonkeyPatch, again: float, told: int
) -> None:
    monkeypatch.setattr(cluster_secret, "TELL_AGAIN_SECONDS", again)
    server = grpc.aio.server(interceptors=[SecretInterceptor(health.SERVICE_NAME, "s" * 16, "not the same secret")])
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    with capture_logs() as logs:
        for _ in range(3):
            options = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own, as each try of a worker has
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await check(channel)
            assert refused.value.details() == "not the same secret"
    await server.stop(None)
    lines = [entry for entry in logs if entry["event"] == "call refused"]
    assert [(line["peer"], line["reason"]) for line in lines] == [("ipv4:127.0.0.1", "not the same secret")] * told
