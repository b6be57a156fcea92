"""`qwen-megakernel prove`: this implementation beside the official package, measured and judged."""
