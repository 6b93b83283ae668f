"""What sizes blip-export fixes in graphs that write words, what it says of them, and what it refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file

from export import sizes
from export.__main__ import main
from models import manifest
from models.config import Blip2LlmConfig, GenerationConfig
from models.config_file import from_dict
from models.errors import Misuse
from tests import chain
from tests.generators import speaking, write_generator
from tests.tiny import GENERATORS, TINY, random_generator


@pytest.mark.parametrize(
    ("kind", "slots", "seen"),
    [
        ("caption", 43, 40),  # 40 and 30, but the decoder has 44 positions
        ("vqa", 31, 35),
        ("opt", 68, 38),  # 6 queries, 32 and 30
        ("llama", 68, 38),
        ("t5", 31, 38),
    ],
)
def test_sizes_by_default(kind: str, slots: int, seen: int) -> None:
    """Room for the longest prompt and 30 words; questions and what T5 reads have their longest too."""
    config = GENERATORS[kind]
    found = sizes.fixed(config, 2, 3, None)
    assert found == (2, config.protocol.max_length, {"M": 3, "S": slots, "C": seen})
    assert sizes.of_graph(found, "llm_decode").batch == 6
    assert sizes.of_graph(found, "llm_prefill") == found


def test_retrieval_has_no_slots() -> None:
    assert sizes.fixed(TINY, 4, 1, None) == (4, 35, {})


@pytest.mark.parametrize(
    ("kind", "slots", "said"),
    [
        ("opt", 37, "--slots 37 does not hold a prompt, which takes 38 with --length 32"),
        ("opt", 80, "--slots 80 is more than the model has positions for: 79"),
        ("caption", 39, "--slots 39 does not hold a prompt, which takes 40"),
        ("vqa", 41, "--slots 41 is more than the model has positions for: 40"),
    ],
)
def test_slots_that_cannot_be(kind: str, slots: int, said: str) -> None:
    with pytest.raises(Misuse, match=said):
        sizes.fixed(GENERATORS[kind], 1, 1, slots)


@pytest.mark.parametrize("slots", [38, 79])
def test_the_fewest_and_the_most_slots(slots: int) -> None:
    assert sizes.fixed(GENERATORS["opt"], 1, 1, slots).others["S"] == slots


class Work:
    """A model, and the command for the quickest of its graphs."""

    def __init__(self, root: Path, kind: str) -> None:
        self.out, self.model = root / "graphs", root / "model"
        self.options = write_generator(self.model, random_generator(speaking(kind)))

    def run(self, *options: object, target: str = "atc", graphs: str = "qformer") -> Result:
        return chain.call(main, *self.options, "--out", self.out, "--target", target, "--graphs", graphs, *options)


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(tmp_path, "opt")


def test_what_the_manifest_says(work: Work) -> None:
    options = ("--batchsize", 2, "--beams", 3, "--length", 9, "--slots", 20)
    chain.done(work.run(*options, graphs="qformer,llm_decode"))
    found = manifest.read(work.out, "graphs", verify=True)
    assert found.content["sizes"] == {"batchsize": 2, "length": 9, "beams": 3, "slots": 20}
    config = from_dict(found.content["config"], "manifest")
    assert isinstance(config, Blip2LlmConfig)
    assert config.protocol.max_length == 9
    assert dataclasses.replace(config, protocol=speaking("opt").protocol) == speaking("opt")
    graphs = found.content["graphs"]
    assert graphs["llm_decode"]["inputs"][0]["shape"] == [6, 1]
    assert graphs["llm_decode"]["inputs"][3]["shape"] == [6, 4, 7, 20, 8]
    assert graphs["qformer"]["inputs"][0]["shape"][0] == 2
    tokenizer = found.content["tokenizer"]
    assert tokenizer["file"] == "tokenizer/vocab.json"
    assert tokenizer["files"] == ["tokenizer/vocab.json", "tokenizer/merges.txt"]
    assert tokenizer["size"] == 300
    for name in tokenizer["files"]:
        assert (work.out / name).read_bytes() == (work.model / Path(name).name).read_bytes()
    assert set(found.files) == {"qformer.onnx", "llm_decode.onnx", *tokenizer["files"]}
    measured = [(row["graph"], row["output"]) for row in found.content["parity"]]
    seeing, writing = ("query_embed", "llm_prompt"), ("logits", "present")
    assert measured == [*(("qformer", name) for name in seeing), *(("llm_decode", name) for name in writing)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_language_model_of_its_own(work: Work, dtype: torch.dtype) -> None:
    """Stored in half precision, in a file of its own, which the manifest names."""
    whole = load_file(work.model / "model.safetensors")
    inner = {name.removeprefix("llm_model."): t.to(dtype) for name, t in whole.items() if name.startswith("llm_model.")}
    save_file(inner, work.model / "opt.safetensors")
    save_file({name: t for name, t in whole.items() if not name.startswith("llm_model.")}, work.model / "model.safetensors")
    refused = chain.refusal(work.run(graphs="llm_prefill"))
    assert "--llm-checkpoint" in refused
    assert not work.out.exists()
    printed = chain.done(work.run("--llm-checkpoint", work.model / "opt.safetensors", graphs="llm_prefill"))
    assert str(dtype).removeprefix("torch.") in printed
    content = manifest.read(work.out, "graphs").content
    assert content["checkpoint"]["llm"]["file"] == "opt.safetensors"
    assert content["precision"] == "float32"
    assert all(row["max_rel"] <= row["bound"] / 10 for row in content["parity"])


@pytest.mark.parametrize(
    ("options", "target", "graphs", "said"),
    [
        (("--beams", 2), "ort", "qformer", "--beams and --slots fix axes of graphs that write words"),
        (("--slots", 50), "ort", "qformer", "--beams and --slots fix axes of graphs that write words"),
        (("--slots", 20), "atc", "qformer", "--slots 20 does not hold a prompt, which takes 38 with --length 32."),
        (("--beams", 0), "atc", "qformer", "Invalid value for '--beams'"),
        (("--slots", -1), "atc", "qformer", "Invalid value for '--slots'"),
        (("--length", 33), "atc", "qformer", "--length 33 is longer than the prompts of this model, 32 tokens."),
        ((), "ort", "llm_decode", "There is no graph 'llm_decode'; known graphs: image_feat, qformer, llm."),
        ((), "atc", "llm", "There is no graph 'llm'; known graphs: image_feat, qformer, llm_prefill, llm_decode."),
    ],
)
def test_misuse(work: Work, options: tuple[object, ...], target: str, graphs: str, said: str) -> None:
    assert said in chain.refusal(work.run(*options, target=target, graphs=graphs), 2)
    assert not work.out.exists()


def test_prompts_of_t5_may_be_longer(tmp_path: Path) -> None:
    """They are not cut in the original."""
    work = Work(tmp_path, "t5")
    result = work.run("--length", 50, graphs="t5_encoder")
    chain.done(result)
    assert not result.stderr
    assert manifest.read(work.out, "graphs").content["graphs"]["t5_encoder"]["outputs"][0]["shape"] == [1, 4, 6, 56, 8]


def test_a_language_model_for_a_model_without_one(tmp_path: Path) -> None:
    work = Work(tmp_path, "caption")
    message = chain.refusal(work.run("--llm-checkpoint", tmp_path, graphs="image_kv"), 2)
    assert "--llm-checkpoint is for BLIP-2's second stage" in message


def test_words_of_another_model(tmp_path: Path) -> None:
    """The vocabulary is read first: nothing is computed in vain."""
    work, other = Work(tmp_path / "opt", "opt"), Work(tmp_path / "caption", "caption")
    assert "OPT reads vocab.json with merges.txt" in chain.refusal(work.run("--tokenizer", other.model))
    assert not work.out.exists()


@pytest.mark.parametrize("config", GENERATORS.values(), ids=GENERATORS)
def test_traced_sizes_differ(config: GenerationConfig) -> None:
    """So that the exporter takes no axis for another, and none for a constant."""
    batch, length, others = sizes.traced(config)
    found = [batch, length, *others.values()]
    assert len(set(found)) == len(found)
    assert min(found) > 1
