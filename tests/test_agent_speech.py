"""What agents ask of speech, over a real socket with the demonstration voice."""

import importlib.util

import numpy as np
import pytest
from live_server import DEMO_TOKEN
from native_client import NativeClient

from qwen_megakernel.serving.leading_silence import THRESHOLD
from qwen_megakernel.serving.native_messages import Done, End, Segment

TEXT = "Good evening, this is the front desk."
RATE = 24_000


@pytest.fixture(scope="module")
def client(demo_server):
    socket = demo_server.connect(f"/?token={DEMO_TOKEN}").__enter__()
    with NativeClient(demo_server, "pcm_f32le", socket=socket) as client:
        yield client


def take(client, context_id, *pieces, **options):
    for piece in pieces:
        client.speak(context_id, piece, seed=1, **options)
    client.send(End(context_id))
    heard = client.hear(context_id)
    return client.array(heard), heard


@pytest.fixture(scope="module")
def plain(client):
    return take(client, "plain", TEXT)[0]


@pytest.mark.slow
def test_what_is_sent_is_the_end_of_what_was_generated(client, plain):
    trimmed, heard = take(client, "trimmed", TEXT, trim_leading_silence=True)
    (done,) = heard.of(Done)
    cut = len(plain) - len(trimmed)
    assert 0 < cut <= RATE
    assert done.trimmed_s == pytest.approx(cut / RATE, abs=1e-4)
    assert np.array_equal(trimmed, plain[cut:])
    assert np.abs(plain[:cut]).max() <= THRESHOLD


def test_a_pause_is_exact_silence_between_two_utterances(client):
    sound, heard = take(
        client, "paused", "Good evening.<bre", 'ak time="300ms"/>How are you?', markup=True
    )
    loud = np.flatnonzero(sound)
    gaps = np.diff(loud) - 1
    assert gaps.max() >= 0.3 * RATE
    (segment,) = heard.of(Segment)
    # 300 ms is no multiple of a frame's 80 ms: what is left without it is.
    assert (len(sound) - 7200) % 1920 == 0
    assert [word.text for word in segment.estimated_words] == ["Good", "evening.", "How", "are", "you?"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("av") is None, reason="needs PyAV")
def test_a_rate_changes_the_length(client, plain):
    faster, _ = take(client, "faster", TEXT, speed=1.25)
    assert len(faster) == pytest.approx(len(plain) / 1.25, rel=0.03)
