"""Values of a config.json, checked. All raise ModelError for one of another type or size. Imports no torch."""

from typing import Any

from common.model.model_error import ModelError

# Largest size and largest number in a config.json: far above those of any model, and small enough to do no harm.
MOST = 1 << 26
_LARGEST = 1e30


def positive(raw: dict[str, Any], key: str, default: int | None = None) -> int:
    """A whole number; where there is none, or null, the default."""
    value = raw.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ModelError(f"config.json must give {key} as a positive whole number; it gives {value!r}")
    if value > MOST:
        raise ModelError(f"config.json gives {key} as {value}, which no model has; at most {MOST} is supported")
    return value


def number(raw: dict[str, Any], key: str, default: float | None = None) -> float:
    """A number; where there is none, or null, the default."""
    value = raw.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < _LARGEST:
        raise ModelError(f"config.json must give {key} as a positive number; it gives {value!r}")
    return float(value)


def object_of(raw: dict[str, Any], key: str) -> dict[str, Any]:
    """An object; where there is none, or null, an empty one."""
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise ModelError(f"config.json must give {key} as an object; it gives {value!r}")
    return value
