"""Penn Treebank tokens, against what pycocoevalcap 1.2's PTBTokenizer yields (Stanford CoreNLP 3.4.1 under Java 17)."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from postprocess.ptb import tokenize
from preprocess.annotations import read_annotations

# A caption, and the words that PTBTokenizer yields for it, when the next caption begins with a small letter.
CAPTIONS = [
    # Apostrophes.
    ("A man's dog isn't here, and it can't bark.", "a man 's dog is n't here and it ca n't bark"),
    (
        "They'll say I'm late; we've gone, she'd know, you're DON'T",
        "they 'll say i 'm late we 've gone she 'd know you 're do n't",
    ),
    ("wouldn't've shouldn't mustn't won't ain't", "would n't 've should n't must n't wo n't ai n't"),
    ("the boys' toys and the dogs'.", "the boys toys and the dogs"),
    ("he said 'hello there' to 'em", "he said hello there to 'em"),
    ("it’s a child’s “toy” that doesn’t work", "it 's a child 's toy that does n't work"),
    ("rock 'n' roll and rock'n'roll", "rock 'n' roll and rock 'n' roll"),
    ("'Tis the season, 'twas night, more'n enough", "'t is the season 't was night more 'n enough"),
    ("o'clock O'Brien ma'am y'all c'mon s'mores l'oreal d'art", "o'clock o'brien ma'am y' all c'mon s'mores l'oreal d'art"),
    ("a jack-o'-lantern for ol' Joe", "a jack-o lantern for ol' joe"),
    ("M&M's McDonald's Xi'an cap'n", "m&m 's mcdonald 's xi'an cap'n"),
    ("n't 's don`t isn‘t", "n't 's do n`t is n`t"),
    ("``quoted'' \"quoted\" 'q", "quoted quoted q"),
    ("I cannot wait, gonna go, wanna see, gotta run, lemme in", "i can not wait gon na go wan na see got ta run lem me in"),
    # Hyphens and dashes.
    ("a T-shirt, black-and-white, 5-year-old co-op - up-", "a t-shirt black-and-white 5-year-old co-op up"),
    ("well -- known --- here", "well known here"),
    ("em—dash en–dash ellipsis… dot·dot bullet •", "em dash en dash ellipsis dot · dot bullet •"),
    ("anti- and pro- war", "anti- and pro- war"),
    ("soft\xadhyphen non‑breaking a b", "softhyphen non‑breaking a b"),
    # Periods.
    ("the U.S. flag in Washington D.C. at night", "the u.s. flag in washington d.c. at night"),
    ("Mr. Smith and Dr. Who met Mrs. Jones on St. Mark's Rd.", "mr. smith and dr. who met mrs. jones on st. mark 's rd."),
    ("on Main St. and 5th Ave. near the Co. building etc.", "on main st. and 5th ave. near the co. building etc."),
    ("at 5 p.m. or 10 a.m. e.g. i.e. vs. Jr.", "at 5 p.m. or 10 a.m. e.g. i.e. vs. jr."),
    ("a bat., a ball.; and a glove.: here", "a bat. a ball. and a glove. here"),
    ("No. 5 is not no. and fig. 2", "no. 5 is not no and fig. 2"),
    ("end of one.The next one. Another", "end of one.the next one another"),
    ("it stops... and goes.... on..", "it stops and goes on"),
    ("a...b and wait...what", "a. b and wait what"),
    ("plan B. is good", "plan b. is good"),
    ("plan B. The rest", "plan b the rest"),
    ("What?! Really!! Yes! no?", "what ?! really !! yes no"),
    # Brackets stay, as words: the list of punctuation has them in capital letters.
    ("(top) [middle] {bottom} <a>", "-lrb- top -rrb- -lsb- middle -rsb- -lcb- bottom -rcb- <a>"),
    ('<br/> <unk> <a href="x y"> text </a>', '<br/> <unk> <a\xa0href="x\xa0y"> text </a>'),
    ("@user #tag :) ;-) :P <3", "@user #tag :-rrb- ;--rrb- :p < 3"),
    # Numbers, money, other signs.
    ("1,000 people, 10:30, 3.5 and .5 -5 +2", "1,000 people 10:30 3.5 and .5 -5 +2"),
    ("5 1/2 inches, 3/4 cup, 24/7, 12/25/2010", "5\xa01/2 inches 3/4 cup 24/7 12/25/2010"),
    ("$5.00, US$5, #1, 50%, R&B, AT&T, b&w, black & white", "$ 5.00 us$ 5 # 1 50 % r&b at&t b & w black & white"),
    ("1950's cars in the '90s, a 90s, 1960s-era '50 thing", "1950 's cars in the '90s a 90s 1960s-era '50 thing"),
    ("red/white/blue/green and/or w/ n/a ", "red/white/blue / green and/or w / n/a"),
    ("555-1234 and (555) 555-1234 or 1-800-555-1234", "555-1234 and -lrb-555-rrb-\xa0555-1234 or 1-800-555-1234"),
    ("5'10\" tall, 6\" long, 10'x12'", "5 10 tall 6 long 10 x12"),
    ("½ cup, 1½ cups, £5, €5, 5¢, ¥5, 20°", "1/2 cup 1 1/2 cups # 5 $ 5 5 cents ¥ 5 20 °"),
    ("a_b __init__ * ** a*b = + ~ | \\ ^", "a_b __ init __ * ** a * b = + ~ | \\ ^"),
    ("&amp; &lt;b&gt; A&amp;B &quot;x&quot; it&apos;s", "& < b > a&b x it 's"),
    ("C++ and C# photo.jpg 1.jpg", "c++ and c# photo.jpg 1.jpg"),
    ("john@foo.com www.foo.com http://www.foo.com/x?y. foo.com", "john@foo.com www.foo.com http://www.foo.com/x?y foo.com"),
    # Other scripts, and what is no token.
    ("café naïve jalapeño's 日本語 Москва", "café naïve jalapeño 's 日本語 москва"),
    ("emoji 😀 here a😀b", "emoji here a b"),
    ("", ""),
    (" . ", ""),
]


@pytest.mark.parametrize(("caption", "words"), CAPTIONS, ids=range(len(CAPTIONS)))
def test_the_words_of_a_caption(caption: str, words: str) -> None:
    assert tokenize([caption]) == [words]


def test_captions_do_not_touch_one_another() -> None:
    captions = [caption for caption, _ in CAPTIONS]
    apart = [text for caption in captions for text in (caption, "x")]
    assert tokenize(apart)[::2] == [words for _, words in CAPTIONS]


def test_a_letter_at_the_end_looks_at_the_next_caption() -> None:
    assert tokenize(["playing the Wii U.", "a man"]) == ["playing the wii u.", "a man"]
    assert tokenize(["playing the Wii U.", "A man"]) == ["playing the wii u", "a man"]
    assert tokenize(["playing the Wii U.", "Men"]) == ["playing the wii u.", "men"]
    assert tokenize(["on page No.", "5 men"]) == ["on page no.", "5 men"]


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", "\t", "\v", "\f", "\x85", "\u2028", "\u2029"])
def test_line_ends_within_a_caption_are_blanks(end: str) -> None:
    assert tokenize([f"a man{end}a dog.", "a cat"]) == ["a man a dog", "a cat"]


def test_long_captions_end_soon() -> None:
    """Rules that try every way to match would take for ever: the slowest of these takes 0.1 s."""
    for part in ("a.", "a-", "a'", "<a ", "<a b='", "1,", "1 ", "a@", "http://", "a.b-", "n't", "&amp;", "aei'"):
        tokenize([part * 500])


def of_fakecap() -> tuple[list[str], list[str]]:
    """The 1,000 results of coco-caption and all references, as they are and after PTBTokenizer."""
    folder = Path(os.environ["BLIP_REAL_DATA"]) / "caption_eval/fakecap"
    results, tokenized, others, tokenized_others = (
        json.loads((folder / f"{name}.json").read_text("utf-8"))
        for name in (
            "captions_val2014_fakecap_results",
            "results_after_tokenization",
            "captions_val2014_refs1000",
            "references_after_tokenization",
        )
    )
    references: dict[str, list[str]] = {str(image["id"]): [] for image in others["images"]}
    for each in others["annotations"]:
        references[str(each["image_id"])].append(each["caption"])
    captions = [each["caption"] for each in results] + [text for texts in references.values() for text in texts]
    words = [tokenized[str(each["image_id"])][0] for each in results]
    return captions, words + [text for image in references for text in tokenized_others[image]]


@pytest.mark.real_data
def test_the_captions_that_were_published_tokenized() -> None:
    captions, words = of_fakecap()
    assert len(captions) == 6_005
    assert tokenize(captions) == words


@pytest.mark.real_data
def test_splitting_at_blanks_is_not_enough() -> None:
    """What the test above would say of a plain reading."""
    captions, words = of_fakecap()
    plain = [caption.lower().replace(".", "").replace(",", "") for caption in captions]
    assert sum(" ".join(text.split()) != own for text, own in zip(plain, words, strict=True)) == 80


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("split", "sha256"),
    [
        ("test", "bcfe863b96dba04efc8ee162e9f1c0bde98b8c1f71c707fb5196ed23c60e1796"),
        ("val", "1153601b078a787e974a1c79643f11731b12557782abf456fe5a55a4f6672eec"),
    ],
)
def test_every_caption_of_karpathys_splits(split: str, sha256: str) -> None:
    """The digest of what PTBTokenizer itself made of them, one caption a line."""
    captions = read_annotations(Path(os.environ["BLIP_REAL_DATA"]) / f"annotations/coco_karpathy_{split}.json").captions
    assert len(captions) == 25_010
    assert hashlib.sha256("\n".join(tokenize(captions)).encode()).hexdigest() == sha256
