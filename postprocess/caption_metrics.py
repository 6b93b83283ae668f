"""All metrics of captions, of all together and of each, as pycocoevalcap 1.2 computes them.

CIDEr-D stands beside CIDEr with the same figure: see postprocess.cider.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from postprocess.bleu import bleu
from postprocess.cider import cider
from postprocess.java_metrics import meteor, spice
from postprocess.ptb import tokenize
from postprocess.references import paired
from postprocess.rouge import rouge_l
from postprocess.scored import Absent, Scored
from preprocess.checked import Id

NAMES = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr", "SPICE", "CIDEr-D")
JAVA = {"METEOR": meteor, "SPICE": spice}


@dataclass(frozen=True)
class Judged:
    """N captions and what the metrics say of them, in the order of the results."""

    ids: list[Id]  # N
    captions: list[str]  # N, as they were given
    references: list[Sequence[str]]  # N
    metrics: dict[str, Scored | Absent]  # by NAMES, in their order
    words: int  # tokens of the captions
    reference_words: int  # tokens of the references nearest in length

    @property
    def corpus(self) -> dict[str, float | None]:
        """The figures of all captions together; None where a metric is absent."""
        return {name: found.corpus if isinstance(found, Scored) else None for name, found in self.metrics.items()}


def judge(
    references: Mapping[Id, Sequence[str]],
    results: Mapping[Id, str],
    only_results: bool = False,
    names: Sequence[str] = NAMES,
) -> Judged:
    """Compare each result with the references of its picture.

    `only_results` leaves out references without a result; `names` chooses metrics, of which METEOR and SPICE start Java. The
    captions are tokenised in the order of the references, as the original does (postprocess.ptb says why that may matter).
    Raises UserError when results and references do not belong together: see postprocess.references.paired.
    """
    rows = paired(references, results, "pictures", only_results)
    captions, texts = _tokenized(references, results)
    candidates, others = [captions[each] for each, _, _ in rows], [texts[each] for each, _, _ in rows]
    bleus, rouge, ciders = bleu(candidates, others), rouge_l(candidates, others), cider(candidates, others)
    plain = dict(zip(NAMES, bleus.scores, strict=False)) | {"ROUGE_L": rouge, "CIDEr": ciders, "CIDEr-D": ciders}
    return Judged(
        ids=[each for each, _, _ in rows],
        captions=[caption for _, caption, _ in rows],
        references=[own for _, _, own in rows],
        metrics={name: JAVA[name](candidates, others) if name in JAVA else plain[name] for name in NAMES if name in names},
        words=bleus.words,
        reference_words=bleus.reference_words,
    )


def _tokenized(references: Mapping[Id, Sequence[str]], results: Mapping[Id, str]) -> tuple[dict[Id, str], dict[Id, list[str]]]:
    """The captions and the references, tokenised, of the pictures that have a result."""
    order = [each for each in references if each in results]
    words = iter(tokenize([text for each in order for text in references[each]]))
    texts = {each: [next(words) for _ in references[each]] for each in order}
    return dict(zip(order, tokenize([results[each] for each in order]), strict=True)), texts
