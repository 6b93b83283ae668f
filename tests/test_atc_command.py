"""The commands for ATC: shapes, precision, quotes, batches; and the Ascend recipe's, which they are compared with."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from export.atc_command import Job, shell
from export.atc_plan import Options, Plan, plan
from export.atc_script import script
from models import manifest, presets
from models.errors import Misuse, UserError
from models.om import OmEntry, entries, entry_to_dict, om_stem
from models.spec import GraphSpec, graph_specs
from runtime.ais_bench_bash import Step
from runtime.ais_bench_bash import script as ais_bench_script
from tests.om_graphs import DECODER, KV, PICTURE, SPECS, TEXT, write_folder

BATCHES = (1, 4, 8, 16, 32, 64)  # of the recipe's table


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("hand made") / "graphs")


def options(graphs: Path, **asked: Any) -> Options:
    usual = Options(
        graphs=graphs,
        out=graphs.parent / "om",
        only=None,
        batches=[4],
        soc="Ascend310P3",
        cann=8,
        precision=None,
        length=None,
        dynamic="none",
        keep=None,
        op_precision=None,
        external_weight=False,
    )
    return replace(usual, **asked)


def made(graphs: Path, **asked: Any) -> dict[str, Job]:
    return {job.stem: job for job in plan(options(graphs, **asked)).jobs}


def flags(job: Job) -> dict[str, str]:
    return dict(part.removeprefix("--").split("=", 1) for part in job.argv[1:])


def refused(graphs: Path, **asked: Any) -> str:
    with pytest.raises(Misuse) as caught:
        plan(options(graphs, **asked))
    return caught.value.message


# The recipe


# The option block of the recipe's README, for a batch and a chip. The last line of the text block lost its backslash there, so
# that --op_precision_mode was never given.
RECIPE = {
    "text_embed": (
        "atc --framework=5 --model=BLIP_text.onnx --output=BLIP_text_bs{bs} --input_format=ND "
        '--input_shape="text_ids:{bs},35;text_atten_mask:{bs},35" --log=error --soc_version=Ascend310P3'
    ),
    "image_embed": (
        "atc --framework=5 --model=BLIP_image.onnx --output=BLIP_image_bs{bs} --input_format=NCHW "
        '--input_shape="input_image:{bs},3,384,384" --log=error --soc_version=Ascend310P3'
    ),
    "image_feat": (
        "atc --framework=5 --model=BLIP_image_feat.onnx --output=BLIP_image_feat_bs{bs} --input_format=NCHW "
        '--input_shape="input_image:{bs},3,384,384" --log=error --soc_version=Ascend310P3'
    ),
}


def corrected(recipe: dict[str, str], graph: str, bs: int) -> dict[str, str]:
    """Everything in which our command differs from the recipe's."""
    # 1. Files are named after the graphs, and found from om/.
    recipe = recipe | {"model": f"../graphs/{graph}.onnx", "output": f"{graph}_bs{bs}"}
    # 2. The precision is said. Without, ATC takes force_fp16: right for pictures, and a loss for texts.
    recipe |= {"precision_mode": "allow_mix_precision" if graph == "text_embed" else "force_fp16"}
    # 3. The backslash that the recipe lacks.
    return recipe | ({"op_precision_mode": "op_precision.ini"} if graph == "text_embed" else {})


@pytest.fixture(scope="module")
def blip_base(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """The recipe's three graphs of BLIP base, for CANN 6, which it was written for."""
    specs = graph_specs(presets.preset("blip-retrieval-base-coco"))
    opened = [specs[name].bind("B", 35) for name in RECIPE]  # type: ignore[arg-type]
    folder = write_folder(tmp_path_factory.mktemp("base") / "graphs", opened, opset=13, length=35)
    return plan(options(folder, batches=BATCHES, cann=6))


@pytest.mark.parametrize("bs", BATCHES)
@pytest.mark.parametrize("graph", RECIPE)
def test_the_recipe_but_for_its_corrections(blip_base: Plan, graph: str, bs: int) -> None:
    (ours,) = [job for job in blip_base.jobs if job.stem == om_stem(graph, [bs])]
    argv = shlex.split(RECIPE[graph].format(bs=bs))
    recipe = dict(part.removeprefix("--").split("=", 1) for part in argv[1:])
    assert ours.argv[0] == argv[0] == "atc"
    assert flags(ours) == corrected(recipe, graph, bs)
    assert set(flags(ours)) - set(recipe) <= {"precision_mode", "op_precision_mode"}
    assert blip_base.files == {"op_precision.ini": "Gelu=high_performance\n"}


def test_atc_sh_holds_the_same_commands(blip_base: Plan) -> None:
    text = script(blip_base).replace(" \\\n", " ")
    calls = [shlex.split(line)[3:] for line in text.splitlines() if line.startswith("convert ")]  # behind name and graph
    assert calls == [list(job.argv) for job in blip_base.jobs]
    assert len(calls) == 18


# Options


def test_a_command(graphs: Path) -> None:
    jobs = made(graphs, batches=[1, 16])
    assert list(jobs) == [f"{name}_bs{n}" for name in ("text_embed", "image_feat", "image_kv") for n in (1, 16)]
    assert shell(jobs["text_embed_bs16"].argv) == (
        "atc --framework=5 --model=../graphs/text_embed.onnx --output=text_embed_bs16 --input_format=ND "
        '--input_shape="text_ids:16,5;text_atten_mask:16,5" --precision_mode_v2=mixed_float16 '
        "--op_precision_mode=op_precision.ini --soc_version=Ascend310P3 --log=error"
    )
    assert shell(jobs["image_feat_bs1"].argv) == (
        "atc --framework=5 --model=../graphs/image_feat.onnx --output=image_feat_bs1 --input_format=NCHW "
        "--input_shape=input_image:1,3,2,2 --precision_mode_v2=fp16 --soc_version=Ascend310P3 --log=error"
    )
    (entry,) = jobs["text_embed_bs16"].entries
    assert (entry.batch, entry.file, entry.precision) == (16, "text_embed_bs16.om", "mixed_float16")
    assert entry.spec == TEXT.bind(16, 5)


@pytest.mark.parametrize("text", ["a:1,2;b:3", "a b", "it's", 'say "hi"', "$HOME", "a`b`", "a\\b", "", "plain"])
def test_quotes_survive_a_shell(text: str) -> None:
    assert shlex.split(shell(["atc", f"--option={text}", text or "x"])) == ["atc", f"--option={text}", text or "x"]


@pytest.mark.parametrize(
    ("cann", "precision", "said"),
    [
        (6, "fp16", "--precision_mode=force_fp16"),
        (6, "mixed_float16", "--precision_mode=allow_mix_precision"),
        (6, "origin", "--precision_mode=must_keep_origin_dtype"),
        (7, "origin", "--precision_mode_v2=origin"),
        (8, "fp16", "--precision_mode_v2=fp16"),
    ],
)
def test_precision(tmp_path: Path, cann: int, precision: str, said: str) -> None:
    folder = write_folder(tmp_path / "graphs", opset=13)
    for job in made(folder, cann=cann, precision=precision).values():
        assert [part for part in job.argv if "precision_mode" in part and "op_" not in part] == [said]


def test_what_suits_each_graph() -> None:
    from export.atc_precision import usual_precision

    blip, blip2 = (graph_specs(presets.preset(name)) for name in ("blip-retrieval-base-coco", "blip2-stage1-vit-g"))
    half = {name for name, spec in blip.items() if usual_precision(spec) == "fp16"}
    assert half == {"image_embed", "image_feat", "image"}
    assert {name for name, spec in blip2.items() if usual_precision(spec) == "fp16"} == {"image_feat"}


def test_external_weight(graphs: Path) -> None:
    assert all("--external_weight=1" in job.argv for job in made(graphs, external_weight=True).values())
    assert not any("external" in part for job in made(graphs).values() for part in job.argv)


def test_op_precision_for_every_graph(graphs: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.ini").write_text("[ByOpType]\nGelu=high_precision")  # no newline, as in the recipe
    found = plan(options(graphs, op_precision=tmp_path / "mine.ini"))
    assert found.files == {"op_precision.ini": "[ByOpType]\nGelu=high_precision\n"}
    assert all("--op_precision_mode=op_precision.ini" in job.argv for job in found.jobs)


# Batches


def test_fixed_batch(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "graphs", [TEXT.bind(2, 5)], target="atc", batchsize=2)
    assert list(made(folder, batches=None)) == list(made(folder, batches=[2])) == ["text_embed_bs2"]
    assert refused(folder, batches=[2, 4]) == (
        "text_embed was exported for batches of 2 alone, asked was --batchsize 2,4. Export it with --target ascend, which leaves "
        "the batch open."
    )
    assert "asked was --dynamic batch" in refused(folder, batches=[2], dynamic="batch")


def test_open_batch_without_a_wish(graphs: Path) -> None:
    assert list(made(graphs, batches=None, only=["image_kv"])) == ["image_kv_bs16"]


def test_several_texts_of_each_prompt(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "graphs", [DECODER], beams=3)
    assert flags(made(folder)["text_decoder_bs4"])["input_shape"] == "text_ids:4,3,1;past:12,4,2"


def test_rows_of_a_language_model(tmp_path: Path) -> None:
    decode = replace(KV, name="llm_decode")
    assert list(made(write_folder(tmp_path / "open", [decode], beams=3))) == ["llm_decode_bs12"]
    fixed = write_folder(tmp_path / "fixed", [decode.bind(6, 5)], target="atc", beams=3, batchsize=2)
    assert list(made(fixed, batches=[2])) == ["llm_decode_bs6"]


def test_gears(graphs: Path, tmp_path: Path) -> None:
    job = made(graphs, batches=[8, 1, 4], dynamic="batch")["text_embed_bs1to8"]
    assert flags(job)["input_shape"] == "text_ids:-1,5;text_atten_mask:-1,5"
    assert (flags(job)["dynamic_batch_size"], [entry.batch for entry in job.entries]) == ("1,4,8", [1, 4, 8])
    assert {entry.file for entry in job.entries} == {"text_embed_bs1to8.om"}
    assert '--dynamic_batch_size="' not in shell(job.argv)

    job = made(graphs, batches=[1, 4], dynamic="dims")["image_feat_bs1to4"]
    assert (flags(job)["input_format"], flags(job)["dynamic_dims"]) == ("ND", "1;4")
    decoder = write_folder(tmp_path / "graphs", [DECODER], beams=3)
    job = made(decoder, batches=[1, 4], dynamic="dims")["text_decoder_bs1to4"]
    assert flags(job)["dynamic_dims"] == "1,3;4,12"
    assert '--dynamic_dims="1,3;4,12"' in shell(job.argv)
    assert "Use --dynamic dims" in refused(decoder, batches=[1, 4], dynamic="batch")


@pytest.mark.parametrize("batches", [[4], [1, 2049], range(1, 102)])
def test_gears_that_atc_does_not_take(graphs: Path, batches: list[int]) -> None:
    for dynamic in ("batch", "dims"):
        assert "2 to 100 batches of up to 2048" in refused(graphs, batches=batches, dynamic=dynamic)


# What cannot be converted


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"only": ["text"]}, "has no graph 'text'; it has: text_embed, image_feat, image_kv."),
        ({"length": "30"}, "--length 30 holds 30, these graphs were exported for texts of 5 tokens at most."),
        ({"length": "buckets"}, "--length buckets needs graphs whose text axis is open; text_embed was exported for 5 tokens."),
        ({"length": "3,5"}, "Export it again: graphs of retrieval with --target ascend --length open; others in a folder"),
        ({"length": "buckets", "only": ["image_kv"]}, "--length buckets is of texts, and image_kv read none. Leave it out."),
        ({"cann": 6}, "CANN 6 reads opsets 9 to 13, these graphs have 17. Export them with --opset 13"),
    ],
)
def test_refused(graphs: Path, asked: dict[str, Any], said: str) -> None:
    assert said in refused(graphs, **asked)
    assert made(graphs, only=["text_embed"], length="5", cann=7)


def test_graphs_for_another_target(tmp_path: Path) -> None:
    assert "--target ort, whose axes ATC cannot be told" in refused(write_folder(tmp_path / "graphs", target="ort"))


def test_another_open_axis(tmp_path: Path) -> None:
    spec = replace(KV, inputs=(replace(KV.inputs[0], shape=("B", "X", 4)),))
    with pytest.raises(UserError, match="image_feat of image_kv has an open axis 'X' beside its batch"):
        plan(options(write_folder(tmp_path / "graphs", [spec])))


def test_a_path_that_atc_does_not_read(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "my graphs")
    assert "ATC reads no path with ' '" in refused(folder, out=tmp_path / "om")
    # From inside the same folder there is nothing to be said of it.
    assert made(write_folder(tmp_path / "of mine" / "graphs"))


@pytest.mark.parametrize("key", ["graphs", "opset", "target", "tokenizer"])
def test_garbled_manifest(tmp_path: Path, key: str) -> None:
    folder = write_folder(tmp_path / "graphs")
    values = json.loads((folder / manifest.NAME).read_text("utf-8"))
    (folder / manifest.NAME).write_text(json.dumps({name: value for name, value in values.items() if name != key}), "utf-8")
    with pytest.raises(UserError, match=f"lacks or garbles '{key}'. Write the folder again with blip-export"):
        plan(options(folder))


# Operators to keep


def test_keep_by_name(graphs: Path, tmp_path: Path) -> None:
    (tmp_path / "keep.txt").write_text("# from an audit\n/Cast\n\n/MatMul\nOpType::SoftmaxV2")
    found = plan(options(graphs, keep=tmp_path / "keep.txt"))
    named = {job.graph: flags(job).get("keep_dtype") for job in found.jobs}
    assert named == {name: f"keep_{name}.txt" for name in ("text_embed", "image_feat", "image_kv")}
    assert found.files["keep_text_embed.txt"] == "/Cast\n/MatMul\nOpType::SoftmaxV2\n"
    assert found.files["keep_image_feat.txt"] == "/MatMul\nOpType::SoftmaxV2\n"
    assert found.files["keep_image_kv.txt"] == "OpType::SoftmaxV2\n"


def test_a_folder_of_lists(graphs: Path, tmp_path: Path) -> None:
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit" / "text_embed.keep_dtype").write_text("/Cast\n")
    (tmp_path / "audit" / "other.keep_dtype").write_text("/Other\n")
    found = plan(options(graphs, keep=tmp_path / "audit"))
    assert [job.graph for job in found.jobs if "keep_dtype" in flags(job)] == ["text_embed"]
    assert found.files["keep_text_embed.txt"] == "/Cast\n"
    assert "is a folder without image_kv.keep_dtype" in refused(graphs, keep=tmp_path / "audit", only=["image_kv"])
    (tmp_path / "audit" / "text_embed.keep_dtype").write_text("/Cast\n/key/MatMul\n")
    assert "names '/key/MatMul', which is no node of text_embed." in refused(graphs, keep=tmp_path / "audit")


def test_precisions_of_single_graphs(graphs: Path, tmp_path: Path) -> None:
    def asked(precision: str, **more: Any) -> dict[str, str]:
        return {job.graph: job.entries[0].precision for job in plan(options(graphs, precision=precision, **more)).jobs}

    usual = {"text_embed": "mixed_float16", "image_feat": "fp16", "image_kv": "mixed_float16"}
    assert asked("image_feat=origin") == {**usual, "image_feat": "origin"}
    assert asked("fp16, image_kv=origin") == {"text_embed": "fp16", "image_feat": "fp16", "image_kv": "origin"}
    assert "says twice what image_kv is computed in" in refused(graphs, precision="image_kv=fp16,image_kv=origin")
    assert "says twice what every graph is computed in" in refused(graphs, precision="fp16,origin")
    assert "names 'itm', which is none of the graphs to convert: text_embed," in refused(graphs, precision="itm=origin")
    assert "holds 'float16', which is not one of fp16, mixed_float16, origin." in refused(graphs, precision="image_kv=float16")
    # The list of a graph that is float32 throughout is left out; one that is given for it alone is refused, as ever.
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit" / "text_embed.keep_dtype").write_text("/Cast\n")
    assert not plan(options(graphs, keep=tmp_path / "audit", precision="text_embed=origin")).files.keys() & {
        "keep_text_embed.txt"
    }
    assert "keeps all of them" in refused(graphs, keep=tmp_path / "audit", precision="origin")


def test_keep_by_type_in_json(graphs: Path, tmp_path: Path) -> None:
    (tmp_path / "mix.json").write_text('{"black-list": {"to-add": ["SoftmaxV2"]}}')
    found = plan(options(graphs, keep=tmp_path / "mix.json", precision="mixed_float16"))
    assert all("--modify_mixlist=keep.json" in job.argv for job in found.jobs)
    assert json.loads(found.files["keep.json"]) == {"black-list": {"to-add": ["SoftmaxV2"]}}
    assert "and image_feat is computed in fp16. Add --precision mixed_float16" in refused(graphs, keep=tmp_path / "mix.json")


@pytest.mark.parametrize(
    ("name", "text", "precision", "said"),
    [
        ("keep.txt", "", None, "names no operator"),
        ("keep.txt", "/Cast\n/Softmx", None, "names '/Softmx', which is no node of text_embed, image_feat, image_kv"),
        ("keep.txt", "/Cast", "origin", "--precision origin keeps all of them"),
        ("keep.json", "[", "mixed_float16", "is not the JSON that --modify_mixlist takes"),
        ("keep.json", "{}", "mixed_float16", "is not the JSON that --modify_mixlist takes"),
        ("keep.json", '{"black": {"to-add": ["A"]}}', "mixed_float16", "is not the JSON that --modify_mixlist takes"),
        ("keep.json", '{"black-list":{"to-add":"SoftmaxV2"}}', "mixed_float16", "is not the JSON that --modify_mixlist takes"),
        ("keep.json", '{"black-list": {"to-add": [1]}}', "mixed_float16", "is not the JSON that --modify_mixlist takes"),
        ("keep.json", '{"black-list": 1}', "mixed_float16", "is not the JSON that --modify_mixlist takes"),
        ("keep.json", '["black-list"]', "mixed_float16", "is not the JSON that --modify_mixlist takes"),
        ("keep.json", '{"black-list": ["A"]}', "mixed_float16", "is not the JSON that --modify_mixlist takes"),
    ],
)
def test_a_wrong_keep_list(graphs: Path, tmp_path: Path, name: str, text: str, precision: str | None, said: str) -> None:
    (tmp_path / name).write_text(text)
    assert said in refused(graphs, keep=tmp_path / name, precision=precision)


# Scripts, by shellcheck


def checked(text: str) -> str:
    """What shellcheck says of a script."""
    program = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([str(program), "-"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (done.stdout == ""), done.stderr
    return done.stdout


def test_atc_sh_passes_shellcheck(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "graphs")
    (folder / "text_embed.onnx.data").write_bytes(b"weights")
    manifest.write(folder, "graphs", manifest.read(folder, "graphs").content)
    (tmp_path / "keep.txt").write_text("OpType::SoftmaxV2\n")
    gears = {"batches": [1, 4], "dynamic": "dims", "keep": tmp_path / "keep.txt", "external_weight": True, "cann": 7}
    for asked in ({}, gears, {"out": tmp_path / "图", "graphs": write_folder(tmp_path / "图" / "graphs")}):
        text = script(plan(options(**{"graphs": folder, **asked})))
        assert checked(text) == ""
        beside = "convert text_embed_bs1to4 ../graphs/text_embed.onnx ../graphs/text_embed.onnx.data \\\n    atc \\\n"
        assert (beside in text) == (asked is gears)
        assert "image_kv.onnx.data" not in text
        planted = text.replace('rm -f "$name.om"', "rm -f $name.om")
        assert planted != text
        assert "SC2086" in checked(planted)


def test_ais_bench_sh_passes_shellcheck() -> None:
    def entry(spec: GraphSpec, dynamic: str = "none") -> OmEntry:
        return OmEntry(spec.name, 4, f"{spec.name}_bs4.om", spec.bind(4, 5), ("atc",), dynamic=dynamic)

    steps = [
        Step(entry(TEXT, "batch"), "../om/text_embed_bs4.om", ("../data/ids", "../data/mask"), 10),
        Step(entry(PICTURE, "dims"), "../om/image_feat_bs4.om", ("../data/img",), 10),
        Step(entry(KV), "../om/image_kv_bs4.om", ("fed/image_feat",), 10, ("image_feat", 0, "image_feat")),
        Step(entry(replace(KV, name="itm_cached")), "../om/itm_cached_bs4.om", ("pairs/cross_kv",), None),
    ]
    text = ais_bench_script(steps, 0)
    assert checked(text) == ""
    planted = text.replace('run itm_cached "$files"', "run itm_cached $files")
    assert planted != text
    assert "SC2086" in checked(planted)


# The manifest's form


def test_entries_round_trip(graphs: Path) -> None:
    found = plan(options(graphs, batches=[4, 1]))
    written = [entry for job in found.jobs for entry in job.entries]
    content = json.loads(json.dumps(found.content(written)))
    assert entries(content) == sorted(written, key=lambda e: ([s.name for s in SPECS].index(e.graph), e.batch))
    assert (content["target"], content["soc"], content["cann"], content["precision"]) == ("om", "Ascend310P3", 8, "by graph")
    assert content["graphs_digest"] == found.source.digest
    assert content["graphs"]["image_feat"].keys() == {"inputs", "outputs"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda e: e.pop("command"), "'command'"),
        (lambda e: e.update(batch=0), "the batch 0"),
        (lambda e: e.update(batch="4"), "the batch '4'"),
        (lambda e: e.update(dynamic="often"), "'often'"),
        (lambda e: e["inputs"][0].update(shape=["B", 3, 2, 2]), "the shapes of 'image_feat'"),
        (lambda e: e.update(inputs=None), "describes the graph 'image_feat' wrongly"),
        (lambda e: e.update(graph="other"), "has no graph 'other'"),
        (lambda e: e.update(seconds="long"), "could not convert string to float"),
    ],
)
def test_garbled_entries(change: Callable[[dict[str, Any]], object], said: str) -> None:
    bound = PICTURE.bind(4, 5)
    values = entry_to_dict(OmEntry("image_feat", 4, "image_feat_bs4.om", bound, ("atc",)))
    content = {"graphs": {"image_feat": {}}, "oms": [values]}
    assert len(entries(content)) == 1
    change(values)
    with pytest.raises(UserError) as caught:
        entries(content)
    assert said in caught.value.message
    assert "blip-atc" in caught.value.message
