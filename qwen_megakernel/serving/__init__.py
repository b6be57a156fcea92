"""Sessions, the dialects that translate for them, the carriers of both, and the ASGI application."""
