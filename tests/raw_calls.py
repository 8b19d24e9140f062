"""Calls over HTTP/2 as the bytes that they are, for servers that are sent what no client sends."""

import struct
from collections.abc import Mapping

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RESET, SETTINGS, PUSH, PING, GOAWAY, WINDOW, CONTINUATION = range(10)
END_STREAM, END_HEADERS = 1, 4
NOTHING: Mapping[str, str] = {}
NO_UTF8 = "/twostroke.v1.Inference/\udcff"  # ends a grpc.aio server of grpcio 1.84 and 1.85


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def headers(metadata: Mapping[str, str] = NOTHING, **fields: str) -> bytes:
    """A header block, every field spelled out as a literal that is not indexed (RFC 7541, section 6.2.2)."""
    named = {f":{name}": value for name, value in fields.items()} | {
        "te": "trailers",
        "content-type": "application/grpc",
        **metadata,
    }
    return b"".join(
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode(errors="surrogateescape")
        for name, value in named.items()
    )


def call(body: bytes, path: str = "/twostroke.v1.Inference/Generate", metadata: Mapping[str, str] = NOTHING) -> bytes:
    """All that a client sends for one call, as bytes: `body` in place of the length-prefixed message."""
    block = headers(metadata, method="POST", scheme="http", path=path, authority="localhost")
    return (
        PREFACE + frame(SETTINGS, 0, 0, b"") + frame(HEADERS, END_HEADERS, 1, block) + frame(DATA, END_STREAM, 1, body)
    )
