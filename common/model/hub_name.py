"""Names of models on the Hugging Face hub: ORG/NAME, or ORG/NAME@REVISION."""

import os
import re
from dataclasses import dataclass

_FORM = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w.-]*(/\w[\w.-]*)*))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class HubName:
    repository: str  # ORG/NAME
    revision: str | None = None  # a branch, a tag or a commit; None: the default branch

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}" if self.revision else self.repository


def parse(model: str) -> HubName | None:
    """What `--model` means as a name on the hub; None if it has another form, or there is anything at such a path on
    this machine, which always wins."""
    match = _FORM.fullmatch(model)
    if match is None or not _is_absent(model):
        return None
    return HubName(match["repository"], match["revision"])


def public_name(model: str) -> str:
    """What callers are told that is served: of a model on the hub ORG/NAME, else `--model` as it is."""
    name = parse(model)
    return name.repository if name else model


def _is_absent(path: str) -> bool:
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:  # nobody may look there, or the like, which model_files then says
        return False
    return False
