"""The bench: its measurements, and the clients that make them."""
