"""What the journal sends, and sends again, without sockets and without Pipecat."""

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipecat_client.journal import Journal
from qwen_megakernel.serving.leading_silence import LeadingSilence
from qwen_megakernel.serving.native_messages import Cancel, End, Flush, Limits, Speak

LIMITS = Limits(max_text_chars=100, max_contexts=2, max_message_bytes=65_536)


def connected():
    journal = Journal()
    journal.restart(LIMITS)
    return journal


def sent(journal):
    messages = []
    while (message := journal.take()) is not None:
        messages.append(message)
    return messages


def outline(messages):
    letters = {Speak: "s", Flush: "f", End: "e", Cancel: "c"}
    return "".join(letters[type(message)] for message in messages)


def test_sentences():
    journal = connected()
    journal.speak("a", "One.", complete=True, voice="v", seed=7)
    journal.speak("a", "Two.", complete=True, voice="w", seed=7)
    first, _, second, _ = sent(journal)
    assert (first.text, first.voice, second.text, second.voice) == ("One.", "v", "Two.", "w")
    # The server adds a segment's index to its seed. Each segment must get 7.
    assert (first.seed, second.seed) == (7, 6)
    journal.end("a")
    assert outline(sent(journal)) == "e"


def test_options_come_with_the_first_piece_only():
    journal = connected()
    for text in ("On", "e ", "two."):
        journal.speak("a", text, complete=False, voice="v")
    assert [speak.voice for speak in sent(journal)] == ["v", None, None]


def test_each_segment_draws_a_seed_and_keeps_it():
    journal = connected()
    journal.speak("a", "One.", complete=True, seed=None)
    journal.speak("b", "One.", complete=True, seed=None)
    first, _, second, _ = sent(journal)
    assert first.seed != second.seed
    journal.restart(LIMITS)
    assert [speak.seed for speak in sent(journal)[::2]] == [first.seed, second.seed]


def test_restart_sends_what_was_not_spoken_and_drops_what_was_heard():
    journal = connected()
    for text in ("One.", "Two.", "Three."):
        reply = journal.speak("a", text, complete=True, seed=5)
    before = sent(journal)[0].context_id
    reply.receive(bytes(200))
    reply.end_segment(0)
    assert reply.receive(b"ab" * 30) == b"ab" * 30  # 30 samples of "Two."
    journal.restart(LIMITS)
    two, _, three, _ = sent(journal)
    assert (two.text, two.seed, three.text, three.seed) == ("Two.", 5, "Three.", 4)
    assert two.context_id != before
    assert journal.find(before) is None
    assert journal.find(two.context_id) is reply
    assert reply.receive(b"ab" * 20) == b""
    assert reply.receive(b"ab" * 11 + b"cd") == b"abcd"
    assert reply.num_samples == 100 + 30 + 2


def test_a_reply_that_goes_on_in_another_context_keeps_the_silence_between_its_sentences():
    for trims, chosen, told in ((True, None, False), (False, True, False), (False, None, None)):
        journal = connected()
        for text in ("One.", "Two."):
            reply = journal.speak("a", text, complete=True, trim_leading_silence=chosen)
        assert [speak.trim_leading_silence for speak in sent(journal)[::2]] == [chosen, chosen]
        journal.restart(LIMITS, trims=trims)  # nothing was spoken: it begins as before
        assert sent(journal)[0].trim_leading_silence is chosen
        reply.end_segment(0)  # it was silence alone, all of which was left out
        journal.restart(LIMITS, trims=trims)
        assert sent(journal)[0].trim_leading_silence is chosen
        reply.receive(bytes(2))
        journal.restart(LIMITS, trims=trims)
        assert sent(journal)[0].trim_leading_silence is chosen
        journal.speak("a", "Three.", complete=True, trim_leading_silence=chosen)
        sent(journal)
        reply.end_segment(0)
        journal.restart(LIMITS, trims=trims)
        assert sent(journal)[0].trim_leading_silence is told


def test_restart_after_the_last_segment_finishes_the_reply():
    journal = connected()
    reply = journal.speak("a", "One.", complete=True)
    journal.end("a")
    sent(journal)
    reply.end_segment(0)
    assert journal.take_finished() == []  # the server still owes its `done`
    journal.restart(LIMITS)
    assert sent(journal) == []
    assert journal.take_finished() == ["a"]
    assert "a" not in journal


def test_cancel_goes_out_only_for_what_the_server_knows():
    journal = connected()
    journal.speak("a", "One.", complete=True)
    (speak, _) = sent(journal)
    journal.speak("b", "Two.", complete=True)
    journal.cancel("b")
    journal.cancel("a")
    assert sent(journal) == [Cancel(speak.context_id)]


def test_refused_text_waits_but_cancels_do_not():
    journal = connected()
    reply = journal.speak("a", "One.", complete=True)
    journal.speak("b", "Two.", complete=True)
    first = sent(journal)[0]
    journal.postpone(reply)
    journal.cancel("b")
    assert outline(sent(journal)) == "c"
    journal.on_hold = False
    again = sent(journal)[0]
    assert (again.text, again.context_id != first.context_id) == ("One.", True)


def test_no_more_contexts_than_the_server_opens():
    journal = connected()
    replies = [journal.speak(name, name, complete=True) for name in "abc"]
    for name in "abc":
        journal.end(name)
    assert [m.text for m in sent(journal) if isinstance(m, Speak)] == ["a", "b"]
    replies[0].end_segment(0)
    journal.done(replies[0])
    assert journal.take_finished() == ["a"]
    assert [m.text for m in sent(journal) if isinstance(m, Speak)] == ["c"]


def test_long_reply_goes_on_in_another_context_before_others_are_sent():
    journal = connected()
    for name in ("One", "Two", "Three"):
        reply = journal.speak("a", f"{name:-<60}", complete=True)
    journal.end("a")
    journal.speak("b", "Next.", complete=True)
    assert outline(sent(journal)) == "sfe"
    for rest in ("sfe", "se"):
        reply.end_segment(0)
        journal.done(reply)
        messages = sent(journal)
        assert outline(messages)[: len(rest)] == rest
    assert messages[-2].text == "Next."


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=5),
    st.lists(st.integers(0, 120), max_size=4),
    st.integers(1, 7),
)
def test_every_sample_once_wherever_the_line_breaks(lengths, cuts, chunk):
    """Segments of some samples each, over connections that carry some samples each."""
    journal = connected()
    for index in range(len(lengths)):
        reply = journal.speak("a", f"{index}", complete=True)
    journal.end("a")
    heard = []
    for budget in [*cuts, 10_000]:
        journal.restart(LIMITS)
        texts = [message.text for message in sent(journal) if isinstance(message, Speak)]
        for index, text in enumerate(texts):
            samples = [(int(text), n) for n in range(lengths[int(text)])]
            while samples and budget > 0:
                part, samples = samples[:chunk], samples[chunk:]
                budget -= len(part)
                new = reply.receive(bytes(2 * len(part)))
                heard += part[len(part) - len(new) // 2 :]
            if samples or budget <= 0:
                break
            reply.end_segment(index)
    assert heard == [(i, n) for i, length in enumerate(lengths) for n in range(length)]


def trimmed(segments, journal, reply, budget):
    """What a server that trims sends of these over one line of so many samples, chunk by chunk."""
    speaks = [message for message in sent(journal) if isinstance(message, Speak)]
    beginning = LeadingSilence() if speaks and speaks[0].trim_leading_silence else None
    heard = []
    for index, speak in enumerate(speaks):
        samples = segments[int(speak.text)]
        for start in range(0, len(samples), 1000):
            piece = samples[start : start + 1000]
            piece = piece if beginning is None else beginning.pass_on(piece)
            piece, budget = piece[: max(budget, 0)], budget - len(piece)
            new = reply.receive(piece.astype("<i2").tobytes())
            heard.append(piece[len(piece) - len(new) // 2 :])
            if budget < 0:
                return heard
        if beginning is not None:
            beginning.end_segment()
        reply.end_segment(index)
    return heard


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.integers(0, 30_000), st.integers(0, 3000)), min_size=1, max_size=4),
    st.lists(st.integers(0, 9000), max_size=3),
)
@example([(2000, 0), (5000, 3000)], [1500])
@example([(20_000, 0), (20_000, 0), (5000, 3000)], [13_000])
def test_a_trimmed_reply_is_the_same_wherever_the_line_breaks(lengths, cuts):
    numbers = iter(range(1, 1_000_000))
    segments = [
        np.array([0.0] * silence + [1.0 + next(numbers) % 30_000 for _ in range(sound)])
        for silence, sound in lengths
    ]

    def whole(cuts):
        journal = connected()
        for index in range(len(segments)):
            reply = journal.speak("a", f"{index}", complete=True, trim_leading_silence=True)
        journal.end("a")
        heard = []
        for budget in [*cuts, 10_000_000]:
            journal.restart(LIMITS)
            heard += trimmed(segments, journal, reply, budget)
        return np.concatenate([*heard, np.zeros(0)])

    np.testing.assert_array_equal(whole(cuts), whole([]))


def test_new_audio_forgives_refusals():
    journal = connected()
    reply = journal.speak("a", "One.", complete=True)
    sent(journal)
    journal.postpone(reply)
    assert reply.num_refusals == 1
    reply.receive(bytes(2))
    assert reply.num_refusals == 0
    journal.postpone(reply)
    reply.receive(bytes(2))  # it was heard before
    assert reply.num_refusals == 1
