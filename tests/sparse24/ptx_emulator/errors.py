"""What the emulator raises."""


class EmulatorError(Exception):
    """The kernel does something that is undefined or that hardware refuses."""


class Deadlock(EmulatorError):
    """No warp can go on."""
