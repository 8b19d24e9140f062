"""Why a model cannot be served. Imports no torch."""

from common.start_error import StartError


class ModelError(StartError, ValueError):
    """A model that cannot be served; the message says why in a sentence."""
