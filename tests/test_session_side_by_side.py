"""Sessions with contexts that are spoken at the same time."""

import asyncio

from session_stage import SEGMENT_S, InstantDecoder, Stage, run_at_once

from qwen_megakernel.serving.events import ContextAudio, ContextDone, ContextQuiet
from qwen_megakernel.serving.session_rules import SessionRules

RULES = SessionRules(max_lead_s=1.0, side_by_side=True)


def ids(events, kind):
    return [event.context_id for event in events if isinstance(event, kind)]


def test_a_context_that_was_left_open_holds_up_no_other():
    async def script():
        stage = Stage(RULES)
        stage.session.append("left", "This text goes on")
        stage.session.append("next", "Hello.", ended=True)
        assert [turn.text for turn in stage.turns] == ["This text goes on", "Hello."]
        for turn in reversed(stage.turns):
            turn.speak()
        stage.turns[1].finish()
        events = await stage.events()
        assert ids(events, ContextAudio) == ["next", "left"]
        assert ids(events, ContextDone) == ["next"]
        stage.session.cancel("left")
        assert ids(await stage.events(), ContextDone) == ["left"]
        assert not stage.session.busy

    run_at_once(script())


def test_no_context_is_reported_as_queued():
    async def script():
        stage = Stage(RULES)
        for name in ("a", "b"):
            stage.session.append(name, "Hello")
        await asyncio.sleep(1.05)
        reports = [e for e in await stage.events() if isinstance(e, ContextQuiet)]
        assert {(r.context_id, r.state) for r in reports} == {
            ("a", "waiting_for_text"), ("b", "waiting_for_text"),
        }  # fmt: skip

    run_at_once(script())


def test_each_context_waits_for_its_own_playback():
    async def script():
        stage = Stage(RULES, InstantDecoder())
        for name in ("a", "b"):
            for text in ("One.", "Two.", "Three."):
                stage.session.append(name, text)
                stage.session.flush(name)
            stage.session.end(name)
        done = []
        while len(done) < 2:
            done += ids(await stage.session.take(), ContextDone)
        assert done == ["a", "b"]
        started = [turn.opened_at - stage.turns[0].opened_at for turn in stage.turns]
        # The third text of each waits until playback is a second behind.
        assert max(started[:4]) < 0.2 < 2 * SEGMENT_S - 1.0 + 0.05
        assert min(started[4:]) > 2 * SEGMENT_S - 1.0 - 0.05

    run_at_once(script())
