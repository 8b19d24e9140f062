"""How large a router's messages to a worker are. gRPC has one limit for all services of a port, and health is open to
whoever reaches a worker's."""

# A router begins another message behind one that has so many bytes.
FULL_BYTES = 4 << 20

# What is said of one sequence apart from its tokens: its grammar above all.
_OTHER_BYTES = 8 << 20

# Of a token: its id, its share of the blocks' hashes, and of where their KV is.
_TOKEN_BYTES = 40


def most_bytes(max_length: int) -> int:
    """The largest message to a worker whose sequences have up to `max_length` tokens: one that is nearly full, and one
    more sequence."""
    return FULL_BYTES + _OTHER_BYTES + _TOKEN_BYTES * max_length
