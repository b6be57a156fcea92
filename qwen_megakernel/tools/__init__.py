"""Commands that prepare and check a machine."""
