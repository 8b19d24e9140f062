"""`python -m common.model.download`: fetches the model in TWOSTROKE_MODEL, for containers with no way to the hub."""

import os
import sys

from common import signals
from common.model.model_files import EMBEDDED, resolve
from common.start_error import StartError
from common.telemetry import logs


def main() -> None:
    logs.configure("json" if os.environ.get("TWOSTROKE_LOG_FORMAT") == "json" else "people")
    signals.end_in_order()  # so that no half of a file is left behind
    try:
        resolve(os.environ.get("TWOSTROKE_MODEL", EMBEDDED))
    except StartError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
