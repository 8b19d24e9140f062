"""`python -m common.model.download`: fetches the model in TWOSTROKE_MODEL, for containers with no way to the hub."""

import os
import sys

from common.model.model_files import EMBEDDED, resolve
from common.start_error import StartError


def main() -> None:
    try:
        resolve(os.environ.get("TWOSTROKE_MODEL", EMBEDDED))
    except StartError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
