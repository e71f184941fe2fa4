"""Compile the Triton kernels ahead of time, without a GPU, and read the machine code.

    python tests/sparse24/aot.py [case ...]

prints for each case and architecture one JSON object a line: registers, spills, instructions, and the widths of
the accesses to global memory. To be run in a process where TRITON_INTERPRET is not set.

To add a kernel, add a case to the table:

    kernel     module of sparse24 and name of the function
    args       type of each argument that is not constexpr. Pointers and integers are taken to be divisible by 16, as
               they are for contiguous tensors with common shapes.
    constants  value of each constexpr argument, and of arguments that the launcher specialises: None, a stride of 1.
    warps      warps a program (default 4)
    elements   entries of the main input a program handles: gives `instructions_per_element` (default: not computed;
               meaningful for kernels without loops)
    archs      compute capabilities (default all of ARCHS)
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

ARCHS = (80, 89, 90, 100)

PACKED = {"values_ptr": "*i32", "metadata_ptr": "*i16"}
NOT_PACKED = {"values_ptr": None, "metadata_ptr": None}
MASK = {"mask_ptr": "*i32", "flips_ptr": "*i64", "mask_row_stride": "i32", "mask_col_stride": "i32"}
NO_MASK = {"mask_ptr": None, "flips_ptr": None, "mask_row_stride": 0, "mask_col_stride": 0, "MASK_WORDS": False}
PRUNE_SIZES = {"rows": "i32", "padded": "i32", "groups": "i32", "words": "i32", "row_stride": "i32"}
TILE = {"col_stride": 1, "ROW_MAJOR": True, "R": 16, "G": 64}


def _prune(
    how: str, weight: str, dtype: str | None, mask: bool, fragments: bool = False, **more: Any
) -> dict[str, Any]:
    args = {"weight_ptr": weight, **PRUNE_SIZES} | (PACKED if dtype else {}) | (MASK if mask else {})
    constants = TILE | {"HOW": how, "DTYPE": dtype, "FRAGMENTS": fragments, "MASK_WORDS": True, "scale_ptr": None}
    constants |= ({} if dtype else NOT_PACKED) | ({} if mask else NO_MASK) | more.pop("constants", {})
    args |= more.pop("args", {})
    constants = {name: value for name, value in constants.items() if name not in args}
    return {"kernel": "prune._prune_pack", "args": args, "constants": constants, "elements": 4096, **more}


_TRANSPOSED = {"args": {"col_stride": "i32"}, "constants": {"row_stride": 1, "ROW_MAJOR": False, "R": 64, "G": 16}}
_TRANSPOSED_PRUNE = _prune("magnitude", "*fp32", "bf16", mask=False, fragments=True, **_TRANSPOSED)
_TRANSPOSED_PRUNE["args"].pop("row_stride")
_TRANSPOSED_PRUNE["constants"]["row_stride"] = 1


def _transposable(weight: str, dtype: str | None, search: bool, mask: bool, fragments: bool) -> dict[str, Any]:
    buffers = ("values_ptr", "metadata_ptr", "transpose_values_ptr", "transpose_metadata_ptr")
    sizes = ("block_rows", "block_cols", "padded_rows", "padded_cols", "row_words", "col_words", "row_stride")
    args = {"weight_ptr": weight, **dict.fromkeys(sizes, "i32")}
    constants = {"SEARCH": search, "DTYPE": dtype, "FRAGMENTS": fragments, "MASK_WORDS": mask, "T": 16}
    constants |= {"col_stride": 1, "ROW_MAJOR": True}
    if dtype:
        args |= dict(zip(buffers, ("*i32", "*i16") * 2, strict=True))
    else:
        constants |= dict.fromkeys(buffers)
    if mask:
        args |= MASK
    else:
        constants |= {name: value for name, value in NO_MASK.items() if name != "MASK_WORDS"}
    return {"kernel": "transposable._transposable", "args": args, "constants": constants, "elements": 4096, "warps": 8}


CASES: dict[str, dict[str, Any]] = {
    "magnitude_fp32_rows": _prune("magnitude", "*fp32", "bf16", mask=True),
    "magnitude_fp32_fragments": _prune("magnitude", "*fp32", "bf16", mask=True, fragments=True),
    "magnitude_bf16_fragments": _prune("magnitude", "*bf16", "bf16", mask=False, fragments=True),
    "magnitude_of_a_transposed_view": _TRANSPOSED_PRUNE,
    "mask_fp32_fragments": _prune("mask", "*fp32", "bf16", mask=True, fragments=True, args={"flips_ptr": "*i64"}),
    "update_mask_fp32": _prune("magnitude", "*fp32", None, mask=True),
    "soft_threshold_fp32_fragments": _prune(
        "soft_threshold", "*fp32", "bf16", mask=False, fragments=True, args={"scale_ptr": "*fp32"}
    ),
    "magnitude_fp32_values_fp32": _prune("magnitude", "*fp32", "fp32", mask=False),
    "unpack_bf16_fragments": {
        "kernel": "prune._unpack",
        "args": {**PACKED, "dense_ptr": "*i16", "rows": "i32", "groups": "i32", "words": "i32"},
        "constants": {"FRAGMENTS": True, "R": 16, "G": 64},
        "elements": 4096,
    },
    "transposable_fp32_fragments": _transposable("*fp32", "bf16", search=True, mask=True, fragments=True),
    "transposable_fp32_rows": _transposable("*fp32", "bf16", search=True, mask=True, fragments=False),
    "transposable_bf16_fragments": _transposable("*bf16", "bf16", search=True, mask=False, fragments=True),
    "transposable_fp32_values_fp32": _transposable("*fp32", "fp32", search=True, mask=False, fragments=False),
    "transposable_mask_fp32": _transposable("*fp32", None, search=True, mask=True, fragments=False),
    "pack_both_fp32_fragments": _transposable("*fp32", "bf16", search=False, mask=True, fragments=True),
}


def _decompress(dtype: str, tokens: int, step: int, split: bool = False) -> dict[str, Any]:
    sizes = dict.fromkeys(("n", "m", "k", "words", "x_row_stride", "steps_a_split"), "i32")
    values, result = ("*fp32" if dtype == "fp32" else "*i32"), ("*fp32" if split else f"*{dtype}")
    args = {"x_ptr": f"*{dtype}", "values_ptr": values, "metadata_ptr": "*i16", "y_ptr": result, **sizes}
    constants: dict[str, Any] = {"BN": tokens, "BM": 64, "BK": step, "SPLIT": split}
    constants, args = (constants | {"bias_ptr": None}, args) if split else (constants, args | {"bias_ptr": f"*{dtype}"})
    return {"kernel": "decompress._decompress_linear", "args": args, "constants": constants}


CASES |= {
    "decompress_16_bit_16_tokens": _decompress("bf16", 16, 128),
    "decompress_16_bit_32_tokens_split": _decompress("fp16", 32, 128, split=True),
    "decompress_16_bit_64_tokens": _decompress("fp16", 64, 64),
    "decompress_16_bit_128_tokens": _decompress("bf16", 128, 64),
    "decompress_fp32_128_tokens": _decompress("fp32", 128, 32),
}


def _mvue(grad: str, dtype: str, dense: bool = False, fragments: bool = False) -> dict[str, Any]:
    sizes = dict.fromkeys(("key0", "key1", "tokens", "features", "rows", "groups", "words", "token_stride"), "i32")
    args = {"grad_ptr": grad, "position_ptr": "*i64", **sizes} | ({"dense_ptr": f"*{dtype}"} if dense else PACKED)
    constants = {"feature_stride": 1, "DTYPE": dtype, "FRAGMENTS": fragments, "Q": 8, "F": 64}
    constants |= NOT_PACKED if dense else {"dense_ptr": None}
    return {"kernel": "mvue._mvue", "args": args, "constants": constants, "elements": 8192}


def _gated(dtype: str, kind: str, gate: bool, backward: bool = False) -> dict[str, Any]:
    inputs, results = ["up"] + ["gate"] * gate, ["out"]
    if backward:
        inputs, results = ["dy", *inputs], ["dup"] + ["dgate"] * gate
    args = {f"{name}_ptr": f"*{dtype}" for name in inputs + results} | {"features": "i32"}
    strided = [*inputs, *(results if backward else [])]
    args |= {f"{name}_row_stride": "i32" for name in strided}
    constants = {"KIND": kind, "BLOCK": 1024} | {f"{name}_col_stride": 1 for name in strided}
    if not gate:
        for name in ("gate", "dgate") if backward else ("gate",):
            constants |= {f"{name}_ptr": None, f"{name}_row_stride": 0, f"{name}_col_stride": 0}
    return {"kernel": f"gated.{'_backward' if backward else '_forward'}", "args": args, "constants": constants,
            "elements": 1024}  # fmt: skip


def _relu2(dtype: str, packed: bool = False, fragments: bool = False, backward: bool = False) -> dict[str, Any]:
    args = {"x_ptr": f"*{dtype}", "tokens": "i32", "groups": "i32", "row_stride": "i32"}
    constants = {"col_stride": 1, "DTYPE": dtype, "ROW_MAJOR": True, "R": 16, "G": 64}
    if packed:
        args |= PACKED | {"words": "i32"}
        constants |= {"FRAGMENTS": fragments}
    else:
        args |= {"out_ptr": f"*{dtype}"}
        constants |= {"DY_ROW_MAJOR": True}
        if backward:
            args |= {"dy_ptr": f"*{dtype}", "dy_row_stride": "i32"}
            constants |= {"dy_col_stride": 1}
        else:
            constants |= {"dy_ptr": None, "dy_row_stride": 0, "dy_col_stride": 0}
    name = "_relu2_prune_pack" if packed else "_relu2_prune"
    return {"kernel": f"gated.{name}", "args": args, "constants": constants, "elements": 4096}


def _adamw(place: str, grad: str, moments: str, aligned: bool = True, frozen: bool = False) -> dict[str, Any]:
    numbers = ("lr", "take1", "take2", "log_beta1", "log_beta2", "eps", "weight_decay", "decay_factor")
    scalars = {"found_inf_ptr": "*fp32", "grad_scale_ptr": "*fp32", **dict.fromkeys(numbers, "fp32")}
    constants = {"PLACE": place, "FROZEN": frozen, "LR_IN_MEMORY": False}
    constants |= {"P": "fp32", "G": grad, "M": moments, "V": moments}
    constants |= {"ALIGNED": aligned, "BLOCK": 1024}
    args = {"table_ptr": "*i64", "owners_ptr": "*i32", **scalars}
    return {"kernel": "optim._adamw", "args": args, "constants": constants, "warps": 8, "elements": 1024}


def _fp8(x: str, mantissa: int, transposed: bool = False) -> dict[str, Any]:
    args = {"x_ptr": f"*{x}", "q_ptr": "*u8", "amax_ptr": "*fp32", "scale_ptr": "*fp32", "cols": "i32",
            "row_stride": "i32"}  # fmt: skip
    bias, largest = (7, 448.0) if mantissa == 3 else (15, 57344.0)
    constants = {"MANTISSA": mantissa, "BIAS": bias, "LARGEST": largest, "SMALLEST_SCALE": 2.0**-126, "col_stride": 1}
    if transposed:
        args |= {"qt_ptr": "*u8", "rows": "i32"}
        constants |= {"R": 64, "C": 64}
    else:
        constants |= {"qt_ptr": None, "rows": 1, "R": 1, "C": 2048}
    elements = constants["R"] * constants["C"]
    return {"kernel": "fp8._quantize_kernel", "args": args, "constants": constants, "elements": elements}


CASES |= {
    "mvue_bf16_rows": _mvue("*bf16", "bf16"),
    "mvue_bf16_fragments": _mvue("*bf16", "bf16", fragments=True),
    "mvue_fp32_fragments": _mvue("*fp32", "fp16", fragments=True),
    "mvue_fp32_values_fp32": _mvue("*fp32", "fp32"),
    "mvue_bf16_dense": _mvue("*bf16", "bf16", dense=True),
    "gelu_bf16": _gated("bf16", "gelu", gate=False),
    "geglu_bf16": _gated("bf16", "geglu", gate=True),
    "gelu_backward_bf16": _gated("bf16", "gelu", gate=False, backward=True),
    "geglu_backward_bf16": _gated("bf16", "geglu", gate=True, backward=True),
    "swiglu_backward_fp32": _gated("fp32", "swiglu", gate=True, backward=True),
    "relu2_backward_fp16": _gated("fp16", "relu2", gate=False, backward=True),
    "relu2_prune_pack_bf16_rows": _relu2("bf16", packed=True),
    "relu2_prune_pack_bf16_fragments": _relu2("bf16", packed=True, fragments=True),
    "relu2_prune_bf16": _relu2("bf16"),
    "relu2_prune_backward_bf16": _relu2("bf16", backward=True),
    "adamw_fp32": _adamw("none", "fp32", "fp32"),
    "adamw_gradient_decay_bf16_gradients": _adamw("gradient", "bf16", "fp32"),
    "adamw_momentum_decay_bf16_moments": _adamw("momentum", "fp32", "bf16"),
    "adamw_frozen_momentum_decay": _adamw("momentum", "fp32", "fp32", frozen=True),
    "adamw_weight_decay_unaligned": _adamw("weight", "fp32", "fp32", aligned=False),
    "amax_bf16": {
        "kernel": "fp8._amax_kernel",
        "args": {"x_ptr": "*bf16", "result_ptr": "*i32", "cols": "i32", "row_stride": "i32"},
        "constants": {"rows": 1, "col_stride": 1, "R": 1, "C": 2048},
        "elements": 2048,
    },
    "quantize_bf16_e4m3": _fp8("bf16", 3),
    "quantize_bf16_e4m3_transposed": _fp8("bf16", 3, transposed=True),
    "quantize_fp32_e5m2": _fp8("fp32", 2),
    "pack_fragments_fp8": {
        "kernel": "fp8._pack_fragments",
        "args": {"q_ptr": "*i32", "values_ptr": "*i32", "metadata_ptr": "*i16", "rows": "i32", "groups": "i32"},
        "constants": {"R": 16, "G": 64},
        "elements": 4096,
    },
}


def compile_case(case: dict[str, Any], arch: int) -> Any:
    """Triton's compiled kernel; its cubin is in `.asm["cubin"]`."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = case["kernel"].rsplit(".", 1)
    kernel = getattr(importlib.import_module(f"sparse24.{module}"), name)
    dtypes = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32, "fp8": tl.float8e4nv}
    constants = {
        name: dtypes.get(value, value) if isinstance(value, str) else value for name, value in case["constants"].items()
    }
    given = {*case["args"], *constants}
    if given != set(kernel.arg_names) or len(given) != len(case["args"]) + len(constants):
        raise ValueError(f"{case['kernel']}: arguments wrong or given twice: {given ^ set(kernel.arg_names)}")
    signature = {name: case["args"].get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith(("*", "i"))
    }
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": case.get("warps", 4), "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def inspect(cubin: bytes) -> dict[str, Any]:
    """Registers, stack, instructions and widths of global accesses of a cubin; empty if it cannot be disassembled."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, timeout=60).stdout
            for flag in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass)
    if not found or not opcodes:
        return {}
    while opcodes and opcodes[-1] in ("NOP", "BRA"):  # padding behind the last EXIT
        opcodes.pop()
    short = Counter(opcode.split(".")[0] for opcode in opcodes)
    width = Counter()
    for opcode in opcodes:
        kind, *modifiers = opcode.split(".")
        if kind in ("LDG", "STG"):
            bits = next((m for m in modifiers if m in ("64", "128", "U8", "S8", "U16", "S16")), "32")
            width[f"{kind}.{bits}"] += 1
    return {
        "registers": int(found[1]),
        "stack_bytes": int(found[2]),
        "spills": short["STL"] + short["LDL"],
        "instructions": len(opcodes),
        "global_accesses": dict(width),
        "opcodes": dict(short.most_common(20)),
    }


def main(names: list[str]) -> None:
    """Compile the named cases (all, if none is named) for their architectures."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))
    for name in names or CASES:
        case = CASES[name]
        for arch in case.get("archs", ARCHS):
            report: dict[str, Any] = {"case": name, "arch": arch}
            try:
                compiled = compile_case(case, arch)
            except Exception as error:  # one kernel that fails must not hide the others
                cause = error
                while cause.__cause__ is not None:  # Triton wraps an error once for each function it was compiling
                    cause = cause.__cause__
                report["error"] = f"{type(cause).__name__}: {cause}"
            else:
                report |= {"shared_bytes": compiled.metadata.shared} | inspect(compiled.asm["cubin"])
                if "elements" in case and "instructions" in report:
                    threads = 32 * case.get("warps", 4)
                    report["instructions_per_element"] = round(report["instructions"] * threads / case["elements"], 1)
            print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
