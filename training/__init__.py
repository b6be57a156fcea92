"""How the demonstration voice was made: data, codec, talker, export, evaluation."""
