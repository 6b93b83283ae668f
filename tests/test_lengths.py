"""Graphs whose text length is open, an .om for each of several lengths, and which of them runs: over the stand-ins for ATC and
ais_bench, whose .om compute what the graphs do."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import export.__main__
import export.atc
from export.atc_plan import Options, plan
from export.lengths import buckets, lengths_asked
from export.lint import lint_folder, lint_model
from export.sizes import Sizes
from models import bert, manifest
from models.errors import Misuse, UserError
from models.om import OmEntry, entries, entry_to_dict, om_stem
from models.spec import GraphSpec, TensorSpec, spec_from_dict
from runtime.graphs import read_graphs
from runtime.outputs import read_retrieval
from runtime.pipeline import pipeline
from runtime.session import Session, open_session
from tests import chain
from tests.doubles import atc
from tests.om_folder import SOC
from tests.om_graphs import TEXT, onnx_of
from tests.tiny import random_blip2

OPEN = ("--target", "ascend", "--length", "open")
GRAPHS = ("text_embed", "image", "image_kv", "itm", "itm_cached")
TEXTS = ("text_embed", "itm", "itm_cached")
LENGTHS = (8, 16, 24, 35)
CLOSE = 1e-5  # what is asked; measured: 0, since what is masked weighs exp(-10000), 0 in float32
K = ("--k-test", 5, "--batchsize", 3, "--itm-batchsize", 3)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TINY with its batch and its text length open. Read only."""
    return chain.export_graphs(tmp_path_factory.mktemp("opened"), *OPEN, "--graphs", ",".join(GRAPHS))


def converted(graphs: Path, out: Path, *options: object) -> Path:
    """blip-atc over the stand-in for ATC."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{atc.install(out.parent / 'bin')}{os.pathsep}{os.environ['PATH']}")
        chain.done(chain.call(export.atc.main, "--graphs", graphs, "--soc", SOC, "--out", out, *options))
    return out


@pytest.fixture(scope="module")
def oms(tmp_path_factory: pytest.TempPathFactory, opened: Path) -> tuple[Path, Path]:
    """om/ folders for batches of 3: of the longest texts alone, and of all lengths. Read only."""
    root = tmp_path_factory.mktemp("lengths")
    asked = ("--batchsize", 3)
    return converted(opened, root / "one", *asked), converted(opened, root / "all", *asked, "--length", "buckets")


@pytest.fixture
def ran(today: None) -> Callable[[], Counter[str]]:
    """Which files the NPU ran since the last call, and how often."""
    import aclruntime  # type: ignore[import-not-found]  # the stand-in, which `today` puts on the path

    aclruntime.ran.clear()

    def since() -> Counter[str]:
        found = Counter(Path(path).stem for path in aclruntime.ran)
        aclruntime.ran.clear()
        return found

    return since


def options(graphs: Path, length: str | None, **more: Any) -> Options:
    usual = Options(graphs, graphs.parent / "om", None, [3], SOC, 8, None, length, "none", None, None, external_weight=False)
    return replace(usual, **more)


# What may be asked


def test_buckets() -> None:
    assert [buckets(longest) for longest in (35, 32, 64, 16, 8, 5)] == [
        *([8, 16, 24, 35], [8, 16, 24, 32], [8, 16, 24, 48, 64], [8, 16], [8], [5]),
    ]
    asked = [lengths_asked(text, 35) for text in (None, "35", "35, 8,16", "buckets")]
    assert asked == [[35], [35], [8, 16, 35], list(LENGTHS)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("50", "--length 50 holds 50, these graphs were exported for texts of 35 tokens at most."),
        ("8,36,35", "holds 36"),
        ("0", "--length 0 holds 0; a text has at least 3 tokens, its first and last among them."),
        ("-8,35", "holds -8; a text has at least 3 tokens"),
        ("8,8,35", "--length 8,8,35 holds 8 twice."),
        ("8,16", "--length 8,16 leaves out 35, the tokens of the longest texts of these graphs. Add it, or export them with"),
        ("bucket", "--length bucket is neither 'buckets' nor a list of numbers such as 8,16,35."),
        ("8,,35", "--length 8,,35 is neither"),
    ],
)
def test_lengths_that_cannot_be(opened: Path, text: str, said: str) -> None:
    for how in ("--dry-run", "--check"):
        more = ("--soc", SOC) if how == "--dry-run" else ()
        assert said in chain.refusal(chain.call(export.atc.main, how, "--graphs", opened, "--length", text, *more), 2)


def test_graphs_of_one_length(atc_graphs: Path) -> None:
    for length in ("buckets", "8,16,35"):
        with pytest.raises(Misuse) as caught:
            plan(options(atc_graphs, length))
        assert caught.value.message == (
            f"--length {length} needs graphs whose text axis is open; text_embed was exported for 35 tokens. Export it again: "
            "graphs of retrieval with --target ascend --length open; others in a folder for each --length."
        )
    assert plan(options(atc_graphs, "35", cann=7)).jobs  # what they were exported for


@pytest.mark.parametrize("target", ["ort", "atc"])
def test_open_is_for_ascend(tmp_path: Path, target: str) -> None:
    named = chain.write_model(tmp_path / "model", random_blip2())
    result = chain.call(export.__main__.main, *named, "--out", tmp_path / "graphs", "--target", target, "--length", "open")
    assert chain.refusal(result, 2).startswith("--length open is of retrieval graphs for --target ascend")
    wrong = chain.call(export.__main__.main, *named, "--target", "ascend", "--length", "opened")
    assert "'opened' is neither a number of tokens nor 'open'." in wrong.stderr


def test_graphs_that_write_words_have_one_length(tmp_path: Path) -> None:
    weights = Path(export.__main__.__file__).parents[1] / "demo"
    named = (
        "--model",
        "blip-caption-demo",
        "--checkpoint",
        weights / "weights.safetensors",
        "--tokenizer",
        weights / "tokenizer",
    )
    result = chain.call(export.__main__.main, *named, *OPEN, "--out", tmp_path / "graphs")
    assert "Graphs that write words have one length" in chain.refusal(result, 2)


# The graphs


def test_what_is_written(opened: Path) -> None:
    content = manifest.read(opened, "graphs").content
    specs = {name: spec_from_dict(name, values) for name, values in content["graphs"].items()}
    assert {t.shape for name in TEXTS for t in specs[name].inputs[:2]} == {("B", "L")}
    assert (content["sizes"], content["config"]["protocol"]["max_length"]) == ({"length": 35}, 35)
    cases = {row["graph"]: row["cases"] for row in content["parity"]}
    assert {cases[name] for name in TEXTS} == {"(1, 35) (3, 8) (2, 3)"}
    assert cases["image_kv"] == "(1) (3)"


def test_a_graph_that_keeps_its_length_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parity is measured at other lengths than that of the example: what became a constant is seen."""

    def forward(self: bert.Embeddings, ids: Any, positions: Any = None) -> Any:
        places = self.position_embeddings.weight[: ids.shape[1]] * int(ids.shape[1])  # a number to the exporter, no axis
        return self.LayerNorm(self.word_embeddings(ids) + places)

    monkeypatch.setattr(bert.Embeddings, "forward", forward)
    named = chain.write_model(tmp_path / "model", chain.random_model())
    result = chain.call(export.__main__.main, *named, *OPEN, "--graphs", "text_embed", "--out", tmp_path / "graphs")
    assert chain.refusal(result).startswith("The graphs are not the model: text_embed.text_embed differs by")
    assert not (tmp_path / "graphs").exists()


def test_the_lint_passes_every_length(opened: Path, tmp_path: Path) -> None:
    for cann in (7, 8):
        assert lint_folder(opened, cann, [1, 4], length="buckets") == []
    two = chain.export_graphs(tmp_path / "two", *OPEN, "--graphs", "itm,itm_cached,text_feat,multimodal", model=random_blip2())
    assert lint_folder(two, 8, [1, 4], length="3,9,35") == []
    for name, model, more in (("early", None, ""), ("early2", random_blip2(), ",itm,multimodal")):
        named = ("--opset", 13, "--graphs", f"text_embed,itm_cached{more}")
        early = chain.export_graphs(tmp_path / name, *OPEN, *named, model=model)
        assert lint_folder(early, 6, [1, 4], length="buckets") == []


def test_the_lint_looks_at_each_length() -> None:
    """A graph that multiplies by as many rows as its longest text has tokens."""
    spec = GraphSpec("text_embed", tuple(TensorSpec(t.name, t.dtype, ("B", "L")) for t in TEXT.inputs), TEXT.outputs)
    model = onnx_of(spec, 17)
    assert lint_model(model, spec, 8, [Sizes(2, 5)]) == []
    found = lint_model(model, spec, 8, [Sizes(2, 4), Sizes(2, 5)])
    assert {finding.rule for finding in found} == {"static"}
    assert "text_ids [2, 4]" in found[0].said


# The commands


def test_a_command_for_each_length(opened: Path) -> None:
    made = {job.stem: dict(part.split("=", 1) for part in job.argv[1:]) for job in plan(options(opened, "35,8")).jobs}
    assert list(made) == [
        *("text_embed_bs3_len8", "text_embed_bs3", "image_bs3", "image_kv_bs3", "itm_bs3_len8", "itm_bs3"),
        *("itm_cached_bs3_len8", "itm_cached_bs3"),
    ]
    assert made["text_embed_bs3_len8"]["--input_shape"] == "text_ids:3,8;text_atten_mask:3,8"
    assert made["itm_cached_bs3_len8"]["--input_shape"] == "text_ids:3,8;text_atten_mask:3,8;cross_kv:1,4,4,17,10"
    assert {stem: argv["--output"] for stem, argv in made.items()} == {stem: stem for stem in made}
    (decoders, several) = (om_stem("itm", batches, length) for batches, length in (([1, 16], None), ([1, 16], 8)))
    assert (decoders, several) == ("itm_bs1to16", "itm_bs1to16_len8")


def test_without_lengths_they_are_those_of_graphs_of_one(opened: Path, tmp_path: Path) -> None:
    fixed = chain.export_graphs(tmp_path / "fixed", "--target", "ascend", "--graphs", ",".join(GRAPHS))
    out = tmp_path / "om"
    ours, theirs = (plan(options(graphs, None, out=out, batches=[1, 16])).jobs for graphs in (opened, fixed))
    assert [job.argv[3:] for job in ours] == [job.argv[3:] for job in theirs]
    assert [job.entries for job in plan(options(opened, "35")).jobs] == [job.entries for job in plan(options(opened, None)).jobs]


def test_gears_at_each_length(opened: Path) -> None:
    for dynamic, option in (("batch", "--dynamic_batch_size=1,4"), ("dims", "--dynamic_dims=1,1;4,4")):
        jobs = plan(options(opened, "8,35", batches=[1, 4], dynamic=dynamic, only=["text_embed"])).jobs
        assert [job.stem for job in jobs] == ["text_embed_bs1to4_len8", "text_embed_bs1to4"]
        assert [("--input_shape=text_ids:-1,8;text_atten_mask:-1,8" in job.argv) for job in jobs] == [True, False]
        assert all(option in job.argv for job in jobs)


def test_om_folder(oms: tuple[Path, Path]) -> None:
    found = manifest.read(oms[1], "om", verify=True)
    lengths = {entry.file: entry.length for entry in entries(found.content)}
    texts = {f"{name}_bs3{'' if n == 35 else f'_len{n}'}.om": n for name in TEXTS for n in LENGTHS}
    assert lengths == {**texts, "image_bs3.om": None, "image_kv_bs3.om": None}
    assert [each["length"] for each in found.content["oms"] if each["graph"] == "itm"] == list(LENGTHS)
    assert set(lengths) <= set(found.files)
    assert {entry.file for entry in entries(manifest.read(oms[0], "om").content)} <= set(lengths)


def test_the_length_in_the_manifest() -> None:
    bound = TEXT.bind(4, 5)
    values = entry_to_dict(OmEntry("text_embed", 4, "text_embed_bs4.om", bound, ("atc",)))
    content = {"graphs": {"text_embed": {}}, "oms": [values]}
    assert (values["length"], entries(content)[0].length) == (5, 5)
    with pytest.raises(UserError, match="the text length 6"):
        entries({**content, "oms": [{**values, "length": 6}]})
    del values["length"]  # as an earlier release wrote it
    assert entries(content)[0].length == 5


# The runs


def test_retrieval(oms: tuple[Path, Path], tiny_data: Path, tmp_path: Path, ran: Callable[[], Counter[str]]) -> None:
    """Each text in the shortest file that holds its batch; the same pairs, numbers and report."""
    counts = []
    for n, om in enumerate(oms):
        chain.done(chain.run(om, tiny_data, tmp_path / str(n), *K))
        counts.append(ran())
    one, several = counts
    assert set(one) == {"text_embed_bs3", "image_bs3", "image_kv_bs3", "itm_cached_bs3"}
    for name in ("text_embed", "itm_cached"):
        files = [f"{name}_bs3{end}" for end in ("_len8", "_len16", "_len24", "")]
        assert all(several[file] for file in files)
        assert sum(several[file] for file in files) == one[f"{name}_bs3"]
    assert all(several[name] == one[name] for name in ("image_bs3", "image_kv_bs3"))
    # 35 captions in batches of like length.
    lengths = np.sort(np.load(tiny_data / "mask.npy").sum(axis=1))
    tops = [lengths[min(start + 2, len(lengths) - 1)] for start in range(0, len(lengths), 3)]
    assert several["text_embed_bs3_len8"] == sum(top <= 8 for top in tops)
    assert several["text_embed_bs3"] == sum(top > 24 for top in tops)
    agree(tmp_path / "0", tmp_path / "1")
    assert chain.recall(tmp_path / "0", tmp_path / "first") == chain.recall(tmp_path / "1", tmp_path / "second")


def agree(first: Path, second: Path) -> None:
    """The same pairs, and numbers that are close."""
    ours, theirs = read_retrieval(first), read_retrieval(second)
    for name in ("pair_image", "pair_text", "pair_direction"):
        np.testing.assert_array_equal(getattr(ours, name)[:], getattr(theirs, name)[:])
    for name in ("text_embed", "itm_logits"):
        np.testing.assert_allclose(getattr(ours, name)[:], getattr(theirs, name)[:], rtol=0, atol=CLOSE)


def test_other_numbers_of_one_length_are_seen(oms: tuple[Path, Path], tiny_data: Path, tmp_path: Path, today: None) -> None:
    wrong = tmp_path / "om"
    shutil.copytree(oms[1], wrong)
    model = onnx.load(wrong / "itm_cached_bs3_len8.om")
    bias = next(t for t in model.graph.initializer if (list(t.dims), t.data_type) == ([2], onnx.TensorProto.FLOAT))
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(1e-3), bias.name))
    onnx.save(model, wrong / "itm_cached_bs3_len8.om")
    kept = {k: v for k, v in manifest.read(oms[1], "om").content.items() if k not in ("format", "kind", "made_by", "files")}
    manifest.write(wrong, "om", kept)
    for om, out in ((oms[0], "wanted"), (wrong, "found")):
        chain.done(chain.run(om, tiny_data, tmp_path / out, *K))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        agree(tmp_path / "wanted", tmp_path / "found")


def test_on_four_npus_and_without_the_cached_graph(
    oms: tuple[Path, Path], opened: Path, tiny_data: Path, tmp_path: Path, ran: Callable[[], Counter[str]]
) -> None:
    alone = converted(opened, tmp_path / "om", "--batchsize", 3, "--length", "16,35", "--only", "text_embed,image,itm")
    for om, out, more in ((oms[0], "one", ()), (oms[1], "four", ("--device", "0,1,2,3")), (alone, "alone", ())):
        chain.done(chain.run(om, tiny_data, tmp_path / out, *K, *more))
    found = ran()
    assert found["itm_bs3_len16"]
    assert found["itm_bs3"]
    agree(tmp_path / "one", tmp_path / "four")
    agree(tmp_path / "one", tmp_path / "alone")


def test_onnx_runtime_runs_them_open(opened: Path, oms: tuple[Path, Path], tiny_data: Path, tmp_path: Path, today: None) -> None:
    for graphs, out in ((opened, "open"), (oms[1], "om")):
        chain.done(chain.run(graphs, tiny_data, tmp_path / out, *K))
    assert open_session(read_graphs(opened), "itm").length is None
    agree(tmp_path / "open", tmp_path / "om")


def test_features(tmp_path: Path, ran: Callable[[], Counter[str]]) -> None:
    """Outputs that have a row for each token, of BLIP-2."""
    graphs = chain.export_graphs(tmp_path, *OPEN, "--graphs", "image_feat,qformer,text_feat,multimodal", model=random_blip2())
    data = chain.prepare(tmp_path / "pictures", graphs)
    for out, length in (("one", "35"), ("several", "10,20,35")):
        om = converted(graphs, tmp_path / f"om-{out}", "--batchsize", 3, "--length", length)
        chain.done(chain.run(om, data, tmp_path / out, task="features"))
    assert {"text_feat_bs3_len10", "text_feat_bs3_len20", "multimodal_bs3_len10"} <= set(ran())
    for name in ("text_embeds", "text_embeds_proj", "multimodal_embeds"):
        one, several = (np.load(tmp_path / out / f"{name}.npy") for out in ("one", "several"))
        np.testing.assert_allclose(several, one, rtol=0, atol=CLOSE)


def test_from_python(oms: tuple[Path, Path], tmp_path: Path, ran: Callable[[], Counter[str]]) -> None:
    chain.write_pictures(tmp_path)
    pictures = [tmp_path / "images" / f"{n}.png" for n in range(4)]
    texts = ["word1 word2", "word3", "word4 word5", *(" ".join(f"word{n}" for n in range(count)) for count in (25, 30))]
    found = [pipeline("image_text_retrieval", om, threads=1)(pictures, texts) for om in oms]
    assert {"itm_cached_bs3_len8", "text_embed_bs3_len8", "text_embed_bs3"} <= set(ran())
    for one, several in zip(*found, strict=True):
        assert [each["text"] for each in one] == [each["text"] for each in several]
        for key in ("itm", "similarity"):
            assert [each[key] for each in several] == pytest.approx([each[key] for each in one], abs=CLOSE)


def test_the_shortest_that_holds_a_text() -> None:
    class Noting:
        def __init__(self, length: int) -> None:
            self.length, self.fed = length, list[tuple[int, ...]]()

        def run(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
            self.fed.append(feeds["text_atten_mask"].shape)
            return [feeds["text_atten_mask"].sum(axis=1, keepdims=True).repeat(4, axis=1).astype(np.float32)]

        def npu_ms(self) -> list[float]:
            return [float(self.length)] * len(self.fed)

    spec = replace(TEXT, inputs=tuple(replace(t, shape=("B", "L")) for t in TEXT.inputs))
    made = {length: Noting(length) for length in (16, 8, 35)}
    session = Session(spec, made[35], 2, 35, shorter={16: made[16], 8: made[8]})
    for length in (1, 8, 9, 16, 17, 35):
        mask = np.ones((1, length), np.int64)
        assert session.run(text_ids=mask, text_atten_mask=mask)["text_embed"].tolist() == [[length] * 4]
    assert {length: backend.fed for length, backend in made.items()} == {n: [(2, n)] * 2 for n in (8, 16, 35)}
    assert session.npu_ms() == [8.0, 8.0, 16.0, 16.0, 35.0, 35.0]
    mask = np.ones((1, 36), np.int64)
    with pytest.raises(UserError, match="exported for 2 rows of length 35; it was fed 1 rows of length 36"):
        session.run(text_ids=mask, text_atten_mask=mask)
