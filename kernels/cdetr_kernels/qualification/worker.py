"""Child process of a qualification: runs tasks, and reports each through a pipe.

`python -m cdetr_kernels.qualification.worker FD`, with a line of JSON for each job on its input.
"""

import ctypes
import json
import os
import signal
import sys
from typing import Any, TextIO

import torch

from cdetr_kernels import evidence
from cdetr_kernels.evidence import Evidence, Record
from cdetr_kernels.qualification import checks, compilation
from cdetr_kernels.qualification.children import identity
from cdetr_kernels.qualification.plan import Task

_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


def main(descriptor: int) -> None:
    """Run the jobs of the parent process until there are no more."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
    with os.fdopen(descriptor, "w") as report:
        for line in sys.stdin:
            run(json.loads(line), report)
            report.flush()
            os._exit(0)  # the parent has all, and torch takes its time to end


def run(job: dict[str, Any], report: TextIO) -> None:
    """Run the tasks of a job; a task that has spoiled the process is the last one."""
    if "capability" in job:
        compilation.run(job)
        return
    device = usable_device(job)
    # With the tiles that are asked for, whatever records say.
    tiles = {name: tuple(sizes) for name, sizes in job["tiles"].items()}
    evidence.fix(device, Evidence(Record(evidence.key(device), (), tiles), "a qualification"))
    for fields in job["tasks"]:
        task = Task(**fields)
        print(json.dumps({"begin": task.label}), file=report, flush=True)
        rows = checks.run(task, device, job["repeats"], job["timing_seconds"])
        fatal = any(row["verdict"] != evidence.RIGHT for row in rows) and _is_spoiled(device)
        print(json.dumps({"rows": rows, "fatal": fatal}), file=report, flush=True)
        if fatal:
            return


def usable_device(job: dict[str, Any]) -> torch.device:
    """Return the device of a job, once it has computed something.

    A GPU may have another number here than in the parent process, which reads the variables that
    number them when it starts.

    Raises:
        RuntimeError: This process does not see the device, or cannot use it.
    """
    device = torch.device(job["device"])
    if device.type == "cuda":
        seen = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
        same = [x for x in seen if identity(x) == job["identity"]]
        if not same:
            raise RuntimeError(f"there is no {device} of the parent process ({job['identity']})")
        device = device if device in same else same[0]
        torch.cuda.set_device(device)
    # A GPU for one process at a time, or without free memory, fails here, and no kernel is blamed.
    torch.zeros(1, device=device).item()
    return device


def _is_spoiled(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
        torch.zeros(1, device=device).item()
    except RuntimeError:
        return True
    torch.cuda.empty_cache()
    return False


if __name__ == "__main__":
    main(int(sys.argv[1]))
