"""The CUDA context that is made during the imports: which calls a driver gets."""

import shutil
import subprocess

import pytest

from qwen_megakernel.installation.cuda_context import begin_context

DRIVER = """
#include <stdio.h>
static FILE* said;
int cuInit(unsigned flags) { said = fopen(TOLD, "w"); fprintf(said, "init %u", flags); return FAILS; }
int cuDeviceGet(int* device, int number) {
  *device = number + 70;
  return fprintf(said, ", device %d", number) < 0;
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
  fprintf(said, ", context %d", device);
  return fflush(said);
}
"""


@pytest.fixture
def driver(tmp_path):
    """A driver that writes down what it is told: `driver(whether it fails)`."""
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("needs a C compiler")

    def make(fails: int) -> str:
        source, library = tmp_path / "driver.c", tmp_path / f"driver{fails}.so"
        source.write_text(DRIVER)
        told = f'-DTOLD="{tmp_path / "told"}"'
        words = [compiler, "-shared", "-fPIC", told, f"-DFAILS={fails}", "-o", library, source]
        subprocess.run(words, check=True, timeout=60)
        return str(library)

    return make


@pytest.mark.parametrize(("device", "number"), [("auto", 0), ("cuda", 0), ("cuda:3", 3)])
def test_the_context_is_that_of_the_device(device, number, driver, tmp_path):
    begin_context(device, driver(0)).join(10)
    assert (tmp_path / "told").read_text() == f"init 0, device {number}, context {number + 70}"


def test_a_driver_that_fails_is_left_alone(driver):
    thread = begin_context("auto", driver(1))
    thread.join(10)
    assert not thread.is_alive()


def test_without_a_driver_or_a_gpu_there_is_nothing_to_do(driver, tmp_path):
    assert begin_context("auto", str(tmp_path / "none.so")) is None
    assert begin_context("cpu", driver(0)) is None
    assert not (tmp_path / "told").exists()
