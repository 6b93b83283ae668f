"""Retrieval by `python -m ais_bench` alone: files that it takes as they are, and the script that calls it, a stand-in here."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import postprocess.__main__
import runtime.__main__
from models import manifest
from runtime.ais_bench_bash import Step, command
from runtime.graphs import read_graphs
from runtime.outputs import read_retrieval as read_outputs
from tests import chain
from tests.ais_bench_files import K, bash, cli, scripted
from tests.om_folder import write_om


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory, atc_graphs: Path, files: Path) -> Path:
    """The outputs/ of our own run. Read only."""
    out = tmp_path_factory.mktemp("ours") / "outputs"
    chain.done(chain.run(atc_graphs, files, out, "--k-test", K))
    return out


def report(out: Path, *options: object) -> dict[str, Any]:
    """blip-post --recall, and its report.json."""
    chain.done(chain.call(postprocess.__main__.main, "--recall", "--out", out, *options))
    found: dict[str, Any] = json.loads((out / "report.json").read_text("utf-8"))
    return found


# The files


@pytest.fixture(params=[0o002, 0o022, 0o077, 0o000])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_modes_names_and_kinds_of_files(umask: int, atc_graphs: Path, tmp_path: Path) -> None:
    """Whatever the umask is, ais_bench of today takes them, under the names of its own order."""
    data = chain.prepare(tmp_path, atc_graphs, "--layout", "files", own=(1,) * 11)
    for folder in (data, data / "img", data / "ids", data / "mask"):
        assert stat.S_IMODE(folder.lstat().st_mode) == 0o750
    for name in ("img", "ids", "mask"):
        paths = sorted((data / name).iterdir())
        assert [path.name for path in paths] == [f"{n:02d}.bin" for n in range(11)]
        assert {stat.S_IMODE(path.lstat().st_mode) for path in paths} == {0o640}
        assert all(path.is_file() and not path.is_symlink() for path in paths)
    assert re.fullmatch(r"[a-z]+(,[a-z]+)*", ",".join(path.name for path in data.iterdir() if path.is_dir()))


def test_ais_bench_takes_the_files_and_would_refuse_others(files: Path, om: Path, tmp_path: Path) -> None:
    def embed(data: Path) -> tuple[int, str]:
        inputs = f"{data / 'ids'},{data / 'mask'}"
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        given = ("--input", inputs, "--output", "out", "--output_dirname", "a")
        done = cli(tmp_path, "2025", "--model", om / "text_embed_bs3.om", *given)
        return done.returncode, done.stderr

    assert embed(files) == (0, "")
    data = shutil.copytree(files, tmp_path / "data")
    (data / "mask" / "07.bin").chmod(0o660)
    assert embed(data)[0] == 1
    (data / "mask" / "07.bin").chmod(0o640)
    (data / "mask").chmod(0o770)
    assert embed(data)[0] == 2
    (data / "mask").chmod(0o750)
    (data / "mask" / "07.bin").unlink()
    (data / "mask" / "07.bin").symlink_to(files / "mask" / "07.bin")
    assert embed(data)[0] == 1


def test_our_own_run_in_files(atc_graphs: Path, files: Path, ours: Path, tmp_path: Path) -> None:
    out = tmp_path / "outputs"
    chain.done(chain.run(atc_graphs, files, out, "--k-test", K, "--layout", "files"))
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["image_embed", "image_feat", "text_embed"]
    assert [path.name for path in sorted((out / "text_embed").iterdir())] == [f"{n:02d}.bin" for n in range(35)]
    assert {stat.S_IMODE(path.stat().st_mode) for path in (out / "image_embed").iterdir()} == {0o640}
    found = read_outputs(out, verify=True)
    for name in ("image_embed", "text_embed", "itm_logits", "pair_sim"):
        np.testing.assert_array_equal(getattr(found, name)[:], getattr(read_outputs(ours), name)[:])
    assert chain.recall(out, tmp_path / "a") == chain.recall(ours, tmp_path / "b")
    assert "already holds this run" in chain.done(chain.run(atc_graphs, files, out, "--k-test", K, "--layout", "files"))
    assert "differs in layout" in chain.done(chain.run(atc_graphs, files, out, "--k-test", K))


# The script


def commands(folder: Path) -> dict[str, list[str]]:
    """What the script calls of each graph."""
    lines = (folder / "ais_bench.sh").read_text("utf-8").splitlines()
    calls = [shlex.split(line) for line in lines if line.strip().startswith("python -m ais_bench")]
    return {call[call.index("--output_dirname") + 1]: call for call in calls}


def test_the_commands(om: Path, files: Path, tmp_path: Path) -> None:
    out = scripted(om, files, tmp_path / "run")

    def path(of: Path) -> str:
        return os.path.relpath(of, out)

    def call(graph: str, inputs: str) -> list[str]:
        file = path(om / f"{graph}_bs3.om")
        argv = f"--model {file} --input {inputs} --output ais --output_dirname {graph} --outfmt BIN --batchsize 3 --device 0"
        return f"python -m ais_bench {argv}".split()

    assert commands(out) == {
        "text_embed": call("text_embed", f"{path(files / 'ids')},{path(files / 'mask')}"),
        "image": call("image", path(files / "img")),
        "image_kv": call("image_kv", "fed/image_feat"),
        "itm_cached": call("itm_cached", "pairs/text_ids,pairs/text_atten_mask,pairs/cross_kv"),
    }
    done = subprocess.run(["bash", "-n", str(out / "ais_bench.sh")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_graphs_in_two_files(om: Path, files: Path, tmp_path: Path) -> None:
    """Without `image` two graphs look at the pictures, and without those that re-rank there is similarity alone."""
    content = json.loads((om / manifest.NAME).read_text("utf-8"))
    kept = {name: content["graphs"][name] for name in ("text_embed", "image_embed", "image_feat", "itm")}
    two = shutil.copytree(om, tmp_path / "om")
    content = {key: value for key, value in content.items() if key not in ("format", "kind", "made_by", "files")}
    content |= {"graphs": kept, "oms": [entry for entry in content["oms"] if entry["graph"] in kept]}
    manifest.write(two, "om", content)
    out = tmp_path / "run"
    said = chain.done(
        chain.call(runtime.__main__.main, "ais-bench-script", "--om", two, "--data", files, "--out", out, "--device", 3)
    )
    assert "there will be no re-ranking" in said
    assert [*commands(out)] == ["text_embed", "image_embed", "image_feat"]
    assert all(call[-2:] == ["--device", "3"] for call in commands(out).values())
    done = bash(out, "2025")
    assert (done.returncode, "To re-rank" in done.stdout) == (0, False)
    assert list(report(tmp_path / "report", "--ais-bench", out / "ais")["metrics"]) == ["itc", "chance"]
    said = chain.refusal(chain.call(runtime.__main__.main, "pairs", "--data", files, "--ais-bench", out / "ais"))
    assert "names no file of image_kv: the om/ folder had none" in said


@pytest.mark.parametrize(
    ("graph", "spoil", "says"),
    [
        ("text_embed", lambda data: (data / "mask" / "07.bin").unlink(), "mask holds 34 .bin files; expected 35."),
        ("text_embed", lambda data: (data / "mask" / "07.bin").rename(data / "mask" / "7.bin"), "have not the same names"),
        ("text_embed", lambda data: (data / "ids" / "07.bin").chmod(0o664), "ids/07.bin is a link, or others may write it"),
        ("image", lambda data: (data / "img").chmod(0o775), "/img is a link, or others may write it"),
        ("image", lambda data: shutil.rmtree(data / "img"), "there is no folder "),
        ("image", lambda data: (data / "img" / "03.bin").write_bytes(b""), "image: ais_bench ended with exit status 1."),
        ("image_kv", lambda data: None, "image_feat: run image first."),
        ("itm_cached", lambda data: None, "itm_cached: there is no folder pairs."),
        ("itm", lambda data: None, "there is no graph itm. Graphs: text_embed image image_kv itm_cached"),
    ],
)
def test_the_script_stops(om: Path, files: Path, tmp_path: Path, graph: str, spoil: Callable[[Path], object], says: str) -> None:
    data = shutil.copytree(files, tmp_path / "data")
    out = scripted(om, data, tmp_path / "run")
    spoil(data)
    done = bash(out, "2025", graph, "text_embed")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ais_bench.sh: ")
    assert says in done.stderr
    assert "Complete" not in done.stdout
    assert not (out / "ais" / "text_embed").exists()


@pytest.mark.parametrize(
    ("does", "says"),
    [
        ("exit 3", "ended with exit status 3."),
        ("mkdir -p ais/text_embed", "reported success and wrote no summary to ais."),
        ("mkdir -p ais/text_embed; echo {} > ais/text_embed_summary.json", "wrote 0 files to ais/text_embed; expected 35."),
    ],
)
def test_success_is_more_than_an_exit_status(om: Path, files: Path, tmp_path: Path, does: str, says: str) -> None:
    out, hiding = scripted(om, files, tmp_path / "run"), tmp_path / "bin"
    hiding.mkdir()
    (hiding / "python").write_text(f"#!/bin/sh\n{does}\n", "utf-8")
    (hiding / "python").chmod(0o755)
    done = bash(out, "2025", first=hiding)
    assert (done.returncode, done.stdout) == (1, "text_embed: 35 files\n")
    assert says in done.stderr


def test_a_graph_that_is_named_runs_anew(om: Path, files: Path, tmp_path: Path) -> None:
    """What an earlier run left is no surplus."""
    out = scripted(om, files, tmp_path / "run")
    assert bash(out, "2025", "text_embed", "image").returncode == 0
    (out / "ais" / "text_embed" / "99_0.bin").write_bytes(b"")
    done = bash(out, "2025", "text_embed")
    assert (done.returncode, done.stderr) == (0, "")
    report(tmp_path / "report", "--ais-bench", out / "ais")


def test_a_disk_without_links(om: Path, files: Path, tmp_path: Path) -> None:
    out, hiding = scripted(om, files, tmp_path / "run"), tmp_path / "bin"
    assert bash(out, "2025").returncode == 0
    linked = {path.name: path.read_bytes() for path in (out / "fed" / "image_feat").iterdir()}
    assert all(path.stat().st_nlink == 2 for path in (out / "fed" / "image_feat").iterdir())
    hiding.mkdir()
    (hiding / "ln").write_text("#!/bin/sh\nexit 1\n", "utf-8")
    (hiding / "ln").chmod(0o755)
    assert bash(out, "2025", "image_kv", first=hiding).returncode == 0
    paths = list((out / "fed" / "image_feat").iterdir())
    assert {path.name: path.read_bytes() for path in paths} == linked
    assert {(path.stat().st_nlink, stat.S_IMODE(path.stat().st_mode)) for path in paths} == {(1, 0o640)}


def test_a_folder_that_ais_bench_would_refuse(om: Path, files: Path, tmp_path: Path) -> None:
    odd = tmp_path / "two words"
    odd.mkdir()
    data = shutil.copytree(files, odd / "data")
    said = chain.refusal(script(om, data, tmp_path / "run"))
    assert said.startswith("ais_bench takes paths of A-Z a-z 0-9 _ . / - alone, and '../two words/data/ids' has others.")
    out = scripted(om, files, tmp_path / "run")
    moved = out.rename(odd / "run")
    done = bash(moved, "2025")
    assert done.returncode == 1  # it is not where its paths lead from


def script(om: Path, data: Path, out: Path, *options: object) -> Any:
    return chain.call(runtime.__main__.main, "ais-bench-script", "--om", om, "--data", data, "--out", out, *options)


def test_what_the_script_is_not_written_for(om: Path, atc_graphs: Path, files: Path, tiny_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "new"
    assert "is packed, and ais_bench reads files" in chain.refusal(script(om, tiny_data, out), 2)
    assert "holds graphs that ais_bench cannot run" in chain.refusal(script(atc_graphs, files, out), 2)
    (scripted(om, files, tmp_path / "run") / "ais").mkdir()
    assert "run/ais holds results, which would be lost" in chain.refusal(script(om, files, tmp_path / "run"), 2)
    for name, graph, part, number, dtype, says in (
        ("narrow", "text_embed", "inputs", 1, "int32", "has other inputs or outputs than this release expects"),
        (
            "half",
            "image",
            "outputs",
            1,
            "float16",
            "image_kv_bs3.om takes image_feat as float32 [17, 48]; what image gives is",
        ),
        ("fed", "itm_cached", "inputs", 0, "float16", "has other inputs or outputs than this release expects"),
        ("seen", "image", "inputs", 0, "float16", "image_bs3.om takes input_image as float16 [3, 32, 32]; "),
    ):
        other = write_om(tmp_path / name, atc_graphs)
        content = json.loads((other / manifest.NAME).read_text("utf-8"))
        (entry,) = [entry for entry in content["oms"] if entry["graph"] == graph]
        entry[part][number]["dtype"] = dtype
        (other / manifest.NAME).write_text(json.dumps(content), "utf-8")
        assert says in chain.refusal(script(other, files, out))
    assert not out.exists()


@pytest.mark.parametrize(
    ("dynamic", "says"),
    [("none", []), ("batch", ["--dymBatch", "3"]), ("dims", ["--dymDims", "text_ids:3,35;text_atten_mask:3,35"])],
)
def test_files_that_take_several_batches(om: Path, dynamic: str, says: list[str]) -> None:
    entry = replace(read_graphs(om).oms["text_embed"], dynamic=dynamic)
    called = command(Step(entry, "a.om", ("ids", "mask"), 35), 0)
    assert called[called.index("BIN") + 1 : called.index("--batchsize")] == says
