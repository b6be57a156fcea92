"""Text, voice and language to prompt rows."""
