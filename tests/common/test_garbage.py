import gc
import subprocess
import sys
from pathlib import Path

from common import garbage

ROOT = Path(__file__).parents[2]


def test_imports_are_not_looked_through_then_nor_later() -> None:
    with garbage.none_in_imports():
        assert not gc.isenabled()
        imported: list[list[int]] = [[]]
    assert gc.isenabled()
    assert not any(kept is imported for kept in gc.get_objects())


def test_a_part_does_not_import_what_only_unpacking_the_embedded_model_takes() -> None:
    program = "import sys, router.main; print(*sys.modules)"
    path = f"{ROOT}:{ROOT / 'protos'}"
    ran = subprocess.run([sys.executable, "-c", program], env={"PYTHONPATH": path}, check=True, capture_output=True)
    modules = set(ran.stdout.decode().split())
    assert "common.model.model_files" in modules
    assert modules.isdisjoint({"gguf", "common.model.gguf_import"})
