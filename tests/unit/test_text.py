"""Text as sentences: nothing that can be said is lost, each can be said at once, and bits give what the whole gives."""

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from neuron_xtts.narration.text import PARAGRAPH_PAUSE, SENTENCE_PAUSE, Incoming, Reader, cut, known_language, sayable

# Two sentences or more of each, with what is no end of one.
TEXTS = {
    "en": ["Mr. Smith paid $3.50 at 5 p.m. today.", "He left.", '"Where to?" she asked.', "Go to www.example.com."],
    "de": ["Dr. Meier kommt z. B. am 3. Mai um 10.30 Uhr.", "Wir warten.", "Das ist gut!"],
    "fr": ["M. Dupont et Mme. Roux sont là.", "M. Dupont est arrivé à 10 h.", "Il pleut… encore.", "Pourquoi ?"],
    "es": ["El Sr. Pérez llegó tarde.", "¿Por qué?", "No lo sé."],
    "pt": ["O carro custa 3.500 euros.", "É caro.", "Vamos embora!"],
    "it": ["Il Sig. Rossi dorme.", "Oggi piove molto.", "Domani no.", "Che bello!"],
    "pl": ["To jest zdanie.", "Czy rozumiesz?", "Tak, oczywiście."],
    "tr": ["Bugün hava güzel.", "Nasılsın?", "Ben iyiyim."],  # noqa: RUF001
    "ru": ["Это первое предложение.", "А это второе!", "Почему?"],  # noqa: RUF001
    "nl": ["Dit is een zin.", "En dit ook.", "Waarom niet?"],
    "cs": ["Toto je věta.", "Rozumíte?", "Ano, jistě."],
    "ar": ["هذه جملة أولى.", "هل تفهم؟", "نعم."],
    "hu": ["Ez egy mondat.", "Érted?", "Igen, persze."],
    "hi": ["यह एक वाक्य है।", "क्या आप समझे?", "हाँ।"],
}  # fmt: skip
WORDS = [
    "the", "dog", "Mr.", "3.5", "e.g.", "ran", "off.", "Why?", '"Yes!"', "no…", "well,", "so;", "***", "—", "café",
    "Dr.", '"Yes,"', "she", "said.", "(no)", "U.S.", "etc.", "a" * 300, "1", "[1]", "[note", "No.", "5", "p.m.",
]  # fmt: skip
BREAKS = ["\n", "\n\n", "\r\n\r\n"]


@pytest.fixture(scope="module")
def reader(tts_original):
    return Reader(tts_original, "en")


@pytest.fixture(scope="module")
def readers(tts_original):
    return Readers((language, Reader(tts_original, language)) for language in TEXTS)


class Readers(dict):
    """hypothesis writes what a test is given, and a model is long."""

    def __repr__(self):
        return "readers"


def letters(text):
    return [character for character in text if character.isalnum()]


def fits(reader, sentence):
    assert len(sentence.text) <= 250
    assert reader.tokens(sentence.text) < 402
    assert sayable(sentence.text)
    assert sentence.text == sentence.text.strip()


@settings(deadline=None, max_examples=50)
@given(words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=120), gaps=st.data())
def test_nothing_is_lost(reader, words, gaps):
    spaces = [gaps.draw(st.sampled_from([" ", "\n", "  ", "\n\n", "\r\n", "\r\n\r\n"])) for _ in words]
    text = "one " + "".join(word + space for word, space in zip(words, spaces, strict=True))
    sentences = reader.read(text)
    assert letters("".join(sentence.text for sentence in sentences)) == letters(text)
    for sentence in sentences:
        fits(reader, sentence)


@settings(deadline=None, max_examples=50)
@given(text=st.text(max_size=400))
@example("a(b[c*d+e?f\\")
@example("[pause")
@example("a\u0000b\ud7ff" + "x" * 300)
def test_any_text(reader, text):
    """Whatever is typed gives sentences that keep every letter, or an error that says why."""
    try:
        sentences = reader.read(text)
    except ValueError as error:
        assert "is no pause" in str(error) or not sayable(text)  # noqa: PT017
        return
    if "pause" not in text:
        assert letters("".join(sentence.text for sentence in sentences)) == letters(text)
    for sentence in sentences:
        fits(reader, sentence)


@pytest.mark.parametrize("language", TEXTS)
def test_languages(tts_original, language):
    """One sentence each, at once and a letter at a time."""
    reader, expected = Reader(tts_original, language), TEXTS[language]
    text = " ".join(expected)
    assert [sentence.text for sentence in reader.read(text)] == expected
    incoming = Incoming(reader)
    found = [sentence for letter in text for sentence in incoming.more(letter)]
    assert found  # before all of it is there
    found += incoming.rest()
    assert [sentence.text for sentence in found] == expected


@settings(deadline=None, max_examples=50)
@given(cuts=st.sets(st.integers(1, 400)), which=st.sampled_from(["en", "de", "fr", "ru"]))
def test_bits(readers, cuts, which):
    """Sentences, and the pauses between them, are those of the whole, however it comes."""
    reader = readers[which]
    some = " ".join(TEXTS[which])
    text = f"{some}\n\n{some} [pause:1.5] {some}"
    bounds = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    incoming = Incoming(reader)
    found = []
    for start, end in itertools.pairwise(bounds):
        found += incoming.more(text[start:end])
    found += incoming.rest()
    assert found == reader.read(text)
    assert len(found) == 3 * len(TEXTS[which])


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(words=st.lists(st.sampled_from(WORDS + BREAKS), max_size=40), cuts=st.sets(st.integers(1, 400)))
def test_bits_of_anything(reader, words, cuts):
    text = " ".join(words)
    bounds = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    incoming, whole = Incoming(reader), Incoming(reader)
    found = []
    for start, end in itertools.pairwise(bounds):
        found += incoming.more(text[start:end])
    assert [*found, *incoming.rest()] == [*whole.more(text), *whole.rest()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It costs 3.50 now. Yes.", ["It costs 3.50 now.", "Yes."]),
        ('"Come in," she said. "Sit."', ['"Come in," she said.', '"Sit."']),
        ("A title\r\n\r\nA text.", ["A title", "A text."]),
        ("One. *** Two.", ["One.", "*** Two."]),
    ],
)
def test_sentences(reader, text, expected):
    assert [sentence.text for sentence in reader.read(text)] == expected


def test_what_is_over_is_told_at_once(reader):
    incoming = Incoming(reader)
    assert incoming.more("Hello the") == []
    assert incoming.more("re.") == []  # "re.5" might follow
    assert [sentence.text for sentence in incoming.more(" ")] == ["Hello there."]
    assert incoming.more("It costs 3.") == []
    assert [sentence.text for sentence in incoming.more("50 today.\n\n")] == ["It costs 3.50 today."]
    assert incoming.rest() == []


def test_pauses(reader):
    sentences = reader.read(
        "[pause:2] One. Two.\n\nThree. [pause: 0.5s][PAUSE:0.25] Four.\n\n[pause:3] Five. [pause:1]"
    )
    assert [sentence.before for sentence in sentences] == [2, SENTENCE_PAUSE, PARAGRAPH_PAUSE, 0.75, 3]
    assert [sentence.after for sentence in sentences] == [0, 0, 0, 0, 1]
    assert [sentence.text for sentence in sentences] == ["One.", "Two.", "Three.", "Four.", "Five."]
    for wrong in ("[pause]", "[pause:]", "[pause:31]", "[pause:-1]", "[pause:soon]"):
        with pytest.raises(ValueError, match="is no pause; expected seconds"):
            reader.read(f"One. {wrong} Two.")
    assert len(reader.read("The [pauses] are [pausing].")) == 1  # words


def test_book(reader):
    """Lines that are wrapped, of whatever system, are no ends of sentences."""
    wrapped = "It was the best\nof times, it was\nthe worst of times.\nThen it rained.\n\n  * * *\n\nChapter 2"
    expected = ["It was the best of times, it was the worst of times.", "Then it rained.", "Chapter 2"]
    for text in (wrapped, wrapped.replace("\n", "\r\n")):
        sentences = reader.read(text)
        assert [sentence.text for sentence in sentences] == expected
        assert [sentence.before for sentence in sentences] == [0, SENTENCE_PAUSE, PARAGRAPH_PAUSE]


def test_what_cannot_be_seen_is_not_said(reader):
    found = reader.read("\ufeffHel\u00adlo\u200b there.\u2060 \u200b Good day.")
    assert [sentence.text for sentence in found] == ["Hello there.", "Good day."]


@pytest.mark.parametrize("text", ["", "   ", "\n\n", "* * *", "...", "\u200b", "[pause:1]"])
def test_nothing_to_say(reader, text):
    with pytest.raises(ValueError, match=r"There is nothing to say in .*; expected words or numbers"):
        reader.read(text)


def test_long_text_without_punctuation(reader):
    """Between words; a word that is longer than anything, anywhere."""
    words = "and so it went on " * 200
    pieces = reader.read(words)
    assert " ".join(piece.text for piece in pieces).split() == words.split()
    assert max(len(piece.text) for piece in pieces) <= 250
    assert min(len(piece.text) for piece in pieces[:-1]) > 100
    assert "".join(piece.text for piece in reader.read("x" * 1000)) == "x" * 1000


def test_many_tokens(reader):
    """Few characters may be many tokens."""
    text = "1234567890123 " * 15  # 13 digits are more than a hundred tokens
    pieces = reader.read(text)
    assert len(text) < 250 < reader.tokens(text)
    assert len(pieces) > 1
    for piece in pieces:
        fits(reader, piece)
    assert letters("".join(piece.text for piece in pieces)) == letters(text)


def test_a_number_without_a_name(reader):
    """Too large for whoever spells numbers."""
    pieces = reader.read("It is " + "7" * 240 + " now.")
    assert letters("".join(piece.text for piece in pieces)) == letters("It is " + "7" * 240 + " now.")


def test_cut():
    """After a clause where there is one, else between words."""
    short = lambda text: len(text) <= 20  # noqa: E731
    assert list(cut("One two three, four five six seven", short)) == ["One two three,", "four five six seven"]
    assert list(cut("One two three four five six seven", short)) == ["One two three four", "five six seven"]
    assert list(cut("x" * 45, short)) == ["x" * 17, "x" * 17, "x" * 11]
    assert list(cut("anything", lambda text: False)) == list("anything")


@settings(deadline=None)
@given(text=st.text(max_size=200).map(str.strip), most=st.integers(1, 50))
def test_pieces_of_a_sentence(text, most):
    pieces = list(cut(text, lambda piece: len(piece) <= most))
    assert letters("".join(pieces)) == letters(text)
    assert all(len(piece) <= most for piece in pieces)


def test_without_pysbd(reader, monkeypatch):
    """It makes regular expressions of what it reads, and fails with some, or loses letters."""
    import pysbd

    for broken in (lambda self, text: 1 / 0, lambda self, text: [text[:5]]):
        monkeypatch.setattr(pysbd.Segmenter, "segment", broken)
        found = reader.read("One is here. Two is there! Three?")
        assert [sentence.text for sentence in found] == ["One is here.", "Two is there!", "Three?"]


def test_known_language(tts_original):
    for asked, expected in (("EN", "en"), ("pt_BR", "pt"), ("zh", "zh-cn"), ("zh-TW", "zh-cn"), (" de ", "de")):
        assert known_language(tts_original, asked) == expected
    with pytest.raises(ValueError, match="language 'tlh' is not known; expected one of en, es, "):
        Reader(tts_original, "tlh")


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("zh-cn", "你好。今天天气很好！", ["你好。", "今天天气很好！"]),  # noqa: RUF001
        ("ja", "こんにちは。元気ですか？", ["こんにちは。", "元気ですか？"]),  # noqa: RUF001
        ("ko", "안녕하세요. 반갑습니다.", ["안녕하세요.", "반갑습니다."]),
    ],
)
def test_languages_with_extras(tts_original, language, text, expected):
    """Read, or refused with what is missing."""
    try:
        reader = Reader(tts_original, language)
    except ValueError as error:
        assert f"coqui-tts cannot read text in '{language}' here: " in str(error)  # noqa: PT017
        assert f'pip install "coqui-tts[{language[:2]}]"' in str(error)  # noqa: PT017
        return
    assert [sentence.text for sentence in reader.read(text)] == expected


def test_a_language_whose_package_is_missing(tts_original, monkeypatch):
    tokenizer = type(tts_original.synthesizer.tts_model.tokenizer)

    def missing(self, text, lang):
        raise ImportError("Chinese requires: pypinyin")

    monkeypatch.setattr(tokenizer, "encode", missing)
    with pytest.raises(ValueError, match=r'ImportError: Chinese requires: pypinyin.*pip install "coqui-tts\[zh\]"'):
        Reader(tts_original, "zh")
