"""Compile the kernels of `training.fused` in many processes. One process alone takes a minute."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from qwen_megakernel.config import CodecConfig


def layers(config: CodecConfig) -> list[tuple[int, int, int]]:
    """(inputs, outputs, taps) of the layers above frame rate, each kind once. 0 taps mean snake."""
    width = config.decoder_dim
    found = [(config.latent_dim, width, 7)]
    for rate in config.upsample_rates:
        half = width // 2
        found += [(width, width, 0), (width, half * rate, 2), (half, half, 7), (half, half, 1)]
        width = half
    return [*found, (width, width, 0)]


def _compile(layer: tuple[int, int, int]) -> None:
    from training import fused

    fused.compile_kernels(*layer)


def compile_all(config: CodecConfig, processes: int) -> None:
    """Compile into Triton's cache on the disk, where the training process finds the kernels."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        # The widest come first, because they take longest.
        list(pool.map(_compile, sorted(layers(config), key=sum, reverse=True)))
