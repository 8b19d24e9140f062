"""gRPC channel and server options that the parts share."""


def keepalive(seconds: int) -> tuple[tuple[str, int], ...]:
    """A peer that is stopped or cut off is noticed within twice as many seconds, even when no call is under way."""
    milliseconds = 1_000 * seconds
    return (
        ("grpc.keepalive_time_ms", milliseconds),
        ("grpc.keepalive_timeout_ms", milliseconds),
        # Of any ping: keepalive sends none of its own while another is out, and for that gRPC would wait a minute.
        ("grpc.http2.ping_timeout_ms", milliseconds),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
    )


# Between the parts. What a worker loses is resumed elsewhere: the sooner the better.
PEERS = keepalive(2)
# From the router to its callers. Nothing brings back their answers, and their machines may be busy for a moment.
CALLERS = keepalive(5)
