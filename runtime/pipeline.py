"""The Python interface: pictures in, labels, scores, vectors or texts out, without folders in between. Needs no torch.

    from runtime.pipeline import pipeline

    classify = pipeline("zero_shot_image_classification", graphs="build/graphs")
    classify("dog.jpg", candidate_labels=["a dog", "a cat"])
    # [{"score": 0.99, "label": "a dog"}, {"score": 0.01, "label": "a cat"}]

Pictures are what runtime.picture_input says: paths, PIL images, numpy arrays, or a list of these. Every graph is loaded when
it is first needed and then kept. The numbers are those of blip-run on the same pictures. What cannot be raises
models.errors.Misuse (the call is wrong) or UserError (the work failed), each with a sentence that says what to do.

The names of tasks and arguments, and the form of what is returned, are those of the pipelines of Hugging Face transformers
and of mindformers, where they have them. N pictures, M texts, L tokens, Q queries, D width, E embedding.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import Misuse
from models.spec import MATCH
from preprocess.text import with_first
from runtime.classify import picture_graphs, probabilities, query_of
from runtime.embed import refuse_nan
from runtime.features import IMAGE, MODES, MULTIMODAL, TENSORS, TEXT, graphs_of, refuse_blip
from runtime.generation_pipeline import WRITERS
from runtime.labels import NO_TEMPERATURE, checked_labels, checked_templates, embed_labels, temperature_of
from runtime.model import Engine, Model, as_texts, count
from runtime.picture_input import Picture, as_list
from runtime.place import Device
from runtime.rerank import score_picture
from runtime.retrieval import PAIR_GRAPHS, PICTURE_GRAPHS
from runtime.similarity import similarities

Pictures = Picture | Sequence[Picture]
Found = list[dict[str, Any]]  # of one picture, the best first


class ZeroShotImageClassification:
    """Which of some labels each picture shows, by what the labels are called.

        classify = pipeline("zero_shot_image_classification", candidate_labels="dog, cat", hypothesis_template="a picture of {}")
        classify(["1.jpg", "2.jpg"], top_k=1)
        # [[{"score": 0.98, "label": "dog"}], [{"score": 0.71, "label": "cat"}]]

    One picture gives a list, a list of pictures a list of lists, as in Hugging Face; mindformers gives a list of lists always.
    Scores are mindformers' (first query, divided by the temperature; its template is "a picture of {}."). Hugging Face's for
    BLIP-2 are those of query="max" and temperature=1.
    """

    def __init__(
        self,
        model: Model,
        candidate_labels: str | Sequence[str] | None = None,
        hypothesis_template: str | Sequence[str] = "This is a photo of {}.",
        query: str | None = None,
        temperature: float | None = None,
    ) -> None:
        """
        Args:
            candidate_labels: for calls that give none; several, or one text with commas between.
            hypothesis_template: for calls that give none; holds {} for the label. Of several the vectors are averaged.
            query: which query of BLIP-2 speaks for a picture, "first" (as in mindformers) or "max".
            temperature: divides the similarities before softmax; None takes the checkpoint's, and warns when it had none.
        """
        self.model, self.labels, self.template = model, candidate_labels, hypothesis_template
        self.query = query_of(model.graphs, query)
        self.temperature, source = temperature_of(model.graphs, temperature)
        if source == "default":
            warnings.warn(NO_TEMPERATURE, stacklevel=3)
        self._embedded: tuple[tuple[list[str], list[str]], np.ndarray] | None = None  # of the last call

    def __call__(
        self,
        images: Pictures,
        candidate_labels: str | Sequence[str] | None = None,
        hypothesis_template: str | Sequence[str] | None = None,
        top_k: int | None = None,
    ) -> Found | list[Found]:
        """Per picture [{"score": float, "label": str}, ...], the most likely first; the scores of all labels add up to 1.
        `top_k` keeps the first so many."""
        given = self.labels if candidate_labels is None else candidate_labels
        if given is None:
            raise Misuse("candidate_labels is None; give the labels to choose from, in the call or to pipeline().")
        kept = None if top_k is None else count("top_k", top_k)
        labels = checked_labels(_several(given))
        templates, _ = as_list(self.template if hypothesis_template is None else hypothesis_template)
        label_embed = self._label_embed(labels, checked_templates(templates))
        pictures, single = as_list(images)
        names = self.model.graphs.first_of(*picture_graphs(self.model.graphs))
        found: list[Found] = []
        for _, seen in self.model.look(pictures, names):
            for row in probabilities(seen["image_embed"], label_embed, self.query, self.temperature):
                order = np.argsort(-row, kind="stable")[:kept]
                found.append([{"score": float(row[c]), "label": labels[c]} for c in order])
        return found[0] if single else found

    def _label_embed(self, labels: list[str], templates: list[str]) -> np.ndarray:
        """(C, E); kept until other labels or templates are asked for."""
        if self._embedded is None or self._embedded[0] != (labels, templates):
            model = self.model
            (session,) = model.sessions(model.graphs.first_of(("text_embed",)))
            positions = model.config.text.positions
            embedded = embed_labels(session, model.tokenizer, labels, templates, positions, model.batchsize)
            self._embedded = ((labels, templates), embedded)
        return self._embedded[1]


def _several(labels: Any) -> list[Any]:
    """The labels one by one. Raises Misuse for what is neither a sequence nor a text with commas between."""
    if isinstance(labels, str):
        return labels.split(",")
    try:
        return list(labels)
    except TypeError:  # of an array without axes too
        raise Misuse(f"candidate_labels is {labels!r:.60}; expected several texts, or one with commas between.") from None


class ImageTextRetrieval:
    """How well each text fits each picture.

        rank = pipeline("image_text_retrieval")
        rank("dog.jpg", ["a dog on grass", "two cats"])
        # [{"text": "a dog on grass", "score": 2.1, "itm": 0.97, "similarity": 0.41}, ...]

    One picture gives a list, a list of pictures a list of lists. Texts are cleaned and cut as captions are.
    """

    def __init__(self, model: Model) -> None:
        self.model = model

    def __call__(self, images: Pictures, texts: str | Sequence[str], match: bool = True) -> Found | list[Found]:
        """Per picture, the best text first: {"text", "score", "itm", "similarity"}. `similarity` compares the embeddings, `itm`
        is the probability that the ITM head gives to a match, and `score` is its logit + the similarity, as in blip-run.

        With `match` False the ITM head is left out, which is much faster: there is no "itm", and the score is the similarity.
        """
        model, captions = self.model, as_texts(texts)
        pictures, single = as_list(images)
        ids, mask = model.tokens(captions)
        text_embed = model.read(model.graphs.first_of(("text_embed",)), ids, mask)["text_embed"]  # (M, E)
        names = model.graphs.first_of(*(PICTURE_GRAPHS if match else picture_graphs(model.graphs)))
        matching = model.graphs.first_of(*PAIR_GRAPHS) if match else ()
        found: list[Found] = []
        for _, seen in model.look(pictures, names):
            sims = similarities(seen["image_embed"], text_embed)  # (B, M)
            for row, sim in enumerate(sims):
                logits = self._itm(matching, seen["image_feat"][[row]], ids, mask) if match else None
                found.append(_ranked(captions, sim, logits))
        return found[0] if single else found

    def _itm(self, names: Sequence[str], feat: np.ndarray, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """itm_logits (M, 2) of all texts with one picture (1, T, D)."""
        model = self.model
        ids = with_first(ids, model.tokenizer.encode_id)
        logits = score_picture(model.sessions(names), feat, ids, mask, model.batchsize)
        refuse_nan("itm_logits", logits)
        return logits


def _ranked(texts: list[str], sim: np.ndarray, logits: np.ndarray | None) -> Found:
    """What is said of one picture: similarities (M,), and itm_logits (M, 2)."""
    score = sim if logits is None else logits[:, MATCH] + sim  # (M,)
    found = []
    for m in np.argsort(-score, kind="stable"):
        entry = {"text": texts[m], "score": float(score[m]), "similarity": float(sim[m])}
        if logits is not None:
            entry["itm"] = float(np.exp(-np.logaddexp(0, logits[m, 1 - MATCH] - logits[m, MATCH])))  # softmax of the two
        found.append(entry)
    return found


class FeatureExtraction:
    """What BLIP-2's Q-Former says of pictures and texts, as `extract_features` of LAVIS returns it.

    describe = pipeline("feature_extraction")
    describe(images=["1.jpg", "2.jpg"], mode="image")["image_embeds_proj"].shape   # (2, 32, 256)
    """

    def __init__(self, model: Model) -> None:
        refuse_blip(model.graphs)
        self.model = model

    def __call__(
        self, images: Pictures | None = None, texts: str | Sequence[str] | None = None, mode: str = MULTIMODAL
    ) -> dict[str, np.ndarray]:
        """Float32 arrays by LAVIS's names. The first axis is that of the pictures or texts, of a single one too.

            mode "image"       image_embeds (N, Q, D), image_embeds_proj (N, Q, E)
            mode "text"        text_embeds (M, L, D), text_embeds_proj (M, L, E); zero where a text has ended, L is the longest's
            mode "multimodal"  multimodal_embeds (N, Q, D): the queries that read a picture and its text, the n-th with the n-th

        The vectors named proj are of unit length. Texts are cleaned and cut as captions are, which LAVIS leaves to its caller.
        """
        if mode not in MODES:
            raise Misuse(f"There is no mode {mode!r}; known modes: {', '.join(MODES)}.")
        if (images is None and mode != TEXT) or (texts is None and mode != IMAGE):
            wanted = {IMAGE: "images", TEXT: "texts", MULTIMODAL: "images and texts"}[mode]
            raise Misuse(f"The mode {mode!r} needs {wanted}; give them, or another mode of {', '.join(MODES)}.")
        model = self.model
        looking, matching, reading = graphs_of(model.graphs, [mode])
        pictures = [] if images is None else as_list(images)[0]
        ids, mask = model.tokens([] if texts is None else as_texts(texts))
        if mode == TEXT:
            return _renamed(mode, model.read(reading, ids, mask))
        if mode == MULTIMODAL and len(pictures) != len(ids):
            raise Misuse(f"{len(pictures)} pictures and {len(ids)} texts; each picture goes with one text.")
        rows = {}
        for graph, output in TENSORS[mode].values():
            spec = model.graphs.symbolic[graph].output(output)
            rows[output] = np.empty((len(pictures), *map(int, spec.sample_shape)), spec.dtype)
        for part, seen in model.look(pictures, looking):
            found = seen if mode == IMAGE else model.read(matching, ids[part], mask[part], image_feat=seen["image_feat"])
            for output in rows:
                rows[output][part] = found[output]
        return _renamed(mode, rows)


def _renamed(mode: str, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: found[output] for name, (_, output) in TENSORS[mode].items()}


TASKS: dict[str, Callable[..., Callable[..., Any]]] = {
    "zero_shot_image_classification": ZeroShotImageClassification,
    "image_text_retrieval": ImageTextRetrieval,
    "feature_extraction": FeatureExtraction,
    **WRITERS,
}


def pipeline(
    task: str,
    graphs: str | Path = "build/graphs",
    provider: str = "cpu",
    threads: int | None = None,
    batchsize: int = 16,
    device: Device | None = None,
    **defaults: Any,
) -> Callable[..., Any]:
    """What does `task`, to be called with pictures.

    Args:
        task: one of TASKS; dashes may stand for its underscores, as Hugging Face writes them.
        graphs: folder that blip-export wrote, or blip-atc.
        provider: "cpu", "cuda" or "cann"; never another one than asked for.
        threads: of one operator; None takes all cores.
        batchsize: pictures or texts per run of a graph.
        device: NPUs of graphs that blip-atc wrote: 0, "0,1,2,3" or [0, 1]; None takes 0.
        defaults: what the class of the task takes besides: `candidate_labels`, `hypothesis_template`, ...

    Raises Misuse for a task or an option that cannot be, UserError when the graphs or the provider cannot be used.
    """
    made = TASKS.get(task.replace("-", "_")) if isinstance(task, str) else None
    if made is None:
        raise Misuse(f"There is no task {task!r}; known tasks: {', '.join(TASKS)}.")
    held = Engine.checked if made in WRITERS.values() else Model
    return made(held(graphs, provider, threads, batchsize, device), **defaults)
