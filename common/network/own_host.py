"""Which host a worker runs on: KV does not leave one, but over transports that cross between hosts."""

from pathlib import Path


def host_id() -> str:
    """The kernel's id of its last boot, which all containers of a host share. Empty if there is none to be read."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""
