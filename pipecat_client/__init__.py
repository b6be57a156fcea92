"""Clients of the server: a Pipecat service, a voice agent around it, and a command-line client."""
