"""Where sentences of streamed text end."""

import asyncio

import pytest

pytest.importorskip("pipecat.services.tts_service", reason="needs pipecat_client/requirements.txt")

from pipecat_client.sentence_ends import SentenceEnds


def pieces(*texts):
    async def scenario():
        ends = SentenceEnds("en")
        return [await ends.split(text) for text in texts]

    return asyncio.run(scenario())


def at_end(text, language="en"):
    ends = SentenceEnds(language)
    asyncio.run(ends.split(text))
    return ends.at_end


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["One is", " here. "], [["One is"], [" here. "]]),
        (["One is here. ", "Two"], [["One is here. "], ["", "Two"]]),
        (["One.", " Two"], [["One."], ["", " Two"]]),
        (["One. Two. Th", "ree."], [["One.", " Two.", " Th"], ["ree."]]),
        (["I saw Dr.", " Smith. ", "He"], [["I saw Dr."], [" Smith. "], ["", "He"]]),
        (["It is 3.", "14. ", "So"], [["It is 3."], ["14. "], ["", "So"]]),
        (["你好。", "再见。"], [["你好。"], ["", "再见。"]]),
        ([""], [[""]]),
    ],
)
def test_text_is_split_where_the_next_sentence_begins(tokens, expected):
    assert pieces(*tokens) == expected
    assert "".join("".join(found) for found in pieces(*tokens)) == "".join(tokens)


def test_end_within_earlier_text_is_left_out():
    """Only the whole next word shows whether a name goes on after an initial."""
    assert pieces("It is you and I. D", "id you see? ", "Yes") == [
        ["It is you and I. D"],
        ["id you see? "],
        ["", "Yes"],
    ]


@pytest.mark.parametrize("text", ["Here it is.", "Really? ", 'He said "no."', "Wait!", "你好。"])
def test_sentence_may_be_over(text):
    assert at_end(text)


@pytest.mark.parametrize(
    "text", ["", " ", "Here it", "I saw Dr.", "It costs 3.", "e.g.", "Well,", "So…"]
)
def test_sentence_goes_on(text):
    assert not at_end(text)
