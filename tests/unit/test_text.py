"""Text as it is said: nothing is lost, everything fits, and it does not matter in which bits it arrives."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuron_xtts.narration.text import Incoming, Reader, Sentence, cut

WORDS = st.sampled_from(
    ["Hello", "world.", "Dr.", "Smith", "3.5", "e.g.", '"Yes,"', "she", "said.", "(no)", "U.S.", "etc.", "***",
     "What?!", "a" * 300, "well;", "so,", "…", "-", "1", "Größe", "\n", "\n\n", "\r\n\r\n", "[1]", "[note", "No.", "5"]
)  # fmt: skip
TEXTS = st.lists(WORDS, min_size=1, max_size=40).map(" ".join)
ANY = st.text(st.characters(codec="utf-8", exclude_characters="[]"), max_size=200)


@pytest.fixture(scope="module")
def reader(tts_original):
    return Reader(tts_original, "en")


def alnum(text):
    return "".join(character for character in text if character.isalnum())


def said(reader, text):
    incoming = Incoming(reader)
    return [*incoming.more(text), *incoming.rest()]


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(text=TEXTS | ANY)
def test_nothing_is_lost_and_everything_fits(reader, tts_original, text):
    sentences = said(reader, text)
    assert alnum("".join(sentence.text for sentence in sentences)) == alnum(text)
    for sentence in sentences:
        assert len(sentence.text) <= 250
        assert reader.tokens(sentence.text) < tts_original.synthesizer.tts_model.args.gpt_max_text_tokens
        assert alnum(sentence.text)


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(text=TEXTS, cuts=st.lists(st.integers(0, 400), max_size=8))
def test_bits_are_the_same_sentences(reader, text, cuts):
    places = [0, *sorted(min(place, len(text)) for place in cuts), len(text)]
    incoming, sentences = Incoming(reader), []
    for start, end in itertools.pairwise(places):
        sentences += incoming.more(text[start:end])
    assert [*sentences, *incoming.rest()] == said(reader, text)


@settings(deadline=None)
@given(text=ANY.map(str.strip), most=st.integers(1, 50))
def test_pieces_of_a_sentence(text, most):
    pieces = list(cut(text, lambda piece: len(piece) <= most))
    assert alnum("".join(pieces)) == alnum(text)
    assert all(len(piece) <= most for piece in pieces)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Dr. Smith is here. He waits.", ["Dr. Smith is here.", "He waits."]),
        ("It costs 3.50 now. Yes.", ["It costs 3.50 now.", "Yes."]),
        ('"Come in," she said. "Sit."', ['"Come in," she said.', '"Sit."']),
        ("One line\nthat is wrapped. Two.", ["One line that is wrapped.", "Two."]),
        ("A title\r\n\r\nA text.", ["A title", "A text."]),
        ("One. *** Two.", ["One.", "*** Two."]),
    ],
)
def test_sentences(reader, text, expected):
    assert [sentence.text for sentence in reader.read(text)] == expected


def test_pauses(reader):
    assert reader.read("One. Two.\n\nThree. [pause:1.5] [PAUSE: 0.5s] Four. [pause:2]") == [
        Sentence("One."), Sentence("Two.", 0.25), Sentence("Three.", 0.6), Sentence("Four.", 2.0, 2.0)
    ]  # fmt: skip
    for wrong in ("[pause]", "[pause:31]", "[pause:-1]", "[pause:a]"):
        with pytest.raises(ValueError, match="is no pause"):
            reader.read(f"One. {wrong} Two.")


def test_languages(tts_original):
    assert Reader(tts_original, "EN_us").language == "en"
    with pytest.raises(ValueError, match="'xx' is not known; expected one of en, "):
        Reader(tts_original, "xx")


@pytest.mark.parametrize("text", ["", " \n\n ", "* * *", "[pause:1]"])
def test_nothing_to_say(reader, text):
    with pytest.raises(ValueError, match="nothing to say"):
        reader.read(text)
