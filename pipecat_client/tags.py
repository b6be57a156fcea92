"""Tags that Pipecat's users write into the text of a bot."""

from __future__ import annotations

from pipecat.frames.frames import TextType
from pipecat.services.tts_service import TextAggregationMode
from pipecat.utils.text.simple_text_aggregator import SimpleTextAggregator
from pipecat.utils.text.skip_tags_aggregator import SkipTagsAggregator

_WHOLE = (("<spell>", "</spell>"), ("<break", ">"))
"""No sentence ends within these."""


def new_aggregator(
    kind: TextType | TextAggregationMode, language: str, *, markup: bool
) -> SimpleTextAggregator:
    """Pipecat's aggregator of text. With `markup` it keeps tags whole."""
    if markup:
        return SkipTagsAggregator(_WHOLE, aggregation_type=kind, language=language)
    return SimpleTextAggregator(aggregation_type=kind, language=language)


class TagWriters:
    """A service's own way of writing tags, under the names that Pipecat's other services have."""

    @staticmethod
    def SPELL(text: str) -> str:
        """Marks a text to spell out. It needs `markup`."""
        return f"<spell>{text}</spell>"

    @staticmethod
    def PAUSE_TAG(seconds: float) -> str:
        """Makes a pause. It needs `markup`."""
        return f'<break time="{seconds}s" />'
