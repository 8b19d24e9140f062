"""`twostroke key`: a new API key."""

import sys
from typing import Annotated

from cyclopts import Parameter

from cli.options import errors_as_exit


def key(name: Annotated[str, Parameter(show_env_var=False)], /) -> None:
    """
    Parameters
    ----------
    name
        Whose key it is: up to 64 letters, digits, - and _.
    """
    from router.callers.api_keys import make

    made, lines = make(name)
    with errors_as_exit():
        print(lines)
    print(f"The key, which is shown only now: {made}", file=sys.stderr)
