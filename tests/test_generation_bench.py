"""The bench of models that write words: its arithmetic on known times and by hand, its tables, its comparison, its record.

No test looks at a speed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from bench import bandwidth, measure, table
from bench.bandwidth import Bandwidth
from bench.flops import count_flops
from bench.forms import DECODE, PREFILL, Load, Writing, bind, forms
from bench.generation import Generation
from bench.graphs import random_inputs
from bench.measure import Timing
from bench.traffic import step_bytes, weights_read
from bench.words import random_asked, write_words
from bench.words_race import same_words, words_works
from models.checkpoint import load_generator
from models.config import Blip2LlmConfig, BlipCaptionConfig
from models.config_file import from_file
from models.errors import UserError
from models.llm_config import OptConfig
from models.spec import graph_specs
from runtime.graphs import Graphs, read_graphs
from runtime.session import check_feeds
from tests import chain, make_checkpoint
from tests.bench_run import blip_bench, record_in
from tests.generators import speaking
from tests.make_generator import TRAINING, write_llm
from tests.test_flops import linear
from tests.text_graphs import write_graphs
from tests.tiny import TINY_OPT, random_generator, tiny_llm
from tests.uncached import Table

Exported = Callable[[str, str], Path]
LOAD = Load(batchsize=2, length=4, loops=1, warmup=0, threads=1, provider="cpu")
WRITING = Writing((1, 3), 6, (True,))
FEW = ("--new-tokens", 5, "--num-beams", "1,3", "--batchsize", 2)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small products and sums for the roofs, and no rest between two ways."""
    monkeypatch.setattr("bench.peak.PRODUCTS", ((16, 8, 32), (64, 64, 64)))
    monkeypatch.setattr(bandwidth, "LEAST", 1 << 16)
    monkeypatch.setattr(bandwidth, "MOST", 1 << 16)
    monkeypatch.setattr(measure, "REST_SECONDS", 0.0)


@pytest.fixture
def opt(generator_graphs: Exported) -> Graphs:
    return read_graphs(generator_graphs("opt", "ort"))


@pytest.fixture
def caption(generator_graphs: Exported) -> Graphs:
    return read_graphs(generator_graphs("caption", "ort"))


def weights_beside(graphs: Graphs) -> Path:
    """What graphs were exported from."""
    return graphs.source.folder.parent / "model" / "model.safetensors"


# Arithmetic


def test_a_generation_of_known_times() -> None:
    """Two texts of 5 words: 4 steps in 0.4 s, of 8 MB each."""
    row = Generation(3, True, 2, 4, 5, Timing((0.5, 0.25, 1.0)), Timing((0.4, 0.2, 0.8)), 8e6)
    assert (row.step_s, row.token_ms, row.tokens_per_s) == pytest.approx((0.1, 50.0, 20.0))
    assert (row.token_bytes, row.gb_per_s) == pytest.approx((4e6, 0.08))
    record = row.record(bandwidth=0.1)
    assert record["of_bandwidth"] == 0.8
    assert (record["first_token_ms"], record["token_ms"], record["tokens_per_s"]) == (500.0, 50.0, 20.0)
    assert (record["num_beams"], record["use_past"], record["batch"], record["new_tokens"]) == (3, True, 2, 5)
    assert record["rest_seconds"] == [0.4, 0.2, 0.8]
    head, line = table.generation_lines([row], Bandwidth(1, 8, {"a": 0.1}))
    assert line.split() == ["3", "kept", "2", "4", "5", "3", "500.00", "50.00", "20.00", "4.00", "0.08", "80.0%"]
    assert len(head) == len(line) <= 130


def opt_weights(config: Blip2LlmConfig) -> int:
    """Numbers that one step multiplies with: four projections and two of the feed-forward layer, and the words."""
    llm = config.llm
    assert isinstance(llm, OptConfig)
    return llm.depth * (4 * llm.width**2 + 2 * llm.width * llm.ffn) + llm.vocab * llm.embed


def caption_weights(config: BlipCaptionConfig) -> int:
    """Keys and values of the picture are computed before. The two last products, which are for one position, have their biases
    with them."""
    d = config.decoder
    layer = 4 * d.width**2 + 2 * d.width**2 + 2 * d.width * d.ffn
    return d.depth * layer + d.width**2 + d.width * d.vocab + d.width + d.vocab


def test_weights_that_a_step_reads(opt: Graphs, caption: Graphs) -> None:
    assert isinstance(opt.config, Blip2LlmConfig)
    assert isinstance(caption.config, BlipCaptionConfig)
    assert weights_read(opt.path("llm")) == 4 * opt_weights(opt.config)
    assert weights_read(caption.path("text_decoder")) == 4 * caption_weights(caption.config)


def test_weights_at_full_size_by_hand() -> None:
    """OPT-125m: 494 MB a word; the tables that words and positions look up are not among them."""
    from models.presets import preset

    config = preset("blip2-opt-125m")
    assert isinstance(config, Blip2LlmConfig)
    assert 4 * opt_weights(config) / 1e6 == pytest.approx(494.17, abs=0.005)


@pytest.mark.parametrize("beams", [1, 3])
def test_bytes_of_a_step(opt: Graphs, caption: Graphs, beams: int) -> None:
    """Of 6 words the last is read by nobody: 5 steps, after 0 to 4 new words, so after 2 on average."""
    llm = opt.config.llm  # type: ignore[union-attr]
    prompt = opt.config.qformer.queries + 4  # type: ignore[union-attr]
    kept = 2 * llm.depth * 2 * llm.width * (prompt + beams * 2)  # all beams share the prompt's
    assert step_bytes(opt, LOAD, beams, 6, True) == 4 * (opt_weights(opt.config) + kept)  # type: ignore[arg-type]
    assert step_bytes(opt, LOAD, beams, 6, False) == 4 * opt_weights(opt.config)  # type: ignore[arg-type]
    decoder = caption.config.decoder  # type: ignore[union-attr]
    seen = 2 * decoder.depth * 2 * decoder.width * caption.config.vision.tokens  # once for a picture, however many beams
    kept = 2 * beams * decoder.depth * 2 * decoder.width * (4 + 2)
    assert step_bytes(caption, LOAD, beams, 6, True) == 4 * (caption_weights(caption.config) + seen + kept)  # type: ignore[arg-type]
    assert step_bytes(caption, LOAD, beams, 6, False) == 4 * (caption_weights(caption.config) + seen)  # type: ignore[arg-type]


def test_bytes_of_a_step_of_fixed_size(generator_graphs: Exported) -> None:
    """2 pictures and 3 columns a run: 5 pictures take 3 runs, which look up the whole buffer."""
    graphs = read_graphs(generator_graphs("caption", "atc"))
    config = graphs.config
    assert isinstance(config, BlipCaptionConfig)
    (slots,) = {t.shape[3] for t in graphs.written["text_decoder"].inputs if t.name == "past"}
    kept = 2 * config.decoder.depth * config.decoder.width * (2 * config.vision.tokens + 6 * int(slots))
    load = Load(5, 4, 1, 0, 1, "cpu")
    assert step_bytes(graphs, load, 1, 6, True) == 3 * 4 * (caption_weights(config) + kept)


def test_operations_of_a_language_model(opt: Graphs) -> None:
    """2 prompts: queries and 4 words at once, of which one is said; then a word of each of 6 sequences, after 3 new ones."""
    config = opt.config
    assert isinstance(config, Blip2LlmConfig)
    llm, queries = config.llm, config.qformer.queries
    assert isinstance(llm, OptConfig)

    def by_hand(rows: int, words: int, before: int) -> int:
        own = 4 * linear(words, llm.width, llm.width) + 2 * linear(words, llm.width, before + words)
        head = linear(1, llm.width, llm.vocab)
        return rows * (llm.depth * (own + 2 * linear(words, llm.width, llm.ffn)) + head)

    counted = [
        sum(count_flops(opt.path("llm"), bind(opt.symbolic["llm"], f.sizes)).values()) for f in forms(opt, "llm", LOAD, WRITING)
    ]
    # In the last layer of a prompt all but one word could be left out of the feed-forward layer; the exporter does leave them.
    assert counted[1:] == [by_hand(2, 1, queries + 4 + 3), by_hand(6, 1, queries + 4 + 3)]
    assert by_hand(2, queries + 4, 0) >= counted[0] > 0.5 * by_hand(2, queries + 4, 0)


# What the graphs and the decoders are given


@pytest.mark.parametrize("kind", ["caption", "vqa", "opt", "llama", "t5"])
def test_forms_of_every_graph(tmp_path: Path, kind: str) -> None:
    graphs = read_graphs(write_graphs(tmp_path, kind))
    for name, spec in graphs.symbolic.items():
        found = forms(graphs, name, LOAD, WRITING)
        decodes = any(t.name == "beam_index" for t in spec.inputs)
        assert [form.part for form in found] == ([PREFILL, DECODE, DECODE] if decodes else [""])
        assert [form.rows for form in found] == ([2, 2, 6] if decodes else [2])
        for form in found:
            bound = bind(spec, form.sizes)
            assert bound.is_static
            assert check_feeds(spec, random_inputs(bound, graphs.config.text.vocab)).items() <= form.sizes.items()


def test_forms_of_a_decoder(tmp_path: Path) -> None:
    prefill, one, three = forms(read_graphs(write_graphs(tmp_path, "opt")), "llm", LOAD, WRITING)
    assert prefill.sizes == {"B": 2, "M": 1, "L": 4, "R": 2, "P": 0, "Q": 6, "C": 0}
    assert one.sizes == {"B": 2, "M": 1, "L": 1, "R": 2, "P": 3, "Q": 0, "C": 6 + 4}
    assert three.sizes == {"B": 2, "M": 3, "L": 1, "R": 6, "P": 3, "Q": 0, "C": 6 + 4}
    feeds = random_inputs(bind(graph_specs(speaking("opt"))["llm"], three.sizes), 300)
    assert feeds["positions"].tolist() == [[[13]] * 3] * 2
    assert feeds["beam_index"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert feeds["past_mask"].all()
    assert feeds["prompt_mask"].all()


def test_as_many_words_as_asked_for() -> None:
    asked = random_asked_of(stop_ids=(3, 7))
    for beams in (1, 4):
        steps = Table(0, 20, asked.stop_ids, towards_stop=9.0).steps(asked.ids[:, :1])
        found = write_words(steps, asked, beams, 7)
        assert found.shape == (3, 7)
        assert not np.isin(found, asked.stop_ids).any()


def random_asked_of(stop_ids: tuple[int, ...]) -> Any:
    from bench.words import Asked

    return Asked(np.zeros((3, 3, 4, 4), np.float32), np.arange(12).reshape(3, 4), 1, stop_ids, 0)


def test_prompts_are_equal_every_time(tmp_path: Path) -> None:
    graphs = read_graphs(write_graphs(tmp_path, "opt"))
    first, second = random_asked(graphs, 2, 5), random_asked(graphs, 2, 5)
    np.testing.assert_array_equal(first.ids, second.ids)
    np.testing.assert_array_equal(first.pictures, second.pictures)
    assert first.ids.shape == (2, 5)
    assert first.mask.all()


def test_works_of_each_kind() -> None:
    found = {kind: words_works(speaking(kind)) for kind in ("caption", "vqa", "opt", "t5")}
    assert found == {"caption": ("captions",), "vqa": ("answers",), "opt": ("tokens",), "t5": ("tokens",)}


def test_other_words_are_no_equal_work() -> None:
    from bench.compare import Way

    ours = np.arange(12).reshape(2, 6)
    assert same_words("tokens", Way("theirs", 12, lambda: ours.copy()), ours) == 0
    with pytest.raises(UserError, match="theirs writes 2 of 12 words that our graphs do not write"):
        same_words("tokens", Way("theirs", 12, lambda: np.where(ours > 9, 0, ours)), ours)
    with pytest.raises(UserError, match="12 of 12 words"):
        same_words("tokens", Way("theirs", 12, lambda: ours[:, :5]), ours)


# The command


def test_tables_and_record(opt: Graphs, tmp_path: Path) -> None:
    options = ("--use-past", "true,false", "--record", tmp_path)
    said = chain.done(blip_bench(opt.source.folder, *FEW, *options)).splitlines()
    found = record_in(tmp_path)
    assert re.fullmatch(r"graphs-config-bs2-t1-cpu-\d{8}-\d{6}\.json", found["file"])
    assert max(map(len, said[1:-1])) <= 130  # the first and the last line name folders
    rows = [(row["graph"], row.get("part"), row["batch"], row["length"]) for row in found["rows"]]
    assert rows == [
        ("image_feat", None, 2, None),
        ("qformer", None, 2, None),
        ("llm", "prefill", 2, 4),
        ("llm", "decode", 2, 1),
        ("llm", "decode", 6, 1),
    ]
    assert [" ".join(line.split()[:2]) for line in said[6:9]] == ["llm prefill", "llm decode", "llm decode"]
    assert found["rows"][4]["sizes"] == {"B": 2, "M": 3, "L": 1, "R": 6, "P": 2, "Q": 0, "C": 6 + 4}
    texts = found["generation"]
    assert [(text["num_beams"], text["use_past"]) for text in texts] == [(1, True), (3, True), (1, False), (3, False)]
    best = max(found["bandwidth"]["gb_per_s"].values())
    for text in texts:
        assert (text["batch"], text["prompt_tokens"], text["new_tokens"], text["loops"]) == (2, 4, 5, 2)
        assert len(text["first_seconds"]) == len(text["rest_seconds"]) == 2
        assert text["step_bytes"] == 2 * text["token_bytes"]
        assert text["tokens_per_s"] == pytest.approx(1e3 / text["token_ms"], rel=1e-3)
        assert text["gb_per_s"] == pytest.approx(text["token_bytes"] * text["tokens_per_s"] / 1e9, rel=0.02, abs=1e-3)
        assert text["of_bandwidth"] == pytest.approx(text["gb_per_s"] / best, rel=0.02, abs=1e-3)
    (head,) = [n for n, line in enumerate(said) if line.startswith("beams past")]
    assert [line.split()[:5] for line in said[head + 1 : head + 5]] == [
        ["1", "kept", "2", "4", "5"],
        ["3", "kept", "2", "4", "5"],
        ["1", "none", "2", "4", "5"],
        ["3", "none", "2", "4", "5"],
    ]
    assert any(line.startswith("Read: this machine reads float32 at ") for line in said)


def test_graphs_of_fixed_size(generator_graphs: Exported, tmp_path: Path) -> None:
    folder = generator_graphs("caption", "atc")
    said = chain.done(blip_bench(folder, *FEW, "--record", tmp_path))
    assert "Timed in the one form that they were exported in: text_decoder (batch 6)." in said
    found = record_in(tmp_path)
    assert [row["graph"] for row in found["rows"]] == ["image_feat", "image_kv", "text_decoder"]
    assert [text["num_beams"] for text in found["generation"]] == [1, 3]
    for options, wanted in (
        (("--num-beams", 4), "text_decoder was exported for 3 sequences of a prompt"),
        (("--new-tokens", 40), "40 new words are asked for"),
        (("--use-past", "false"), "has graphs with fixed buffers, which need the past"),
    ):
        assert wanted in chain.refusal(blip_bench(folder, *FEW, *options, "--no-record"), 2)


def test_comparison_of_tokens(opt: Graphs, tmp_path: Path) -> None:
    options = ("--checkpoint", weights_beside(opt), "--rounds", 2, "--use-past", "true,false", "--record", tmp_path)
    said = chain.done(
        blip_bench(opt.source.folder, *FEW, "--only", "qformer", "--compare", "transformers", *options)
    ).splitlines()
    assert max(map(len, said[1:-1])) <= 130
    assert any(
        re.fullmatch(r"Times the speed of transformers: tokens \(greedy\) .*, tokens \(3 beams\) .*\.", line) for line in said
    )
    found = record_in(tmp_path)
    assert re.fullmatch(r"compare-transformers-config-bs2-t1-cpu-\d{8}-\d{6}\.json", found["file"])
    compared = found["compare"]
    assert ", OPTForCausalLM, sdpa attention, float32" in compared["with"]
    assert compared["checkpoint"]["sha256"] == found["graphs"]["checkpoint"]["sha256"]
    assert (compared["prompt_tokens"], compared["new_tokens"], compared["rounds"]) == (4, 5, 2)
    assert [work["work"] for work in compared["works"]] == ["tokens (greedy)", "tokens (3 beams)"]
    for work in compared["works"]:
        assert [way["way"] for way in work["ways"]] == [
            "llm, caches kept",
            "llm, no caches",
            "transformers: OPTForCausalLM.generate",
        ]
        assert [way["items"] for way in work["ways"]] == [10, 10, 10]  # 2 texts of 5 words
        assert [way.get("max_abs_difference") for way in work["ways"]] == [None, 0.0, 0.0]


def test_comparison_of_captions(caption: Graphs, tmp_path: Path) -> None:
    options = ("--checkpoint", weights_beside(caption), "--rounds", 1, "--num-beams", 3, "--record", tmp_path)
    chain.done(blip_bench(caption.source.folder, "--only", "image_kv", "--compare", "transformers", *options))
    (work,) = record_in(tmp_path)["compare"]["works"]
    assert work["work"] == "captions (3 beams)"
    ours, theirs = work["ways"]
    assert ours["way"] == "image_feat, image_kv, text_decoder, caches kept"
    assert theirs["way"] == "transformers: BlipForConditionalGeneration.generate"
    assert ours["items"] == theirs["items"] == 1


def test_weights_in_three_files(opt: Graphs, tmp_path: Path) -> None:
    """As LAVIS publishes them; and those of another model are not of equal work."""
    config = opt.config
    assert isinstance(config, Blip2LlmConfig)

    def write(folder: Path, seed: int | None) -> tuple[object, ...]:
        model = load_generator(config, weights_beside(opt))[0] if seed is None else random_generator(config, seed)
        state, llm = dict(model.state_dict()), "llm_model."
        folder.mkdir()
        encoder = {name.removeprefix("visual_encoder."): t for name, t in state.items() if name.startswith("visual_encoder.")}
        torch.save(encoder, folder / "vit.pth")
        trained = {n.replace("llm_proj", "opt_proj"): t for n, t in state.items() if not n.startswith((llm, "visual_encoder."))}
        torch.save({"model": trained, **TRAINING}, folder / "opt.pth")
        write_llm(folder / "llm", config.llm, {n.removeprefix(llm): t for n, t in state.items() if n.startswith(llm)})
        named = ("--checkpoint", folder / "opt.pth", "--vit-checkpoint", folder / "vit.pth", "--llm-checkpoint", folder / "llm")
        return (*FEW, "--only", "qformer", "--compare", "transformers", "--rounds", 1, *named)

    records = tmp_path / "records"
    chain.done(blip_bench(opt.source.folder, *write(tmp_path / "same", None), "--record", records))
    compared = record_in(records)["compare"]
    assert [compared[part]["file"] for part in ("checkpoint", "vit_checkpoint", "llm_checkpoint")] == [
        "opt.pth",
        "vit.pth",
        "llm",
    ]
    found = chain.refusal(blip_bench(opt.source.folder, *write(tmp_path / "other", 9), "--no-record"))
    assert re.match(r"The tokens \(greedy\) come out differently: transformers: OPTForCausalLM.generate writes \d+ of 10 ", found)


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--num-beams", "1,x"), 2, "--num-beams is '1,x'; expected whole numbers from 1 to 64, with commas between."),
        (("--num-beams", "0"), 2, "--num-beams is '0'; expected"),
        (("--num-beams", "-1"), 2, "--num-beams is '-1'; expected"),
        (("--num-beams", "65"), 2, "--num-beams is '65'; expected"),
        (("--num-beams", "1,"), 2, "--num-beams is '1,'; expected"),
        (("--num-beams", "1.5"), 2, "--num-beams is '1.5'; expected"),
        (("--num-beams", "\u0663"), 2, "expected whole numbers"),
        (("--num-beams", "9" * 5000), 2, "expected whole numbers"),
        (("--use-past", "no"), 2, "--use-past is 'no'; expected true, false, or true,false."),
        (("--new-tokens", 1), 2, "1 is not in the range x>=2"),
        (("--prompt-tokens", 0), 2, "0 is not in the range x>=1"),
        (
            ("--new-tokens", 71),
            2,
            "71 new words are asked for after 10, and the model has positions for 80. Give fewer --new-tokens",
        ),
        (("--length", 8), 2, "--length is for models for retrieval, which"),
        (("--captions", "x.json"), 2, "--captions is for models for retrieval"),
        (("--pairs", 3), 2, "--pairs is for models for retrieval"),
        (("--itm-batchsize", 3), 2, "--itm-batchsize is for models for retrieval"),
        (("--rounds", 3), 2, "--rounds is only read with --compare transformers"),
        (("--llm-checkpoint", "x"), 2, "--llm-checkpoint is only read with --compare transformers"),
        (("--compare", "transformers"), 2, "needs the weights: add --checkpoint"),
        (
            ("--compare", "transformers", "--checkpoint", "x", "--works", "pairs"),
            2,
            "no work 'pairs' to compare; there are tokens.",
        ),
        (("--compare", "transformers", "--checkpoint", "x", "--provider", "cuda"), 2, "leave out --provider cuda"),
        (("--compare", "transformers", "--checkpoint", "missing.pth"), 1, "There is no checkpoint missing.pth"),
        (("--only", "text_decoder"), 2, "has no graph 'text_decoder'; it has image_feat, qformer, llm"),
    ],
)
def test_wrong_commands(tmp_path: Path, options: tuple[object, ...], code: int, said: str) -> None:
    graphs = write_graphs(tmp_path, "opt")
    assert said in chain.refusal(blip_bench(graphs, *options, "--no-record"), code)


def test_a_question_longer_than_its_encoder_reads(tmp_path: Path) -> None:
    found = chain.refusal(blip_bench(write_graphs(tmp_path, "vqa"), "--prompt-tokens", 37, "--no-record"), 2)
    assert found == "--prompt-tokens 37 is longer than the 36 positions of the question encoder."


@pytest.mark.parametrize(
    "options",
    [("--num-beams", 1), ("--new-tokens", 4), ("--prompt-tokens", 4), ("--use-past", "true"), ("--llm-checkpoint", "x")],
)
def test_options_of_words_with_graphs_for_retrieval(ort_graphs: Path, options: tuple[object, ...]) -> None:
    found = chain.refusal(blip_bench(ort_graphs, *options, "--no-record"), 2)
    assert found.startswith(f"{options[0]} is for models that write words, which ")


def test_a_graph_that_writing_needs_is_missing(opt: Graphs, tmp_path: Path) -> None:
    few = chain.with_only(opt.source.folder, tmp_path / "few", "qformer", "image_feat")
    assert "has no graph 'llm'. Export it: " in chain.refusal(blip_bench(few, *FEW, "--no-record"))


# Checkpoints to measure with


def test_a_checkpoint_that_deviates_from_the_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_checkpoint, "preset", lambda name: tiny_llm(TINY_OPT))
    out = tmp_path / "m.pth"
    result = CliRunner().invoke(make_checkpoint.main, ["--vision-depth", "1", "--vocab", "33", "--bfloat16", "--out", str(out)])
    assert result.exit_code == 0, result.output
    config = from_file(tmp_path / "m.json")
    assert isinstance(config, Blip2LlmConfig)
    assert (config.vision.depth, config.llm.vocab, config.llm.width) == (1, 33, TINY_OPT.width)
    model, report = load_generator(config, out, tmp_path / "m_vit.pth", tmp_path / "m_llm")
    assert report.unexpected == ()
    assert model.state_dict()["llm_model.model.decoder.embed_tokens.weight"].dtype == torch.bfloat16
    held = json.loads((tmp_path / "m_llm" / "config.json").read_text("utf-8"))
    assert held["vocab_size"] == 33
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.json", "m.pth", "m_llm", "m_vit.pth"]


def test_vocabularies_of_readers_are_not_changed(tmp_path: Path) -> None:
    options = ["--model", "blip-demo", "--vocab", "33", "--out", str(tmp_path / "m.pth")]
    found = CliRunner().invoke(make_checkpoint.main, options)
    assert (found.exit_code, "--vocab is for models that write words" in found.output) == (2, True)
