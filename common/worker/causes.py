"""Names for the causes of an attempt's end, in logs and metrics."""

from twostroke.v1 import worker_pb2 as pb


def name_of(cause: "pb.Ended.Cause.ValueType") -> str:
    """For example lease_lost, for CAUSE_LEASE_LOST."""
    return pb.Ended.Cause.Name(cause).removeprefix("CAUSE_").lower()
