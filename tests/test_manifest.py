"""Folders that are complete or not there: written, checked, replaced, and left alone when they are not ours."""

from __future__ import annotations

import fcntl
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models import manifest
from models.errors import Misuse, UserError

CONTENT = {"task": "retrieval", "sizes": [1, 2], "text": "naïve 🦊 \ud800"}  # an emoji, and half of one


def make(folder: Path, kind: str = "data", text: str = "0123456789") -> manifest.Manifest:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sub").mkdir(exist_ok=True)
    (folder / "a.npy").write_text(text)
    (folder / "sub" / "b.bin").write_bytes(b"")
    return manifest.write(folder, kind, CONTENT)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fail(out: Path, error: type[BaseException], resumable: bool = False) -> None:
    """A run that fails when its work is done."""
    with manifest.new_folder(out, "data", resumable) as folder:
        make(folder, text="new")
        raise error


def refuse(out: Path) -> None:
    """A run that must not begin."""
    with manifest.new_folder(out, "data"):
        raise AssertionError


def refusal(folder: Path, kind: str = "data", verify: bool = False) -> str:
    with pytest.raises(UserError) as caught:
        manifest.read(folder, kind, verify)
    assert caught.value.exit_code == 1
    assert str(folder) in caught.value.message
    made_with = manifest.MADE_WITH[kind]
    assert caught.value.message.endswith((f"Write the folder again with {made_with}.", f"{made_with} writes it."))
    return caught.value.message


# Writing and reading


def test_round_trip(tmp_path: Path) -> None:
    written = make(tmp_path)
    found = manifest.read(tmp_path, "data", verify=True)
    assert found == written
    assert found.content == CONTENT
    assert found.digest == written.digest
    assert list(found.files) == ["a.npy", "sub/b.bin"]
    assert found.files["a.npy"] == {"sha256": "84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882", "bytes": 10}
    assert found.made_by.keys() == {"command", "python", "versions"}
    assert "numpy" in found.made_by["versions"]
    assert names(tmp_path) == ["a.npy", "manifest.json", "sub"]


def test_digest_names_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make(tmp_path / "one")
    monkeypatch.setattr(sys, "argv", ["other", "--command"])
    assert make(tmp_path / "two").digest == first.digest
    assert make(tmp_path / "two", text="012345678x").digest != first.digest
    assert make(tmp_path / "two", kind="graphs").digest != first.digest


@pytest.mark.parametrize(
    ("argv", "typed"),
    [
        (["/usr/bin/blip-pre", "retrieval", "--images", "my pictures"], "blip-pre retrieval --images 'my pictures'"),
        (["/src/preprocess/__main__.py", "retrieval"], "python -m preprocess retrieval"),
        (["/usr/bin/blip-bench"], "blip-bench"),
        ([str(Path(__file__).parent.parent / "bench" / "training.py"), "--depth", "2"], "python -m bench.training --depth 2"),
        (["mine/script.py"], "script.py"),
    ],
)
def test_command(argv: list[str], typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    assert manifest.command() == typed


def test_command_with_a_name_that_is_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/blip-pre", "--images", "caf\udce9 bar"])  # a Latin-1 file name
    make(tmp_path)
    assert manifest.read(tmp_path, "data").made_by["command"] == "blip-pre --images 'caf\udce9 bar'"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "manifest.json").unlink(), "holds no manifest.json: it is not a complete data folder"),
        (lambda f: (f / "a.npy").unlink(), "a.npy is missing"),
        (lambda f: (f / "a.npy").write_text("0123"), "a.npy has 4 bytes, its manifest says 10"),
        (lambda f: (f / "manifest.json").write_text(""), "manifest.json is damaged (JSONDecodeError"),
        (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe"), "manifest.json is damaged (UnicodeDecodeError"),
        (lambda f: (f / "manifest.json").write_text("[" * 100_000), "manifest.json is damaged (RecursionError"),
        (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json is damaged (TypeError"),
        (lambda f: (f / "manifest.json").write_text("3"), "manifest.json is damaged (AttributeError"),
        (lambda f: (f / "manifest.json").write_text("{}"), "manifest.json is damaged (KeyError: 'format')"),
        (lambda f: edit(f, lambda m: m.pop("files")), "manifest.json is damaged (KeyError: 'files')"),
        (lambda f: edit(f, lambda m: m.update(files=[1])), "manifest.json is damaged (AttributeError"),
        (lambda f: edit(f, lambda m: m["files"]["a.npy"].pop("sha256")), "manifest.json is damaged (KeyError: 'sha256')"),
        (lambda f: edit(f, lambda m: m["files"]["a.npy"].update(bytes=1e999)), "manifest.json is damaged (OverflowError"),
        (lambda f: edit(f, lambda m: m.update(kind="graphs")), "is a 'graphs' folder, expected 'data'"),
        (lambda f: edit(f, lambda m: m.update(format=2)), "has format 2, this release reads 1"),
    ],
)
def test_damaged_folder(tmp_path: Path, damage: Callable[[Path], object], said: str) -> None:
    make(tmp_path)
    damage(tmp_path)
    assert said in refusal(tmp_path)


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_no_folder(tmp_path: Path) -> None:
    assert "There is no folder" in refusal(tmp_path / "none")


def test_changed_content_is_seen_by_verify_alone(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "a.npy").write_text("012345678x")
    manifest.read(tmp_path, "data")
    assert "a.npy is not what its manifest describes: the sha256 differs" in refusal(tmp_path, verify=True)


def test_write_text_leaves_the_old_text_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    manifest.write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        manifest.write_text(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# Replacing a folder


def test_new_folder(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "data"
    for text in ("first", "second"):
        with manifest.new_folder(out, "data") as folder:
            assert list(folder.iterdir()) == []
            make(folder, text=text)
            assert out.exists() == (text == "second")
        manifest.read(out, "data", verify=True)
        assert (out / "a.npy").read_text() == text
        assert names(out.parent) == ["data"]


def test_new_folder_takes_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with manifest.new_folder(tmp_path / "data", "data") as folder:
        make(folder)
    manifest.read(tmp_path / "data", "data")


def test_new_folder_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    for text in ("first", "second"):
        with manifest.new_folder(tmp_path / "data", "data") as folder:
            make(folder, text=text)
        assert (tmp_path / "disk" / "a.npy").read_text() == text
    assert (tmp_path / "data").is_symlink()
    assert names(tmp_path) == ["data", "disk"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
@pytest.mark.parametrize("before", [False, True], ids=["new", "replaced"])
def test_failure_leaves_nothing(tmp_path: Path, error: type[BaseException], before: bool) -> None:
    out = tmp_path / "data"
    if before:
        make(out, text="old")
    with pytest.raises(error):
        fail(out, error)
    assert names(tmp_path) == (["data"] if before else [])
    if before:
        manifest.read(out, "data", verify=True)
        assert (out / "a.npy").read_text() == "old"


def test_resumable_folder_is_kept_and_found_again(tmp_path: Path) -> None:
    out = tmp_path / "data"
    with pytest.raises(KeyboardInterrupt):
        fail(out, KeyboardInterrupt, resumable=True)
    assert not out.exists()
    with manifest.new_folder(out, "data", resumable=True) as folder:
        assert (folder / "a.npy").read_text() == "new"
        make(folder)
    assert names(tmp_path) == ["data"]
    with manifest.new_folder(out, "data", resumable=True) as folder:
        assert list(folder.iterdir()) == []
        make(folder)


@pytest.mark.parametrize("content", [None, "text", '{"kind": "graphs"}', '{"kind": ', "[]", "[" * 100_000])
def test_foreign_folder_is_refused(tmp_path: Path, content: str | None) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    if content is not None:
        (out / "manifest.json").write_text(content)
    with pytest.raises(Misuse, match="is not empty and is not a data folder; choose another --out") as caught:
        refuse(out)
    assert caught.value.exit_code == 2
    assert (out / "thesis.tex").read_text() == "years of work"
    assert names(tmp_path) == ["out"]


def test_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(Misuse, match="out is a file; --out takes a folder"):
        refuse(tmp_path / "out")


def test_links_in_a_left_over_folder_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("")
    (tmp_path / ".data.part").mkdir()
    (tmp_path / ".data.part" / "link").symlink_to(tmp_path / "kept")
    with manifest.new_folder(tmp_path / "data", "data") as folder:
        make(folder)
    assert (tmp_path / "kept" / "file").exists()


# Two runs, and a run that was killed

HOLD = """
import sys, time
from pathlib import Path
from models import manifest
with manifest.new_folder(Path(sys.argv[1]), "data") as folder:
    (folder / "half").write_text("written")
    print("busy", flush=True)
    time.sleep(60)
"""


def test_busy_folder_is_refused_until_its_owner_is_gone(tmp_path: Path) -> None:
    out = tmp_path / "data"
    owner = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "busy\n"
        with pytest.raises(UserError, match=r"Another run is writing .*data; wait for it, or choose another --out"):
            refuse(out)
        assert (tmp_path / ".data.part" / "half").exists()  # the owner's work is untouched
        owner.send_signal(signal.SIGKILL)
    finally:
        owner.kill()
        owner.communicate()
    with manifest.new_folder(out, "data") as folder:
        assert list(folder.iterdir()) == []
        make(folder)
    assert names(tmp_path) == ["data"]


def test_owner_that_finishes_while_we_ask_is_not_mixed_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder, which we opened to lock it, has become the result."""
    out = tmp_path / "data"
    flock = fcntl.flock

    def late(handle: int, operation: int) -> None:
        make(tmp_path / ".data.part")
        (tmp_path / ".data.part").rename(out)
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(UserError, match="Another run is writing"):
        refuse(out)
    manifest.read(out, "data", verify=True)


@pytest.mark.parametrize("fails", [False, True], ids=["next run ends well", "next run fails"])
def test_run_killed_between_its_two_renames(tmp_path: Path, fails: bool) -> None:
    """The old folder was moved away and the new one not yet moved in: the next run puts the old one back first."""
    out = tmp_path / "data"
    make(tmp_path / ".data.old", text="old")
    make(tmp_path / ".data.part", text="lost")
    if fails:
        with pytest.raises(OSError):  # noqa: PT011 (the one that is raised here)
            fail(out, OSError)
    else:
        with manifest.new_folder(out, "data") as folder:
            assert (out / "a.npy").read_text() == "old"
            make(folder, text="new")
    manifest.read(out, "data", verify=True)
    assert (out / "a.npy").read_text() == ("old" if fails else "new")
    assert names(tmp_path) == ["data"]


def test_run_killed_after_both_renames(tmp_path: Path) -> None:
    out = tmp_path / "data"
    make(out, text="new")
    make(tmp_path / ".data.old", text="old")
    with manifest.new_folder(out, "data") as folder:
        make(folder, text="newer")
    assert (out / "a.npy").read_text() == "newer"
    assert names(tmp_path) == ["data"]


def test_a_run_can_be_killed_at_any_time(tmp_path: Path) -> None:
    """SIGKILL while folders are replaced as fast as possible: what is there is complete, and the next run works."""
    out = tmp_path / "data"
    loop = "import sys\nfrom pathlib import Path\nfrom models import manifest\nfrom tests.test_manifest import make\n"
    loop += "while True:\n with manifest.new_folder(Path(sys.argv[1]), 'data') as f:\n  make(f)\n print(1, flush=True)\n"
    for wait in (0.0, 0.003, 0.007):
        run = subprocess.Popen([sys.executable, "-c", loop, str(out)], stdout=subprocess.PIPE)
        assert run.stdout is not None
        run.stdout.readline()
        time.sleep(wait)
        run.kill()
        run.communicate()
        with manifest.new_folder(out, "data") as folder:
            make(folder)
        manifest.read(out, "data", verify=True)
        assert names(tmp_path) == ["data"]
