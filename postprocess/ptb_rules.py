"""What is one token: the rules of postprocess.ptb, found by comparing outputs with Stanford CoreNLP 3.4.1's PTBTokenizer.

The first group of a rule is the token. What a rule sees behind it counts for how far it reaches: of all rules that match at
a place the one that reaches farthest wins, of equals the first. Captions follow one another, a newline between them.

Beyond ASCII a character is a letter unless it is listed here; for scripts that Unicode took up after 2012 the lists do not
aim at equality.
"""

from __future__ import annotations

import re

# Code points that are tokens of their own, wherever they stand between words.
SYMBOLS = (
    "a1-a3 a5-a9 ac ae-b4 b6-b9 bc-bf d7 f7 37e 387 589 5be 5c0 5c3 5c6 5f3-5f4 600-603 606-60c 614 61b 61e-61f 66a 66d 6d4 "
    "700-70d 7f6-7f8 964-965 e3f e4f 1fbd 2016-2017 201a 201e-2023 2030-2038 203b 203e-2042 2044 2070 2074-207e 2080-208e 20a4 "
    "2100-2101 2103-2106 2108-2109 2114 2116-2118 211e-2123 2125 2127 2129 212e 213a-213b 2140-2144 214a-214d 214f 2153-215e "
    "2190-2bff 3001-3002 3012 30fb ff01-ff0f ff1a-ff20 ff3b-ff40 ff5b-ff65 ffe0-ffe1 ffe5-ffe6"
)
# Blanks, quotation marks, dashes, currencies, numerals, characters for private use, pictographs: no letters either.
NEITHER = "7f-a0 a4 ab bb 2000-206f 20a0-20cf 2150-218f 2e00-2e7f d800-f8ff fe00-fe0f fff0-ffff 10000-10ffff"


def _members(code_points: str) -> str:
    """The inside of a character class."""
    ends = [[int(end, 16) for end in part.split("-")] for part in code_points.split()]
    return "".join(f"\\U{end[0]:08x}-\\U{end[-1]:08x}" for end in ends)


LETTER = rf"[^\x00-@\[-`{{-~{_members(SYMBOLS)}{_members(NEITHER)}]"
LETTERS = rf"(?:{LETTER}|\d)*"
ASCII = r"[A-Za-z0-9]"
APOSTROPHE = r"(?:['’]|&apos;)"  # begins 's; no other sign does
CURLED = "“”‘’‛«»‹›\x91\x92\x93\x94"
ANY_QUOTE = r"(?:['’`‘‛]|&apos;)"  # may stand inside of o'clock and n't
WORD = rf"{LETTER}{LETTERS}(?:[.!?]{LETTER}{LETTERS})*"  # "end.The" is one
CLITIC = rf"{APOSTROPHE}(?i:[smd]|re|ve|ll)"
NOT = rf"[nN]{ANY_QUOTE}[tT]"
ELIDED = rf"[dDoOlL]{ANY_QUOTE}"  # d'art, o'clock, l'orange
COMPOUND = rf"(?:{ELIDED}{LETTER}{LETTER}|{LETTER}|\d){LETTERS}(?:[-_\u2010\u2011](?:{ELIDED}{LETTER})?(?:{LETTER}|\d)+)*"
INITIALS = r"[A-Za-z](?:\.[A-Za-z])+"
TAG_NAME = r"[A-Za-z][A-Za-z0-9:._-]*"
QUOTED = r"""(?:'[^'\n]*'|"[^"\n]*")"""


def _any(words: str) -> str:
    """One of the words, in small or capital letters."""
    return f"(?i:{'|'.join(words.split())})"


def _any_capital(words: str) -> str:
    """One of the words, the first letter a capital."""
    return "|".join(f"{word[0]}(?i:{word[1:]})" for word in words.split())


# Shortened words that keep their period. Those of the second kind keep it even before a letter or two: "st.x".
TITLES = _any(
    "adj adm adv alex asst atty ave brig capt cf cie cmdr col cpl dept det dr drs elec ens ft gen gov govs hon insp invt jos "
    "lt maj messrs mlle mme mr mrs ms msgr mt natl pfc ph prof pres pvt rep reps rev sen sens sfc sgt spc st ste supt vs wm wyo"
)
SHORTENED = "|".join(
    [
        _any(
            "al ala apr ariz assn aug bhd bldg blvd bros calif co colo conn corp cos ct dak dec esq est etc ext feb fla fri ga "
            "inc ind intl jan jr jul jun kan kans ky ltd mar md mich minn mo mon mont neb nev nov oct okla penn plc rd rt sep "
            "sept seq sq sr sys tel tenn thu thurs tue tues univ va vt wed wis wisc"
        ),
        _any_capital("Ark Az Del Ill La Mass Miss Ore Pa Tex Wash"),
        r"(?i:ph\.d|ed\.d)|[Mm]fg|[Mm]tg|[Pp]?[Pp]tes?|[Pp]?[Pp]tys?",
    ]
)
FILE_ENDS = _any(
    "bat bmp c class cgi cpp dll doc docx exe gif gz h htm html jar java jpeg jpg mov mp3 pdf php pl png ppt ps py sql tar txt "
    "wav x xml zip"
)
BEFORE_NUMBERS = _any("art ca fig figs no nos op pp prop")  # "no. 5", but "no."
# After these a period that follows one letter ends the sentence.
SENTENCE_STARTS = _any_capital(
    r"About According Additionally After A An As At But Earlier Here Her However He If In It Last Many More Mr\. Ms\. Now Once "
    r"One Other Our She Since So Some Such That There These They The Their Then This We What When While Yet You"
)
TWO_WORDS = (("can", "not"), ("gon", "na"), ("got", "ta"), ("lem", "me"), ("gim", "me"), ("wan", "na"))
# Words with an apostrophe of their own.
WITH_APOSTROPHE = (
    rf"{APOSTROPHE}[nN]{APOSTROPHE}?",
    rf"[lLdDjJ]{APOSTROPHE}",
    rf"(?i:dunkin|somethin|ol){APOSTROPHE}",
    rf"{APOSTROPHE}(?i:em|till?|cause)",
    rf"{APOSTROPHE}[2-9]0[sS]",
    rf"[A-HJ-XZn]{ANY_QUOTE}{LETTER}{LETTER}+",
    rf"{LETTER}+[aeiouyAEIOUY]{ANY_QUOTE}[aeiouA-Z]{LETTER}*",
    "(?i:e'er|c'mon|c'est|s'mores|cap'n|ev'ry|li'l|nat'l|nor'easter|o'o)",
)
TAG = rf"</?{TAG_NAME}(?: +(?:{TAG_NAME} *= *{QUOTED}|{TAG_NAME}|{QUOTED}| */))*[ ]*/?>|<[!?][A-Za-z-][^>\n]*>"
CAPITALS = r"[A-Z]+(?:(?:&(?i:amp);|\+|&)[A-Z]+)+"  # AT&T
ENTITY = "&(?i:amp|lt|gt|quot|apos|nbsp|[mn]dash);"
OUTSIDE = r' \n"<>|(){}'  # in no address
PATH = rf'(?:/[^ \n"<>|()]+[^{OUTSIDE}.!?,-])?'
HOST = r"(?:[^ \n\"`'|!(){}$,-_]+\.)+"  # small letters and some signs; the range from , to _ holds digits and capitals
SPAN = r"[- \xa0]"  # between the parts of a telephone number

RULES = tuple(
    re.compile(pattern)
    for pattern in [
        # Halves of what is written as one word; the other half follows as a token of its own.
        *(rf"((?i:{first}))(?i:{second})" for first, second in TWO_WORDS),
        r"('[tT])(?i:is|was)",
        rf"([mM]ore){APOSTROPHE}n",
        rf"({WORD}){CLITIC}",
        rf"([A-Za-z]*[A-MO-Za-mo-z]){NOT}",
        rf"({TAG})",
        rf"({WORD})",
        *(rf"({form})" for form in WITH_APOSTROPHE),
        rf"([yY]{APOSTROPHE}){LETTER}",
        rf"((?i:https?)://[^{OUTSIDE}]+[^{OUTSIDE}.!?,-])",
        rf"((?i:www)\.(?:[^{OUTSIDE}.!?,]+\.)+[a-zA-Z]{{2,4}}{PATH})",
        rf"({HOST}(?:com|net|org|edu){PATH})",
        rf"((?:<|&lt;)?{ASCII}[^{OUTSIDE}\xa0]*@(?:[^{OUTSIDE}.\xa0]+\.)*[^{OUTSIDE}.\xa0]+(?:>|&gt;)?)",
        rf"(@[A-Za-z_][A-Za-z_0-9]*|#{LETTER}+)",
        rf"({CLITIC})[^A-Za-z]",
        rf"((?!'){CLITIC})",
        rf"({NOT})[^A-Za-z]",
        # Numbers.
        r"(\d{1,2}[-/]\d{1,2}[-/]\d{2,4})",
        r"([-+]?(?:\d*(?:[.:,]\d+)+|\d+))",
        r"((?:\d{1,4}[- \xa0])?\d{1,4}(?:\\?/|\u2044)\d{1,4})",
        # Words with hyphens, and capitals or words joined by other signs.
        rf"({COMPOUND})",
        rf"({CAPITALS})",
        rf"({ASCII}+(?:-[A-Za-z]+){{0,2}}(?:\\?/{ASCII}+(?:-[A-Za-z]+){{0,2}}){{1,2}})",
        r"((?i:anti|pro)-)",
        r"(-(?i:[lr][rcs]b)-|[cC]\+\+|[cC]#|[fF]#)",
        r"([A-Z]*\$|#)",
        # Periods that stay.
        rf"({TITLES}\.)",
        rf"((?:{SHORTENED})\.)[\s\S]{{2}}",
        rf"((?:{SHORTENED})\.)",
        rf"({BEFORE_NUMBERS}\.)\s?\d",
        rf"((?:{INITIALS}|[A-Za-z])\.)",
        rf"((?:{LETTER}|\d){LETTERS}(?:\.(?:{LETTER}|\d){LETTERS})*\.{FILE_ENDS})[\s.?!,]",
        rf"([A-Za-z])\.\s+(?:(?:{SENTENCE_STARTS})|{TAG})\s",
        rf"((?:{WORD}|{COMPOUND})\.)[,;:]",
        rf"({APOSTROPHE}\d\d)\s",
        rf"((?:\(\d{{2,3}}\)[ \xa0]?|(?:\+\+?)?(?:\d{{2,4}}{SPAN})?\d{{2,4}}{SPAN})\d{{3,4}}{SPAN}?\d{{3,5}})",
        rf"({ASCII}[A-Za-z0-9.,]*(?:-(?:{INITIALS}\.|{ASCII}+))+)",
        # Signs.
        rf"('){LETTER}[^ \n]",  # begins a quotation
        r"([<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]])[^A-Za-z0-9]",
        r"([-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][-_.]?[-^x=~<>']\))",
        r"(-----+|---?|_+|\.{3,5}|[?!]+|''|``|\*+|(?:\\\*){1,3}|##+|@@+|<<|>>)",
        rf"(&#\d+;|{ENTITY})",
        rf"([{CURLED}]{{2,}})",
        r"(.)",
    ]
)
# Where a token may go on behind a blank, so that a caption cannot be read piece by piece.
ACROSS_BLANKS = re.compile(r"<|\d[ \xa0]\(?\d|\)[ \xa0]?\d")
# Pieces whose last period depends on what follows.
OPEN_END = re.compile(rf"(?:^|[^A-Za-z])(?:[A-Za-z]|{BEFORE_NUMBERS})\.\s*$")
SYMBOL = f"[{_members(SYMBOLS)}]"
