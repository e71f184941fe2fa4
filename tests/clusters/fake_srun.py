"""What srun does, on this machine: FAKE_TASKS processes with the variables of a job step, their signals, the highest exit
code."""

import os
import signal
import subprocess
import sys

if __name__ == "__main__":
    command = sys.argv[1:]
    while command[0].startswith("--"):
        del command[0]
    count = int(os.environ["FAKE_TASKS"])
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(count), "SLURM_STEP_NODELIST": "localhost"}
    tasks = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda received, _: [task.send_signal(received) for task in tasks])
    for number in range(count):
        own = {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number), "SLURM_NTASKS": str(count)}
        tasks.append(subprocess.Popen(command, env={**os.environ, **step, **own}))
    codes = [task.wait() for task in tasks]
    sys.exit(max(code if code >= 0 else 128 - code for code in codes))
