"""Give a prompt its text in pieces, as a turn does."""

from __future__ import annotations

from qwen_megakernel.prompt.builder import Prompt, PromptBuilder


def give_text(prompts: PromptBuilder, prompt: Prompt, *pieces: str) -> None:
    """Give a prompt its whole text."""
    feed = prompts.open_feed()
    for piece in pieces:
        prompt.extend(feed.append(piece))
    prompt.extend(feed.flush())
    prompt.end()
