"""The miniature's world: about a thousand words, and a grammar that makes English sentences of them.

Two kinds of sentences: of the grammar, and word salad, in which every word meets every other. The grammar alone would
teach a model phrases; the salad teaches it words, so that it can say texts that no rule made.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random

_NOUNS = """
dog cat bird horse fish child boy girl man woman teacher doctor farmer king queen friend tree flower river lake mountain
garden house door window table chair book letter song story voice machine computer car train boat ship road bridge city
village market school kitchen apple orange cake egg stone star moon sun cloud wind storm shadow word number question
answer picture picnic jacket mother father brother sister baby family uncle aunt neighbor student writer singer driver
captain soldier baker artist nurse guest stranger hero mouse cow sheep pig duck chicken rabbit bear lion tiger monkey
snake frog bee spider elephant wolf fox animal leg arm hand foot head face eye ear nose mouth tooth hair heart finger
shoulder body hat coat shirt shoe dress glove pocket button bag box bottle cup glass plate spoon fork knife bowl basket
lamp candle clock mirror bed blanket pillow sofa shelf wall floor roof stair room building tower castle church hotel
shop office factory station airport hospital library museum theater park field farm forest island beach sea ocean
desert valley hill cave path street corner square map ticket wheel engine plane bus truck bicycle key lock rope hammer
nail tool wire paper pen pencil page line letterbox newspaper radio television phone camera screen button robot game
ball toy doll kite drum piano guitar bell flag gift present ring coin dollar prize party dance holiday journey trip
lesson class test problem idea plan dream secret promise mistake reason rule law war peace job name sound noise light
color circle shape side end middle top bottom part piece group pair place world country town state
river morning evening afternoon night day week month year hour minute second moment time winter summer spring autumn
potato tomato carrot onion banana lemon grape cherry nut sandwich pizza meal breakfast lunch dinner leaf seed root
branch bush grass rock wave drop
""".split()
_MASS = """
water milk coffee tea bread butter cheese sugar salt rice soup meat honey fruit juice fire smoke snow rain ice sand
gold silver iron wood money music work help love news air
""".split()
_PLURALS = {
    "child": "children", "man": "men", "woman": "women", "person": "people", "mouse": "mice", "foot": "feet",
    "tooth": "teeth", "leaf": "leaves", "knife": "knives", "shelf": "shelves", "wolf": "wolves", "fish": "fish",
    "sheep": "sheep",
}  # fmt: skip
# base, third person, past, and -ing form where the rules of `_forms` do not make it
_TRANSITIVE = """
like see/sees/saw/seeing find/finds/found/finding take/takes/took/taking bring/brings/brought/bringing
buy/buys/bought/buying sell/sells/sold/selling make/makes/made/making paint open close read/reads/read/reading
write/writes/wrote/writing hear/hears/heard/hearing follow watch love need want keep/keeps/kept/keeping
hold/holds/held/holding carry/carries/carried/carrying know/knows/knew/knowing
eat/eats/ate/eating drink/drinks/drank/drinking cook clean wash build/builds/built/building break/breaks/broke/breaking
cut/cuts/cut/cutting draw/draws/drew/drawing show lose/loses/lost/losing win/wins/won/winning give/gives/gave/giving
send/sends/sent/sending catch/catches/caught/catching throw/throws/threw/throwing push pull touch
visit remember forget/forgets/forgot/forgetting learn teach/teaches/taught/teaching
help ask call count choose/chooses/chose/choosing change drive/drives/drove/driving ride/rides/rode/riding fix move
hide/hides/hid/hiding save share use
""".split()
_INTRANSITIVE = """
sing/sings/sang/singing walk run/runs/ran/running jump swim/swims/swam/swimming fly/flies/flew/flying
sleep/sleeps/slept/sleeping dance play work wait laugh speak/speaks/spoke/speaking listen stay smile
cry/cries/cried/crying
talk sit/sits/sat/sitting stand/stands/stood/standing fall/falls/fell/falling grow/grows/grew/growing
come/comes/came/coming go/goes/went/going leave/leaves/left/leaving arrive return rest travel live die/dies/died/dying
""".split()
_ADJECTIVES = """
small big red green blue yellow black white old young new happy sad quiet loud warm cold dry wet fast slow good bad long
short strong soft dark bright heavy round brown gray pink purple golden clean dirty empty full open closed rich poor
kind brave clever lazy tired hungry thirsty angry afraid careful busy free famous funny strange simple easy hard
difficult important beautiful pretty ugly tall low high deep wide narrow thin thick flat sharp sweet sour bitter fresh
hot cool light broken perfect wonderful terrible gentle wild wise silent tiny huge little great
lovely friendly local modern ancient wooden
""".split()
_COMPARATIVES = """
bigger smaller older younger better worse longer shorter faster slower stronger taller warmer colder happier cheaper
""".split()
_ADVERBS = """
today tomorrow yesterday now again slowly quickly quietly together here there always often early late soon never
sometimes outside inside away back home alone carefully happily everywhere tonight already once twice
""".split()
_PREPOSITIONS = (
    "in on under near behind over by with for from at across through around beside between before after without".split()
)
_MODALS = "can will must should could would may".split()
_WEATHER = "sunny cloudy windy rainy snowy warm cold dry wet dark bright hot cool".split()
_DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
_MONTHS = "january february march april june july august september october november december".split()
_SMALL = """
one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen
""".split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_LARGE = "hundred thousand million".split()
_ORDINALS = "first second third fourth fifth last next".split()
_DETERMINERS = "the a this that my your his her our their every another each".split()
_PLURAL_DETERMINERS = "the these those my your his her our their some many few all both several most".split()
_PRONOUNS = "i you we they".split()
_SINGULAR_PRONOUNS = "he she it everyone someone nobody".split()
_OBJECTS = "me you him her it us them everything something nothing anything".split()
_LINKS = "and but because when while if before after so until".split()
_GREETINGS = "hello welcome goodbye yes no please thanks sorry".split()
_OTHER = """
and but because when where who what why how which whose is are was were be been am has have had do does did done very
too so all some any many much more most less than only then to of at as there not or if until since about into onto up
down out off thank good day say says said think thinks thought feel feels felt hope tell tells told look looks looked
let us try tried start started stop stopped still just also even almost maybe really ever own same other
their them him her its myself yourself person people against along above below behind among during left right zero
half both either enough well quite
an sky weather wrong quick understand understands understood meet meets met put puts turn turns turned begin begins
began best worst seen gone taken given written favorite different umbrella gate knight future south north east west
dozen indeed plus minus midnight noon grandmother grandfather places strangers smell mine yours yet ago later hours
days minutes months weeks years shoes cows pigs chickens robots machines miniature speech language
""".split()


def _plural(noun: str) -> str:
    if noun in _PLURALS:
        return _PLURALS[noun]
    if re.search(r"(s|x|ch|sh|ss|z|tato|mato|hero)$", noun):
        return noun + "es"
    if re.search(r"[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + "s"


def _forms(verb: str) -> tuple[str, ...]:
    if "/" in verb:
        return tuple(verb.split("/"))
    stem = verb.removesuffix("e")
    third = verb + ("es" if re.search(r"(s|x|ch|sh)$", verb) else "s")
    return (verb, third, stem + "ed" if verb != "stop" else "stopped", stem + "ing")


NOUNS = list(dict.fromkeys(_NOUNS))
#: Plurals are of the first nouns only, which keeps the vocabulary at about a thousand words.
PLURALS = [_plural(noun) for noun in NOUNS[:75]]
TRANSITIVE = [_forms(verb) for verb in _TRANSITIVE]
INTRANSITIVE = [_forms(verb) for verb in _INTRANSITIVE]
WORDS = sorted(
    {
        *NOUNS, *PLURALS, *_MASS, *_ADJECTIVES, *_COMPARATIVES, *_ADVERBS, *_PREPOSITIONS, *_MODALS, *_WEATHER, *_DAYS,
        *_MONTHS, *_SMALL, *_TENS, *_LARGE, *_ORDINALS, *_DETERMINERS, *_PLURAL_DETERMINERS, *_PRONOUNS,
        *_SINGULAR_PRONOUNS, *_OBJECTS, *_LINKS, *_GREETINGS, *_OTHER,
        *(form for verb in TRANSITIVE + INTRANSITIVE for form in verb),
    }
)  # fmt: skip


def sentence(random: Random, salad: float = 0.4) -> str:
    """One sentence in lower case with its punctuation.

    Args:
        random: what chooses.
        salad: the share of sentences that are words in any order.
    """
    return _salad(random) if random.random() < salad else _grammatical(random)


def _salad(r: Random) -> str:
    words = [r.choice(WORDS) for _ in range(r.choice((1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 8, 9, 10)))]
    if len(words) > 4 and r.random() < 0.2:
        words[len(words) // 2] += ","
    return " ".join(words) + r.choice("....?!")


def _grammatical(r: Random) -> str:
    kind = r.random()
    if kind < 0.42:
        return _clause(r) + "."
    if kind < 0.58:
        comma = r.choice((",", ""))
        return f"{_clause(r, short=True)}{comma} {r.choice(_LINKS)} {_clause(r, short=True)}."
    if kind < 0.66:
        link = r.choice(("when", "if", "before", "after", "while"))
        return f"{link} {_clause(r, short=True)}, {_clause(r, short=True)}."
    if kind < 0.80:
        return _question(r) + "?"
    if kind < 0.88:
        return _command(r) + r.choice("..!")
    if kind < 0.95:
        return _remark(r) + "."
    return _greeting(r) + r.choice(".!")


def _clause(r: Random, short: bool = False) -> str:
    singular, subject = _subject(r)
    tail = "" if short or r.random() < 0.5 else " " + _tail(r)
    kind = r.randrange(9)
    if kind < 3:
        verb = r.choice(TRANSITIVE)
        return f"{subject} {verb[r.choice((1 if singular else 0, 2))]} {_object(r)}{tail}"
    if kind == 3:
        verb = r.choice(INTRANSITIVE)
        return f"{subject} {verb[r.choice((1 if singular else 0, 2))]} {_tail(r)}"
    if kind == 4:
        verb = r.choice(TRANSITIVE)
        return f"{subject} {r.choice(_MODALS)} {r.choice(('', '', 'not ', 'always '))}{verb[0]} {_object(r)}{tail}"
    if kind == 5:
        verb = r.choice(TRANSITIVE + INTRANSITIVE)
        be = _be(r, subject, singular)
        extent = r.choice(("", "", "not ", "still "))
        return f"{subject} {be} {extent}{verb[3]}{' ' + _object(r) if verb in TRANSITIVE else ''}{tail}"
    if kind == 6:
        be = _be(r, subject, singular)
        return f"{subject} {be} {r.choice(('', '', 'very ', 'not ', 'too ', 'so '))}{r.choice(_ADJECTIVES)}{tail}"
    if kind == 7:
        be = _be(r, subject, singular)
        return f"{subject} {be} {r.choice(_COMPARATIVES)} than {_object(r)}"
    verb = r.choice(TRANSITIVE)
    wish = r.choice(
        (("want", "wants", "wanted"), ("need", "needs", "needed"), ("try", "tries", "tried"), ("have", "has", "had"))
    )
    wished = "tried" if wish[0] == "try" else wish[r.choice((1 if singular else 0, 2))]
    return f"{subject} {wished} to {verb[0]} {_object(r)}{tail}"


def _be(r: Random, subject: str, singular: bool) -> str:
    if subject == "i":
        return r.choice(("am", "was"))
    return r.choice(("is", "was") if singular else ("are", "were"))


def _subject(r: Random) -> tuple[bool, str]:
    kind = r.random()
    if kind < 0.18:
        return False, r.choice(_PRONOUNS)
    if kind < 0.30:
        return True, r.choice(_SINGULAR_PRONOUNS)
    if kind < 0.36:
        return False, f"{_noun_phrase(r)} and {_noun_phrase(r)}"
    if kind < 0.44:
        return True, f"the {r.choice(NOUNS)} {r.choice(('of', 'in', 'near', 'with'))} {_noun_phrase(r)}"
    if kind < 0.62:
        return False, _plural_phrase(r)
    return True, _noun_phrase(r)


def _noun_phrase(r: Random) -> str:
    kind = r.random()
    determiner = r.choice(_DETERMINERS)
    if kind < 0.35:
        noun = f"{r.choice(_ADJECTIVES)} {r.choice(NOUNS)}"
    elif kind < 0.43:
        noun = f"{r.choice(_ADJECTIVES)} {r.choice(_ADJECTIVES)} {r.choice(NOUNS)}"
    elif kind < 0.48:
        determiner, noun = "the", f"{r.choice(_ORDINALS)} {r.choice(NOUNS)}"
    elif kind < 0.56:
        determiner, noun = r.choice(("the", "some", "my", "this")), r.choice(_MASS)
    else:
        noun = r.choice(NOUNS)
    if determiner == "a" and noun[0] in "aeiou":
        determiner = "an"
    return f"{determiner} {noun}"


def _plural_phrase(r: Random) -> str:
    count = r.choice((r.choice(_PLURAL_DETERMINERS), _number(r)))
    count = "two" if count == "one" else count
    return f"{count} {r.choice(_ADJECTIVES) + ' ' if r.random() < 0.4 else ''}{r.choice(PLURALS)}"


def _number(r: Random) -> str:
    kind = r.random()
    if kind < 0.6:
        return r.choice(_SMALL + _TENS)
    if kind < 0.8:
        return f"{r.choice(_TENS)} {r.choice(_SMALL[:9])}"
    return f"{r.choice(_SMALL[:9])} {r.choice(_LARGE)}"


def _object(r: Random) -> str:
    kind = r.random()
    if kind < 0.15:
        return r.choice(_OBJECTS)
    if kind < 0.35:
        return _plural_phrase(r)
    if kind < 0.43:
        verb = r.choice(TRANSITIVE)
        return f"the {r.choice(NOUNS)} that {r.choice(_PRONOUNS)} {r.choice((verb[0], verb[2]))}"
    return _noun_phrase(r)


def _tail(r: Random) -> str:
    kind = r.random()
    if kind < 0.4:
        return r.choice(_ADVERBS)
    if kind < 0.8:
        return f"{r.choice(_PREPOSITIONS)} {_noun_phrase(r)}"
    if kind < 0.9:
        return f"on {r.choice(_DAYS)}" if r.random() < 0.6 else f"in {r.choice(_MONTHS)}"
    when = f"{r.choice(('in', 'before', 'after', 'every'))} {r.choice(('the ', ''))}"
    return when + r.choice(("morning", "evening", "night", "winter", "summer", "day", "lunch"))


def _question(r: Random) -> str:
    kind = r.randrange(6)
    verb = r.choice(TRANSITIVE)
    singular, subject = _subject(r)
    if kind == 0:
        return f"where {_be(r, subject, singular)} {subject}"
    if kind == 1:
        asked = r.choice(("what", "who", "how", "why", "when", "where"))
        return f"{asked} {r.choice(('did', *_MODALS))} {subject} {verb[0]} {_object(r)}"
    if kind == 2:
        return f"{r.choice((('does' if singular else 'do'), 'did', *_MODALS))} {subject} {verb[0]} {_object(r)}"
    if kind == 3:
        return f"how many {r.choice(PLURALS)} {r.choice(('do', 'did', 'can', 'will'))} {subject} {verb[0]}"
    if kind == 4:
        return f"{_be(r, subject, singular)} {subject} {r.choice(_ADJECTIVES)}"
    return (
        f"what is {r.choice(('the name of', 'the color of', 'in', 'under', 'behind', 'wrong with'))} {_noun_phrase(r)}"
    )


def _command(r: Random) -> str:
    verb = r.choice(TRANSITIVE)
    start = r.choice(("", "", "please ", "do not ", "never ", "let us "))
    return f"{start}{verb[0]} {_object(r)}{' ' + _tail(r) if r.random() < 0.5 else ''}"


def _remark(r: Random) -> str:
    kind = r.randrange(5)
    if kind == 0:
        return f"the weather is {r.choice(_WEATHER)} and {r.choice(_WEATHER)} {r.choice(_ADVERBS[:4])}"
    if kind == 1:
        return f"there {r.choice(('are', 'were'))} {_plural_phrase(r)} {r.choice(_PREPOSITIONS)} {_noun_phrase(r)}"
    if kind == 2:
        return f"there {r.choice(('is', 'was'))} {_noun_phrase(r)} {r.choice(_PREPOSITIONS)} {_noun_phrase(r)}"
    if kind == 3:
        start = r.choice(("i think", "she said", "we know", "they hope", "he told me", "you said"))
        return f"{start} that {_clause(r, short=True)}"
    return f"{_number(r)} and {_number(r)} {r.choice(('is', 'are'))} {_number(r)}"


def _greeting(r: Random) -> str:
    kind = r.randrange(4)
    if kind == 0:
        start = f"{r.choice(_GREETINGS)} {r.choice(('my', 'our', 'my', 'to our', 'to the'))}"
        return f"{start} {r.choice(_ADJECTIVES)} {r.choice(NOUNS)}"
    if kind == 1:
        return f"{r.choice(_GREETINGS)}, {_clause(r, short=True)}"
    if kind == 2:
        time = r.choice(("morning", "evening", "night", "afternoon", "day"))
        return f"good {time}, {r.choice(('my friend', 'everyone', 'world', 'neighbor'))}"
    return f"thank you for {_noun_phrase(r)}"


def unknown(text: str, words: Sequence[str] = WORDS) -> list[str]:
    """The words of a text that are not in this world."""
    return sorted(set(re.findall(r"[a-z]+", text.lower())) - set(words))
