"""The second stage of retrieval by `python -m ais_bench`: its pairs, and the report, which is that of our own run. ais_bench is a
stand-in, of 2023 and of 2025.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

import postprocess.__main__
import runtime.__main__
from models import manifest
from postprocess.inputs import AisBench, read
from preprocess.dataset import read_retrieval
from runtime import ais_bench_batches, ais_bench_pairs
from runtime.ais_bench_batches import chunks
from runtime.ais_bench_run import read_run
from runtime.outputs import RetrievalOutputs, scores
from runtime.outputs import read_retrieval as read_outputs
from tests import chain
from tests.ais_bench_files import K, bash, scripted, whole_run, with_pairs
from tests.om_folder import GENERATIONS, cast_input, half_outputs, write_om
from tests.tiny import random_blip2

GRAPHS = ("text_embed", "image", "image_kv", "itm_cached")
WANTED = ("--target", "atc", "--graphs", ",".join(GRAPHS))


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory, atc_graphs: Path, files: Path) -> Path:
    """The outputs/ of our own run. Read only."""
    out = tmp_path_factory.mktemp("ours") / "outputs"
    chain.done(chain.run(atc_graphs, files, out, "--k-test", K))
    return out


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory, om: Path, files: Path) -> Path:
    """A whole run by the ais_bench of today. Read only."""
    return whole_run(om, files, tmp_path_factory.mktemp("theirs") / "run", "2025")


@pytest.fixture
def copied(theirs: Path, tmp_path: Path) -> Path:
    """A copy of that run, to be spoilt."""
    return Path(shutil.copytree(theirs, tmp_path / "run"))


def report(out: Path, *options: object) -> dict[str, Any]:
    """blip-post --recall, and its report.json."""
    chain.done(chain.call(postprocess.__main__.main, "--recall", "--out", out, *options))
    found: dict[str, Any] = json.loads((out / "report.json").read_text("utf-8"))
    return found


def first(folder: Path) -> Path:
    return min(folder.iterdir())


def same(found: RetrievalOutputs, wanted: RetrievalOutputs) -> None:
    for name in ("pair_image", "pair_text", "pair_direction"):
        np.testing.assert_array_equal(getattr(found, name)[:], getattr(wanted, name)[:], err_msg=name)
    for name in ("image_embed", "text_embed", "pair_sim", "itm_logits"):
        np.testing.assert_allclose(getattr(found, name)[:], getattr(wanted, name)[:], atol=1e-6, err_msg=name)
    np.testing.assert_allclose(scores(found), scores(wanted), atol=1e-6)


# The pairs


def test_pairs_are_batches_of_one_picture(theirs: Path, files: Path) -> None:
    data, run = read_retrieval(files), read_run(theirs / "ais")
    found = manifest.read(theirs / "pairs", "pairs", verify=True)
    plan = ais_bench_pairs.read_pairs(theirs / "pairs", run).plan
    parts, tag = chunks(plan.image, 3), found.content["tag"]
    assert found.content["inputs"]["text_ids"] == {"dtype": "int64", "shape": [3, 35]}
    assert len(list((theirs / "pairs" / "text_ids").iterdir())) == len(parts)
    assert sum(part.stop - part.start for part in parts) == len(plan.image)
    assert any(part.stop - part.start < 3 for part in parts)
    for number, part in enumerate(parts):
        (picture,) = set(plan.image[part].tolist())
        texts = [*plan.text[part], *[plan.text[part.stop - 1]] * 3][:3]
        ids, mask, kv = (
            theirs / "pairs" / name / f"{tag}_{number:02d}.bin" for name in ("text_ids", "text_atten_mask", "cross_kv")
        )
        wanted = np.array(data.ids[texts])
        wanted[:, 0] = data.encode_id
        np.testing.assert_array_equal(np.fromfile(ids, np.int64).reshape(3, 35), wanted)
        np.testing.assert_array_equal(np.fromfile(mask, np.int64).reshape(3, 35), data.mask[texts])
        assert kv.samefile(theirs / "ais" / "image_kv" / f"{picture:02d}_0.bin")  # no copy
        assert not kv.is_symlink()


def test_what_the_pairs_take(copied: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = with_pairs(copied, files, "--k-test", K)
    assert "It takes 0.1 MB for the captions" in said
    assert "are linked to the files of image_kv, which takes no disk." in said
    before = {path.name: path.read_bytes() for path in (copied / "pairs" / "cross_kv").iterdir()}
    monkeypatch.setattr(ais_bench_pairs, "_links", lambda path, folder: False)  # another disk
    assert "are copied." in with_pairs(copied, files, "--k-test", K)
    paths = sorted((copied / "pairs" / "cross_kv").iterdir())
    assert {path.name: path.read_bytes() for path in paths} == before
    assert len({path.stat().st_ino for path in paths}) == 14  # one for each picture
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {0o640}
    assert bash(copied, "2025", "itm_cached").returncode == 0


def test_a_disk_without_the_space(copied: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(copied / "pairs")
    usage = shutil.disk_usage(copied)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    result = chain.call(runtime.__main__.main, "pairs", "--data", files, "--ais-bench", copied / "ais")
    assert re.fullmatch(r"The pairs take [\d.]+ MB, and the disk of .* has 0.0 MB free.", chain.refusal(result))
    assert "It takes" in result.stdout
    assert not (copied / "pairs").exists()


def test_pairs_that_cannot_be(copied: Path, files: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pairs(*options: object, data: Path = files) -> Any:
        return chain.call(runtime.__main__.main, "pairs", "--data", data, "--ais-bench", copied / "ais", *options)

    assert "itm_cached_bs3.om, which takes 3" in chain.refusal(pairs("--rows", 4), 2)
    assert "was made for another data folder" in chain.refusal(pairs(data=tiny_data))
    for module in (ais_bench_pairs, ais_bench_batches):
        monkeypatch.setattr(module, "MOST_FILES", 20)
    assert re.search(r"makes \d+ batches of 3 pairs, each a file; ais_bench takes 20 in a folder", chain.refusal(pairs()))
    (copied / "ais" / "image_kv" / "05_0.bin").unlink()
    assert "image_kv/05_0.bin is missing" in chain.refusal(pairs())


# The report


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_report_is_that_of_our_own_run(
    generation: str, om: Path, files: Path, ours: Path, theirs: Path, tmp_path: Path
) -> None:
    run = theirs if generation == "2025" else whole_run(om, files, tmp_path / "run", generation)
    found, data = read(AisBench(run / "ais", run / "pairs"), files, verify=True)
    same(found, read_outputs(ours))
    assert data.source.digest == read_retrieval(files).source.digest
    wanted = report(tmp_path / "ours", "--outputs", ours)
    made = report(tmp_path / "theirs", "--ais-bench", run / "ais", "--pairs", run / "pairs", "--data", files)
    for part in ("metrics", "curves", "counts", "protocol", "deviations", "parity", "data"):
        assert made[part] == wanted[part], part
    assert [row["stage"] for row in made["timings"]] == [f"{graph}, on the NPU" for graph in GRAPHS]
    assert [row["items"] for row in made["timings"]] == [35, 14, 14, made["counts"]["pairs"]]
    assert (made["backend"]["soc"], made["graphs"]["target"]) == ("Ascend310P3", "om")


def test_batches_are_those_that_ran(om: Path, files: Path, theirs: Path, tmp_path: Path) -> None:
    """There are .om for 3 rows alone."""
    ran = dict.fromkeys(GRAPHS, 3)
    asked = ("--om", om, "--data", files, "--out", tmp_path / "run", "--batchsize", 16, "--itm-batchsize", 2)
    said = chain.done(chain.call(runtime.__main__.main, "ais-bench-script", *asked))
    assert f"{om} has no larger .om: it runs text_embed, image, image_kv in batches of 3, not of 16." in said
    backend = manifest.read(tmp_path / "run", "ais_bench").content["backend"]
    assert (backend["batchsize"], backend["itm_batchsize"], backend["batches"]) == (16, 2, ran)
    assert report(tmp_path / "theirs", "--ais-bench", theirs, "--data", files)["backend"]["batches"] == ran
    asked = (*asked[:-4], "--batchsize", 3, "--itm-batchsize", 3)
    assert "no larger .om" not in chain.done(chain.call(runtime.__main__.main, "ais-bench-script", *asked))  # the control


def test_a_summary_without_files(copied: Path, files: Path, tmp_path: Path) -> None:
    path = copied / "ais" / "itm_cached_summary.json"
    found = json.loads(path.read_text("utf-8"))
    named = ("--ais-bench", copied / "ais", "--pairs", copied / "pairs", "--data", files, "--out", tmp_path / "report")
    report(tmp_path / "control", *named[:-2])
    first = found["filesinfo"][min(found["filesinfo"], key=int)]
    for spoil, says in (
        (lambda: first.update(infiles=[]), "a sample was made of no file"),
        (found["filesinfo"].clear, "no files"),
    ):
        spoil()
        path.write_text(json.dumps(found), "utf-8")
        said = chain.refusal(chain.call(postprocess.__main__.main, "--recall", *named))
        assert said == (
            f"{path} is no summary of ais_bench that names files (ValueError: {says}). Remove the folder and run the graph again."
        )


def test_similarity_alone(theirs: Path, ours: Path, tmp_path: Path) -> None:
    found = report(tmp_path / "theirs", "--ais-bench", theirs)  # as well as its folder ais
    wanted = report(tmp_path / "ours", "--outputs", ours)
    assert found["metrics"] == {method: wanted["metrics"][method] for method in ("itc", "chance")}
    assert (found["counts"]["pairs"], found["curves"]["itc"]) == (0, wanted["curves"]["itc"])
    page, text = ((tmp_path / "theirs" / name).read_text("utf-8") for name in ("report.html", "report.txt"))
    assert "nothing re-ranked" in text
    assert "Nothing was re-ranked" in page
    assert "Re-ranked" not in page + text
    assert "Re-ranked" in (tmp_path / "ours" / "report.html").read_text("utf-8")  # the control


def test_float16_outputs(atc_graphs: Path, files: Path, ours: Path, tmp_path: Path) -> None:
    """With --output_type=FP16 of ATC: keys and values are widened for a graph that takes float32."""
    halves = dict.fromkeys(("text_embed", "image_kv", "itm_cached"), half_outputs)
    out = whole_run(write_om(tmp_path / "om", atc_graphs, changed=halves), files, tmp_path / "run", "2025")
    sizes = [first(out / "pairs" / "cross_kv").stat().st_size, (out / "ais" / "image_kv" / "00_0.bin").stat().st_size]
    assert sizes[0] == 2 * sizes[1]
    found, _ = read(AisBench(out / "ais", out / "pairs"), files, verify=False)
    wanted = read_outputs(ours)
    np.testing.assert_array_equal(found.text_embed[:], wanted.text_embed[:].astype(np.float16).astype(np.float32))
    assert 0 < np.abs(found.itm_logits[:].mean() - wanted.itm_logits[:].mean()) < 0.01
    assert scores(found).dtype == np.float32


def test_an_int32_om(atc_graphs: Path, files: Path, tmp_path: Path) -> None:
    """Its manifest says int64, and ais_bench does whatever the bytes allow. Of batch 4 it takes two files of int64."""
    graphs = chain.export_graphs(tmp_path / "four", *WANTED, "--batchsize", 4)

    def narrow(path: Path, spec: Any) -> Any:
        for name in ("text_ids", "text_atten_mask"):
            cast_input(name, TensorProto.INT32)(path, spec)
        return spec

    out = scripted(write_om(tmp_path / "om", graphs, changed={"text_embed": narrow}), files, tmp_path / "run")
    done = bash(out, "2025")
    assert (done.returncode, "takes text_ids int32 560 bytes" in done.stderr) == (1, True)
    text = (out / "ais_bench.sh").read_text("utf-8")
    (out / "ais_bench.sh").write_text(text.replace("        opened text_embed ", "        : "), "utf-8")  # by hand
    done = bash(out, "2025")
    assert done.returncode == 0, done.stderr  # all seems well
    said = chain.refusal(chain.call(postprocess.__main__.main, "--recall", "--ais-bench", out / "ais", "--out", tmp_path / "r"))
    assert "text_embed_summary.json: the graph ran 18 times over 35 files; in batches of 4 that would be 9." in said
    assert "int32" in said
    assert not (tmp_path / "r").exists()


def test_blip2(tmp_path: Path) -> None:
    """The vectors of a picture have an axis more, and its graph gives three outputs."""
    graphs = chain.export_graphs(tmp_path / "graphs", *WANTED, "--batchsize", 3, model=random_blip2())
    data = chain.prepare(tmp_path, graphs, "--layout", "files")
    out = whole_run(write_om(tmp_path / "om", graphs), data, tmp_path / "run", "2025")
    chain.done(chain.run(graphs, data, tmp_path / "outputs", "--k-test", K))
    found, _ = read(AisBench(out / "ais", out / "pairs"), data, verify=False)
    same(found, read_outputs(tmp_path / "outputs"))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda run: (run / "ais" / "text_embed" / "07_0.bin").unlink(), "text_embed/07_0.bin is missing"),
        (lambda run: shutil.copy(run / "ais/image/07_0.bin", run / "ais/image/77_0.bin"), "image/77_0.bin is no output"),
        (lambda run: first(run / "ais" / "itm_cached").write_bytes(b"1234"), "_00_0.bin has 4 bytes"),
        (
            lambda run: nan(run / "ais" / "image" / "07_0.bin"),
            "image/07_0.bin holds NaN or infinity: image gave it in image_embed",
        ),
        (lambda run: nan(first(run / "ais" / "itm_cached")), "_00_0.bin holds NaN or infinity: itm_cached gave it in itm_logits"),
        (lambda run: shutil.rmtree(run / "ais" / "itm_cached"), "ais/itm_cached. ais_bench writes it"),
        (lambda run: (run / "ais" / "image_summary.json").unlink(), "ais/image has no summary"),
        (lambda run: shutil.rmtree(run / "pairs"), "pairs. blip-run pairs writes it."),
        (lambda run: (run / manifest.NAME).unlink(), "Write the folder again with blip-run ais-bench-script."),
        (lambda run: first(run / "pairs" / "text_ids").unlink(), "_00.bin is missing"),
    ],
)
def test_a_report_that_is_refused(copied: Path, files: Path, tmp_path: Path, spoil: Callable[[Path], object], says: str) -> None:
    spoil(copied)
    named = ("--ais-bench", copied / "ais", "--pairs", copied / "pairs", "--data", files, "--out", tmp_path / "report")
    assert says in chain.refusal(chain.call(postprocess.__main__.main, "--recall", *named))
    assert not (tmp_path / "report").exists()


def nan(path: Path) -> None:
    held = np.fromfile(path, np.float32)
    held[1] = np.nan
    held.tofile(path)


def test_nan_where_nothing_is_ranked_again(copied: Path, files: Path, tmp_path: Path) -> None:
    report(tmp_path / "control", "--ais-bench", copied / "ais", "--data", files)
    nan(copied / "ais" / "image" / "07_0.bin")
    named = ("--ais-bench", copied / "ais", "--data", files, "--out", tmp_path / "report")
    said = chain.refusal(chain.call(postprocess.__main__.main, "--recall", *named))
    assert "ais/image/07_0.bin holds NaN or infinity: image gave it in image_embed" in said
    assert not (tmp_path / "report").exists()


def test_scores_of_other_pairs(copied: Path, files: Path, tmp_path: Path) -> None:
    """As many batches, and files of the same sizes: the names alone tell, and what they begin with."""
    named = ("--ais-bench", copied / "ais", "--pairs", copied / "pairs", "--data", files)
    before = report(tmp_path / "before", *named)
    old = [path.name for path in sorted((copied / "pairs" / "text_ids").iterdir())]
    tag = manifest.read(copied / "pairs", "pairs").content["tag"]
    assert "pairs at k_test 6" in with_pairs(copied, files, "--k-test", K + 1)
    other = manifest.read(copied / "pairs", "pairs").content["tag"]
    assert len(old) <= len(list((copied / "pairs" / "text_ids").iterdir()))
    said = chain.refusal(chain.call(postprocess.__main__.main, "--recall", *named, "--out", tmp_path / "report"))
    assert said == (
        f"{copied}/ais/itm_cached_summary.json is of other pairs than {copied}/pairs: itm_cached was fed "
        f"pairs/text_ids/{tag}_00.bin, and the files of these begin with {other}_. Run it again: bash ais_bench.sh itm_cached."
    )
    assert bash(copied, "2025", "itm_cached").returncode == 0
    assert report(tmp_path / "after", *named)["counts"]["pairs"] > before["counts"]["pairs"]
    with_pairs(copied, files, "--k-test", K)  # and back
    assert {path.name for path in (copied / "pairs" / "text_ids").iterdir()} == set(old)
    assert f"begin with {tag}_" in chain.refusal(chain.call(postprocess.__main__.main, "--recall", *named))


def test_inputs_in_another_order(copied: Path, files: Path, tmp_path: Path) -> None:
    """By hand: masks for words, of the same names and bytes."""
    text, (given, turned) = (copied / "ais_bench.sh").read_text("utf-8"), ("{0}/ids,{0}/mask", "{0}/mask,{0}/ids")
    data = os.path.relpath(files, copied)
    (copied / "ais_bench.sh").write_text(text.replace(given.format(data), turned.format(data)), "utf-8")
    done = bash(copied, "2025", "text_embed")
    assert done.returncode == 0, done.stderr
    said = chain.refusal(chain.call(postprocess.__main__.main, "--recall", "--ais-bench", copied / "ais", "--data", files))
    assert f"text_ids of text_embed was fed {data}/mask/00.bin; expected the files of a folder ids." in said


def test_options_that_do_not_go_together(theirs: Path, ours: Path, files: Path, tiny_data: Path) -> None:
    def post(*options: object) -> Any:
        return chain.call(postprocess.__main__.main, *options)

    assert "choose one" in chain.refusal(post("--recall", "--outputs", ours, "--ais-bench", theirs / "ais"), 2)
    assert "--pairs belongs to --ais-bench" in chain.refusal(post("--recall", "--pairs", theirs / "pairs"), 2)
    assert "--ais-bench belongs to --recall" in chain.refusal(post("--top1", "--ais-bench", theirs / "ais"), 2)
    said = chain.refusal(post("--recall", "--ais-bench", theirs / "ais", "--data", tiny_data))
    assert "was made for another data folder" in said
