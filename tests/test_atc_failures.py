"""What blip-atc says and leaves when ATC fails, or is stopped: over the stand-in for ATC."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import pytest

from export.atc_errors import MEANING, failure
from models import manifest
from models.om import entries
from tests import chain
from tests.atc_calls import install, left, listed, run
from tests.om_graphs import TEXT, onnx_of, write_folder

ROOT = Path(__file__).parent.parent
ALL = ("--batchsize", "1")  # text_embed, image_feat and image_kv, in this order


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("tools"))


@pytest.fixture
def graphs(tmp_path: Path, tools: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", str(tools))
    return write_folder(tmp_path / "graphs")


def held(graphs: Path) -> list[str]:
    """What is kept for the next run."""
    part = graphs.parent / ".om.part"
    return sorted(path.relative_to(part).as_posix() for path in part.rglob("*") if path.is_file())


# What it says


@pytest.mark.parametrize("code", [*MEANING, "EB9999"])
def test_every_code_is_one_sentence(code: str) -> None:
    said = f"ATC run failed, Please check the detail log\n{code}: Something is wrong.\n  Solution: none\n"
    message = failure("itm_bs4", 255, said).message
    assert message.startswith(f"itm_bs4: atc ended with exit status 255, {code}, ")
    assert ": Something is wrong. " in message
    assert re.search(r"[^.]$", message)  # the caller ends it


def test_the_code_that_says_more_counts() -> None:
    assert "E20001" in failure("a", 255, "E19999: Inner Error!\nEZ9999: Inner\nE20001: Failed to compile").message
    assert "EZ9999" in failure("a", 255, "[EZ9999] Inner Error!").message
    assert "no error code" in failure("a", 1, "E1234 REE99999 error 10001").message


def test_a_script_around_atc_whose_child_is_killed(graphs: Path, tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    around = graphs.parent / "around"
    around.mkdir()
    (around / "atc").write_text(f'#!/bin/sh\n{tools}/atc "$@"\nexit $?\n')
    (around / "atc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{around}:{tools}")
    monkeypatch.setenv("ATC_DOUBLE_FAIL", "image_kv_bs1=killed")
    asked = ("--batchsize", "1", "--only", "image_kv")
    assert "atc was killed (SIGKILL), most often for lack of memory." in chain.refusal(run(graphs, *asked))
    monkeypatch.setenv("ATC_DOUBLE_FAIL", "image_kv_bs1=silent")
    assert "exit status 3 and no error code" in chain.refusal(run(graphs, *asked))


@pytest.mark.parametrize(
    ("failing", "said"),
    [
        (
            "E20001",
            "exit status 255, E20001, an operator could not be compiled for this processor: Failed to compile op MatMulV2.",
        ),
        ("EZ9999", "exit status 255, EZ9999, a kernel of the AI core could not be built"),
        (
            "silent",
            "exit status 3 and no error code; it said: ATC start working now, please wait for a moment. Its log is in ~/ascend",
        ),
        ("killed", "atc was killed (SIGKILL), most often for lack of memory."),
        ("nothing", "there is no image_feat_bs1.om, though atc reported success."),
        ("empty", "image_feat_bs1.om is empty, though atc reported success."),
    ],
)
def test_atc_fails(graphs: Path, monkeypatch: pytest.MonkeyPatch, failing: str, said: str) -> None:
    chain.done(run(graphs, "--batchsize", "1", "--only", "text_embed"))
    before = manifest.read(graphs.parent / "om", "om").digest
    monkeypatch.setenv("ATC_DOUBLE_FAIL", f"image_feat_bs1={failing}")
    message = chain.refusal(run(graphs, "--batchsize", "1", "--only", "text_embed,image_feat"))
    assert message.startswith("image_feat_bs1: ")
    assert said in message
    assert message.endswith("; 1 .om file is finished and kept: the same command goes on from there.")
    assert left(graphs) == [".om.part", "om"]
    assert held(graphs) == [".made.json", "text_embed_bs1.om"]  # nothing half-written, and what was complete is as it was
    assert manifest.read(graphs.parent / "om", "om", verify=True).digest == before


def test_an_operator_that_atc_does_not_read(graphs: Path) -> None:
    model = onnx_of(TEXT, 17)
    model.graph.node[0].op_type = "Attention"
    onnx.save(model, graphs / "text_embed.onnx")
    assert "text_embed.onnx has" in chain.refusal(run(graphs))  # the manifest knows its size
    listed(graphs)
    message = chain.refusal(run(graphs, "--only", "text_embed"))
    assert "E16002, the graph holds an operator that this CANN release does not read" in message
    assert "ai.onnx::17::Attention" in message
    assert left(graphs) == []


def test_an_option_of_another_release(graphs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATC_DOUBLE_CANN", "6")
    assert chain.refusal(run(graphs, *ALL)) == (
        "text_embed_bs1: atc ended with exit status 1, unknown command line flag 'precision_mode_v2': it is of another release "
        "of CANN than --cann says. Give --cann 6 or 7 as it is installed; 6 takes graphs of opset 13; nothing was written."
    )


def test_no_sentence_ends_twice(graphs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for failing in ("silent", "E19999", "killed", "nothing"):
        monkeypatch.setenv("ATC_DOUBLE_FAIL", f"text_embed_bs1={failing}")
        assert not re.search(r"\.\.|\.;", chain.refusal(run(graphs, *ALL)))


# What it keeps


def calls(graphs: Path, tools: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Note every call of ATC from now on; returns the file, a line each."""
    around, log = graphs.parent / "noted", graphs.parent / "noted" / "calls"
    around.mkdir()
    (around / "atc").write_text(f'#!/bin/sh\necho "$3" >> {log}\nexec {tools}/atc "$@"\n')
    (around / "atc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{around}:{tools}")
    return log


def called(log: Path) -> list[str]:
    """What was made since the last time."""
    made = [line.removeprefix("--output=") for line in log.read_text().split()] if log.exists() else []
    log.unlink(missing_ok=True)
    return made


@pytest.mark.parametrize("weights", [(), ("--external-weight",)])
def test_the_next_run_goes_on(graphs: Path, tools: Path, monkeypatch: pytest.MonkeyPatch, weights: tuple[str, ...]) -> None:
    log = calls(graphs, tools, monkeypatch)
    chain.done(run(graphs, *ALL, *weights))
    whole = manifest.read(graphs.parent / "om", "om").files
    assert called(log) == ["text_embed_bs1", "image_feat_bs1", "image_kv_bs1"]
    monkeypatch.setenv("ATC_DOUBLE_FAIL", "image_kv_bs1=E20001")
    assert "; 2 .om files are finished and kept: " in chain.refusal(run(graphs, *ALL, *weights))
    monkeypatch.delenv("ATC_DOUBLE_FAIL")
    called(log)
    assert ", of the last run" in chain.done(run(graphs, *ALL, *weights))
    assert called(log) == ["image_kv_bs1"]
    found = manifest.read(graphs.parent / "om", "om", verify=True)
    assert found.files == whole
    assert all(entry.seconds is not None for entry in entries(found.content))
    assert ".om.part" not in left(graphs)


@pytest.mark.parametrize("change", ["graph", "option", "list", "converter", "file", "notes"])
def test_what_is_not_the_same_is_made_again(graphs: Path, tools: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    log = calls(graphs, tools, monkeypatch)
    monkeypatch.setenv("ATC_DOUBLE_FAIL", "image_kv_bs1=E20001")
    chain.refusal(run(graphs, *ALL))
    monkeypatch.delenv("ATC_DOUBLE_FAIL")
    called(log)
    more, again = (), ["text_embed_bs1"]
    part = graphs.parent / ".om.part"
    if change == "graph":
        model = onnx_of(TEXT, 17)
        model.doc_string = "another"
        onnx.save(model, graphs / "text_embed.onnx")
        listed(graphs)
    elif change == "option":
        more, again = ("--cann", "7", "--precision", "origin"), ["text_embed_bs1", "image_feat_bs1"]
    elif change == "list":
        (graphs.parent / "mine.ini").write_text("Gelu=high_precision\n")
        more, again = ("--op-precision", str(graphs.parent / "mine.ini")), ["text_embed_bs1", "image_feat_bs1"]
    elif change == "converter":
        other = graphs.parent / "other"
        other.mkdir()
        (other / "atc").write_text((graphs.parent / "noted" / "atc").read_text())
        (other / "atc").chmod(0o755)
        monkeypatch.setenv("PATH", f"{other}:{tools}")
        again = ["text_embed_bs1", "image_feat_bs1"]
    elif change == "file":
        (part / "text_embed_bs1.om").write_bytes(b"cut short")
    else:
        (part / ".made.json").write_text(json.dumps([{"call": 1}]))
        again = ["text_embed_bs1", "image_feat_bs1"]
    (part / "stray.om").write_bytes(b"of nobody")
    chain.done(run(graphs, *ALL, *more))
    assert called(log) == [*again, "image_kv_bs1"]
    assert sorted(path.name for path in (graphs.parent / "om").glob("*.om")) == [
        f"{name}_bs1.om" for name in ("image_feat", "image_kv", "text_embed")
    ]


def around(graphs: Path, tools: Path, text: str) -> Path:
    """A script in place of ATC, which is there as $REAL; returns the file in which it may note the numbers of its processes."""
    folder = graphs.parent / "around"
    folder.mkdir()
    (folder / "atc").write_text(f"#!/bin/bash\nREAL={tools}/atc PIDS={folder}/pids\n{text}")
    (folder / "atc").chmod(0o755)
    return folder / "pids"


def test_what_another_command_finished_is_kept(graphs: Path, tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = calls(graphs, tools, monkeypatch)
    monkeypatch.setenv("ATC_DOUBLE_FAIL", "image_kv_bs1=E20001")
    chain.refusal(run(graphs, *ALL))
    first = held(graphs)
    monkeypatch.setenv("ATC_DOUBLE_FAIL", "text_embed_bs4=E20001")
    assert chain.refusal(run(graphs, "--batchsize", "4")).endswith("; nothing was written.")
    assert held(graphs) == first == [".made.json", "image_feat_bs1.om", "text_embed_bs1.om"]
    monkeypatch.setenv("ATC_DOUBLE_FAIL", "image_feat_bs1=E20001")
    result = run(graphs, *ALL, "--precision", "origin")  # the same names
    assert chain.refusal(result).endswith("; 1 .om file is finished and kept: the same command goes on from there.")
    assert "text_embed_bs1.om of another command, which was stopped, makes room for text_embed_bs1." in result.stdout
    assert held(graphs) == [".made.json", "text_embed_bs1.om"]
    monkeypatch.delenv("ATC_DOUBLE_FAIL")
    called(log)
    chain.done(run(graphs, "--batchsize", "1,4", "--precision", "origin"))
    assert called(log)[0] == "text_embed_bs4"
    assert sorted(path.name for path in (graphs.parent / "om").iterdir()) == [
        *(f"{name}_bs{batch}.om" for name in ("image_feat", "image_kv") for batch in (1, 4)),
        *("manifest.json", "op_precision.ini", "text_embed_bs1.om", "text_embed_bs4.om", "tokenizer"),
    ]


def test_folders_among_the_weights(graphs: Path, tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pids = around(graphs, tools, '$REAL "$@" && mkdir -p weight/of && echo weights > weight/of/layer\n')
    monkeypatch.setenv("PATH", f"{pids.parent}:{tools}:/usr/bin:/bin")
    monkeypatch.setenv("ATC_DOUBLE_FAIL", "image_kv_bs1=E20001")
    chain.refusal(run(graphs, *ALL, "--external-weight"))
    assert "weight/of/layer" in held(graphs)
    (graphs.parent / ".om.part/weight/stray").mkdir()
    (graphs.parent / ".om.part/weight/stray/file").write_bytes(b"of nobody")
    monkeypatch.delenv("ATC_DOUBLE_FAIL")
    assert ", of the last run" in chain.done(run(graphs, *ALL, "--external-weight"))
    found = [name for name in manifest.read(graphs.parent / "om", "om", verify=True).files if name.startswith("weight/")]
    assert found == ["weight/of/layer"]


def test_a_file_that_somebody_else_writes_to(graphs: Path, tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an ATC does whose blip-atc was killed."""
    pids = around(graphs, tools, '[ "$3" != --output=image_kv_bs1 ] || echo more >> text_embed_bs1.om\nexec $REAL "$@"\n')
    monkeypatch.setenv("PATH", f"{pids.parent}:{tools}")
    said = chain.refusal(run(graphs, *ALL))
    assert said.startswith("text_embed_bs1.om has changed since ATC made it: something else writes to ")
    assert said.endswith("and end it; 2 .om files are finished and kept: the same command goes on from there.")
    assert held(graphs) == [".made.json", "image_feat_bs1.om", "image_kv_bs1.om"]
    assert not (graphs.parent / "om").exists()
    chain.done(run(graphs, *ALL))
    manifest.read(graphs.parent / "om", "om", verify=True)


# Stopped


def heed_signals() -> None:
    """A shell's background job, as tests may run in, ignores some, and its children with it."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@contextmanager
def started(graphs: Path, tools: Path, pids: Path, *before: str) -> Iterator[subprocess.Popen[bytes]]:
    """blip-atc, which waits 1 second for an ATC that does not end; when the block ends no process of it is left."""
    named = ("--graphs", graphs, "--out", graphs.parent / "om", "--soc", "Ascend310P3", *ALL)
    code = "from export import atc, atc_call\natc_call.GRACE = 1\natc.main()"
    ours = subprocess.Popen(
        [*before, sys.executable, "-c", code, *map(str, named)],
        cwd=ROOT,
        env={**os.environ, "PATH": f"{pids.parent}:{tools}"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=heed_signals,
    )
    try:
        until(pids.exists)
        yield ours
    finally:
        ours.kill()
        ours.wait()
        none_left(pids)


def none_left(pids: Path) -> None:
    """Nothing that ATC started runs."""
    theirs = [int(pid) for pid in pids.read_text().split()]
    try:
        until(lambda: not any(map(alive, theirs)), 10)
    finally:
        for pid in filter(alive, theirs):
            os.kill(pid, signal.SIGKILL)


STUCK = """\
[ "$3" = --output={stem} ] || exec $REAL "$@"
{first}
echo half > {stem}.om; mkdir kernel_meta
/bin/sleep 600 &
echo $$ $! > $PIDS.part; /bin/mv $PIDS.part $PIDS
wait
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
@pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
def test_a_signal_ends_atc_too(graphs: Path, tools: Path, number: signal.Signals, first: bool) -> None:
    """With what it started, and what it had half written."""
    stem = "text_embed_bs1" if first else "image_feat_bs1"
    pids = around(graphs, tools, STUCK.format(stem=stem, first=""))
    with started(graphs, tools, pids) as ours:
        ours.send_signal(number)
        assert ours.wait(30) == 128 + number
    assert left(graphs) == (["around"] if first else [".om.part", "around"])
    assert first or held(graphs) == [".made.json", "text_embed_bs1.om"]


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_second_signal_leaves_nothing_either(graphs: Path, tools: Path, second: signal.Signals) -> None:
    """While we wait for an ATC that does not end when it is asked to."""
    pids = around(graphs, tools, STUCK.format(stem="text_embed_bs1", first="trap '' TERM"))
    with started(graphs, tools, pids) as ours:
        ours.send_signal(signal.SIGINT)
        time.sleep(0.3)
        ours.send_signal(second)
        assert ours.wait(30) == 130
    assert left(graphs) == ["around"]


def test_nohup_is_heeded(graphs: Path, tools: Path) -> None:
    pids = around(graphs, tools, STUCK.format(stem="text_embed_bs1", first=""))
    with started(graphs, tools, pids, str(tools / "bash"), "-c", "trap '' HUP; exec \"$@\"", "nohup") as ours:
        ours.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            ours.wait(1)
        ours.send_signal(signal.SIGTERM)
        assert ours.wait(30) == 128 + signal.SIGTERM


@pytest.mark.parametrize(("end", "said"), [("kill -9 $$", "atc was killed (SIGKILL)"), ('exec $REAL "$@"', None)])
def test_what_atc_leaves_behind_is_ended(
    graphs: Path, tools: Path, monkeypatch: pytest.MonkeyPatch, end: str, said: str | None
) -> None:
    """A compiler that holds what ATC writes to does not hold us."""
    pids = around(graphs, tools, f"/bin/sleep 600 &\necho $! > $PIDS\n{end}\n")
    monkeypatch.setenv("PATH", f"{pids.parent}:{tools}")
    begun = time.monotonic()
    result = run(graphs, *ALL, "--only", "image_kv")
    assert time.monotonic() - begun < 60
    none_left(pids)
    assert said in chain.refusal(result) if said else chain.done(result)


def until(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether it runs; one that has ended and that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
