"""The session core, the dialects that translate for it, their carriers, and the ASGI application."""
