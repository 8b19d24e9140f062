"""Makes the Python stubs of protos/twostroke/v1, or says with --check which of them have drifted from the protos."""

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent
PACKAGE = Path("twostroke/v1")
GENERATED = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


def compile_protos(target: Path) -> None:
    """Writes the stubs of every proto under `target`."""
    # protoc looks for mypy-protobuf's plugins on PATH, where a virtual environment that is not activated is missing.
    path = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", "")))
    protos = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / PACKAGE).glob("*.proto"))
    outputs = [f"--{kind}_out={target}" for kind in ("python", "grpc_python")]
    outputs += [f"--{kind}_out=quiet:{target}" for kind in ("mypy", "mypy_grpc")]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT}", *outputs, *protos]
    subprocess.run(command, env=os.environ | {"PATH": path}, check=True)


def stubs(root: Path) -> dict[str, bytes]:
    """The content of every generated file under `root`, by name."""
    return {path.name: path.read_bytes() for pattern in GENERATED for path in (root / PACKAGE).glob(pattern)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; fail if the stubs are not those of the protos"
    )
    check = parser.parse_args().check
    present = stubs(ROOT)
    with tempfile.TemporaryDirectory() as target:
        compile_protos(Path(target))
        wanted = stubs(Path(target))
    drifted = sorted(name for name in wanted.keys() | present.keys() if wanted.get(name) != present.get(name))
    if check and drifted:
        sys.exit(f"stubs are not those of the protos: {', '.join(drifted)}. Run: make protos")
    if not check:
        for name in drifted:
            path = ROOT / PACKAGE / name
            if name in wanted:
                path.write_bytes(wanted[name])
            else:
                path.unlink()
            print(f"{path.relative_to(ROOT)} {'written' if name in wanted else 'removed'}")


if __name__ == "__main__":
    main()
