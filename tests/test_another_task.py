"""A folder that one task has filled is not replaced by another: the tasks share their default folders, and a run takes hours."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

import postprocess.__main__
import preprocess.__main__
from models import manifest
from runtime import retrieval
from runtime.outputs import read_classify, read_retrieval
from tests import chain
from tests.classes import data_for
from tests.test_classify import stop_in

Call = Callable[..., Result]


@pytest.fixture
def runs(ort_graphs: Path, tiny_data: Path, tmp_path: Path) -> dict[str, Call]:
    """blip-run of each task to the same folder."""
    data = {"retrieval": tiny_data, "classify": data_for(ort_graphs)}

    def of(task: str) -> Call:
        return lambda *options: chain.run(ort_graphs, data[task], tmp_path / "outputs", *options, task=task)

    return {task: of(task) for task in data}


def assert_kept(folder: Path, kind: str, before: bytes) -> None:
    manifest.read(folder, kind, verify=True)
    assert (folder / manifest.NAME).read_bytes() == before
    assert not (folder.parent / f".{folder.name}.part").exists()


@pytest.mark.parametrize(("first", "second"), [("retrieval", "classify"), ("classify", "retrieval")])
def test_a_complete_run(runs: dict[str, Call], tmp_path: Path, first: str, second: str) -> None:
    chain.done(runs[first]())
    out = tmp_path / "outputs"
    before = (out / manifest.NAME).read_bytes()
    message = chain.refusal(runs[second](), code=2)
    assert message == f"{out} is of the task {first!r}, this is {second!r}: its outputs would be lost. Choose another --out."
    assert_kept(out, "outputs", before)
    chain.done(runs[second]("--restart"))
    assert manifest.read(out, "outputs", verify=True).content["task"] == second


def test_a_half_finished_run(runs: dict[str, Call], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "PICTURES_PER_SHARD", 4)
    with monkeypatch.context() as patch:
        stop_in(patch, "pictures", shard=2)
        with pytest.raises(RuntimeError, match="stopped"):
            runs["retrieval"]()
    part = tmp_path / ".outputs.part"
    before = {path.name: path.read_bytes() for path in part.iterdir()}
    assert chain.refusal(runs["classify"](), code=2) == (
        f"{part} holds a half-finished run with another task (retrieval, now classify). "
        "Finish it with its own options, choose another --out, or start anew with --restart."
    )
    assert {path.name: path.read_bytes() for path in part.iterdir()} == before
    chain.done(runs["retrieval"]())
    timings = {row["stage"]: row["resumed"] for row in read_retrieval(tmp_path / "outputs", verify=True).run["timings"]}
    assert timings["pictures"] == 8


def test_a_half_finished_run_is_dropped_when_asked(
    runs: dict[str, Call], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_in(patch, "captions", shard=0)
        with pytest.raises(RuntimeError, match="stopped"):
            runs["retrieval"]()
    chain.done(runs["classify"]("--restart"))
    read_classify(tmp_path / "outputs", verify=True)
    assert not (tmp_path / "outputs" / "image_feat.npy").exists()


def test_data(ort_graphs: Path, tiny_data: Path, tmp_path: Path) -> None:
    images, source = data_for(ort_graphs).parent / "images", tiny_data.parent
    calls = {
        "classify": ("classify", "--images", images),
        "retrieval": ("retrieval", "--images", source / "images", "--annotations", source / "annotations.json"),
    }
    for held, folder, task in (("retrieval", tiny_data, "classify"), ("classify", data_for(ort_graphs), "retrieval")):
        out = tmp_path / held
        shutil.copytree(folder, out)
        before = (out / manifest.NAME).read_bytes()
        named = (*calls[task], "--graphs", ort_graphs, "--out", out, "--workers", 1)
        message = chain.refusal(chain.call(preprocess.__main__.main, *named), code=2)
        assert message == f"{out} is of the task {held!r}, this is {task!r}: its data would be lost. Choose another --out."
        assert_kept(out, "data", before)


def test_report(runs: dict[str, Call], tmp_path: Path) -> None:
    options = {"retrieval": "--recall", "classify": "--top1"}
    for task, held in (("retrieval", "classify"), ("classify", "retrieval")):
        chain.done(runs[task]("--restart"))
        out = tmp_path / held
        out.mkdir()
        before = manifest.write(out, "report", {"task": held}) and (out / manifest.NAME).read_bytes()
        named = (options[task], "--outputs", tmp_path / "outputs", "--out", out)
        message = chain.refusal(chain.call(postprocess.__main__.main, *named), code=2)
        assert message == f"{out} is of the task {held!r}, this is {task!r}: its report would be lost. Choose another --out."
        assert_kept(out, "report", before)
