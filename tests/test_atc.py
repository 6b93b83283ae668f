"""blip-atc over the stand-in for ATC: what it writes, what a host without Python does with atc.sh, and every way to fail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import Result

import runtime.__main__
from export import atc as command
from export import atc_plan
from models import manifest
from models.errors import UserError
from models.om import entries
from tests import chain
from tests.atc_calls import install, left, listed, run
from tests.om_graphs import TEXT, onnx_of, write_folder


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("tools"))


@pytest.fixture
def graphs(tmp_path: Path, tools: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", str(tools))
    return write_folder(tmp_path / "graphs")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text_embed of TINY with its batch open, as blip-export writes it."""
    folder = tmp_path_factory.mktemp("exported")
    return chain.export_graphs(folder, "--target", "ascend", "--graphs", "text_embed,image_feat")


# om/


def test_om_folder(graphs: Path) -> None:
    said = chain.done(run(graphs, "--batchsize", "4,1"))
    om = graphs.parent / "om"
    found = manifest.read(om, "om", verify=True)
    names = [f"{name}_bs{n}.om" for name in ("text_embed", "image_feat", "image_kv") for n in (1, 4)]
    assert [entry.file for entry in entries(found.content)] == names
    assert sorted(found.files) == sorted([*names, "op_precision.ini", "tokenizer/vocab.txt"])  # nothing of what ATC leaves
    assert sorted(path.name for path in om.iterdir()) == sorted([*names, "op_precision.ini", "tokenizer", "manifest.json"])
    assert all(name in said for name in names)
    assert all(entry.seconds is not None and entry.command[0] == "atc" for entry in entries(found.content))
    assert (found.content["target"], found.content["soc"], found.content["cann"]) == ("om", "Ascend310P3", 8)
    assert found.content["graphs_digest"] == manifest.read(graphs, "graphs").digest
    assert left(graphs) == ["om"]


def test_an_om_computes_what_its_graph_does(graphs: Path) -> None:
    chain.done(run(graphs, "--batchsize", "4", "--only", "text_embed"))
    (entry,) = entries(manifest.read(graphs.parent / "om", "om").content)
    random = np.random.default_rng(0)
    fed = {t.name: random.integers(0, 9, [int(n) for n in t.shape]) for t in entry.spec.inputs}
    made, source = (
        onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, fed)[0]
        for path in (graphs.parent / "om" / entry.file, graphs / "text_embed.onnx")
    )
    assert made.shape == entry.spec.outputs[0].shape
    np.testing.assert_array_equal(made, source)


def test_what_blip_export_writes_is_taken(exported: Path, tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tools))
    chain.done(run(exported, "--batchsize", "2", "--cann", "7", "--external-weight"))
    found = manifest.read(exported.parent / "om", "om")
    specs = {entry.graph: entry.spec for entry in entries(found.content)}
    assert "weight/text_embed_bs2_weight_combined" in found.files
    assert onnx.load(found.folder / "text_embed_bs2.om").graph.initializer[0].raw_data
    assert specs["text_embed"].inputs[0].shape == (2, 35)
    assert specs["image_feat"].outputs[0].shape == (2, 17, 48)


def test_graphs_with_a_fixed_batch(atc_graphs: Path, tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setenv("ATC_DOUBLE_CANN", "6")  # refuses --precision_mode_v2, and opsets beyond 13
    named = ("--graphs", atc_graphs, "--out", tmp_path / "om", "--soc", "310P3", "--only", "text_embed,itm_cached")
    chain.done(chain.call(command.main, *named, "--cann", 6))
    found = entries(manifest.read(tmp_path / "om", "om").content)
    assert [entry.file for entry in found] == ["text_embed_bs3.om", "itm_cached_bs3.om"]
    wrong = chain.call(command.main, *named, "--cann", 7)
    assert "unknown command line flag 'precision_mode_v2'" in chain.refusal(wrong)  # the stand-in can refuse


def test_gears_and_lists(graphs: Path, tmp_path: Path) -> None:
    (tmp_path / "keep.txt").write_text("/MatMul\n")
    (tmp_path / "mine.ini").write_text("Gelu=high_precision")
    asked = ("--keep", tmp_path / "keep.txt", "--op-precision", tmp_path / "mine.ini")
    chain.done(run(graphs, "--batchsize", "1,4", "--dynamic", "batch", "--only", "text_embed", *asked))
    one, four = entries(manifest.read(graphs.parent / "om", "om").content)
    assert (one.batch, four.batch, one.file, four.file) == (1, 4, *["text_embed_bs1to4.om"] * 2)
    shutil.rmtree(graphs.parent / "om")
    chain.done(run(graphs, "--batchsize", "1,4", "--dynamic", "dims", "--only", "image_feat"))


def test_a_complete_folder_is_not_replaced_by_one_with_less(graphs: Path) -> None:
    chain.done(run(graphs, "--batchsize", "1"))
    before = manifest.read(graphs.parent / "om", "om", verify=True).digest
    assert chain.refusal(run(graphs, "--batchsize", "4", "--only", "text_embed"), 2) == (
        f"{graphs.parent}/om is complete and holds image_feat, image_kv, which would be lost: a folder is written as a whole. "
        "Choose another --out, or convert all of its graphs (--precision GRAPH=PRECISION is of one alone)."
    )
    assert manifest.read(graphs.parent / "om", "om", verify=True).digest == before
    chain.done(run(graphs, "--batchsize", "4", "--precision", "image_kv=origin"))  # the control
    found = entries(manifest.read(graphs.parent / "om", "om", verify=True).content)
    assert [(entry.batch, entry.precision) for entry in found] == [(4, "mixed_float16"), (4, "fp16"), (4, "origin")]


def test_the_name_with_the_host_s_system(graphs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATC_DOUBLE_FAIL", "image_kv_bs1=host")
    chain.done(run(graphs, "--batchsize", "1", "--only", "image_kv"))
    (entry,) = entries(manifest.read(graphs.parent / "om", "om").content)
    assert entry.file == "image_kv_bs1_linux_x86_64.om"


def test_dry_run(graphs: Path) -> None:
    result = run(graphs, "--batchsize", "1,4", "--dry-run")
    assert len(chain.done(result).splitlines()) == 6
    assert "op_precision.ini: Gelu=high_performance" in result.stderr
    assert left(graphs) == []


# atc.sh


def bash(om: Path, tools: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Called from elsewhere, on a host without Python."""
    paths = {"PATH": str(tools), **environment}
    return subprocess.run(["bash", str(om / "atc.sh")], cwd="/", env=paths, capture_output=True, text=True, check=False)


def scripted(graphs: Path, *asked: object) -> Path:
    chain.done(run(graphs, "--script", *asked))
    return graphs.parent / "om"


def test_a_script_and_its_collection(graphs: Path, tools: Path) -> None:
    om = scripted(graphs, "--batchsize", "1,16", "--only", "text_embed,image_kv")
    assert os.access(om / "atc.sh", os.X_OK)
    assert subprocess.run(["bash", "-n", str(om / "atc.sh")], check=False).returncode == 0
    assert "there is no text_embed_bs1.om; atc.sh has not been run there, or not to its end." in chain.refusal(
        run(graphs, "--collect")
    )
    early = chain.refusal(chain.call(runtime.__main__.main, "retrieval", "--graphs", om, "--data", "d", "--out", "o"))
    assert "expected 'graphs'. Its .om files are not collected: run `bash atc.sh` in it, then `blip-atc --collect --out" in early
    done = bash(om, tools)
    assert (done.returncode, done.stderr) == (0, "")
    assert "[4/4] image_kv_bs16" in done.stdout
    assert "4 files are complete" in done.stdout
    (om / "text_embed_bs1.om").rename(graphs / "kept")
    assert "there is no text_embed_bs1.om" in chain.refusal(run(graphs, "--collect"))  # text_embed_bs16.om is none
    (om / "text_embed_bs1.om").touch()
    assert "text_embed_bs1.om is empty; atc.sh has not been run" in chain.refusal(run(graphs, "--collect"))
    (graphs / "kept").rename(om / "text_embed_bs1.om")
    assert "4 .om files" in chain.done(run(graphs, "--collect"))
    found = manifest.read(om, "om", verify=True)
    assert [entry.seconds for entry in entries(found.content)] == [None] * 4
    assert "kernel_meta" not in {path.name for path in om.iterdir()}
    chain.done(run(graphs, "--batchsize", "1"))  # such a folder may be written again


@pytest.mark.parametrize(
    ("failing", "status", "said"),
    [
        ("E20001", 1, "atc.sh: image_feat_bs1: atc ended with exit status 255. Its error code, if it gave one, stands above."),
        (
            "killed",
            1,
            "atc.sh: image_feat_bs1: atc was killed (SIGKILL), most often for lack of memory. "
            "Set TE_PARALLEL_COMPILER=1, or try a smaller --batchsize.",
        ),
        ("nothing", 1, "atc.sh: image_feat_bs1: atc reported success, but there is no image_feat_bs1.om."),
        ("empty", 1, "atc.sh: image_feat_bs1: image_feat_bs1.om is empty, though atc reported success. Is the disk full?"),
        ("host", 0, ""),
    ],
)
def test_a_script_stops_at_the_first_failure(graphs: Path, tools: Path, failing: str, status: int, said: str) -> None:
    om = scripted(graphs, "--batchsize", "1")
    (om / "image_feat_bs1.om").write_bytes(b"of an earlier run")
    done = bash(om, tools, ATC_DOUBLE_FAIL=f"image_feat_bs1={failing}")
    assert done.returncode == status
    assert done.stderr.splitlines()[-1:] == ([said] if said else [])  # above it bash may name what was killed
    assert (om / "text_embed_bs1.om").exists()
    assert (om / "image_kv_bs1.om").exists() == (status == 0)


def test_a_script_without_atc_or_without_the_graphs(graphs: Path, tools: Path, tmp_path: Path) -> None:
    om = scripted(graphs, "--batchsize", "1", "--only", "image_kv")
    (tmp_path / "bare").mkdir()
    for name in ("bash", "dirname"):
        (tmp_path / "bare" / name).symlink_to(tools / name)
    assert "atc is not on the PATH. Run: source" in bash(om, tmp_path / "bare").stderr
    (graphs / "image_kv.onnx").rename(tmp_path / "image_kv.onnx")
    assert "../graphs/image_kv.onnx is not there" in bash(om, tools).stderr


def test_a_script_looks_for_the_weights_beside_a_graph(graphs: Path, tools: Path) -> None:
    data = "text_embed.onnx.data"
    onnx.save(onnx_of(TEXT, 17), graphs / "text_embed.onnx", save_as_external_data=True, location=data, size_threshold=0)
    listed(graphs)
    om = scripted(graphs, "--batchsize", "1", "--only", "text_embed,image_kv")
    (graphs / data).rename(graphs / "left")
    done = bash(om, tools)
    missing = "../graphs/text_embed.onnx.data is not there, or may not be read. Carry the graphs along with this folder."
    assert (done.returncode, done.stderr.strip()) == (1, f"atc.sh: text_embed_bs1: {missing}")
    assert "ATC" not in done.stdout  # it was not called
    (graphs / "left").rename(graphs / data)
    assert bash(om, tools).returncode == 0  # of image_kv there is none, and none is looked for


def test_a_script_does_not_replace_what_one_made(graphs: Path, tools: Path) -> None:
    om = scripted(graphs, "--batchsize", "1", "--only", "image_kv")
    assert bash(om, tools).returncode == 0
    again = ("--script", "--batchsize", "1")
    held = "holds image_kv_bs1.om, which would be lost. "
    assert f"{held}Give it a manifest with --collect, or" in chain.refusal(run(graphs, *again), 2)
    assert "is not a om folder" in chain.refusal(run(graphs, "--batchsize", "1"), 2)
    chain.done(run(graphs, "--collect"))
    assert f"{held}It is complete: blip-run takes it with --graphs {om}. Choose another" in chain.refusal(run(graphs, *again), 2)
    assert "It has its manifest already; nothing is left to collect." in chain.refusal(run(graphs, "--collect"))
    assert "It is already converted; expected is the folder of blip-export" in chain.refusal(run(om))
    (om / manifest.NAME).unlink()
    assert f"{held}Choose another --out, or remove it yourself." in chain.refusal(run(graphs, *again), 2)
    assert (om / "image_kv_bs1.om").exists()


# Misuse


@pytest.mark.parametrize(
    ("asked", "code", "said"),
    [
        (("--batchsize", "0"), 2, "--batchsize 0 holds 0; a batch has at least 1 row."),
        (("--batchsize", "4,-1"), 2, "--batchsize 4,-1 holds -1"),
        (("--batchsize", "1,4,1"), 2, "--batchsize 1,4,1 holds 1 twice."),
        (("--batchsize", "1,,4"), 2, "--batchsize 1,,4 is not a list of numbers"),
        (("--only", "text_embed,itm"), 2, "has no graph 'itm'; it has: text_embed, image_feat, image_kv."),
        (("--soc", "H200"), 2, "--soc H200 is not the name of a processor."),
        (("--keep", "nowhere.txt"), 1, "--keep nowhere.txt cannot be read: no such file or directory."),
        (("--keep", "."), 2, "--keep . is a folder without text_embed.keep_dtype"),
        (("--op-precision", "nowhere.ini"), 1, "--op-precision nowhere.ini cannot be read: no such file or directory."),
        (("--graphs", "nowhere"), 1, "There is no folder nowhere. blip-export writes it."),
        (("--dry-run", "--script"), 2, "--dry-run, --script, --check and --collect are different things to do; give one."),
        (("--collect", "--out", "nowhere"), 1, "There is no folder nowhere."),
    ],
)
def test_misuse(graphs: Path, asked: tuple[str, ...], code: int, said: str) -> None:
    assert said in chain.refusal(run(graphs, *asked), code)
    assert left(graphs) == []


def test_wrong_lists(graphs: Path, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    assert "binary is no text in UTF-8" in chain.refusal(run(graphs, "--keep", tmp_path / "binary"))
    (tmp_path / "wrong.ini").write_text("Gelu high\n")
    assert "holds the line 'Gelu high'; expected lines such as" in chain.refusal(
        run(graphs, "--op-precision", tmp_path / "wrong.ini"), 2
    )


def test_no_atc(graphs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert "There is no atc on the PATH. Run `source" in chain.refusal(run(graphs))
    assert left(graphs) == []


def test_a_folder_of_something_else(graphs: Path) -> None:
    (graphs.parent / "om").mkdir()
    (graphs.parent / "om" / "mine.txt").write_text("mine")
    assert "is not empty and is not a om folder" in chain.refusal(run(graphs, "--batchsize", "1"), 2)
    assert left(graphs) == ["om"]


# --check


def test_check(graphs: Path) -> None:
    def check(*asked: object) -> Result:
        return chain.call(command.main, "--check", "--graphs", graphs, *asked)

    assert "can read every graph" in chain.done(check("--batchsize", "1,4"))
    assert chain.refusal(check("--cann", "6")).startswith("ATC of CANN 6 would refuse or garble")
    model = onnx_of(TEXT, 17)
    model.graph.node[0].op_type = "Attention"
    onnx.save(model, graphs / "text_embed.onnx")
    listed(graphs)
    assert "can read image_feat, image_kv in" in chain.done(check("--only", "image_feat,image_kv"))
    assert "would refuse" in chain.refusal(check("--only", "text_embed"))
    assert "has no graph 'itm'; it has: text_embed" in chain.refusal(check("--only", "itm"), 2)


@pytest.mark.parametrize(
    "asked",
    [
        *(("--precision", "fp16"), ("--dynamic", "none"), ("--soc", "310P3"), ("--keep", "k")),
        *(("--op-precision", "o"), ("--external-weight",), ("--out", "om")),
    ],
)
def test_check_takes_no_other_option(graphs: Path, asked: tuple[str, ...]) -> None:
    said = chain.refusal(chain.call(command.main, "--check", "--graphs", graphs, *asked), 2)
    assert said == f"--check takes --graphs, --only, --batchsize, --length, --cann and --operators alone; leave out {asked[0]}."


def test_another_list_of_operators(graphs: Path, tmp_path: Path) -> None:
    """That of the release at hand, which may lack what ours has."""
    asked, table = ("--check", "--graphs", graphs, "--only", "text_embed", "--operators"), tmp_path / "ops.txt"
    table.write_text("8-18 Cast MatMul\n", "utf-8")
    assert "would refuse" in chain.refusal(said := chain.call(command.main, *asked, table))
    assert "text_embed: operator: ATC has no parser for Mul: Mul '/Mul'." in said.stdout
    table.write_text("8-18 Cast MatMul Mul\n", "utf-8")
    chain.done(chain.call(command.main, *asked, table))
    for text in ("operators: Cast", "18-8 Cast", "8-999999999999 Cast"):
        table.write_text(text, "utf-8")
        assert f"{table}, line 1: expected opsets and names, as in" in chain.refusal(chain.call(command.main, *asked, table))
    wrong = f"The list of ATC's operators {tmp_path} cannot be read: is a directory."
    assert chain.refusal(chain.call(command.main, *asked, tmp_path)) == wrong
    without = chain.refusal(run(graphs, "--operators", table), 2)
    assert without == "--operators is the list that --check looks operators up in; give both, or leave it out."


# Sizes and modes


def test_a_file_that_ais_bench_would_refuse(graphs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float16 takes half of what float32 does; beside the .om the weights do not count."""
    size = (graphs / "image_feat.onnx").stat().st_size
    monkeypatch.setattr(atc_plan, "LARGEST_OM", size - 1)
    asked = ("--dry-run", "--only", "image_feat", "--precision")
    said = "Warning: The .om of image_feat will hold some 0.0 GB of weights; ais_bench refuses one of more than 0 GB. Add"
    assert said in run(graphs, *asked, "origin").stderr
    assert "Warning" not in run(graphs, *asked, "fp16").stderr
    assert "Warning" not in run(graphs, *asked, "origin", "--external-weight").stderr


@pytest.mark.parametrize("umask", [0o002, 0o077])
def test_modes_of_files(graphs: Path, tools: Path, umask: int) -> None:
    """As ais_bench takes them, whoever makes them and whatever the umask."""
    om, before = graphs.parent / "om", os.umask(umask)
    try:
        chain.done(run(graphs, "--batchsize", "1", "--external-weight"))
        modes = {path.stat().st_mode & 0o777 for path in om.rglob("*") if path.is_file()}
        folders = {path.stat().st_mode & 0o777 for path in (om, *om.rglob("*")) if path.is_dir()}
        shutil.rmtree(om)
        scripted(graphs, "--batchsize", "1")
        assert bash(om, tools).returncode == 0
        made = {path.stat().st_mode & 0o777 for path in om.glob("*.om")}
    finally:
        os.umask(before)
    assert (modes, folders, made) == ({0o640}, {0o750}, {0o640})


# Its manifest


def test_a_damaged_manifest_names_who_mends_it(graphs: Path, tmp_path: Path) -> None:
    chain.done(run(graphs, "--batchsize", "1"))
    path = graphs.parent / "om" / manifest.NAME
    values = json.loads(path.read_text("utf-8"))
    asked = ("retrieval", "--graphs", path.parent, "--data", "d", "--out", "o")
    path.write_text("{", "utf-8")
    broken = chain.refusal(chain.call(runtime.__main__.main, *asked))
    assert f"{path} is damaged" in broken
    assert broken.endswith("Write the folder again with blip-atc.")
    del values["oms"][0]["command"]
    with pytest.raises(UserError, match=rf"^{path} lacks or garbles 'command'. Write the folder again with blip-atc.$"):
        entries(values, path)
