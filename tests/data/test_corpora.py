"""What `--corpus` accepts, and the same text on every machine, process, folder and locale."""

import os
import subprocess
import sys

import pytest

from effjax.data import ArrayLoader, ByteTokenizer, load, pack_corpus
from effjax.data.corpora import CORPORA
from effjax.errors import ConfigError, DataError


def test_every_named_corpus_loads_splits_and_repeats():
    for name in CORPORA:
        corpus = load(name, 100_000)
        assert corpus.name == name
        assert corpus.bytes == 100_000
        assert corpus.digest == load(name, 100_000).digest
        train, held = corpus.split()
        assert train.bytes + held.bytes == corpus.bytes
        assert held.bytes


@pytest.mark.parametrize(
    ("spec", "nearest"),
    [("pyhton", "'python'"), ("python-topic", "'python-topics'"), ("tfds", "'tfds:NAME'")],
)
def test_a_typo_names_the_nearest(spec, nearest):
    with pytest.raises(DataError, match=rf"'{spec}': no such .* did you mean {nearest}\?"):
        load(spec)


def test_files_and_limits(tmp_path, monkeypatch):
    (tmp_path / "python").write_text("a file of that name")
    monkeypatch.chdir(tmp_path)
    assert load("./python").bytes == 19
    assert load("python", 10).documents[0].name == "__future__.py"
    assert load(str(tmp_path), 6).bytes == 6
    for limit in (0, -1):
        with pytest.raises(ConfigError, match=f"limit_bytes must be at least 1, got {limit}"):
            load("python", limit)


FINGERPRINT = """
import hashlib, json, sys
from jax._src import xla_bridge
from effjax.data import ArrayLoader, ByteTokenizer, load, pack_corpus

corpus = load(sys.argv[1])
train, held = corpus.split()
packed = pack_corpus(train, ByteTokenizer(), 16)
loader = ArrayLoader(packed, 4, 3)
rows = [loader.rows_at(step).tolist() for step in range(20)]
order = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
print(corpus.digest, train.digest, held.digest, packed.digest, order)
print(*(load(name, 50_000).digest for name in ("python", "python-topics")))
print(xla_bridge.backends_are_initialized())
"""


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(["a.txt", "Z.txt", "é.txt", "ß/中.txt", "b.txt", "_.txt"]):
        path = tmp_path / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name} " * (40 + 7 * i), encoding="utf-8")
    return tmp_path / "texts"


def test_determinism_over_processes_hash_seeds_folders_and_locales(folder, tmp_path):
    settings = [
        ({}, os.getcwd(), str(folder)),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, tmp_path, "texts"),
        ({"LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "2", "TZ": "Asia/Tokyo"}, folder, "."),
    ]
    outputs = set()
    for environment, cwd, path in settings:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", FINGERPRINT, path],
            cwd=cwd,
            env={**os.environ, "PYTHONHASHSEED": "1", **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        outputs.add(done.stdout)
    assert len(outputs) == 1
    assert len(set(outputs.copy().pop().split())) == 8, "two digests of different things are equal"
    assert outputs.pop().endswith("False\n"), "the data room has initialised a device"


def test_every_byte_of_a_corpus_is_predicted_once(folder):
    corpus = load(str(folder))
    packed = pack_corpus(corpus, ByteTokenizer(), 16)
    assert packed.predictions == (packed.batch().targets >= 0).sum() == corpus.bytes
    with pytest.raises(DataError, match=r"corpus .*texts is shorter than one batch: its \d+ ids"):
        ArrayLoader(packed, 1000, 0)
