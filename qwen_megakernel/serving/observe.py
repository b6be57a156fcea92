"""Logs and metrics: one log line and one set of samples per turn, without anything a client said."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from qwen_megakernel.turn import FinishReason

log = logging.getLogger("qwen_megakernel.server")
edge_log = logging.getLogger("qwen_megakernel.server.edge")
"""For peers that are not clients yet, or that break rules. Anybody can cause its lines at any rate."""

Refused = Literal["connection", "turn"]
_TTFC_BUCKETS_S = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)
_RTF_BUCKETS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.5, 2.0, 5.0)


@dataclass(frozen=True, slots=True)
class TurnRecord:
    """A finished turn without its text."""

    turn: str
    chars: int
    voice: str | None
    seed: int
    ttfc_ms: float | None
    rtf: float | None
    frames: int
    finish_reason: str
    error: str | None = None
    trimmed_s: float | None = None
    """Seconds of silence that were left out before the first sound; None if the silence is kept."""
    dry: int = 0
    """See `Account.num_dry`."""

    def line(self) -> str:
        """The record as a log line for people."""
        ttfc = "-" if self.ttfc_ms is None else f"{self.ttfc_ms:.0f} ms"
        rtf = "-" if self.rtf is None else f"{self.rtf:.3f}"
        text = (
            f"turn {self.turn}: {self.finish_reason}, chars {self.chars}, voice {self.voice or '-'}, "
            f"seed {self.seed}, ttfc {ttfc}, rtf {rtf}, frames {self.frames}"
        )
        if self.trimmed_s is not None:
            text += f", trimmed {self.trimmed_s * 1000:.0f} ms"
        return f"{text}, error: {self.error}" if self.error else text


class Metrics:
    """Prometheus figures of one server; the gauges read their sources when scraped."""

    def __init__(
        self,
        *,
        num_sessions: Callable[[], float],
        num_slots: Callable[[], float],
        num_active: Callable[[], float],
        num_waiting: Callable[[], float],
        num_unsent_bytes: Callable[[], float],
        engine_cpu_s: Callable[[], float],
        is_loaded: Callable[[], float],
        num_warm_frames: Callable[[], float],
    ) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        name = "qwen_megakernel"
        for suffix, text, source in (
            ("connections", "Clients that are connected", num_sessions),
            ("slots", "Turns that may hold a slot at a time", num_slots),
            ("turns_active", "Turns in a slot", num_active),
            ("turns_waiting", "Turns waiting for a slot", num_waiting),
            ("unsent_bytes", "Bytes held for clients that have not taken them", num_unsent_bytes),
            ("engine_cpu_seconds", "CPU time of the engine's thread", engine_cpu_s),
            ("model_loaded", "1 while the model is on its device, else 0", is_loaded),
            ("warm_frames", "Frames that kept the GPU warm while nobody spoke", num_warm_frames),
        ):
            Gauge(f"{name}_{suffix}", text, registry=self.registry).set_function(source)
        self._turns = Counter(
            f"{name}_turns", "Finished turns", ["finish_reason"], registry=self.registry
        )
        for reason in get_args(FinishReason):
            self._turns.labels(reason)  # exists from the start, so that rates begin at 0
        self._refused = Counter(
            f"{name}_refused",
            "Connections and turns that were not let in",
            ["what"],
            registry=self.registry,
        )
        for what in get_args(Refused):
            self._refused.labels(what)
        self._dry = Counter(
            f"{name}_playback_dry",
            "Times that playback ran dry within an utterance; late text and slow readers count too",
            registry=self.registry,
        )
        self._ttfc = Histogram(
            f"{name}_ttfc_seconds",
            "Turn opened to first audio handed to the socket",
            buckets=_TTFC_BUCKETS_S,
            registry=self.registry,
        )
        self._rtf = Histogram(
            f"{name}_rtf", "Wall time over audio time", buckets=_RTF_BUCKETS, registry=self.registry
        )

        self._trimmed = Counter(
            f"{name}_trimmed_seconds",
            "Silence before the first sound of replies that was not sent",
            registry=self.registry,
        )

    def record(self, turn: TurnRecord) -> None:
        """Count a finished turn and log its line."""
        self._turns.labels(turn.finish_reason).inc()
        self._dry.inc(turn.dry)
        if turn.ttfc_ms is not None:
            self._ttfc.observe(turn.ttfc_ms / 1000)
        if turn.rtf is not None:
            self._rtf.observe(turn.rtf)
        self._trimmed.inc(turn.trimmed_s or 0.0)
        level = logging.ERROR if turn.error else logging.INFO
        log.log(level, "%s", turn.line(), extra={"fields": asdict(turn)})

    def count_refusal(self, what: Refused) -> None:
        """Count a client that was told to come back later."""
        self._refused.labels(what).inc()

    def page(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)


class JsonFormatter(logging.Formatter):
    """One JSON object per line; `extra={"fields": {...}}` becomes top-level keys."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line: JSON escapes newlines."""
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


class _ClientFaults(logging.Filter):
    """Makes one line of uvicorn's traceback for a client's broken UTF-8: the server is not at fault."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], UnicodeDecodeError):
            record.exc_info, record.exc_text = None, None
            record.levelno, record.levelname = logging.WARNING, "WARNING"
        return True


class FewOfAKind(logging.Filter):
    """Lets a few lines of each kind through in a period. The next one says how many were left out.

    The lines of one place in the code are one kind. In `edge_log` the template distinguishes kinds, too.
    """

    def __init__(self, burst: int = 3, period_s: float = 10.0) -> None:
        super().__init__()
        self._burst, self._period_s = burst, period_s
        self._kinds: dict[tuple[str, int, str], tuple[float, int]] = {}
        """For each kind, when its period began, and the number of its lines since then."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is written."""
        template = str(record.msg) if record.name == edge_log.name else ""
        kind = (record.pathname, record.lineno, template)
        start, num_lines = self._kinds.get(kind, (-self._period_s, 0))
        if record.created - start >= self._period_s:
            num_left_out = max(0, num_lines - self._burst)
            if num_left_out:
                record.msg = f"{record.getMessage()} (and {num_left_out} more such lines before)"
                record.args = ()
            start, num_lines = record.created, 0
        self._kinds[kind] = (start, num_lines + 1)
        return num_lines < self._burst


def configure_logging(log_format: str) -> None:
    """Send all logs to stderr as `text` or `json`.

    uvicorn logs only warnings and errors: its INFO lines hold addresses with `?token=`.
    """
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")
    handler.setFormatter(JsonFormatter() if log_format == "json" else text)
    handler.addFilter(_ClientFaults())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("qwen_megakernel").setLevel(logging.INFO)
    few = FewOfAKind()
    for logger in (edge_log, logging.getLogger("uvicorn.error"), logging.getLogger("asyncio")):
        logger.addFilter(few)
