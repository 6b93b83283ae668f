"""Accuracy of answers, by the official rule of VQA: an answer is right as far as three other people gave it.

Each of the ten people is left out in turn, the answer is worth min(1, others who gave it / 3), and the mean of the ten counts.
Before, answers are cleaned. Two forms of the rule are in use, and differ in what they clean:

    lavis      the answer always; what people said of punctuation alone, and only where it is not all the same
               (salesforce/LAVIS lavis/common/vqa_tools/vqa_eval.py, and GT-Vision-Lab/VQA at commit c4e6a0e)
    agreement  both wholly where what people said is not all the same, neither where it is
               (GT-Vision-Lab/VQA PythonEvaluationTools/vqaEvaluation/vqaEval.py later, as its issue 14 quotes it)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from models.errors import Misuse, UserError
from postprocess.references import Asked, paired
from preprocess.checked import Id

RULES = ("lavis", "agreement")
ENOUGH = 3  # other people
DIGITS = 2  # to which the original rounds, of percent

ARTICLES = frozenset(["a", "an", "the"])
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(WORDS)}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
BETWEEN_DIGITS = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")
PERIODS = 32  # taken out at most: the original hands re.UNICODE, which is 32, to `sub` as the number of replacements
# How words without their apostrophes, or with some of them, are written out. As the original has it, "somebody'd" included.
CONTRACTED = (
    "aint:ain't arent:aren't cant:can't couldve:could've couldnt:couldn't couldn'tve:couldn't've couldnt've:couldn't've "
    "didnt:didn't doesnt:doesn't dont:don't hadnt:hadn't hadnt've:hadn't've hadn'tve:hadn't've hasnt:hasn't havent:haven't "
    "hed:he'd hed've:he'd've he'dve:he'd've hes:he's howd:how'd howll:how'll hows:how's isnt:isn't itd:it'd itd've:it'd've "
    "it'dve:it'd've itll:it'll maam:ma'am mightnt:mightn't mightnt've:mightn't've mightn'tve:mightn't've mightve:might've "
    "mustnt:mustn't mustve:must've neednt:needn't notve:not've oclock:o'clock oughtnt:oughtn't ow's'at:'ow's'at "
    "'ows'at:'ow's'at 'ow'sat:'ow's'at shant:shan't shed've:she'd've she'dve:she'd've shouldve:should've "
    "shouldnt:shouldn't shouldnt've:shouldn't've shouldn'tve:shouldn't've somebody'd:somebodyd somebodyd've:somebody'd've "
    "somebody'dve:somebody'd've somebodyll:somebody'll somebodys:somebody's someoned:someone'd someoned've:someone'd've "
    "someone'dve:someone'd've someonell:someone'll someones:someone's somethingd:something'd somethingd've:something'd've "
    "something'dve:something'd've somethingll:something'll thats:that's thered:there'd thered've:there'd've "
    "there'dve:there'd've therere:there're theres:there's theyd:they'd theyd've:they'd've they'dve:they'd've "
    "theyll:they'll theyre:they're theyve:they've twas:'twas wasnt:wasn't wed've:we'd've we'dve:we'd've weve:we've "
    "werent:weren't whatll:what'll whatre:what're whats:what's whatve:what've whens:when's whered:where'd wheres:where's "
    "whereve:where've whod:who'd whod've:who'd've who'dve:who'd've wholl:who'll whos:who's whove:who've whyll:why'll "
    "whyre:why're whys:why's wont:won't wouldve:would've wouldnt:wouldn't wouldnt've:wouldn't've wouldn'tve:wouldn't've "
    "yall:y'all yall'll:y'all'll y'allll:y'all'll yall'd've:y'all'd've y'alld've:y'all'd've y'all'dve:y'all'd've "
    "youd:you'd youd've:you'd've you'dve:you'd've youll:you'll youre:you're youve:you've"
)
CONTRACTIONS = dict(pair.split(":") for pair in CONTRACTED.split())


@dataclass(frozen=True)
class VqaAccuracy:
    """Of Q answers, in the order of the results. Percent; figures of several are rounded to DIGITS, as the original prints."""

    ids: list[Id]  # Q
    answers: list[str]  # Q, as they were given
    asked: list[Asked]  # Q
    each: np.ndarray  # (Q,) float64, not rounded
    overall: float
    per_answer_type: dict[str, float]  # questions whose type is not annotated are in `overall` alone
    per_question_type: dict[str, float]


def judge(
    references: Mapping[Id, Asked], results: Mapping[Id, str], rule: str = "lavis", only_results: bool = False
) -> VqaAccuracy:
    """Compare each answer with what people answered. `only_results` leaves out questions without a result.

    Raises Misuse when `rule` is none of RULES; UserError when results and references do not belong together (see
    postprocess.references.paired) or nobody answered a question.
    """
    if rule not in RULES:
        raise Misuse(f"There is no rule {rule!r} of VQA accuracy; choose {' or '.join(RULES)}.")
    rows = paired(references, results, "questions", only_results)
    for question, _, own in rows:
        if not own.answers:
            raise UserError(f"Nobody answered the question {question!r}: its annotation has no answers, so nothing can be right.")
    values = [accuracy(answer, own.answers, rule) for _, answer, own in rows]
    asked = [own for _, _, own in rows]
    return VqaAccuracy(
        ids=[question for question, _, _ in rows],
        answers=[answer for _, answer, _ in rows],
        asked=asked,
        each=100.0 * np.array(values, np.float64),  # (Q,)
        overall=_percent(values),
        per_answer_type=_per_type([own.answer_type for own in asked], values),
        per_question_type=_per_type([own.question_type for own in asked], values),
    )


def accuracy(answer: str, answers: Sequence[str], rule: str = "lavis") -> float:
    """From 0 to 1, of one answer, given what people said (one or more).

    With ten people it is the official rule. Where fewer than four were asked, nobody could reach three others: then all others
    are enough, and of a single person the answer itself. The original would call every answer to one person wrong.
    """
    mine, theirs = _line(answer), list(answers)
    if rule == "agreement":
        theirs = [_line(text) for text in theirs]
    differ = len(set(theirs)) > 1
    if differ:
        theirs = [clean(text) if rule == "agreement" else without_punctuation(text) for text in theirs]
    if differ or rule == "lavis":
        mine = clean(mine)
    same = [text == mine for text in theirs]
    if len(same) == 1:
        return float(same[0])
    enough = min(ENOUGH, len(same) - 1)
    return sum(min(1.0, (sum(same) - own) / enough) for own in same) / len(same)


@lru_cache(maxsize=1 << 16)
def clean(answer: str) -> str:
    """Without punctuation and articles, small letters, numbers up to ten as digits, contractions with their apostrophes."""
    words = (NUMBERS.get(word, word) for word in without_punctuation(answer).lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


@lru_cache(maxsize=1 << 16)
def without_punctuation(answer: str) -> str:
    """Each sign is taken out where it stands beside a blank anywhere in the answer, or when a comma stands between digits
    somewhere; otherwise it becomes a blank. Periods go, but before a digit."""
    apart = BETWEEN_DIGITS.search(answer) is not None
    text = answer
    for sign in PUNCTUATION:
        text = text.replace(sign, "" if apart or f"{sign} " in answer or f" {sign}" in answer else " ")
    return PERIOD.sub("", text, count=PERIODS)


def _line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _per_type(types: Sequence[str | None], values: Sequence[float]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for kind, value in zip(types, values, strict=True):
        if kind is not None:
            found.setdefault(kind, []).append(value)
    return {kind: _percent(own) for kind, own in found.items()}


def _percent(values: Sequence[float]) -> float:
    return round(100 * sum(values) / len(values), DIGITS)
