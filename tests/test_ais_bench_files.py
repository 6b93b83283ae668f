"""Retrieval by `python -m ais_bench` alone: files that it takes as they are, and the script that calls it, a stand-in here."""

from __future__ import annotations

import ast
import inspect
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
from onnx import TensorProto

import postprocess.__main__
import runtime.__main__
from models import manifest
from runtime import ais_bench_batches, ais_bench_look, ais_bench_script
from runtime.ais_bench_bash import Step, command
from runtime.graphs import read_graphs
from runtime.outputs import read_retrieval as read_outputs
from runtime.plan import plan_pairs
from tests import chain
from tests.ais_bench_files import K, bash, cli, environment, scripted
from tests.om_folder import Change, cast_input, half_outputs, turned_round, write_om


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
    def embed(data: Path) -> int:
        inputs = f"{data / 'ids'},{data / 'mask'}"
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        given = ("--input", inputs, "--output", "out", "--output_dirname", "a")
        return cli(tmp_path, "2025", "--model", om / "text_embed_bs3.om", *given).returncode

    assert embed(files) == 0
    data = shutil.copytree(files, tmp_path / "data")
    (data / "mask" / "07.bin").chmod(0o660)
    assert embed(data) == 1
    (data / "mask" / "07.bin").chmod(0o640)
    (data / "mask").chmod(0o770)
    assert embed(data) == 2
    (data / "mask").chmod(0o750)
    (data / "mask" / "07.bin").unlink()
    (data / "mask" / "07.bin").symlink_to(files / "mask" / "07.bin")
    assert embed(data) == 1


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
        ("text_embed", lambda data: (data / "mask" / "07.bin").unlink(), "text_embed: ../data/mask/07.bin is missing"),
        ("text_embed", lambda data: (data / "ids" / "34.bin").unlink(), "text_embed: ../data/ids/34.bin is missing"),
        ("text_embed", lambda data: (data / "mask/07.bin").rename(data / "mask/7.bin"), "../data/mask/07.bin is missing"),
        ("text_embed", lambda data: (data / "mask/34.bin").rename(data / "mask/00a.bin"), "/mask/00a.bin is a file too many"),
        ("text_embed", lambda data: shutil.copy(data / "mask/07.bin", data / "mask/35.npy"), "/mask/35.npy is a file too many"),
        (
            "text_embed",
            lambda data: (data / "mask" / "07.bin").write_bytes(bytes(279)),
            "/mask/07.bin has 279 bytes; expected 280.",
        ),
        (
            "text_embed",
            lambda data: (data / "ids" / "08.bin").write_bytes(bytes(560)),
            "/ids/08.bin has 560 bytes; expected 280.",
        ),
        ("text_embed", lambda data: (data / "ids" / "07.bin").chmod(0o664), "ids/07.bin is a link, or others may write it"),
        ("image", lambda data: (data / "img").chmod(0o775), "/img is a link, or others may write it"),
        ("image", lambda data: shutil.rmtree(data / "img"), "there is no folder "),
        (
            "image",
            lambda data: (data / "img" / "03.bin").write_bytes(b""),
            "image: ../data/img/03.bin has 0 bytes; expected 12288.",
        ),
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


def fails(out: Path, graph: str) -> str:
    """What the script in the folder `out` says of one graph, before anything is run."""
    done = bash(out, "2025", graph)
    assert done.returncode == 1
    assert "files\n" not in done.stdout
    assert not (out / "ais" / graph).exists()
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("graph", "change", "says"),
    [
        (
            "text_embed",
            cast_input("text_atten_mask", TensorProto.INT32),
            "takes text_ids int64 840 bytes, text_atten_mask int32 420 bytes; expected text_ids int64 840 bytes, text_atten_mask "
            "int64 840 bytes. Compile it again with blip-atc.",
        ),
        ("text_embed", turned_round, "takes text_atten_mask int64 840 bytes, text_ids int64 840 bytes; expected text_ids int64"),
        ("image", turned_round, "gives image_feat float32 9,792 bytes, image_embed float32"),
    ],
)
def test_the_om_is_looked_at_first(atc_graphs: Path, files: Path, tmp_path: Path, graph: str, change: Change, says: str) -> None:
    om = write_om(tmp_path / "om", atc_graphs, changed={graph: change})
    said = fails(scripted(om, files, tmp_path / "run"), graph)
    assert said.startswith(f"ais_bench.sh: {graph}: ../om/{graph}_bs3.om {says}")
    # Another graph of the same folder is run.
    assert bash(tmp_path / "run", "2025", "image" if graph == "text_embed" else "text_embed").returncode == 0


def test_an_om_that_gives_float16_is_run(atc_graphs: Path, files: Path, tmp_path: Path) -> None:
    om = write_om(tmp_path / "om", atc_graphs, changed={"text_embed": half_outputs})
    done = bash(scripted(om, files, tmp_path / "run"), "2025", "text_embed")
    assert done.returncode == 0, done.stderr


def test_a_host_without_ais_bench(om: Path, files: Path, tmp_path: Path) -> None:
    """That is told of ais_bench, and not of the .om."""
    out = scripted(om, files, tmp_path / "run")
    (tmp_path / "ais_bench").mkdir()
    (tmp_path / "ais_bench" / "__init__.py").write_text("raise ImportError('libascendcl.so: cannot open shared object file')\n")
    env = {**environment("2025"), "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(["bash", str(out / "ais_bench.sh")], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ais_bench.sh: ais_bench cannot be imported (libascendcl.so: cannot open shared object file). Source CANN's set_env.sh "
        "in this shell, and install the wheels aclruntime and ais_bench of Ascend's tools (ais-bench_workload); PyPI has neither "
        "of them."
    )


def test_what_the_host_runs_is_for_the_python_of_its_cann() -> None:
    text = inspect.getsource(ais_bench_look)
    ast.parse(text, feature_version=(3, 7))
    with pytest.raises(SyntaxError):
        ast.parse(text + "if odd := 1:\n    pass\n", feature_version=(3, 7))  # the control


def test_an_om_that_cannot_be_opened(atc_graphs: Path, files: Path, tmp_path: Path) -> None:
    om = write_om(tmp_path / "om", atc_graphs)
    out, file = scripted(om, files, tmp_path / "run"), om / "text_embed_bs3.om"
    held = file.read_bytes()
    file.write_bytes(b"om")
    assert "text_embed: ../om/text_embed_bs3.om cannot be opened on NPU 0: [-1][ACL" in fails(out, "text_embed")
    file.write_bytes(held)
    file.chmod(0o664)
    assert "../om/text_embed_bs3.om is a link, or others may write it" in fails(out, "text_embed")
    file.unlink()
    assert "text_embed: there is no file ../om/text_embed_bs3.om. Carry om/" in fails(out, "text_embed")


def test_files_of_another_user(om: Path, files: Path, tmp_path: Path) -> None:
    hiding = tmp_path / "bin"
    hiding.mkdir()
    for group, says in (("4712", "ais_bench refuses ../"), (str(files.stat().st_gid), None)):
        (hiding / "id").write_text(f"#!/bin/sh\n[ $1 = -u ] && echo 4711 || echo 4713 {group}\n", "utf-8")
        (hiding / "id").chmod(0o755)
        done = bash(scripted(om, files, tmp_path / "run" / group), "2025", "text_embed", first=hiding)
        assert done.returncode == (1 if says else 0)
        assert (says or "") in done.stderr


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
    (hiding / "python").write_text(f"#!/bin/sh\n[ $1 = - ] && exit 0\n{does}\n", "utf-8")
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
    assert done.returncode == 0, done.stderr
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


def test_more_pairs_than_ais_bench_takes(om: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first graph runs, and not when the disk is full of keys and values."""
    monkeypatch.setattr(ais_bench_batches, "MOST_FILES", 50)
    monkeypatch.setattr(ais_bench_script, "MOST_FILES", 50)
    said = chain.refusal(script(om, files, tmp_path / "run", "--k-test", 20))
    assert said == (
        "k_test 20 of 14 pictures and 35 captions makes at least 164 batches of 3 pairs, each a file; ais_bench takes 50 in a "
        "folder. Choose a smaller --k-test, or compile itm_cached for a larger batch: 14 is enough (--itm-batchsize)."
    )
    assert not (tmp_path / "run").exists()
    assert "as many" not in chain.done(script(om, files, tmp_path / "run", "--k-test", 1))
    assert json.loads((tmp_path / "run" / manifest.NAME).read_text("utf-8"))["k_test"] == 1
    said = chain.done(script(om, files, tmp_path / "run", "--k-test", 3))
    assert "itm_cached: blip-run pairs may find more batches of 3 than ais_bench takes; 4 is enough." in said


def test_batches_of_coco() -> None:
    """5,000 pictures, 25,010 captions, k_test 256: 64 captions of a picture are too few together, 96 are enough."""
    coco = (5000, 25010, 256)
    assert [ais_bench_batches.fewest(*coco, rows) for rows in (64, 65, 96)] == [100_040, 98_501, 66_694]
    assert ais_bench_batches.enough(*coco) == 81
    assert ais_bench_batches.enough(100_000, 5, 5) is None


@pytest.mark.parametrize("seed", range(5))
def test_bounds_of_batches(seed: int) -> None:
    random = np.random.default_rng(seed)
    pictures, captions, k = random.integers(2, 30, 3).tolist()
    vectors = [random.normal(size=(count, 4)).astype(np.float32) for count in (pictures, captions)]
    pairs = plan_pairs(*vectors, k)
    for rows in (1, 2, 3, 7, 50):
        found = len(ais_bench_batches.chunks(pairs.image, rows))
        assert ais_bench_batches.fewest(pictures, captions, k, rows) <= found
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ais_bench_batches, "MOST_FILES", max(found - 1, pictures))
            sufficient = ais_bench_batches.enough(pictures, captions, k)
            assert sufficient is None or sufficient > rows or found <= pictures


@pytest.mark.parametrize(
    ("dynamic", "says"),
    [("none", []), ("batch", ["--dymBatch", "3"]), ("dims", ["--dymDims", "text_ids:3,35;text_atten_mask:3,35"])],
)
def test_files_that_take_several_batches(om: Path, dynamic: str, says: list[str]) -> None:
    entry = replace(read_graphs(om).oms["text_embed"], dynamic=dynamic)
    called = command(Step(entry, "a.om", ("ids", "mask"), 35), 0)
    assert called[called.index("BIN") + 1 : called.index("--batchsize")] == says
