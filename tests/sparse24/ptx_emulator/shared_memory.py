"""Shared memory of a CTA: what each byte holds, whether it may be touched, and by which proxy it was written."""

from __future__ import annotations

import numpy as np

from .errors import EmulatorError
from .number_formats import UINT

SHARED_BASE = 1024  # the first KiB of a CTA's shared memory is the system's
OFFSET = 0xFFFFFF  # the part of a shared::cluster address below the CTA's rank
RANK_BITS = 24
WRITTEN, COPYING = 0xFF, 0x02  # states of a byte; 0: never written


def swizzle(offset: np.ndarray, width: int) -> np.ndarray:
    """The XOR of 16-byte units within rows of `width` bytes, on absolute offsets."""
    return offset ^ (((offset >> 7) & (width // 16 - 1)) << 4) if width else offset


class SharedMemory:
    """size: bytes that the kernel may use. warps: how many the CTA has. rank: its own in the cluster."""

    def __init__(self, rank: int, size: int, warps: int) -> None:
        self.rank = rank
        self.base = (rank << RANK_BITS) + SHARED_BASE  # the first address for the kernel
        self.end = SHARED_BASE + size
        whole = -(-self.end // 1024) * 1024
        self.data, self.state = np.zeros(whole, np.uint8), np.zeros(whole, np.uint8)
        self.views = {n: self.data.view(UINT[n]) for n in UINT}
        self.states = {n: self.state.view(UINT[n]) for n in UINT}
        # For the order between generic writes and what TMA and wgmma read ("proxies"): when and by which warp a byte
        # was written, in fences so far, -1 by TMA; and when each warp last executed fence.proxy.async.
        self.stamp, self.writer = np.full(whole, -1, np.int32), np.zeros(whole, np.uint8)
        self.clock, self.fences = 0, np.zeros(warps, np.int32)

    def offsets(self, addresses: np.ndarray, width: int) -> np.ndarray:
        """Checked offsets of shared::cta addresses."""
        if addresses.size == 0:
            return addresses
        if (addresses >> RANK_BITS != self.rank).any():
            raise EmulatorError(f"shared::cta address of another CTA: {int(addresses.max()):#x}")
        offset = addresses & OFFSET
        if offset.min() < SHARED_BASE or offset.max() + width > self.end:
            raise EmulatorError(
                f"shared access outside of the {self.end - SHARED_BASE} bytes: "
                f"{int(offset.min()) - SHARED_BASE} … {int(offset.max()) - SHARED_BASE + width}"
            )
        if (offset % width).any():
            raise EmulatorError(f"misaligned shared access of {width} bytes: {int(offset[offset % width != 0][0])}")
        return offset

    def check_state(self, state: np.ndarray, reading: bool) -> None:
        """Shared memory may be read where it is written and no copy is under way, and written where none is."""
        if (state == COPYING).any():
            verb = "read" if reading else "written"
            raise EmulatorError(f"shared memory {verb} while an asynchronous copy to it is under way (missing wait?)")
        if reading and (state == 0).any():
            raise EmulatorError("shared memory read before it was written")

    def load(self, addresses: np.ndarray, size: int, count: int) -> np.ndarray:
        """(lanes, count) elements of `size` bytes each."""
        index = (self.offsets(addresses, size * count) // size)[:, None] + np.arange(count)
        state = self.states[size][index]
        if (state != np.iinfo(state.dtype).max).any():
            self.check_state(np.ascontiguousarray(state).view(np.uint8), reading=True)
        return self.views[size][index]

    def store(self, addresses: np.ndarray, values: np.ndarray, warp: int) -> None:
        """values (lanes, count)."""
        size, count = values.itemsize, values.shape[1]
        index = (self.offsets(addresses, size * count) // size)[:, None] + np.arange(count)
        full = np.iinfo(values.dtype).max
        state = self.states[size][index]
        if ((state != full) & (state != 0)).any():
            self.check_state(np.ascontiguousarray(state).view(np.uint8), reading=False)
        self.views[size][index] = values
        self.states[size][index] = full
        written = (addresses & OFFSET)[:, None] + np.arange(size * count)
        self.stamp[written], self.writer[written] = self.clock, warp

    def begin_copy(self, offsets: np.ndarray) -> None:
        """An asynchronous copy to these bytes is under way from here on."""
        self.check_state(self.state[offsets], reading=False)
        self.state[offsets] = COPYING

    def end_copy(self, offsets: np.ndarray, data: np.ndarray, warp: int | None) -> None:
        """warp: whose generic write it is; None: TMA's."""
        self.data[offsets], self.state[offsets] = data, WRITTEN
        if warp is None:
            self.stamp[offsets] = -1
        else:
            self.stamp[offsets], self.writer[offsets] = self.clock, warp

    def fence(self, warp: int) -> None:
        """fence.proxy.async"""
        self.clock += 1
        self.fences[warp] = self.clock

    def gather_async(self, offsets: np.ndarray, reader: int, fences: np.ndarray) -> np.ndarray:
        """Bytes at offsets, read by TMA or wgmma for a warp; fences as they were when it issued the instruction.

        The fence may be the writer's, before a barrier, or the reader's, after it.
        """
        if offsets.min() < SHARED_BASE or offsets.max() >= self.end:
            raise EmulatorError("TMA or wgmma reads outside of the shared memory")
        self.check_state(self.state[offsets], reading=True)
        stamp, writer = self.stamp[offsets], self.writer[offsets]
        unfenced = (stamp >= fences[reader]) & (stamp >= fences[writer])
        if unfenced.any():
            raise EmulatorError(f"TMA or wgmma reads what warp {writer[unfenced][0]} wrote, without fence.proxy.async")
        return self.data[offsets]
