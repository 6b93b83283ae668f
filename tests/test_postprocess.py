"""blip-post on the command line: what it prints, what it leaves, and what it says when something is wrong."""

from __future__ import annotations

import ast
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from models import manifest
from postprocess.__main__ import main
from postprocess.recall import score_matrices
from preprocess.tensors import FILES, PACKED
from runtime.outputs import read_retrieval
from tests.retrieval_run import Run, make_run
from tests.test_recall import dense_recall


def post(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["--recall", *map(str, arguments)])


def printed(result: Result) -> dict[str, float]:
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("eval_result: ")]
    values: dict[str, float] = ast.literal_eval(line.removeprefix("eval_result: "))
    return values


def refused(result: Result, code: int, *says: str) -> None:
    """One sentence or two on stderr, the exit code, and no traceback."""
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    assert result.stderr.startswith(("Error: ", "Usage: "))
    for text in says:
        assert text in result.stderr


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path)


def test_prints_the_table_the_metrics_and_the_path(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "report"
    result = post("--outputs", run.outputs, "--out", out)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("14 pictures, 70 captions, ")
    assert lines[0].endswith("pairs re-ranked (k_test 12). Recall in percent:")
    assert lines[-1] == str(out / "report.html")
    table = lines[2:11]
    assert len({len(line) for line in table if not line.endswith(("caption", "picture"))}) == 1  # aligned
    values = printed(result)
    assert table[2].split() == ["Re-ranked", *(f"{values[f'txt_{k}']:.2f}" for k in ("r1", "r5", "r10", "r_mean"))]
    assert table[8].split()[:2] == ["Chance", f"{100 / 14:.2f}"]
    matrices = score_matrices(read_retrieval(run.outputs))
    assert values == dense_recall(*matrices, run.image_of_text)
    assert sorted(p.name for p in out.iterdir()) == ["manifest.json", "report.html", "report.json", "report.txt"]
    found = manifest.read(out, "report", verify=True)
    assert found.content["metrics"]["reranked"] == values
    assert found.content["outputs"]["digest"] == manifest.read(run.outputs, "outputs").digest
    assert found.content["data"]["digest"] == manifest.read(run.data, "data").digest


def test_keys_of_the_ascend_recipe(run: Run, tmp_path: Path) -> None:
    usual = printed(post("--outputs", run.outputs, "--out", tmp_path / "a"))
    result = post("--outputs", run.outputs, "--out", tmp_path / "b", "--keys", "ascend")
    values = printed(result)
    assert list(values)[:5] == ["text_r1", "text_r5", "text_r10", "text_r_mean", "image_r1"]
    assert list(values)[5:] == ["image_r5", "image_r10", "image_r_mean", "r_mean"]
    assert list(values.values()) == list(usual.values())[:-1]  # without agg_metrics
    record = json.loads((tmp_path / "b/report.json").read_text("utf-8"))
    assert (record["keys"], record["metrics"]["reranked"]) == ("ascend", values)


def test_writes_the_same_report_again(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "report"
    assert post("--outputs", run.outputs, "--out", out).exit_code == 0
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    assert post("--outputs", run.outputs, "--out", out).exit_code == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first


def test_reads_one_file_per_sample(tmp_path: Path) -> None:
    packed, files = (make_run(tmp_path / layout, own=(2,) * 4, k_test=3, layout=layout) for layout in (PACKED, FILES))
    results = [post("--outputs", run.outputs, "--out", run.outputs.parent / "report") for run in (packed, files)]
    assert printed(results[0]) == printed(results[1])


def test_data_folder_that_moved(run: Run, tmp_path: Path) -> None:
    moved, out = tmp_path / "elsewhere", tmp_path / "report"
    run.data.rename(moved)
    refused(post("--outputs", run.outputs, "--out", out), 1, "there is no folder", "--data")
    assert not out.exists()
    refused(post("--outputs", run.outputs, "--data", tmp_path / "nowhere", "--out", out), 1, "no folder", "blip-pre retrieval")
    assert post("--outputs", run.outputs, "--data", moved, "--out", out).exit_code == 0


def test_data_folder_recorded_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path)
    again = manifest.read(run.data, "data")
    path = run.outputs / manifest.NAME
    path.write_text(path.read_text("utf-8").replace(json.dumps(str(run.data)), '"data"'), "utf-8")
    monkeypatch.chdir(tmp_path)
    assert post("--outputs", "outputs", "--out", "report").exit_code == 0
    assert json.loads((tmp_path / "report/report.json").read_text("utf-8"))["data"]["digest"] == again.digest


def test_page_says_how_it_was_called(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/blip-post", "--recall", "--keys", "ascend", "--verify"])
    assert post("--outputs", run.outputs, "--out", tmp_path / "report").exit_code == 0
    assert "<pre>blip-post --recall --keys ascend --verify</pre>" in (tmp_path / "report/report.html").read_text("utf-8")


def test_asking_for_nothing_is_misuse(run: Run) -> None:
    result = CliRunner().invoke(main, ["--outputs", str(run.outputs)])
    refused(result, 2, "Nothing was asked for", "blip-post --recall")


def test_unknown_keys_are_misuse(run: Run, tmp_path: Path) -> None:
    refused(post("--outputs", run.outputs, "--out", tmp_path / "report", "--keys", "lavis"), 2, "'blip', 'ascend'")


def test_out_that_is_something_else_is_misuse(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("do not delete", "utf-8")
    refused(post("--outputs", run.outputs, "--out", tmp_path / "mine"), 2, "not a report folder")
    refused(post("--outputs", run.outputs, "--out", tmp_path / "mine/thesis.txt"), 2, "is a file")
    refused(post("--outputs", run.outputs, "--out", run.outputs), 2, "not a report folder")
    assert (tmp_path / "mine/thesis.txt").read_text("utf-8") == "do not delete"
    manifest.read(run.outputs, "outputs", verify=True)


def unfinished(run: Run) -> None:
    (run.outputs / manifest.NAME).unlink()


def of_another_kind(run: Run) -> None:
    shutil.copy(run.data / manifest.NAME, run.outputs / manifest.NAME)


def truncated(run: Run) -> None:
    os.truncate(run.outputs / "itm_logits.npy", 200)


def missing(run: Run) -> None:
    (run.outputs / "pair_sim.npy").unlink()


def not_json(run: Run) -> None:
    (run.outputs / manifest.NAME).write_text("{", "utf-8")


def damaged_data(run: Run) -> None:
    os.truncate(run.data / "img.npy", 1000)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (unfinished, ("is not a complete outputs folder", "blip-run")),
        (of_another_kind, ("is a 'data' folder, expected 'outputs'",)),
        (truncated, ("itm_logits.npy has 200 bytes",)),
        (missing, ("pair_sim.npy is missing",)),
        (not_json, ("is damaged",)),
        (damaged_data, ("img.npy has 1,000 bytes", "blip-pre")),
    ],
)
def test_damaged_folders(run: Run, tmp_path: Path, harm: Any, says: tuple[str, ...]) -> None:
    harm(run)
    out = tmp_path / "report"
    refused(post("--outputs", run.outputs, "--out", out), 1, *says)
    assert not list(tmp_path.glob("*report*")) + list(tmp_path.glob(".*report*"))


def test_no_outputs_at_all(tmp_path: Path) -> None:
    refused(post("--outputs", tmp_path / "outputs", "--out", tmp_path / "report"), 1, "There is no folder", "blip-run")


def test_a_flipped_byte_is_found_with_verify(run: Run, tmp_path: Path) -> None:
    path = run.outputs / "itm_logits.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    refused(post("--outputs", run.outputs, "--out", tmp_path / "report", "--verify"), 1, "itm_logits.npy", "sha256 differs")


def test_data_of_another_run(run: Run, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", seed=1)
    result = post("--outputs", run.outputs, "--data", other.data, "--out", tmp_path / "report")
    refused(result, 1, "made from another data folder", "--data", "or run blip-run retrieval again.")
    assert not (tmp_path / "report").exists()


def overwrite(run: Run, name: str, change: Any) -> None:
    """Change a tensor and complete the folder again, as a broken writer would."""
    found = manifest.read(run.outputs, "outputs")
    path = run.outputs / f"{name}.npy"
    values = np.load(path)
    change(values)
    np.save(path, values)
    manifest.write(run.outputs, "outputs", found.content)


def nan(values: np.ndarray) -> None:
    values[3] = np.nan


def beyond(values: np.ndarray) -> None:
    values[-1] = 70


def negative(values: np.ndarray) -> None:
    values[0] = -1


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("itm_logits", nan, "1 of "),
        ("text_embed", nan, "values of text_embed are not finite"),
        ("pair_text", beyond, "pair_text goes from 0 to 70, expected 0 .. 69"),
        ("pair_image", negative, "pair_image goes from -1"),
    ],
)
def test_numbers_that_cannot_be_ranked(run: Run, tmp_path: Path, name: str, change: Any, says: str) -> None:
    overwrite(run, name, change)
    refused(post("--outputs", run.outputs, "--out", tmp_path / "report"), 1, says)
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("data", "outputs", "says"),
    [
        ({}, {"timings": None}, "lacks or garbles"),
        ({}, {"timings": [{"stage": "pairs", "items": "many", "seconds": 1, "resumed": 0}]}, "lacks or garbles"),
        ({}, {"graphs": {}}, "Run blip-pre retrieval and blip-run retrieval again."),
        ({"broken": ["a.jpg"]}, {}, "lacks or garbles"),
        ({}, {"data": {}}, "does not say which data it was made from ('folder'). Run blip-run retrieval again."),
        ({}, {"k_test": "many"}, "lacks or garbles"),
        ({"protocol": {}}, {}, "lacks or garbles"),
        ({"image_of_text": [99] * 70}, {}, "beyond the 14 images"),
        ({"images": [{}] * 14}, {}, "lacks"),
    ],
)
def test_manifests_that_lack_a_part(tmp_path: Path, data: dict[str, Any], outputs: dict[str, Any], says: str) -> None:
    run = make_run(tmp_path, data=data, outputs=outputs)
    refused(post("--outputs", run.outputs, "--out", tmp_path / "report"), 1, says)
    assert not (tmp_path / "report").exists()


def test_outputs_of_another_size(tmp_path: Path) -> None:
    """A manifest made to fit by hand: the counts still tell."""
    run, other = make_run(tmp_path / "a"), make_run(tmp_path / "b", own=(5,) * 9)
    content = manifest.read(run.outputs, "outputs").content
    content["data"] = {"digest": manifest.read(other.data, "data").digest, "folder": str(other.data)}
    manifest.write(run.outputs, "outputs", content)
    refused(post("--outputs", run.outputs, "--out", tmp_path / "report"), 1, "image_embed has the shape (14, 8)", "(9, 8)")


def test_a_failure_leaves_the_older_report(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "report"
    assert post("--outputs", run.outputs, "--out", out).exit_code == 0
    before = (out / "report.html").read_bytes()
    overwrite(run, "itm_logits", nan)
    refused(post("--outputs", run.outputs, "--out", out), 1, "not finite")
    assert (out / "report.html").read_bytes() == before
