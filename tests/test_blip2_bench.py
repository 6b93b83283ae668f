"""The bench on a tiny BLIP-2: operations by hand, every graph timed, compared with transformers. No test looks at a speed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bench import measure
from bench.captions import choose_captions
from bench.compare import load_rival
from bench.flops import count_flops
from models.blip2 import LN_VISION_EPS
from models.spec import graph_specs
from runtime.graphs import read_graphs
from tests import chain
from tests.bench_run import COMPARED, annotations, blip_bench, record_in
from tests.make_checkpoint import encoder_file, without_encoder
from tests.test_flops import by_hand, linear
from tests.tiny import TINY2, TINY_CLIP, random_blip2


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small products for the peak, and no rest between two ways."""
    monkeypatch.setattr("bench.peak.PRODUCTS", ((16, 8, 32), (64, 64, 64)))
    monkeypatch.setattr(measure, "REST_SECONDS", 0.0)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every graph of TINY2 (seed 0), dynamic. Read only."""
    return chain.export_graphs(tmp_path_factory.mktemp("blip2"), model=random_blip2())


@pytest.fixture
def weights(graphs: Path) -> Path:
    """What the graphs were exported from."""
    return graphs.parent / "model" / "model.safetensors"


@pytest.mark.parametrize(("batch", "length"), [(1, 2), (3, 11), (5, 35)])
@pytest.mark.parametrize("name", list(graph_specs(TINY2)))
def test_operations_of_every_graph(graphs: Path, name: str, batch: int, length: int) -> None:
    found = read_graphs(graphs)
    counted = count_flops(found.path(name), found.symbolic[name].bind(batch, length))
    assert sum(counted.values()) == by_hand(name, TINY2, batch, length)


def test_one_pass_of_the_image_encoder(graphs: Path) -> None:
    """`image` gives the features, the queries and their embedding for what `image_feat` and `qformer` take apart. Only
    the patches are convolved, so the convolution counts the passes."""
    found, vision = read_graphs(graphs), TINY2.vision
    image, feat, qformer = (count_flops(found.path(n), found.symbolic[n].bind(2, 1)) for n in ("image", "image_feat", "qformer"))
    assert image["Conv"] == 2 * linear(vision.tokens - 1, 3 * vision.patch**2, vision.width)
    assert sum(image.values()) == sum(feat.values()) + sum(qformer.values())


def test_every_graph_is_timed(graphs: Path, tmp_path: Path) -> None:
    said = chain.done(blip_bench(graphs, "--batchsize", 4, "--record", tmp_path)).splitlines()
    found = record_in(tmp_path)
    assert [line.split()[0] for line in said[4 : 4 + len(graph_specs(TINY2))]] == list(graph_specs(TINY2))
    assert [row["graph"] for row in found["rows"]] == list(graph_specs(TINY2))
    assert found["rows"][0]["length"] == TINY2.protocol.max_length
    # A record says how deep the image encoder was: a comparison of pairs needs no deep one.
    assert found["graphs"]["config"]["vision"]["depth"] == TINY2.vision.depth


def test_captions_are_matched_as_they_are(graphs: Path, tmp_path: Path) -> None:
    """There is no [ENC] to put first."""
    found = choose_captions(read_graphs(graphs), annotations(tmp_path), 10, 35)
    np.testing.assert_array_equal(found.itm_ids, found.ids)
    assert set(found.ids[:, 0]) == {chain.TOKENS.index("[CLS]")}


def test_comparison(graphs: Path, weights: Path, tmp_path: Path) -> None:
    options = ("--checkpoint", weights, "--captions", annotations(tmp_path), "--rounds", 2, "--record", tmp_path / "records")
    said = chain.done(blip_bench(graphs, *COMPARED, *options, "--pairs", 38)).splitlines()
    assert max(map(len, said[1:-1])) <= 130  # the first and the last line name folders
    found = record_in(tmp_path / "records")["compare"]
    assert ", Blip2ForImageTextRetrieval, eager attention, float32" in found["with"]
    works = {work["work"]: work["ways"] for work in found["works"]}
    assert {name: [way["items"] for way in ways] for name, ways in works.items()} == {
        "pictures": [4, 4],
        "captions": [38, 38],
        "pairs": [38, 5, 5],
    }
    # 2e-7 to 7e-7 measured.
    assert all(way["max_abs_difference"] < 5e-6 for ways in works.values() for way in ways[1:])


def test_a_part_of_the_comparison_at_another_length(graphs: Path, weights: Path, tmp_path: Path) -> None:
    """Without the graphs that only the rest needs."""
    few = chain.with_only(graphs, tmp_path / "few", "image", "image_kv", "itm_cached", "itm")
    options = ("--checkpoint", weights, "--works", "pairs", "--length", 20, "--rounds", 1, "--record", tmp_path / "records")
    said = chain.done(blip_bench(few, *COMPARED, *options))
    assert "transformers: qformer, itm_head, per pair, padded to 20" in said
    (work,) = record_in(tmp_path / "records")["compare"]["works"]
    assert (work["work"], len(work["ways"])) == ("pairs", 3)


def test_an_image_encoder_in_a_file_of_its_own(graphs: Path, tmp_path: Path) -> None:
    state = random_blip2().state_dict()
    torch.save({"model": without_encoder(state)}, tmp_path / "pretrained.pth")
    torch.save(encoder_file(state, TINY2), tmp_path / "vit.pth")
    records, options = tmp_path / "records", ("--works", "pictures", "--rounds", 1, "--checkpoint", tmp_path / "pretrained.pth")
    found = chain.refusal(blip_bench(graphs, *COMPARED, *options, "--no-record"))
    assert "--vit-checkpoint" in found
    chain.done(blip_bench(graphs, *COMPARED, *options, "--vit-checkpoint", tmp_path / "vit.pth", "--record", records))
    compared = record_in(records)["compare"]
    assert (compared["checkpoint"]["file"], compared["vit_checkpoint"]["file"]) == ("pretrained.pth", "vit.pth")


# A tensor of the model, and the first work that it spoils.
WRONG = {
    "visual_encoder.blocks.1.attn.v_bias": "pictures",
    "ln_vision.weight": "pictures",
    "query_tokens": "pictures",
    "Qformer.bert.encoder.layer.0.intermediate_query.dense.weight": "pictures",
    "Qformer.bert.encoder.layer.2.crossattention.self.key.weight": "pictures",
    "Qformer.bert.embeddings.position_embeddings.weight": "captions",
    "Qformer.bert.encoder.layer.1.output.dense.bias": "captions",
    "text_proj.weight": "captions",
    "itm_head.bias": "pairs",
}


@pytest.mark.parametrize("name", WRONG)
def test_one_wrong_tensor_is_noticed(graphs: Path, tmp_path: Path, name: str) -> None:
    """One that is off by a twentieth is not rounding: the results differ by 5e-4 and more."""
    other = random_blip2()
    tensor = other.state_dict()[name]
    tensor += 0.05 * random_blip2(seed=1).state_dict()[name]
    chain.write_model(tmp_path, other)
    found = chain.refusal(blip_bench(graphs, *COMPARED, "--checkpoint", tmp_path / "model.safetensors", "--no-record"))
    assert found.startswith(f"The {WRONG[name]} come out differently: ")


def test_the_norm_behind_the_image_encoder(graphs: Path, weights: Path) -> None:
    """Its epsilon is LAVIS's. A comparison would not notice another one: 2e-7 here, less than rounding."""
    rival = load_rival(read_graphs(graphs), weights, None, 1)
    assert rival.theirs.model.vision_model.post_layernorm.eps == LN_VISION_EPS


def test_transformers_has_no_clip_encoder(tmp_path: Path) -> None:
    folder = chain.export_graphs(tmp_path, "--graphs", "image_kv", model=random_blip2(TINY_CLIP))
    options = ("--compare", "transformers", "--checkpoint", tmp_path / "model" / "model.safetensors", "--no-record")
    found = chain.refusal(blip_bench(folder, *options), 2)
    assert found == "transformers has no BLIP-2 with CLIP's image encoder; leave out --compare transformers."
