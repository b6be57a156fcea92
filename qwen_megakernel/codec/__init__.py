"""Codes to samples and back: the streaming decoder in PyTorch and as CUDA kernels, and the encoder."""
