"""Speed as it is heard: a server and its clients, the parts of a frame, the official package beside."""

from __future__ import annotations

import re
import subprocess
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import soundfile

from qwen_megakernel.bench import parts, turns
from qwen_megakernel.config import SAMPLE_RATE
from qwen_megakernel.prove.gates import Found, Section
from qwen_megakernel.prove.plan import Size
from qwen_megakernel.prove.session import Session
from qwen_megakernel.prove.utterances import Utterance
from qwen_megakernel.tools.demo import running_server

PART_FRAMES = 30
SAMPLE_S = 0.2
SPREADS = (
    ("ttfc_ms", "TTFC, ms"),
    ("ttfb_ms", "first chunk at the client, ms"),
    ("ttfa_ms", "audible TTFA, ms"),
    ("rtf", "RTF"),
)

Report = Callable[[str], None]


class GpuMeter:
    """Watts and megabytes of the GPUs while something runs, by nvidia-smi where there is one."""

    def __init__(self) -> None:
        self.watts = 0.0
        self.megabytes = 0.0
        self._stop = threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Keep the highest value of each while the `with` block runs."""
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join(5)

    def _watch(self) -> None:
        command = ["nvidia-smi", "--query-gpu=power.draw,memory.used", "--format=csv,noheader,nounits"]
        while not self._stop.wait(SAMPLE_S):
            try:
                out = subprocess.run(
                    command, capture_output=True, text=True, timeout=10, check=True
                ).stdout
            except (OSError, subprocess.SubprocessError):
                return
            with suppress(ValueError):
                values = np.array([[float(v) for v in line.split(",")] for line in out.splitlines()])
                self.watts = max(self.watts, float(values[:, 0].max()))
                self.megabytes = max(self.megabytes, float(values[:, 1].max()))


def resident_megabytes(port: int) -> float | None:
    """Resident memory of the server's process in MB, from its metrics; None if they do not have it."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with suppress(OSError), opener.open(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        found = re.search(r"^process_resident_memory_bytes (\S+)", answer.read().decode(), re.MULTILINE)
        return float(found[1]) / 1e6 if found else None
    return None


def of_server(
    section: Section, options: Sequence[str | Path], size: Size, report: Report
) -> dict[str, Any]:
    """TTFC, TTFA, RTF of one voice, and how many voices play on at a time."""
    meter = GpuMeter()
    with running_server(*options, show=lambda line: None) as port, meter.running():
        client = turns.BenchClient(port)
        client.speak(turns.SENTENCE, 0)
        alone = turns.summary([client.speak(turns.SENTENCE, seed) for seed in range(size.turns)])
        client.close()
        together = {}
        for count in size.voices_at_once:
            report(f"speed: {count} voices")
            together[count] = turns.summary(turns.speak_at_once(port, count, max(count, size.turns)))
        memory = resident_megabytes(port)
    rows = [
        [label, *(f"{alone[name][p]:.3g}" for p in ("p50", "p95"))]
        for name, label in SPREADS
        if alone[name]
    ]
    section.table("One voice", ["figure", "p50", "p95"], rows)
    lines = [
        [n, s["underruns"], f"{s['ttfc_ms']['p95']:.0f}", f"{s['rtf']['p95']:.2f}"]
        for n, s in together.items()
    ]
    section.table("Voices at a time", ["voices", "underruns", "TTFC p95, ms", "RTF p95"], lines)
    fluent = [n for n, found in together.items() if not found["underruns"]]
    figures = {
        "most voices without an underrun, of those tried": max(fluent, default=0),
        "server's memory, MB": memory,
        "GPU memory, MB": meter.megabytes or None,
        "GPU power, highest, W": meter.watts or None,
    }
    section.table("At most", ["figure", "value"], [[k, v] for k, v in figures.items() if v is not None])
    section.judge("real time", alone["rtf"]["p50"], detail=f"{size.turns} turns")
    section.judge("underruns", alone["underruns"], detail=f"in {size.turns} turns, one at a time")
    return {"alone": alone, "together": {str(n): s for n, s in together.items()}, **figures}


def of_parts(section: Section, session: Session, report: Report) -> dict[str, Any]:
    """Measure a frame's decode and its codec, each alone."""
    plan = session.plan
    found = parts.run(
        session.checkpoint, plan.backend, plan.device, streams=(1,), frames=PART_FRAMES, report=report
    )
    frame = found["streams"]["1"]
    rows = [["frame of codes", f"{frame['decode_ms']:.2f}"], ["codec", f"{frame['codec_ms']:.2f}"]]
    rows += [[f"prefill of {n} rows", f"{ms:.2f}"] for n, ms in found["prefill_ms"].items()]
    section.table("By part, of an 80 ms frame", ["part", "ms"], rows)
    return found


def of_official(section: Section, session: Session, count: int) -> dict[str, Any]:
    """Measure the official package with the same sentence. It gives no sound before the end."""
    plan, seconds, audio = session.plan, [], []
    voice = sorted(session.voices)[0]
    for seed in range(count):
        reply = session.official.ask(
            "time", item=session.item(Utterance(turns.SENTENCE, voice, seed, plan.language)),
            dtype=plan.dtype, seed=seed,
        )  # fmt: skip
        seconds.append(reply["seconds"])
        audio.append(reply["audio_s"])
    rtf = float(np.median(np.array(seconds) / np.array(audio)))
    section.table(
        "Official package, same sentence", ["figure", "median"],
        [["first sound: the whole utterance, ms", f"{1000 * np.median(seconds):.0f}"],
         ["RTF", f"{rtf:.3g}"]],
    )  # fmt: skip
    return {"seconds": seconds, "audio_s": audio, "rtf": rtf}


def of_peer(section: Section, session: Session, count: int) -> dict[str, Any] | None:
    """Measure faster-qwen3-tts, if it is in the official environment and the checkpoint clones."""
    plan, cloner = session.plan, session.cloner
    if cloner is None or cloner.codec_encoder is None or plan.device.type != "cuda":
        return None
    said, drawn = session.spoken
    samples = session.subject.decode([frame for d in drawn[:2] for frame in d.codes])
    with TemporaryDirectory(prefix="prove-") as folder:
        recording = Path(folder) / "reference.wav"
        soundfile.write(recording, samples, SAMPLE_RATE)
        found = session.official.ask(
            "peer", model=str(plan.folder), device=str(plan.device), recording=str(recording),
            item=session.item(Utterance(turns.SENTENCE, said[0].voice, 0, plan.language)),
            ref_text=" ".join(u.text for u in said[:2]), runs=count,
        )  # fmt: skip
    if found["version"] is None:
        section.notes.append("faster-qwen3-tts is not installed beside the official package")
        return None
    rtf = np.median(np.array(found["seconds"]) / np.array(found["audio_s"]))
    section.table(
        f"faster-qwen3-tts {found['version']}, same sentence", ["figure", "median"],
        [["first chunk, ms", f"{1000 * np.median(found['first_s']):.0f}"], ["RTF", f"{rtf:.3g}"]],
    )  # fmt: skip
    return found


def measure(session: Session, report: Report) -> Found:
    """Run the whole part."""
    section, size = Section("speed"), session.plan.size
    section.figures["parts"] = of_parts(section, session, report)
    section.figures["official"] = of_official(section, session, min(3, size.turns))
    section.figures["peer"] = of_peer(section, session, min(3, size.turns))
    section.figures["server"] = of_server(section, session.server_options, size, report)
    return section.found()
