import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

PROTOS = Path(__file__).parents[2] / "protos"

BUILD = "import sys; from setuptools import build_meta; build_meta.build_editable(sys.argv[1])"
FIND = """
import site, sys
from importlib.util import find_spec
site.addsitedir(sys.argv[1])
print(find_spec("twostroke").origin)
"""


def test_a_clone_called_twostroke_does_not_hide_the_client(tmp_path: Path) -> None:
    """Where it is in the working directory, and the client installed in it with --editable."""
    protos, site = tmp_path / "twostroke" / "protos", tmp_path / "site"
    shutil.copytree(PROTOS, protos, ignore=shutil.ignore_patterns("*.egg-info", "build", "__pycache__"))
    subprocess.run([sys.executable, "-c", BUILD, tmp_path], cwd=protos, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # -S: not what is installed in this environment
    command: list[str | Path] = [sys.executable, "-S", "-c", FIND, site]
    found = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    assert found.stdout.strip() == str(protos / "twostroke" / "__init__.py")
