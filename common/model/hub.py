"""Models of the Hugging Face hub, downloaded into its own cache: what is read of them, and no more."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import structlog
from huggingface_hub import constants, get_cached_repo_tree, hf_hub_download, is_offline_mode, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tqdm.auto import tqdm

from common.model import checkpoint
from common.model.hub_name import HubName
from common.model.model_config import load_config
from common.model.model_error import ModelError

log = structlog.get_logger(__name__)

# What routers and workers read beside the weights.
_SMALL_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
    checkpoint.INDEX,
]


def download(name: HubName, *, weights: bool) -> Path:
    """The Hugging Face directory of a model in the hub's cache, called by its commit; what is not there yet is
    downloaded. A model that is not supported is refused before its weights come. The hub's own variables count:
    HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT and others.

    Args:
        name: of the model.
        weights: False leaves them out.

    Raises:
        ModelError: the model cannot be had, is not supported, or has no safetensors.
    """
    with _told(name):
        directory = Path(
            snapshot_download(name.repository, revision=name.revision, allow_patterns=_SMALL_FILES, tqdm_class=_NoBar)
        )
    for file in ("config.json", "tokenizer.json"):
        if not (directory / file).exists():
            raise ModelError(f"{name} has no {file}, which every model that can be served has")
    load_config(directory, to_run=False)
    for file in _missing_weights(name, directory) if weights else []:
        log.info("downloading weights", model=str(name), file=file)
        # One after another on this thread: with snapshot_download's threads, Ctrl-C would wait for whole files.
        with _told(name):
            hf_hub_download(name.repository, file, revision=directory.name)
    return directory


class _NoBar(tqdm):  # type: ignore[type-arg]  # it takes them in its stubs only
    """Small files come too quickly to be watched."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options | {"disable": True})


def _missing_weights(name: HubName, directory: Path) -> list[str]:
    try:
        listed = {file.path for file in get_cached_repo_tree(name.repository, revision=directory.name)}
    except CachedRepoTreeNotFoundError:  # offline, and an older client has left no list: what is there must do
        return []
    files = checkpoint.names(directory, listed.__contains__)
    if not listed.issuperset(files):
        raise ModelError(f"{name} lacks files of weights in the safetensors format, and no other is read")
    return [file for file in files if not (directory / file).exists()]


@contextmanager
def _told(name: HubName) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # huggingface_hub's own, httpx2's, hf_xet's, the operating system's
        raise ModelError(_sentence(name, error)) from error


def _sentence(name: HubName, error: Exception) -> str:
    hub, cause = constants.ENDPOINT, str(error.__cause__ or error).partition("\n")[0]
    match error:
        case HFValidationError():
            return f"'{name}' is no directory here, and cannot be the name of a model on {hub}"
        case GatedRepoError():
            return (
                f"{name} is only for those who have accepted its terms: accept them at {hub}/{name.repository}, and "
                "set HF_TOKEN to a token of yours"
            )
        case RepositoryNotFoundError():
            return (
                f"'{name}' is no directory here, and {hub} shows no such model: check the name, and set HF_TOKEN if "
                "the model is private"
            )
        case RevisionNotFoundError():
            return f"{hub}/{name.repository} has no branch, tag or commit {name.revision!r}"
        case HfHubHTTPError() if error.response.status_code == 401:
            return f"{hub} does not accept the token in HF_TOKEN, or that of `hf auth login`"
        case LocalEntryNotFoundError() if is_offline_mode():
            return (
                f"{name} is not, or not completely, in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids to "
                "download it: unset that, or name a local directory"
            )
        case LocalEntryNotFoundError():
            return (
                f"'{name}' is no directory here, and as a model on {hub} it cannot be downloaded ({cause}): check the "
                "network, or name a local directory"
            )
        case OSError(errno=int()):
            return (
                f"cannot keep {name} in {constants.HF_HUB_CACHE}: {error.strerror}; HF_HOME can name another directory"
            )
        case _:
            return f"the download of {name} broke off ({cause}); start again: files that have come are kept"
