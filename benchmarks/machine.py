"""What was measured on: hardware, versions, clocks and power."""

from __future__ import annotations

import datetime
import platform
import re
import statistics
import subprocess
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from sparse24.dispatch import device_key

ROOT = Path(__file__).resolve().parent.parent
SMI_FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "utilization.gpu", "memory.used")
SMI_FACTS = ("name", "driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem", "memory.total")


def facts(device: torch.device) -> dict[str, Any]:
    """The hardware and versions; opens the device."""
    found: dict[str, Any] = {
        **device_key(device),
        "python": platform.python_version(),
        "device": device.type,
        "host": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
    }
    for package in ("numpy", "matplotlib", "tokenizers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "capability": f"sm_{properties.major}{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "nvidia_smi": smi(SMI_FACTS),
        }
    else:
        found["processor"] = _processor()
    return found


def short_name(found: dict[str, Any]) -> str:
    """For file names: `nvidia-h200`, `cpu`."""
    return re.sub(r"[^a-z0-9]+", "-", str(found.get("gpu", found.get("device", "cpu"))).lower()).strip("-")


def _commit() -> str:
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + (" with changes" if changed.strip() else "")


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1) if found else platform.processor()


def smi(fields: tuple[str, ...] = SMI_FIELDS) -> dict[str, str]:
    """One reading of nvidia-smi; empty if there is none."""
    try:
        line = subprocess.run(
            _query(fields), capture_output=True, text=True, check=True, timeout=20
        ).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return {}
    return dict(zip(fields, (value.strip() for value in line.split(",")), strict=False))


def _query(fields: tuple[str, ...]) -> list[str]:
    return ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]


class SmiLog:
    """Reads clocks and power twice a second, beside the measurements; does nothing without nvidia-smi."""

    def __init__(self) -> None:
        self.readings: list[tuple[float, list[float]]] = []
        try:
            self._process: subprocess.Popen[str] | None = subprocess.Popen(
                [*_query(SMI_FIELDS)[:-1], "--format=csv,noheader,nounits", "-lms", "500"],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        except OSError:
            self._process = None
            return
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                self.readings.append((time.time(), [float(value) for value in line.split(",")]))
            except ValueError:  # a field that this device does not have
                continue

    def between(self, start: float, end: float) -> dict[str, float]:
        """Median clocks and largest power in a span of time, over the readings at which the GPU was busy."""
        within = [values for at, values in self.readings if start <= at <= end and values[4] > 0]
        if not within:
            return {}
        return {
            "sm_mhz": statistics.median(values[0] for values in within),
            "sm_mhz_lowest": min(values[0] for values in within),
            "memory_mhz": statistics.median(values[1] for values in within),
            "power_w_highest": max(values[2] for values in within),
            "celsius_highest": max(values[3] for values in within),
        }

    def close(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
