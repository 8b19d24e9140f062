import gc
import subprocess
import sys
from pathlib import Path

from common import garbage

ROOT = Path(__file__).parents[2]


def test_imports_are_not_looked_through_then_nor_later() -> None:
    before = gc.get_freeze_count()
    try:
        with garbage.none_in_imports():
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > before
    finally:
        gc.unfreeze()


def test_a_part_does_not_import_what_only_unpacking_the_embedded_model_takes() -> None:
    program = "import sys, router.main; print(*sys.modules)"
    path = f"{ROOT}:{ROOT / 'protos'}"
    ran = subprocess.run([sys.executable, "-c", program], env={"PYTHONPATH": path}, check=True, capture_output=True)
    modules = set(ran.stdout.decode().split())
    assert "common.model_files" in modules
    assert modules.isdisjoint({"gguf", "common.gguf_import"})
