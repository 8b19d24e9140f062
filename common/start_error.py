"""Why a part of a cluster cannot start."""


class StartError(Exception):
    """Its text says in a sentence what is wrong and what to change. The command line prints only that."""


class AddressError(StartError, OSError):
    """An address cannot be listened on."""
