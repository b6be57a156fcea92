"""A text of any accepted length is spoken whole, in parts, over every interface."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from listener import Listener, speak
from live_server import collect, send
from native_client import NativeClient
from slow_cases import slow_after
from test_client_cli import run
from test_reference import Both

from qwen_megakernel import GenerationParams, SamplingParams, TTSDecoder
from qwen_megakernel.config import MAX_UTTERANCE_FRAMES, Guards
from qwen_megakernel.engine.active_turn import PART_SEED_STEP, ActiveTurn, TurnRequest
from qwen_megakernel.prompt.parts import (
    MIN_PART_TOKENS,
    PART_BORDER,
    PartFeed,
    PromptParts,
    max_part_tokens,
)
from qwen_megakernel.prompt.shared_rows import SharedRows
from qwen_megakernel.prompt.text_feed import TextFeed, TextTokenizer
from qwen_megakernel.prompt.tokenizer import load_tokenizer
from qwen_megakernel.serving.native_messages import End
from qwen_megakernel.tts_model import SynthesisError
from qwen_megakernel.turn import Turn

SENTENCES = [f"This is sentence number {n} of the story, and it goes on a little." for n in range(58)]
STORY = " ".join(SENTENCES)[:3990] + " The end."
SHORT_STORY = " ".join(SENTENCES[:5])
DIGITS = "0123456789" * 400
LETTERS = "ab" * 2000
CHINESE = "今天天气很好，我们下午去公园走一走，然后一起吃晚饭。" * 40
GREEDY = SamplingParams(0.0, 0, 1.0, 1.0)


class FakePrompt:
    """A prompt that keeps its tokens."""

    ready, num_rows, shared = True, 0, SharedRows(0, 0)

    def __init__(self, made: list[FakePrompt]) -> None:
        self.made, self.token_ids, self.ended = made, [], False
        made.append(self)

    def extend(self, token_ids: list[int]) -> None:
        assert not (self.ended and token_ids)
        self.token_ids += token_ids

    @property
    def num_text_tokens(self) -> int:
        return len(self.token_ids)

    def end(self) -> None:
        assert not self.ended
        self.ended = True

    def sibling(self) -> FakePrompt:
        return FakePrompt(self.made)


@pytest.fixture(scope="module")
def tokenizer(tiny_base):
    return TextTokenizer(load_tokenizer(tiny_base))


@pytest.fixture(scope="module")
def brief(brief_base):
    with TTSDecoder.load(brief_base, num_slots=2) as tts:
        yield tts


@pytest.fixture
def small_parts(monkeypatch):
    """Make parts of up to 40 tokens, so that few sentences are several parts."""
    monkeypatch.setattr("qwen_megakernel.engine.active_turn.max_part_tokens", lambda *_, **__: 40)


def split(tokenizer, pieces: list[str], max_tokens: int = 167) -> list[list[int]]:
    prompts: list[FakePrompt] = []
    feed, parts = PartFeed(TextFeed(tokenizer), tokenizer, max_tokens), PromptParts(FakePrompt(prompts))
    for piece in pieces:
        parts.extend(feed.append(piece))
    parts.extend(feed.flush())
    parts.end()
    assert all(prompt.ended for prompt in prompts)
    return [prompt.token_ids for prompt in prompts]


def part_texts(tokenizer, text: str, max_tokens: int = 167) -> list[str]:
    return [tokenizer.decode(part) for part in split(tokenizer, [text], max_tokens)]


# --- where a text is cut ------------------------------------------------------------------------------


def test_a_part_s_length_budget_is_within_an_utterance():
    guards = Guards()
    limit = max_part_tokens(guards, 10_000, streaming=True)
    assert guards.budget(limit) <= MAX_UTTERANCE_FRAMES < guards.budget(limit + 1)
    assert max_part_tokens(Guards(frames_per_token=0), 10_000, streaming=True) == limit
    for streaming in (True, False):
        small = max_part_tokens(guards, 1000, streaming=streaming)
        assert guards.budget(small) + (0 if streaming else small) <= 1000
    assert max_part_tokens(guards, 20, streaming=True) == MIN_PART_TOKENS


def test_a_text_that_fits_is_one_part_of_the_same_tokens(tokenizer):
    text = STORY[:700]
    while len(tokenizer.encode(text)) > 167:
        text = text[:-1].rstrip()
    assert len(tokenizer.encode(text)) > 160
    assert split(tokenizer, list(text)) == split(tokenizer, [text]) == [tokenizer.encode(text)]


@pytest.mark.parametrize("text", [STORY, CHINESE], ids=["English", "Chinese"])
def test_parts_are_whole_sentences(tokenizer, text):
    texts = part_texts(tokenizer, text)
    assert len(texts) >= 5
    assert all(part[-1] in ".。" and part[0] in "T今" for part in texts)
    assert "".join("".join(texts).split()) == "".join(text.split())


def test_a_sentence_that_is_too_long_is_cut_at_a_clause_else_at_a_word(tokenizer):
    clauses = "we walked along the river for an hour, " * 30
    assert all(part.endswith("hour,") for part in part_texts(tokenizer, clauses))
    words = "walking " * 300
    texts = part_texts(tokenizer, words)
    assert len(texts) > 1
    assert " ".join(texts) == words.strip()


def test_a_number_or_an_abbreviation_is_no_end_of_a_sentence(tokenizer):
    text = "the version is 3.14 of e.g.the list " * 40
    assert all(not part.endswith((".", "3")) for part in part_texts(tokenizer, text))


@pytest.mark.parametrize(
    "text", [DIGITS, LETTERS, "…" * 1000, "👩‍👩‍👧" * 300], ids=lambda text: text[:2]
)
def test_a_text_without_breaks_is_cut_where_it_must(tokenizer, text):
    parts = split(tokenizer, [text])
    assert max(map(len, parts)) <= 167
    assert "".join(part_texts(tokenizer, text)) == text


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.sampled_from(["Hi", " all.", " ", "\n", "e", "3", ".", ",", "!", "。", "世界", "é", "'s"])
    ),
    st.lists(st.integers(0, 60), max_size=6),
)
def test_the_cuts_do_not_depend_on_how_the_text_arrives(tokenizer, words, cuts):
    text, at = "".join(words), sorted(cuts)
    pieces = [text[a:b] for a, b in zip([0, *at], [*at, len(text)], strict=True)]
    whole = split(tokenizer, [text], 12)
    assert split(tokenizer, list(text), 12) == split(tokenizer, pieces, 12) == whole
    said = "".join("".join(tokenizer.decode(part) for part in whole).split())
    assert said == "".join(tokenizer.normalise(text).split())
    if len(whole) > 1:
        assert all(whole), "a part with nothing to say"
    for part in whole:
        assert tokenizer.encode(tokenizer.decode(part)) == part, "not the tokens of a text of its own"


# --- turns ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_long_text_sounds_as_its_parts_one_after_the_other(brief, small_parts):
    params = GenerationParams(seed=7)
    listener = speak(brief, SHORT_STORY, params=params, chunk_frames=1)
    finished = listener.events[-1]
    assert (finished.reason, finished.error) == ("stop", None)
    texts = part_texts(brief._prompts.tokenizer, SHORT_STORY, 40)
    assert len(texts) > 3
    alone = [
        speak(brief, text, params=replace(params, seed=7 + k * PART_SEED_STEP)).samples
        for k, text in enumerate(texts)
    ]
    np.testing.assert_allclose(listener.samples, np.concatenate(alone), atol=1e-4)
    assert finished.num_samples == len(listener.samples)


@pytest.mark.parametrize(
    "options", slow_after(1, [{}, {"streaming": False}]), ids=["streaming", "whole"]
)
def test_live_text_and_company_do_not_change_a_long_text(brief, options, small_parts):
    whole = speak(brief, SHORT_STORY, params=GenerationParams(seed=3), **options).samples
    live, beside = Listener(), Listener()
    brief.open_turn(SHORT_STORY, sink=beside, ended=True, params=GenerationParams(seed=30))
    turn = brief.open_turn(sink=live, params=GenerationParams(seed=3), **options)
    for first in range(0, len(SHORT_STORY), 7):
        turn.append(SHORT_STORY[first : first + 7])
    turn.end()
    assert live.wait(200).reason == "stop"
    np.testing.assert_allclose(live.samples, whole, atol=1e-4)
    assert beside.wait(200).reason == "stop"


@pytest.mark.slow
def test_a_part_waits_for_its_text_and_a_cancel_ends_it(brief, small_parts):
    """The first part is complete and spoken. The second has too little text."""
    texts = part_texts(brief._prompts.tokenizer, SHORT_STORY, 40)
    listener = Listener()
    params = GenerationParams(seed=7, min_frames=60)  # more than a part has tokens
    turn = brief.open_turn(" ".join([*texts[:2], "This"]), sink=listener, params=params)
    deadline = time.monotonic() + 200
    while not any(a.part == 1 and a.text_late for a in brief._engine._speaking):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not turn.finished
    turn.cancel()
    assert listener.wait().reason == "cancelled"


def test_what_the_model_cuts_off_is_an_error_to_the_caller(brief, small_parts):
    """The limit of a guard, and not the caller's own."""
    guards = Guards(repeat_frames=0, silence_s=0, base_frames=3, frames_per_token=1)
    cut = GenerationParams(seed=0, talker=GREEDY, min_frames=10_000, guards=guards)
    finished = speak(brief, "Hello.", params=cut).events[-1]
    assert finished.reason == "length"
    heard = []
    with pytest.raises(SynthesisError, match=r"cut off: \d+ frames are the most for \d+ text tokens"):
        heard.extend(brief.stream("Hello.", params=cut))
    assert sum(map(len, heard)) == finished.num_samples > 0, "what was spoken comes before the error"
    with pytest.raises(SynthesisError, match="cut off"):
        brief.synthesize("Hello.", params=cut)


@pytest.mark.slow
def test_a_part_that_is_cut_off_is_told_and_the_others_are_spoken(brief, small_parts):
    guards = Guards(repeat_frames=0, silence_s=0, base_frames=3, frames_per_token=1)
    params = GenerationParams(seed=0, talker=GREEDY, min_frames=10_000, guards=guards)
    texts = part_texts(brief._prompts.tokenizer, SHORT_STORY, 40)
    finished = speak(brief, SHORT_STORY, params=params).events[-1]
    frames = sum(guards.budget(len(brief._prompts.tokenizer.encode(part))) for part in texts)
    assert (finished.reason, finished.num_frames) == ("length", frames)
    assert len(texts) > 1
    assert "cut off in part 1: " in finished.error


def test_a_caller_s_own_limit_is_no_error_and_counts_over_all_parts(brief, small_parts):
    params = GenerationParams(seed=7, max_frames=5)
    assert len(brief.synthesize("Hello there.", params=replace(params, min_frames=10))) == 5 * 1920
    total = speak(brief, SHORT_STORY, params=replace(params, max_frames=None)).events[-1].num_frames
    finished = speak(brief, SHORT_STORY, params=replace(params, max_frames=total - 1)).events[-1]
    assert (finished.reason, finished.num_frames, finished.error) == ("length", total - 1, None)


@pytest.mark.parametrize(("max_frames", "ending"), [(3, "silence"), (4, None)])
def test_a_caller_s_limit_holds_where_a_part_ends_for_another_reason_just_there(max_frames, ending):
    request = TurnRequest(voice=None, params=GenerationParams(max_frames=max_frames))
    active = ActiveTurn(Turn(lambda: None, None), request, FakePrompt([]), print)
    active.parts.extend([1, PART_BORDER, 2])
    active.num_fed = active.num_frames = 3
    assert active.end_part("silence") == ending


@pytest.mark.parametrize("streaming", [True, False])
def test_each_part_is_the_official_prompt_of_its_text(tiny_base, streaming):
    both = Both.load(tiny_base)
    first = both.prompts.open(both.voice(), "english", streaming=streaming)
    feed = PartFeed(both.prompts.open_feed(), both.prompts.tokenizer, 40)
    parts = PromptParts(first)
    parts.extend(feed.append(SHORT_STORY) + feed.flush())
    parts.end()
    texts = part_texts(both.prompts.tokenizer, SHORT_STORY, 40)
    for text in texts:
        theirs = both.official_inputs(
            [text], languages=["english"], non_streaming_mode=not streaming, **both.clone_prompt()
        )
        torch.testing.assert_close(
            parts.current.rows(), theirs["inputs_embeds"][0], rtol=1e-4, atol=1e-5
        )
        for row in [*theirs["trailing_text_hidden"][0], both.prompts.pad_row]:
            torch.testing.assert_close(parts.current.next_text_row(), row, rtol=1e-4, atol=1e-5)
            parts.current.advance()
        assert parts.has_next == (text != texts[-1])
        if parts.has_next:
            parts.advance()


# --- every interface -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seconds(brief, recording):
    """Seconds of the story in the live server's voice."""
    voice = brief.clone_voice(recording.read_bytes())
    params = GenerationParams(seed=7)
    return len(brief.synthesize(STORY, voice, params=params)) / 24_000


@pytest.mark.slow
def test_the_simple_protocol_speaks_4000_characters_whole(live_server, seconds):
    with live_server.connect() as client:
        send(client, text=STORY, seed=7)
        _, done = collect(client)
    assert (done["finish_reason"], done["duration_s"]) == ("stop", pytest.approx(seconds, abs=1e-3))


@pytest.mark.slow
def test_a_native_context_speaks_4000_characters_whole(live_server, seconds):
    with NativeClient(live_server) as client:
        client.speak("a", STORY, seed=7)
        client.send(End("a"))
        done = client.hear("a").done
    assert (done.finish_reason, done.duration_s) == ("stop", pytest.approx(seconds, abs=1e-3))


@pytest.mark.slow
def test_the_command_line_speaks_4000_characters_whole(live_server, seconds):
    result = run("--url", live_server.url, "--text", STORY, "--seed", "7", "--json")
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    assert (figures["finish_reason"], figures["duration_s"]) == (
        "stop",
        pytest.approx(seconds, abs=1e-3),
    )


def test_the_command_line_exits_with_1_where_speech_was_cut_off(tmp_path):
    """A server reports the cut: the client keeps the audio and prints the figures."""
    from websockets.sync.server import serve

    def answer(socket) -> None:
        socket.recv()
        socket.send(np.zeros(1920, "<f4").tobytes())
        done = {"done": True, "finish_reason": "length", "samples": 1920, "duration_s": 0.08}
        socket.send(json.dumps(done))

    out = tmp_path / "x.wav"
    with serve(answer, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.socket.getsockname()[1]
        result = run("--url", f"ws://127.0.0.1:{port}", "--text", "Hi.", "--out", str(out), "--json")
        server.shutdown()
    assert result.returncode == 1
    assert result.stderr == "error: the server cut the speech off (finish_reason length)\n"
    assert json.loads(result.stdout)["samples"] == 1920
    assert out.stat().st_size > 2 * 1920
