"""The comparison of KV in 8-bit floats with others, on a short text."""

import json
from pathlib import Path

from benchmarks.kv_cache_dtype import main


def test_what_8_bit_kv_costs(tmp_path: Path) -> None:
    text, out = tmp_path / "text", tmp_path / "out.json"
    text.write_text("A router in front owns every request, and pairs a prefill worker with a decode worker. " * 4)
    assert main(text=text, tokens=70, window=32, dtypes=("float32",), device="cpu", out=out) == 0
    figures = {figure["what"]: figure["measured"].split()[0] for figure in json.loads(out.read_text())["figures"]}
    divergence, same = "divergence from the first (KL), a token", "the same token is likeliest"
    assert (figures[f"float32, KV auto: {divergence}"], figures[f"float32, KV auto: {same}"]) == ("0.0000", "100.0")
    assert 0 < float(figures[f"float32, KV fp8: {divergence}"]) < 0.05
    assert float(figures[f"float32, KV fp8: {same}"]) > 80
