"""Kernels of a cubin on a GPU, launched through CUDA's driver API.

The API is called with ctypes, so that neither a build nor a start needs a host compiler. A launch takes
a few microseconds of the host: its shape and the places of its parameters are prepared once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import byref, c_char, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_void_p
from functools import cache
from pathlib import Path

import torch

from qwen_megakernel.installation.cubin import Cubin, read_cubin
from qwen_megakernel.installation.kept_builds import ptx_of

_LIBRARY = "libcuda.so.1"
_COOPERATIVE, _CLUSTER_DIMENSION, _PROGRAMMATIC_STREAM_SERIALIZATION = 2, 4, 6
"""CUlaunchAttributeID of cuda.h."""
_MAX_DYNAMIC_SHARED_BYTES, _PREFERRED_CARVEOUT = 8, 9
"""CUfunction_attribute of cuda.h."""
_SM_SHARED_BYTES = 81
"""CUdevice_attribute of cuda.h."""


_SLOW: dict[str, tuple[type, ...]] = {
    "cuInit": (c_uint,),
    "cuDeviceGet": (c_void_p, c_int),
    "cuDeviceGetAttribute": (c_void_p, c_int, c_int),
    "cuDevicePrimaryCtxRetain": (c_void_p, c_int),
    "cuModuleLoadData": (c_void_p, c_char_p),
    "cuModuleGetFunction": (c_void_p, c_void_p, c_char_p),
    "cuFuncSetAttribute": (c_void_p, c_int, c_int),
    "cuOccupancyMaxActiveBlocksPerMultiprocessor": (c_void_p, c_void_p, c_int, c_size_t),
    "cuGetErrorName": (c_int, c_void_p),
    "cuGetErrorString": (c_int, c_void_p),
}
"""Called without the interpreter's lock."""
_QUICK: dict[str, tuple[type, ...]] = {
    "cuCtxSetCurrent": (c_void_p,),
    "cuLaunchKernelEx": (c_void_p, c_void_p, c_void_p, c_void_p),
    "cuMemsetD8Async": (c_uint64, c_ubyte, c_size_t, c_void_p),
}
"""Called with the interpreter's lock: to get it back can take longer than such a call."""


class DriverError(RuntimeError):
    """The driver refused a call; the message says which, and why."""


class _AttributeValue(ctypes.Union):
    _fields_ = (
        ("flag", c_int), ("cluster", c_uint * 3), ("pointer", c_void_p), ("pad", c_char * 64),
    )  # fmt: skip


class _Attribute(ctypes.Structure):
    _fields_ = (("id", c_uint), ("pad", c_uint), ("value", _AttributeValue))


class _LaunchConfig(ctypes.Structure):
    _fields_ = (
        ("grid", c_uint * 3), ("block", c_uint * 3), ("shared_bytes", c_uint), ("stream", c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)), ("num_attributes", c_uint),
    )  # fmt: skip


class _Driver:
    """The functions of the driver that are called here."""

    def __init__(self, library: str = _LIBRARY) -> None:
        try:
            slow, quick = ctypes.CDLL(library), ctypes.PyDLL(library)
        except OSError as error:
            raise DriverError(f"the NVIDIA driver's library cannot be loaded: {error}") from None
        self._slow = slow
        for functions, loaded in ((_SLOW, slow), (_QUICK, quick)):
            for name, types in functions.items():
                function = getattr(loaded, name)
                function.argtypes, function.restype = types, c_int
        self.set_current = quick.cuCtxSetCurrent
        self.launch = quick.cuLaunchKernelEx
        self.memset = quick.cuMemsetD8Async
        self.call("cuInit", 0)

    def call(self, name: str, *args: object) -> None:
        """Call a function that may take long. Raises `DriverError`."""
        self.check(getattr(self._slow, name)(*args), name)

    def check(self, result: int, what: str) -> None:
        """Raise `DriverError` unless `result`, a CUresult, is success."""
        if result:
            raise DriverError(f"{what}: {self._describe(result)}")

    def _describe(self, result: int) -> str:
        name, text = c_char_p(), c_char_p()
        if self._slow.cuGetErrorName(result, byref(name)) or name.value is None:
            return f"CUDA error {result}"
        self._slow.cuGetErrorString(result, byref(text))
        return f"{name.value.decode()} ({(text.value or b'').decode()})"


@cache
def driver() -> _Driver:
    """The driver's library. Raises `DriverError` where there is none."""
    return _Driver()


class Module:
    """A built cubin on one GPU, or its PTX where the GPU is newer than the cubin."""

    def __init__(self, product: Path, cubin: Cubin, device: int) -> None:
        """Load it.

        Args:
            product: from `build_tts.build`.
            cubin: what it holds.
            device: index of the GPU.

        Raises:
            DriverError: the driver is missing, or refuses the file.
        """
        self._driver, self._product, self.cubin = driver(), product, cubin
        self.facts = cubin.facts
        """What the sources declare with csrc/facts.cuh."""
        self._kernels: dict[str, c_void_p] = {}
        self._granted: dict[str, int] = {}
        """Dynamic shared memory that a CTA of each kernel may have, in bytes."""
        ordinal, self._context, self._module = c_int(), c_void_p(), c_void_p()
        sm_bytes = c_int()
        self._driver.call("cuDeviceGet", byref(ordinal), device)
        self._driver.call("cuDeviceGetAttribute", byref(sm_bytes), _SM_SHARED_BYTES, ordinal)
        self.sm_shared_bytes = sm_bytes.value
        """Shared memory of an SM."""
        self._driver.call("cuDevicePrimaryCtxRetain", byref(self._context), ordinal)
        self.make_current()
        self._load()

    def _load(self) -> None:
        try:
            self._driver.call("cuModuleLoadData", byref(self._module), self._product.read_bytes())
        except DriverError as error:
            if not ptx_of(self._product).is_file():
                raise DriverError(f"{self._product}: {error}") from None
            self._load_ptx()

    def _load_ptx(self) -> None:
        ptx = ptx_of(self._product)
        try:
            self._driver.call("cuModuleLoadData", byref(self._module), ptx.read_bytes() + b"\0")
        except DriverError as error:
            raise DriverError(f"{ptx}: {error}") from None

    def make_current(self) -> None:
        """Make the GPU's primary context, which PyTorch uses, the one of this thread."""
        self._driver.check(self._driver.set_current(self._context), "cuCtxSetCurrent")

    def kernel(self, name: str, shared_bytes: int = 0) -> c_void_p:
        """A kernel by its name in the source, whose CTAs may have so much dynamic shared memory."""
        if name not in self._kernels:
            self.make_current()
            found = c_void_p()
            self._driver.call("cuModuleGetFunction", byref(found), self._module, name.encode())
            self._kernels[name] = found
        if shared_bytes > self._granted.get(name, 0):  # launches that want less have more
            self._set(name, _MAX_DYNAMIC_SHARED_BYTES, shared_bytes)
            self._granted[name] = shared_bytes
        return self._kernels[name]

    def limit_shared_memory(self, name: str, sm_bytes: int) -> None:
        """Have an SM that runs a kernel use so much of its memory as shared memory, and not more."""
        if sm_bytes < self.sm_shared_bytes:
            self.kernel(name)
            self._set(name, _PREFERRED_CARVEOUT, 100 * sm_bytes // self.sm_shared_bytes)

    def _set(self, name: str, attribute: int, value: int) -> None:
        self.make_current()
        self._driver.call("cuFuncSetAttribute", self._kernels[name], attribute, value)

    def ctas_an_sm(self, kernel: c_void_p, threads: int, shared_bytes: int) -> int:
        """How many CTAs of a launch an SM can hold."""
        count = c_int()
        self._driver.call(
            "cuOccupancyMaxActiveBlocksPerMultiprocessor", byref(count), kernel, threads, shared_bytes
        )
        return count.value

    def fill(self, address: int, byte: int, num_bytes: int, cuda_stream: int) -> None:
        """Fill device memory with a byte, on a stream. Raises `DriverError`."""
        self.make_current()
        self._driver.check(self._driver.memset(address, byte, num_bytes, cuda_stream), "cuMemsetD8Async")


class Launch:
    """A launch of a kernel that can be repeated; what `params` hold is read anew each time."""

    def __init__(
        self,
        module: Module,
        kernel: c_void_p,
        params: Sequence[ctypes._CDataType],
        *,
        grid: tuple[int, int],
        threads: int,
        shared_bytes: int = 0,
        cooperative: bool = False,
        early: bool = False,
        cluster: int = 1,
    ) -> None:
        """Prepare it.

        Args:
            module, kernel: what is launched.
            params: the kernel's parameters, ctypes data that the kernel's own types mirror.
            grid: CTAs in x and y.
            threads: of a CTA.
            shared_bytes: dynamic shared memory of a CTA.
            cooperative: whether CTAs wait for each other, so that all must fit on the GPU.
            early: whether it may begin before the one ahead of it has ended.
            cluster: CTAs of a cluster, in x.
        """
        self._module, self._kernel, self._kept = module, kernel, tuple(params)
        self._driver = driver()
        self._params = (c_void_p * len(params))(*(ctypes.addressof(one) for one in params))
        chosen = []
        for used, number, value in (
            (cooperative, _COOPERATIVE, _AttributeValue(flag=1)),
            (early, _PROGRAMMATIC_STREAM_SERIALIZATION, _AttributeValue(flag=1)),
            (cluster > 1, _CLUSTER_DIMENSION, _AttributeValue(cluster=(c_uint * 3)(cluster, 1, 1))),
        ):
            if used:
                chosen.append(_Attribute(number, 0, value))
        self._attributes = (_Attribute * max(len(chosen), 1))(*chosen)
        self._config = _LaunchConfig(
            (c_uint * 3)(*grid, 1), (c_uint * 3)(threads, 1, 1), shared_bytes, None,
            self._attributes, len(chosen),
        )  # fmt: skip
        self._at = byref(self._config)

    def __call__(self, cuda_stream: int) -> None:
        """Put the launch on a stream. Raises `DriverError`."""
        self._module.make_current()
        self._config.stream = cuda_stream
        result = self._driver.launch(self._at, self._kernel, self._params, None)
        if result:
            self._driver.check(result, "the kernel cannot be launched")


_read = cache(read_cubin)


@cache
def _load(product: Path, device: int) -> Module:
    return Module(product, _read(product), device)


def load_module(product: Path, device: torch.device) -> Module:
    """A built cubin on a GPU, loaded once a process.

    Raises:
        CubinError: it is no cubin.
        DriverError: the driver is missing, or refuses it.
    """
    _read(product)  # what is wrong with it is told first
    driver()
    with torch.cuda.device(device):  # is left as it was found
        return _load(product, torch.cuda.current_device())
