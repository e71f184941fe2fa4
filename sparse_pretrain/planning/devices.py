"""What data sheets say of devices that a run may be planned for."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_pretrain.errors import UserError
from sparse_pretrain.hardware import PEAK_TFLOPS


@dataclass(frozen=True)
class Device:
    """One device and its links; GB are 1e9 bytes.

    memory_gb: of its own.
    link_gbs, link: GB/s in each direction to the other devices of its node, and what that is.
    network_gbs, network: GB/s of the network for each device, and whose; None = there is no usual one.
    """

    name: str
    memory_gb: float
    link_gbs: float
    link: str
    network_gbs: float | None = None
    network: str = ""

    @property
    def tflops(self) -> float:
        """Dense bf16 and fp16 peak."""
        return PEAK_TFLOPS[self.name]


# NVIDIA's data sheets of these products. Links: half of the sheet's figure, which adds up both directions.
_NVLINK3, _NVLINK4, _NVLINK5 = "NVLink 3, 600 GB/s", "NVLink 4, 900 GB/s", "NVLink 5, 1.8 TB/s"
_PCIE4, _PCIE5 = "PCIe 4.0 x16, 64 GB/s", "PCIe 5.0 x16, 128 GB/s"
_DEVICES = (
    Device("B200", 180, 900, _NVLINK5, 50, "DGX B200: a 400 Gb/s ConnectX-7 for each GPU"),
    Device("H200", 141, 450, _NVLINK4, 50, "DGX H200: a 400 Gb/s ConnectX-7 for each GPU"),
    Device("H100", 80, 450, _NVLINK4, 50, "DGX H100: a 400 Gb/s ConnectX-7 for each GPU"),
    Device("H100 PCIe", 80, 64, _PCIE5),
    Device("A100", 80, 300, _NVLINK3, 25, "DGX A100: a 200 Gb/s ConnectX-6 for each GPU"),
    Device("L40S", 48, 32, _PCIE4),
    Device("RTX 4090", 24, 32, _PCIE4),
    Device("RTX 3090", 24, 32, _PCIE4),
)
DEVICES = {device.name: device for device in _DEVICES}


def find_device(name: str) -> Device:
    """Raises UserError, naming `device`, if its data sheet is not known."""
    if name not in DEVICES:
        hint = "For another one, take the nearest and set memory_gb, bandwidth_gbs, network_gbs and trainer.peak_tflops"
        raise UserError("device", name, list(DEVICES), hint)
    return DEVICES[name]
