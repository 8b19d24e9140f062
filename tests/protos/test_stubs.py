import subprocess
import sys
from pathlib import Path

PROTOS = Path(__file__).parents[2] / "protos"


def test_stubs_are_those_of_the_protos() -> None:
    check = subprocess.run(
        [sys.executable, PROTOS / "generate.py", "--check"], check=False, capture_output=True, text=True
    )
    assert check.returncode == 0, check.stderr


def test_the_client_imports_nothing_heavy() -> None:
    program = "import sys; sys.path.insert(0, sys.argv[1]); import twostroke; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-I", "-c", program, PROTOS], capture_output=True, text=True, check=True)
    imported = set(run.stdout.split())
    assert "twostroke" in imported
    assert imported.isdisjoint({"torch", "transformers", "tokenizers", "numpy", "structlog"})
