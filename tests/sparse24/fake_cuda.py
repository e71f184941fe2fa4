"""`fake_cuda.c` compiled and loaded, with what it recorded: the driver API's caller is tested without a GPU."""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from sparse24.cubin import KINDS, Driver, Entry

SOURCE = Path(__file__).with_name("fake_cuda.c")


class FakeCuda:
    """The library, and a `Driver` on it."""

    def __init__(self, folder: Path) -> None:
        compiler = shutil.which("cc")
        if compiler is None:
            pytest.skip("needs a C compiler")
        library = folder / "libfakecuda.so"
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, SOURCE], check=True, timeout=60)
        self._library = ctypes.CDLL(str(library))
        self.driver = Driver(str(library))

    def get(self, name: str, kind: Any) -> Any:
        return kind.in_dll(self._library, name)

    def calls(self) -> list[str]:
        """Functions called since the last time."""
        buffer = self.get("calls", ctypes.c_char * 4096)
        names, buffer.value = buffer.value.decode().split(), b""
        return names

    def fail(self, function: str, code: int) -> None:
        """Let this function return this code from now on; 0 = none."""
        self.get("fail_name", ctypes.c_char * 64).value = function.encode()
        self.get("fail_code", ctypes.c_int).value = code

    def expect(self, entry: Entry) -> None:
        """Tell how many bytes each parameter of the next launch has, as the driver knows from the cubin."""
        sizes = [parameter.size for parameter in entry.parameters]
        self.get("sizes", ctypes.c_int * 64)[: len(sizes)] = sizes
        self.get("size_count", ctypes.c_int).value = len(sizes)

    def launched(self, entry: Entry) -> dict[str, Any]:
        """The last launch: grid, block, shared, cluster, stream, parameters (argument, kind, value)."""
        words = list(self.get("launch", ctypes.c_uint * 10))
        raw = bytes(self.get("parameters", ctypes.c_ubyte * 4096))
        values, at = [], 0
        for parameter in entry.parameters:
            (value,) = struct.unpack_from("<" + KINDS[parameter.kind][0], raw, at)
            values.append((parameter.argument, parameter.kind, value))
            at += parameter.size
        assert self.get("unaligned", ctypes.c_int).value == 0
        assert self.get("launch_function", ctypes.c_uint64).value == 0x22
        return {
            "grid": tuple(words[:3]),
            "block": tuple(words[3:6]),
            "shared": words[6],
            "cluster": words[8:10] if words[7] else None,
            "stream": self.get("launch_stream", ctypes.c_uint64).value,
            "parameters": values,
        }


def decode_map(raw: bytes) -> dict[str, Any]:
    """The arguments that a tensor map of the fake driver was made of."""
    address, columns, rows, pitch, element, rank, box0, box1, step0, step1, *rest = struct.unpack_from("<4Q11I", raw)
    interleave, swizzle, promotion, fill, mark = rest
    assert (rank, step0, step1, interleave, promotion, fill, mark) == (2, 1, 1, 0, 2, 0, 0x2424)
    box = (box1, box0)
    return {
        "address": address,
        "shape": (rows, columns),
        "pitch": pitch,
        "element": element,
        "box": box,
        "swizzle": swizzle,
    }
