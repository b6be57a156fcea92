"""The thread that owns the device and runs turns on a decoder and a codec."""
