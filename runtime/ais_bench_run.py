"""A run of retrieval whose graphs ais_bench runs alone: its folder, and what has become of it so far. Needs no engine.

DIR/manifest.json  which .om of each graph runs, and of which data
DIR/ais_bench.sh   the commands (runtime/ais_bench_script.py)
DIR/ais/           what ais_bench writes, a folder for each graph
DIR/pairs/         the candidates (runtime/ais_bench_pairs.py)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models import manifest
from models.errors import UserError
from models.om import OmEntry, entries
from models.spec import TensorSpec
from preprocess.dataset import RetrievalData, read_retrieval
from preprocess.tensors import stems
from runtime.ais_bench import BinFiles, read_folder

KIND = "ais_bench"
AIS, PAIRS = "ais", "pairs"  # folders
MOST_FILES = 100_000  # in a folder, of ais_bench of 2025
IMAGE_EMBED, TEXT_EMBED, IMAGE_KV, ITM = "image_embed", "text_embed", "image_kv", "itm_cached"
FEEDS = {"text_ids": "ids", "text_atten_mask": "mask", "input_image": "img"}  # inputs by the tensor of the data


@dataclass(frozen=True)
class AisRun:
    """The folder of such a run."""

    source: manifest.Manifest
    ais: Path  # with a folder of each graph
    data: Path  # folder that it was made for, where it lay then
    oms: Mapping[str, OmEntry]  # by graph, in the order in which they run

    @property
    def content(self) -> dict[str, Any]:
        return self.source.content

    def open_data(self, folder: Path | None, verify: bool = False) -> RetrievalData:
        """The data that it was made for, at `folder` or where it lay then. Raises UserError when that is other data."""
        data = read_retrieval(folder or self.data, verify)
        if (digest := self.content["data"].get("digest")) != data.source.digest:
            raise UserError(
                f"{self.source.folder} was made for another data folder, {self.data} (digest {str(digest)[:12]}; "
                f"{data.source.folder} has {data.source.digest[:12]}). Name the right one with --data, or write the commands and "
                "run them again."
            )
        return data

    def outputs(self, graph: str, samples: int, names: list[str] | None = None) -> dict[str, BinFiles]:
        """What ais_bench wrote of `graph`, see ais_bench.read_folder; `names` are the stems, where they are not the samples'."""
        entry = self.entry(graph)
        return read_folder(self.ais / graph, entry.spec, samples, names or stems(samples), sources(entry))

    def entry(self, graph: str) -> OmEntry:
        """The .om of `graph`. Raises UserError when there was none."""
        if graph not in self.oms:
            raise UserError(f"{self.source.folder / manifest.NAME} names no file of {graph}: the om/ folder had none. {_again()}")
        return self.oms[graph]

    def picture_graph(self, output: str) -> str:
        """The graph that gives `output` of a picture."""
        found = [name for name, entry in self.oms.items() if output in {tensor.name for tensor in entry.spec.outputs}]
        if not found:
            raise UserError(f"{self.source.folder / manifest.NAME} names no graph that gives {output}. {_again()}")
        return found[0]

    def embeddings(self, data: RetrievalData) -> tuple[BinFiles, BinFiles]:
        """image_embed (N, E), or (N, Q, E) of BLIP-2, and text_embed (M, E), both float32 on disk. Raises UserError when they are
        not numbers, as well."""
        images = self.outputs(self.picture_graph(IMAGE_EMBED), len(data.images))[IMAGE_EMBED]
        texts = self.outputs(TEXT_EMBED, len(data.captions))[TEXT_EMBED]
        images.refuse_nan(IMAGE_EMBED)
        texts.refuse_nan(TEXT_EMBED)
        return images, texts


def read_run(ais: Path) -> AisRun:
    """The run in the folder DIR, or that whose outputs are in DIR/ais. Raises UserError when there is none, or its manifest is
    damaged."""
    folder = ais if (ais / manifest.NAME).is_file() else ais.absolute().parent
    ais = ais / AIS if folder == ais else ais
    found = manifest.read(folder, KIND)
    try:
        oms = {entry.graph: entry for entry in entries(found.content, found.folder / manifest.NAME)}
        return AisRun(
            found, ais, Path(found.content["data"]["folder"]), {name: oms[name] for name in found.content["made_of"]["used"]}
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / manifest.NAME} lacks or garbles {error}. {_again()}") from error


def sources(entry: OmEntry) -> tuple[str, ...]:
    """What the folders are called that a graph reads, one for each input: those of the data, but the pairs have their own."""
    return tuple(tensor.name if entry.graph == ITM else FEEDS.get(tensor.name, tensor.name) for tensor in entry.spec.inputs)


def bytes_of(tensor: TensorSpec) -> int:
    """Of one tensor, every axis a number."""
    return math.prod(map(int, tensor.shape)) * np.dtype(tensor.dtype).itemsize


def size(count: float) -> str:
    """So many bytes as a person says it."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _again() -> str:
    return f"Write it again with {manifest.MADE_WITH[KIND]}."
