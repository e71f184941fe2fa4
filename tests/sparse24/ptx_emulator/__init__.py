"""A PTX emulator in numpy: runs the compiled GEMM kernels where there is no GPU.

    emulator = Emulator(ptx)                       # the text of one kernel, as in compiled.asm["ptx"]
    counts = emulator.launch(grid, arguments, cluster=None, lazy=True, seed=None, only=None, shared=231424)

grid: CTAs in x, y, z (with clusters: CTAs, not clusters). arguments, in the order of the PTX parameters:
    int, float       a scalar
    numpy array      a pointer to its first element; contiguous; what the kernel writes is in the array afterwards
    Pointer          an array and an offset in bytes, which may lie outside: only accesses are checked
    TensorMap        a TMA descriptor; Triton passes it as `*tensor_map.arguments()` (descriptor, shape, strides)
Missing trailing arguments (Triton's scratch pointers) are null. bfloat16 and float8 are arrays of uint16 and uint8.
cluster: CTAs of a cluster, along x; by default as the PTX says.
only: the CTAs to run, as (x, y, z); with clusters name every CTA of each.
shared: bytes of dynamic shared memory (compiled.metadata.shared), which are checked.
Returns how often each instruction was executed by a warp.

What is asynchronous runs in one of two ways, and a correct kernel gives the same result in both:
    lazy=False       copies are done where they are issued, as early as possible: a buffer that is overwritten too
                     early is found by its wrong result;
    lazy=True        as late as possible: cp.async at the wait for its group, TMA loads when no warp can go on, TMA
                     stores and wgmma (which read shared memory) at the wait. A missing wait is found.
seed: None lets each warp run until it has to wait, in order; a number draws which warps are ahead at random.

Errors (EmulatorError, with the instruction, its number, the CTA and the warp): accesses outside of an array or of
shared memory, misaligned ones, shared memory read before it was written or touched while a copy to it is under way,
registers that are read while a wgmma still has to write them or that change while it still has to read them, a
missing wgmma.fence, generic writes that TMA or wgmma read without fence.proxy.async, mbarrier misuse, invalid
metadata, descriptors that do not fit, and deadlocks (what each warp waits for). Not found: races that no tried order
of the warps shows, and whatever depends on time. Not modelled: registers and occupancy, atomics, floating-point
rounding inside of an mma (the sums are float32 here), __nanosleep, texture, local memory, calls.

Fragment and metadata layouts are those of the PTX ISA: 9.7.14.6 (mma.sp) and 9.7.15.5-6 (wgmma, wgmma.sp; its
metadata figures are those of mma.sp). With 16-bit types the sparsity selector names the pair of threads of each
four, (0, 1) or (2, 3), that holds the metadata; with 8-bit types all four hold it.
"""

from .arguments import Pointer, TensorMap
from .emulator import Emulator
from .errors import Deadlock, EmulatorError

__all__ = ["Deadlock", "Emulator", "EmulatorError", "Pointer", "TensorMap"]
