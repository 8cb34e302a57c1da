"""Damaged cards, plans, graphs, parameters and scans under sanitizers, and what finds them."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

RUNS, SECONDS = 20_000, 60
LIBFUZZER_SECONDS = int(os.environ.get("QSM_FUZZ_SECONDS", "20"))


@pytest.mark.slow
def test_at_random(
    build_fake: Callable[..., Path],
    drive: Callable[..., str],
    fake_models: Path,
    note_counts: Callable[..., None],
) -> None:
    fuzz = build_fake("address,undefined", source="fuzz.cpp")
    cards = [
        fake_models / f"{name}.onnx"
        for name in ("cnn", "tkd", "priors", "eroded", "lps", "total", "tiles", "axial", "nan")
    ]
    models = [str(path) for path in (*cards, fake_models / "both.plan")]
    said = drive(fuzz, str(fake_models), str(RUNS), str(SECONDS), *models)
    runs, refused, opened, mapped = map(int, said.split())
    assert runs > RUNS // 20, "so slow that it shows nothing"
    assert refused > runs // 4
    assert opened > mapped > runs // 20
    what = "cards, parameters and scans in the C library"
    note_counts(what, inputs=runs, refused=refused, other=opened)


@pytest.mark.slow
def test_where_coverage_leads(
    libfuzzer: Path,
    drive: Callable[..., str],
    fake_models: Path,
    prior_model: Path,
    tmp_path: Path,
    note_counts: Callable[..., None],
) -> None:
    seeds, corpus = tmp_path / "seeds", tmp_path / "corpus"
    seeds.mkdir()
    corpus.mkdir()
    for path in (*fake_models.glob("*.onnx"), *fake_models.glob("*.plan"), prior_model):
        for n in range(8):
            (seeds / f"{n}-{path.name}").write_bytes(bytes([n, 0, 0, 0]) + path.read_bytes())
    # the memory that it sees is its parent's peak, too
    limits = ("-max_len=8192", "-len_control=0", "-timeout=60", "-seed=1")
    limits += ("-rss_limit_mb=0", "-malloc_limit_mb=1024")
    limits += (f"-max_total_time={LIBFUZZER_SECONDS}", f"-artifact_prefix={tmp_path}/")
    there = ("sh", "-c", 'cd "$0" && exec "$@" 2>&1', str(tmp_path))
    said = drive(libfuzzer, *limits, str(corpus), str(seeds), before=there)
    assert int(re.findall(r"cov: (\d+)", said)[-1]) > 1000, said
    runs = int(re.findall(r"Done (\d+) runs", said)[-1])
    note_counts("the same, led by coverage", inputs=runs)
