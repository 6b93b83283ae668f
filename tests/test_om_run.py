"""blip-run over om/ folders, with stand-ins for ais_bench: to the bit the numbers of ONNX Runtime over the same graphs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from models import manifest
from models.errors import UserError
from preprocess.pictures import open_graphs
from runtime.graphs import Graphs, read_graphs
from runtime.outputs import read_caption, read_classify, read_retrieval, read_vqa
from runtime.pipeline import pipeline
from runtime.place import numbers
from runtime.session import Session, open_session
from tests import chain, classes
from tests.om_folder import SOC, cast_input, half_outputs, same_tensors, turned_round, write_om
from tests.text_graphs import call_run, caption_data
from tests.tiny import random_blip2

RETRIEVAL = ("image", "text_embed", "image_kv", "itm_cached")
WHOLE = 7  # a batch that divides the 14 pictures and the 35 captions; chain.STATIC divides neither
K = ("--k-test", 5)
LAST = {"itm_cached": "text_ids", "image": "input_image"}
LAST_TYPES = {"itm_cached": TensorProto.INT32, "image": TensorProto.DOUBLE}


@pytest.fixture(scope="module")
def by_batch(tmp_path_factory: pytest.TempPathFactory, atc_graphs: Path) -> dict[int, Path]:
    """graphs/ folders of TINY for batches of 3 and of 7."""
    options = ("--target", "atc", "--batchsize", WHOLE, "--graphs", ",".join(RETRIEVAL))
    return {chain.STATIC: atc_graphs, WHOLE: chain.export_graphs(tmp_path_factory.mktemp("whole"), *options)}


@pytest.fixture(scope="module")
def expected(
    tmp_path_factory: pytest.TempPathFactory, by_batch: dict[int, Path], tiny_data: Path
) -> Callable[[int], tuple[Path, Path]]:
    """The outputs of ONNX Runtime by batch, and an om/ folder of the same graphs."""
    made: dict[int, tuple[Path, Path]] = {}

    def of(batch: int) -> tuple[Path, Path]:
        if batch not in made:
            root = tmp_path_factory.mktemp(f"expected{batch}")
            chain.done(chain.run(by_batch[batch], tiny_data, root / "outputs", *K))
            made[batch] = root / "outputs", write_om(root / "om", by_batch[batch])
        return made[batch]

    return of


@pytest.mark.parametrize("batch", [chain.STATIC, WHOLE])
def test_retrieval(
    generation: str, expected: Callable[[int], tuple[Path, Path]], tiny_data: Path, tmp_path: Path, batch: int
) -> None:
    wanted, om = expected(batch)
    chain.done(chain.run(om, tiny_data, tmp_path / "outputs", *K))
    assert same_tensors(tmp_path / "outputs", wanted)[-1] == "text_embed.npy"
    run = read_retrieval(tmp_path / "outputs").run
    assert (run["backend"]["provider"], run["backend"]["soc"], run["backend"]["device"]) == ("om", SOC, [0])
    assert run["graphs"]["target"] == "om"


def test_retrieval_on_four_npus(
    today: None, expected: Callable[[int], tuple[Path, Path]], tiny_data: Path, tmp_path: Path
) -> None:
    wanted, om = expected(chain.STATIC)
    out = tmp_path / "outputs"
    chain.done(chain.run(om, tiny_data, out, *K, "--device", "0,1,2,3"))
    same_tensors(out, wanted)
    assert read_retrieval(out).run["backend"]["device"] == [0, 1, 2, 3]
    assert chain.recall(out, tmp_path / "ours") == chain.recall(wanted, tmp_path / "theirs")
    # The numbers are the same wherever they were computed: there is nothing to do again.
    assert "already holds this run" in chain.done(chain.run(om, tiny_data, out, *K, "--device", "2"))


def test_other_numbers_are_seen(today: None, by_batch: dict[int, Path], expected: Any, tiny_data: Path, tmp_path: Path) -> None:
    """In float16 the outputs of one graph are others; and they are read, widened."""
    om = write_om(tmp_path / "om", by_batch[WHOLE], changed={"itm_cached": half_outputs})
    chain.done(chain.run(om, tiny_data, tmp_path / "outputs", *K))
    found, wanted = (np.load(folder / "itm_logits.npy") for folder in (tmp_path / "outputs", expected(WHOLE)[0]))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, wanted.astype(np.float16).astype(np.float32))
    with pytest.raises(AssertionError, match="itm_logits"):
        same_tensors(tmp_path / "outputs", expected(WHOLE)[0])


def test_inputs_and_outputs_in_another_order(
    generation: str, by_batch: dict[int, Path], expected: Any, tiny_data: Path, tmp_path: Path
) -> None:
    changed = dict.fromkeys(("image", "text_embed", "itm_cached"), turned_round)
    om = write_om(tmp_path / "om", by_batch[WHOLE], changed=changed)
    chain.done(chain.run(om, tiny_data, tmp_path / "outputs", *K))
    same_tensors(tmp_path / "outputs", expected(WHOLE)[0])


def test_an_int32_file_is_refused(today: None, by_batch: dict[int, Path], tiny_data: Path, tmp_path: Path) -> None:
    om = write_om(tmp_path / "om", by_batch[WHOLE], changed={"text_embed": cast_input("text_atten_mask", TensorProto.INT32)})
    said = chain.refusal(chain.run(om, tiny_data, tmp_path / "outputs", *K))
    assert said.startswith(f"text_embed: {om / 'text_embed_bs7.om'} takes text_atten_mask as int32; expected int64.")


@pytest.mark.parametrize(("task", "device"), [("retrieval", "0"), ("retrieval", "0,1"), ("classify", "0")])
def test_every_file_is_looked_at_before_the_first_runs(
    today: None, by_batch: dict[int, Path], tiny_data: Path, tmp_path: Path, task: str, device: str
) -> None:
    """Not when the pictures, which come first, are done."""
    wrong = "itm_cached" if task == "retrieval" else "image"  # of each task what runs last
    om = write_om(tmp_path / "om", by_batch[WHOLE], changed={wrong: cast_input(LAST[wrong], LAST_TYPES[wrong])})
    data = tiny_data if task == "retrieval" else classes.prepare(tmp_path, by_batch[WHOLE])
    import aclruntime  # type: ignore[import-not-found]  # the stand-in, which `today` puts on the path

    before = len(aclruntime.runs)
    said = chain.refusal(chain.run(om, data, tmp_path / "outputs", "--device", device, task=task))
    assert f"{wrong}_bs7.om takes {LAST[wrong]} as " in said
    assert len(aclruntime.runs) == before
    assert not list(tmp_path.glob("*outputs*"))  # nor is anything begun


def test_a_larger_batch_than_there_is(today: None, expected: Any, tiny_data: Path, tmp_path: Path) -> None:
    wanted, om = expected(WHOLE)
    said = chain.done(chain.run(om, tiny_data, tmp_path / "outputs", *K, "--batchsize", 100, "--itm-batchsize", 64))
    line = (
        f"{om} has no larger .om: it runs image, text_embed in batches of 7, not of 100; itm_cached in batches of 7, not of 64."
    )
    assert line in said.splitlines()
    backend = read_retrieval(tmp_path / "outputs").run["backend"]
    assert (backend["batchsize"], backend["itm_batchsize"]) == (100, 64)  # what was asked
    assert backend["batches"] == {"image": 7, "text_embed": 7, "image_kv": 7, "itm_cached": 7}  # and what was run
    said = chain.done(chain.run(om, tiny_data, tmp_path / "fits", *K, "--batchsize", 7, "--itm-batchsize", 3))
    assert "no larger .om" not in said
    assert "batches" not in read_retrieval(wanted).run["backend"]  # of ONNX Runtime, which takes any


@pytest.mark.parametrize(
    ("device", "provider", "said"),
    [
        ("0,0", "cpu", "--device is '0,0'; expected numbers of NPUs from 0 to 255, each once, with commas between."),
        ("256", "cpu", "--device is '256'"),
        ("-1", "cpu", "--device is '-1'"),
        ("0,,1", "cpu", "--device is '0,,1'"),
        ("npu", "cpu", "--device is 'npu'"),
        ("0", "cuda", "--provider is of ONNX Runtime, and "),
    ],
)
def test_npus_that_cannot_be(
    today: None, om: Path, tiny_data: Path, tmp_path: Path, device: str, provider: str, said: str
) -> None:
    result = chain.run(om, tiny_data, tmp_path / "outputs", f"--device={device}", "--provider", provider)
    assert chain.refusal(result, 2).startswith(said)
    assert not (tmp_path / "outputs").exists()


def test_npus_for_graphs_that_have_none(atc_graphs: Path, tiny_data: Path, tmp_path: Path) -> None:
    said = chain.refusal(chain.run(atc_graphs, tiny_data, tmp_path / "outputs", "--device", "0"), 2)
    assert said.startswith(f"--device is of graphs compiled for an NPU, and {atc_graphs} holds none")


def test_numbers() -> None:
    assert (numbers("0"), numbers("3, 1"), numbers(2), numbers([255, 0])) == ((0,), (3, 1), (2,), (255, 0))


def test_which_batch(today: None, by_batch: dict[int, Path], tmp_path: Path) -> None:
    """The smallest that holds what is asked for, else the largest."""
    smaller = chain.with_only(by_batch[chain.STATIC], tmp_path / "smaller", *RETRIEVAL)
    graphs = read_graphs(write_om(tmp_path / "om", by_batch[WHOLE], smaller))

    def chosen(of: Graphs) -> list[str]:
        return [of.path(name).name for name in ("text_embed", "itm_cached")]

    large, small = ["text_embed_bs7.om", "itm_cached_bs7.om"], ["text_embed_bs3.om", "itm_cached_bs3.om"]
    assert [chosen(graphs.at(size)) for size in (1, 3, 4, 7, 8, 100)] == [small, small, large, large, large, large]
    assert (chosen(graphs), graphs.devices, graphs.is_static) == (large, (0,), True)
    session = open_session(graphs.at(2).on((0, 1)), "image")
    assert (session.batch, session.each, [session.filled(rows) for rows in (1, 3, 4, 9)]) == (6, 3, [3, 3, 6, 6])
    assert isinstance(session, Session)


def test_a_folder_that_is_damaged(om: Path, tmp_path: Path, atc_graphs: Path) -> None:
    folder = write_om(tmp_path / "om", atc_graphs)
    content = json.loads((folder / manifest.NAME).read_text("utf-8"))
    (folder / "itm_bs3.om").unlink()
    with pytest.raises(UserError, match=r"itm_bs3\.om is missing, .* Write the folder again with blip-atc\."):
        read_graphs(folder)
    for wrong in ({"oms": content["oms"][1:]}, {"oms": [{}]}, {"soc": None, "cann": None, "oms": "x"}):
        kept = {key: value for key, value in content.items() if key not in ("format", "kind", "made_by", "files")}
        manifest.write(folder, "om", {**kept, **wrong})
        with pytest.raises(UserError, match="blip-atc"):
            read_graphs(folder)


def test_a_graph_that_was_not_converted(om: Path) -> None:
    """All that the folder has, so that it is not lost, and what is missing."""
    graphs = read_graphs(om)
    wanted = ",".join(sorted({*graphs.written, "qformer"}))
    with pytest.raises(UserError, match=f"has no graph 'qformer'. Convert it: blip-atc --only {wanted} ...$"):
        graphs.first_of(("qformer",))


def test_classify(generation: str, atc_graphs: Path, om: Path, tmp_path: Path) -> None:
    data = classes.prepare(tmp_path, atc_graphs)
    for graphs, out in ((atc_graphs, "wanted"), (om, "found")):
        chain.done(chain.run(graphs, data, tmp_path / out, task="classify"))
    same_tensors(tmp_path / "found", tmp_path / "wanted")
    backend = read_classify(tmp_path / "found").run["backend"]
    assert (backend["soc"], backend["batches"]) == (SOC, {"text_embed": 3, "image_embed": 3})


def test_features(today: None, tmp_path: Path) -> None:
    """Of BLIP-2, with outputs that have a row for each token."""
    options = ("--target", "atc", "--batchsize", 3, "--graphs", "image_feat,qformer,text_feat,multimodal")
    graphs = chain.export_graphs(tmp_path, *options, model=random_blip2())
    data = chain.prepare(tmp_path / "pictures", graphs)
    for folder, out, more in ((graphs, "wanted", ()), (write_om(tmp_path / "om", graphs), "found", ("--device", "0,1"))):
        chain.done(chain.run(folder, data, tmp_path / out, *more, task="features"))
    assert "text_embeds.npy" in same_tensors(tmp_path / "found", tmp_path / "wanted")


def test_from_python(today: None, om: Path, atc_graphs: Path, tmp_path: Path) -> None:
    chain.write_pictures(tmp_path)
    pictures = [tmp_path / "images" / f"{n}.png" for n in range(5)]
    assert open_graphs(om)[0] == open_graphs(atc_graphs)[0]
    found, wanted = (
        pipeline("image_text_retrieval", folder, threads=1, **more)(pictures, ["word1 word2", "word3"])
        for folder, more in ((om, {"device": [0, 1]}), (atc_graphs, dict[str, Any]()))
    )
    assert found == wanted


def copies(root: Path, graphs: Path) -> tuple[Path, Path]:
    """graphs/ of fixed size, and om/ of the same."""
    return graphs, write_om(root / "om", graphs)


@pytest.mark.parametrize("kind", ["caption", "opt"])
def test_captions(generation: str, generator_graphs: Callable[[str, str], Path], tmp_path: Path, kind: str) -> None:
    graphs, om = copies(tmp_path, generator_graphs(kind, "atc"))
    data, brief = caption_data(tmp_path, om), ("--num-beams", 3, "--min-length", 2, "--max-length", 12, "--num-return", 2)
    npus = ("--device", "0,1,2,3") if generation == "2025" else ()
    found = []
    for folder, out, more in ((graphs, "wanted", ()), (om, "found", npus)):
        chain.done(call_run("caption", folder, tmp_path / out, *brief, "--prompt", "a", "--data", data, *more))
        found.append(read_caption(tmp_path / out))
    assert found[0].generated == found[1].generated
    assert len({row["texts"][0] for row in found[1].generated}) > 1
    assert found[1].run["backend"]["device"] == ([0, 1, 2, 3] if npus else [0])


def test_answers(today: None, generator_graphs: Callable[[str, str], Path], tmp_path: Path) -> None:
    graphs, om = copies(tmp_path, generator_graphs("vqa", "atc"))
    chain.write_pictures(tmp_path)
    (tmp_path / "answers.json").write_text(json.dumps(["red dog", "a dog", "cat", "two", "the ball", "isn't"]), "utf-8")
    pictures = ",".join(str(tmp_path / "images" / f"{n}.png") for n in range(5))
    asked = ("--images", pictures, "--questions", "two?,a red cat,what?,is it a dog,the ball")
    for how in (("--inference", "generate"), ("--answer-list", tmp_path / "answers.json", "--k-test", 4)):
        found = []
        for folder, more in ((graphs, ()), (om, ("--device", "1,0"))):
            chain.done(call_run("vqa", folder, tmp_path / "outputs", *asked, *how, *more))
            found.append(read_vqa(tmp_path / "outputs").generated)
        assert found[0] == found[1]
        assert len({row["texts"][0] for row in found[1]}) > 1
