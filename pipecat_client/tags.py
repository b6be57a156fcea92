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
    """Pipecat's aggregator of text, which leaves tags whole where there is `markup`."""
    if markup:
        return SkipTagsAggregator(_WHOLE, aggregation_type=kind, language=language)
    return SimpleTextAggregator(aggregation_type=kind, language=language)


class TagWriters:
    """A service's own way of writing tags, under the names that Pipecat's other services have."""

    @staticmethod
    def SPELL(text: str) -> str:
        """A text to spell out, where tags are followed."""
        return f"<spell>{text}</spell>"

    @staticmethod
    def PAUSE_TAG(seconds: float) -> str:
        """A pause, where tags are followed."""
        return f'<break time="{seconds}s" />'
