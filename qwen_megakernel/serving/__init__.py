"""What clients speak: sans-IO protocol, dialects, the ASGI application."""
