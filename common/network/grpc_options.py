"""gRPC channel and server options that the parts share."""


def keepalive(seconds: int) -> tuple[tuple[str, int], ...]:
    """Options that notice a stopped or unreachable peer within twice as many seconds, even if no call is under way."""
    milliseconds = 1_000 * seconds
    return (
        ("grpc.keepalive_time_ms", milliseconds),
        ("grpc.keepalive_timeout_ms", milliseconds),
        # For other pings, too: keepalive sends none while one of those is out, and gRPC would wait a minute for it.
        ("grpc.http2.ping_timeout_ms", milliseconds),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
    )


# Not through the proxy that http_proxy names: it is for what is outside.
DIRECT = (("grpc.enable_http_proxy", 0),)

# Between the parts. A lost worker's requests are resumed elsewhere: the sooner the better.
PEERS = (*keepalive(2), *DIRECT)
# From the router to its callers. A lost call is not resumed, and a caller's machine may be busy for a moment.
CALLERS = keepalive(5)
