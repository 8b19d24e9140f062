"""How the causes of an attempt's end are called in logs and metrics."""

from twostroke.v1 import worker_pb2 as pb


def name_of(cause: "pb.Ended.Cause.ValueType") -> str:
    """CAUSE_LEASE_LOST is lease_lost."""
    return pb.Ended.Cause.Name(cause).removeprefix("CAUSE_").lower()
