"""Files, directories and globs: sorted, strict, and every refusal names the file."""

import os
from pathlib import Path

import pytest

from effjax.data.files import read_text, text_files
from effjax.errors import DataError


@pytest.fixture
def tree(tmp_path):
    for name, text in {
        "b.txt": "bé",
        "a/z.txt": "z",
        "a/b/c.md": "c",
        "a.txt": "a",
        ".hidden": "h",
        ".git/x.txt": "x",
        "a/empty.txt": "",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path


def names(corpus):
    return [document.name for document in corpus.documents]


def test_directory_is_every_visible_file_sorted_by_relative_name(tree):
    corpus = text_files(str(tree))
    assert names(corpus) == ["a.txt", "a/b/c.md", "a/empty.txt", "a/z.txt", "b.txt"]
    assert corpus.bytes == 6
    assert corpus.empty == 1


def test_one_file_and_globs(tree):
    assert names(text_files(str(tree / "b.txt"))) == ["b.txt"]
    assert names(text_files(f"{tree}/*.txt")) == ["a.txt", "b.txt"]
    assert names(text_files(f"{tree}/**/*.txt")) == ["a.txt", "a/empty.txt", "a/z.txt", "b.txt"]
    assert names(text_files(f"{tree}/a*")) == ["a.txt"]
    assert names(text_files(f"{tree}/*/*/*.md")) == ["a/b/c.md"]
    assert names(text_files(f"{tree}/a*/*.txt")) == ["a/empty.txt", "a/z.txt"]


def test_names_and_digest_do_not_depend_on_where_the_files_lie(tree, tmp_path_factory, monkeypatch):
    import shutil

    other = tmp_path_factory.mktemp("with space") / "é"
    shutil.copytree(tree, other)
    monkeypatch.chdir(tree)
    digests = {text_files(spec).digest for spec in (str(tree), str(other), ".", f"{tree}/**/*.*")}
    assert len(digests) == 1
    digests = {text_files(spec).digest for spec in ("*.txt", f"{other}/*.txt")}
    assert len(digests) == 1


def test_order_is_not_the_file_systems(tree, monkeypatch):
    expected = text_files(str(tree)).digest
    walk = os.walk

    def shuffled(*args, **kwargs):
        for parent, directories, files in walk(*args, **kwargs):
            directories.reverse()
            yield parent, directories, files[::-1]

    monkeypatch.setattr(os, "walk", shuffled)
    assert text_files(str(tree)).digest == expected


def test_limit_keeps_a_prefix_and_cuts_no_character(tree):
    corpus = text_files(str(tree), 5)
    assert [d.text for d in corpus.documents] == [b"a", b"c", b"", b"z", b"b"]


def test_literal_name_that_looks_like_a_glob(tree):
    (tree / "[x].txt").write_text("lit")
    assert names(text_files(str(tree / "[x].txt"))) == ["[x].txt"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("c.txt", r"c.txt': no such file or directory; wanted a file, .*; did you mean 'b.txt'\?"),
        ("no/such/dir", r"no/such/dir': no such file"),
        ("b.txt/c", r"b.txt/c': no such file"),
        ("*.json", r"glob '.*\*.json' matches no file"),
        ("bad.txt", r"corpus file .*bad.txt is not UTF-8 text: byte 4 is 0xe9"),
        ("a/empty.txt", r"corpus file .*a/empty.txt is empty"),
        ("nothing", r"corpus directory .*nothing holds no files"),
        ("empties", r"corpus .*empties: all 2 files are empty"),
        ("pipe", r"corpus .*pipe is neither a file nor a directory"),
        ("pip*", r"corpus file .*pipe is not a regular file"),
        ("special", r"corpus file .*gone is unreadable: No such file"),
        ("nul\0", r"no such file or directory"),
    ],
)
def test_refusals_name_the_file(tree, spec, message):
    (tree / "bad.txt").write_bytes(b"caf\xc3\xa9"[:3] + b"f\xe9 noir")
    (tree / "nothing").mkdir()
    (tree / "empties").mkdir()
    (tree / "empties/1").touch()
    (tree / "empties/2").touch()
    os.mkfifo(tree / "pipe")
    (tree / "special").mkdir()
    (tree / "special/gone").symlink_to("nowhere")
    with pytest.raises(DataError, match=message) as error:
        text_files(f"{tree}/{spec}")
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 3


def test_empty_spec_is_not_the_working_directory(tree, monkeypatch):
    monkeypatch.chdir(tree)
    with pytest.raises(DataError, match="corpus '': no such file"):
        text_files("")


def test_unreadable_files_and_directories(tree, monkeypatch):
    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(tree / "a"))

    # As root everything is readable, so the refusal is played.
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", denied)
        with pytest.raises(
            DataError, match=r"corpus file .*b.txt is unreadable: Permission denied"
        ):
            read_text(tree / "b.txt")
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", denied)
        with pytest.raises(DataError, match=r"corpus directory .*a is unreadable"):
            text_files(str(tree))
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", denied)
        with pytest.raises(DataError, match=r"corpus .*b.txt is unreadable"):
            text_files(str(tree / "b.txt"))
