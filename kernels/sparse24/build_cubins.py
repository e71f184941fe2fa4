"""Compile every GEMM variant ahead of time and write `cubins/` with its manifest; `scripts/build-cubins` runs this.

Needs Triton 3.9 and no GPU. The result depends on the sources and on Triton's version alone, so `--check` can tell
whether the cubins are those of the sources.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from sparse24.cubin import FOLDER, KINDS
from sparse24.gemm_variant import Variant, compile_variant

TRITON = "3.9.0"
PTXAS = "12.9"  # of the two that Triton brings, the one whose machine code drivers for CUDA 12 load as well
PROCESSES = 2

# type in a signature -> kind of a parameter; pointers and descriptors are told by how they begin
_KIND_OF_TYPE = {"i32": "i32", "i64": "i64", "fp32": "fp32"}
_PTX_TYPE = {"pointer": "u64", "scratch": "u64", "i64": "u64", "i32": "u32", "fp32": "f32"}
_HOST_ELEMENT = {8: 10, 9: 8, 10: 9}  # CUtensorMapDataType where it differs from the device's numbers, as in Triton


def variants() -> dict[str, Variant]:
    """All variants by name.

    Raises:
        ValueError: two have the same name.
    """
    from sparse24 import gemm_mma_sp, gemm_wgmma_sp

    listed = [*gemm_wgmma_sp.VARIANTS, *gemm_mma_sp.VARIANTS]
    by_name = {variant.name: variant for variant in listed}
    if len(by_name) != len(listed):
        raise ValueError(f"names of variants must differ; found {sorted(v.name for v in listed)}")
    return by_name


def build_one(name: str, folder: Path) -> dict[str, Any]:
    """Compile one variant, write its cubin to the folder, and return its entry of the manifest.

    Raises:
        RuntimeError: the code spills registers, needs scratch memory, holds a path of this
            machine, or its parameters are not those that `cubin` passes.
    """
    import triton

    variant = variants()[name]
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    os.environ |= {
        "TRITON_PTXAS_PATH": str(tools / "ptxas"),
        "TRITON_PTXAS_BLACKWELL_PATH": str(tools / "ptxas"),  # Triton's own choice for sm_90 is that of CUDA 13
        "TRITON_DISABLE_LINE_INFO": "1",
        "TRITON_DEFAULT_FP_FUSION": "1",
    }
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        compiled = compile_variant(variant)
    code, metadata = compiled.asm["cubin"], compiled.metadata
    file = f"{name}.cubin"
    (folder / file).write_bytes(code)

    def tool(*arguments: str) -> str:
        command = [str(tools / arguments[0]), *arguments[1:]]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def refuse(reason: str) -> RuntimeError:
        return RuntimeError(f"{name}: {reason}")

    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise refuse("needs scratch memory, which the launcher does not give")
    if path := re.search(rb"(?:/[\w.-]{3,}){2,}", code):
        raise refuse(f"the cubin holds the path {path.group().decode()}")
    usage = tool("cuobjdump", "-res-usage", str(folder / file))
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage).groups())  # type: ignore[union-attr]
    if stack or local:
        raise refuse(f"spills: {stack} bytes of stack, {local} of local memory")
    ptx = compiled.asm["ptx"]
    threads = int(re.search(r"^\.reqntid\s+(\d+)", ptx, re.MULTILINE)[1])  # type: ignore[index]
    if threads != 32 * metadata.num_warps:
        raise refuse(f"{threads} threads in the PTX, {metadata.num_warps} warps in Triton's metadata")
    version = re.search(r"release (\S+),", tool("ptxas", "--version"))[1]  # type: ignore[index]
    if (triton.__version__, version) != (TRITON, PTXAS):
        raise refuse(f"Triton must be {TRITON} with ptxas {PTXAS}; found {triton.__version__} with {version}")
    return {
        "name": name,
        "file": file,
        "sha256": sha256(code).hexdigest(),
        "symbol": metadata.name,
        "form": variant.form,
        "dtype": variant.dtype,
        "capability": variant.capability,
        "block": list(variant.block),
        "threads": threads,
        "cluster": metadata.num_ctas,
        "shared": metadata.shared,
        "registers": registers,
        # only a program that computes several tiles asks how many programs there are
        "persistent": bool(re.search(r"%n(ctaid|clusterid)\.x", ptx)),
        "triton": triton.__version__,
        "ptxas": version,
        "parameters": _parameters(variant, compiled, tool("cuobjdump", "-elf", str(folder / file)), refuse),
    }


def _parameters(variant: Variant, compiled: Any, elf: str, refuse: Any) -> list[dict[str, Any]]:
    """The parameter list: from the signature, and the same by the PTX (types) and by the cubin (sizes, offsets)."""
    expected: list[dict[str, Any]] = []
    formats = iter(compiled.metadata.tensordesc_meta or [])
    for argument, type_ in variant.signature.items():
        if type_ == "constexpr":
            continue
        if not type_.startswith("tensordesc<"):
            kind = "pointer" if type_.startswith("*") else _KIND_OF_TYPE[type_]
            expected.append({"argument": argument, "kind": kind})
            if (divisor := variant.attrs.get(argument, 1)) > 1:
                expected[-1]["divisor"] = divisor
            continue
        format_ = next(formats)
        if format_["fp4_padded"] or format_["is_im2col"]:
            raise refuse(f"{argument} has a kind of tensor map that the launcher does not make")
        tensor_map = {
            "box": format_["block_size"],
            "element": _HOST_ELEMENT.get(format_["elem_type"], format_["elem_type"]),
            "element_bytes": format_["elem_size"],
            "swizzle": format_["swizzle"],
        }
        expected.append({"argument": argument, "kind": "tensor_map", "tensor_map": tensor_map})
        for kind in ("i32", "i64"):
            expected += [{"argument": argument, "kind": kind} for _ in format_["block_size"]]
    expected += [{"argument": "", "kind": "scratch"}] * 2

    declared = re.search(r"\.visible \.entry \w+\(\n(.*?)\n\)", compiled.asm["ptx"], re.DOTALL)[1].split("\n")  # type: ignore[index]
    wanted = [
        r"\.param \.align (64|128) \.b8 \w+\[128\],?"
        if p["kind"] == "tensor_map"
        else rf"\.param \.{_PTX_TYPE[p['kind']]} .*"
        for p in expected
    ]
    if len(declared) != len(wanted) or not all(
        re.fullmatch(w, d.strip()) for w, d in zip(wanted, declared, strict=True)
    ):
        raise refuse(f"the signature means {[p['kind'] for p in expected]}, but the PTX declares {declared}")

    recorded = {
        int(ordinal, 16): (int(size, 16), int(offset, 16))
        for ordinal, offset, size in re.findall(r"Ordinal : 0x(\w+)\s+Offset\s+: 0x(\w+)\s+Size\s+: 0x(\w+)", elf)
    }
    if sorted(recorded) != list(range(len(expected))):
        raise refuse(f"{len(expected)} parameters expected, but the cubin records {sorted(recorded)}")
    for ordinal, parameter in enumerate(expected):
        size, offset = recorded[ordinal]
        if size != KINDS[parameter["kind"]][1]:
            raise refuse(f"parameter {ordinal} ({parameter}) has {size} bytes in the cubin")
        expected[ordinal] = {**parameter, "size": size, "offset": offset}
    return expected


def _exit_quietly() -> None:
    """At a normal exit Triton's bindings print a page about objects that they leaked."""
    atexit.register(os._exit, 0)


def _names() -> list[str]:
    return list(variants())


def build(folder: Path) -> None:
    """Write the cubin of every variant and manifest.json to an empty folder."""
    from sparse24.matmul import ARGUMENTS

    with ProcessPoolExecutor(PROCESSES, get_context("spawn"), initializer=_exit_quietly) as pool:
        names = pool.submit(_names).result()
        entries = list(pool.map(build_one, names, [folder] * len(names)))
    for entry in entries:
        if unknown := {p["argument"] for p in entry["parameters"]} - {"", *ARGUMENTS}:
            raise RuntimeError(f"{entry['name']}: arguments must be among {', '.join(ARGUMENTS)}; found {unknown}")
    digest = sha256("".join(entry["sha256"] for entry in entries).encode()).hexdigest()  # of all machine code
    text = json.dumps({"digest": digest, "kernels": entries}, indent=1, ensure_ascii=False)
    # one line a parameter: readable, and a change shows in a diff
    text = re.sub(
        r"\{\s+(\"argument\"[^{}]*(?:\{[^{}]*\}[^{}]*)?)\}", lambda m: "{" + " ".join(m[1].split()) + "}", text
    )
    text = re.sub(r"\[\s+([\d,\s]+?)\s+\]", lambda m: "[" + " ".join(m[1].split()) + "]", text)
    (folder / "manifest.json").write_text(text + "\n")


def differences(built: Path, shipped: Path) -> list[str]:
    """Names of the files that are not the same in both folders."""
    names = {file.name for folder in (built, shipped) for file in folder.glob("*") if file.is_file()}
    return sorted(
        name
        for name in names
        if not ((built / name).exists() and (shipped / name).exists())
        or (built / name).read_bytes() != (shipped / name).read_bytes()
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/build-cubins", description=__doc__)
    parser.add_argument("--check", action="store_true", help="build elsewhere and compare; exit 1 if something differs")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as temporary:
        built = Path(temporary)
        build(built)
        differing = differences(built, FOLDER)
        if check and differing:
            print(f"not what the sources give: {', '.join(differing)}; run scripts/build-cubins", file=sys.stderr)
            sys.exit(1)
        FOLDER.mkdir(exist_ok=True)
        for name in differing:
            if (built / name).exists():
                shutil.copyfile(built / name, FOLDER / name)
            else:
                (FOLDER / name).unlink()
    size = sum(file.stat().st_size for file in FOLDER.glob("*.cubin"))
    print(f"{len(list(FOLDER.glob('*.cubin')))} cubins, {size / 1e6:.1f} MB; written anew: {len(differing)}")


if __name__ == "__main__":
    main()
