"""Check of everything that only a GPU can show, in one command and within eight minutes.

    python -m benchmarks gpu_check
    python -m benchmarks gpu_check --rehearse   tiny sizes on a CPU, in triton's interpreter

Stages: the extension is built, the kernels qualify (the record goes into the package), their tests,
tests that need a GPU, compute-sanitizer, microbenchmarks, and the model and its training step
against transformers. Needs torch, triton, numpy and pytest; what else a stage
needs and does not find is named, and the stage skipped.

The results go to `benchmarks/results/<gpu>-torch<version>-<date>.json` as they come. A second call
continues with the same file: passed stages are not repeated, and microbenchmarks that ran out of
time are continued. Exit status: 0 if all is well, 1 if a stage failed, 2 if there is no GPU.
"""

import argparse
import dataclasses
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import ops, results
from cdetr_fast.common.files import write_json, write_text
from cdetr_kernels import evidence
from cdetr_kernels.qualification.children import OUT_OF_TIME

ROOT = Path(__file__).parents[1]
TIME_LIMIT = 470.0  # seconds, for all stages
NEED_NO_GPU = " and ".join(
    f"not {name}" for name in ("in_the_interpreter", "audit", "emulated", "wheel", "machine_code")
)
QUALIFICATION = "qualification of the kernels"
PASSED, FAILED, SKIPPED, PARTIAL = "passed", "failed", "skipped", "to be continued"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One part of the check: a command with a time limit.

    Args:
        command: What is run, after `python -m`; or its own first word with `program`.
        seconds: Its time limit.
        program: Another program to start, with python and `-m` as its last arguments.
        needs: Modules, and programs, without which it is skipped.
        env: Environment variables beside those of this process.
        limited: The command takes `--limit` itself, and exits with 3 if it was too short.
    """

    command: list[str]
    seconds: float
    program: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    limited: bool = False


def stages(lines: Path, rehearse: bool) -> dict[str, Stage]:
    """Return the stages by name; `lines` is where microbenchmarks keep what they have measured."""
    if rehearse:
        return _rehearsed(lines)
    workers = []
    if importlib.util.find_spec("xdist"):
        workers = ["-n", str(min(8, os.cpu_count() or 1))]  # most of the time is compilation
    once = ["benchmarks.kernels_once", "--dtypes", "bf16", "fp32"]
    # Without torch's cache every tensor is an allocation, and reading past its end is noticed.
    exact = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    sanitizer = (_sanitizer(), "--error-exitcode", "9", "--print-limit", "20")
    common = ["benchmarks.ops", "--device", "cuda", "--into", str(lines)]
    theirs = ("transformers", "timm", "torchvision", "scipy")
    model = ["benchmarks", "model", "--device", "cuda", "--repeats", "20"]
    training = ["benchmarks", "training", "--device", "cuda", "--repeats", "10"]
    return {
        # For the GPU that is here alone, which is quicker.
        "extension": Stage(["cdetr_kernels.build"], 120, env=_this_architecture()),
        QUALIFICATION: Stage(
            ["cdetr_kernels.qualification"], 110, env={"CDETR_FAST_CACHE": str(lines.parent)}
        ),
        # What needs no GPU is left out: it takes minutes.
        "kernels": _tests("tests/kernels", 150, *workers, "-k", NEED_NO_GPU),
        "gpu": _tests("tests/gpu", 120),
        "microbenchmarks": Stage(
            [*common, "--seconds", "0.3", "--dtypes", "bf16", "fp32", "--providers",
             "^(?!.*(compiled|flex))"],
            120, limited=True,
        ),
        "model": Stage([*model, "--size", "800", "1333"], 60, needs=theirs),
        "model bf16": Stage(
            [*model, "--size", "800", "1333", "--dtype", "bfloat16"], 60, needs=theirs
        ),
        "training step": Stage(
            [*training, "--backbone", "resnet50", "--targets", "7", "--precision", "bf16",
             "--size", "800", "1066"],
            80, needs=theirs,
        ),
        "loss": Stage(
            ["benchmarks", "loss", "--device", "cuda", "--repeats", "10"], 60, needs=theirs
        ),
        "memcheck": Stage(once, 90, (*sanitizer, "--tool", "memcheck"), sanitizer[:1], exact),
        "racecheck": Stage(once, 90, (*sanitizer, "--tool", "racecheck"), sanitizer[:1]),
        # Last, as each size is compiled for each of them.
        "microbenchmarks, compiled": Stage(
            [*common, "--seconds", "0.3", "--dtypes", "bf16", "fp32", "--only",
             "conditional_attention", "--providers", "compiled|flex"],
            200, limited=True,
        ),
    }  # fmt: skip


def _this_architecture() -> dict[str, str]:
    if not torch.cuda.is_available():
        return {}
    return {"TORCH_CUDA_ARCH_LIST": ".".join(map(str, torch.cuda.get_device_capability()))}


def _sanitizer() -> str:
    """Return compute-sanitizer's path; it is not always where programs are looked for."""
    folders = [os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin", "/opt/cuda/bin"]
    found = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(folders)
    )
    return found or "compute-sanitizer"


def _rehearsed(lines: Path) -> dict[str, Stage]:
    interpreted = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    theirs = ("transformers", "timm", "torchvision", "scipy")
    small = ["--backbone", "resnet18", "--size", "64", "96", "--batch", "2", "--threads", "1",
             "--repeats", "1"]  # fmt: skip
    once = ["benchmarks.kernels_once", "--dtypes", "bf16"]
    return {
        "kernels": dataclasses.replace(
            _tests("tests/kernels", 120, "-k", "no_queries or large_angles"),
            env=interpreted,
        ),
        "gpu": _tests("tests/gpu", 120),
        QUALIFICATION: Stage(
            ["cdetr_kernels.qualification", "residual_layer_norm"],
            120,
            env=interpreted | {"CDETR_FAST_CACHE": str(lines.parent)},
        ),
        # What memcheck and racecheck watch on a GPU.
        "every kernel once": Stage(once, 120, env=interpreted),
        "memcheck": Stage(once, 60, ("compute-sanitizer",), ("compute-sanitizer on a GPU",)),
        "microbenchmarks": Stage(
            ["benchmarks.ops", "--tiny", "--into", str(lines), "--repeats", "1", "--dtypes", "fp32",
             "--only", "sine", "--threads", "1", "--providers", "^(?!.*compiled)"],
            120, env=interpreted, limited=True,
        ),
        "model": Stage(["benchmarks", "model", *small], 120, needs=theirs),
        "training step": Stage(["benchmarks", "training", *small], 120, needs=theirs),
    }  # fmt: skip


def _tests(folder: str, seconds: float, *options: str) -> Stage:
    """Run those test files whose imports are all there; conftest.py has imports of its own."""
    common = ROOT / "tests" / "conftest.py"
    paths = sorted((ROOT / folder).glob("test_*.py"))
    missing = _missing_imports([common, *paths])
    for path in paths:
        if path in missing:
            print(f"left out: {path.name} needs {missing[path]}")
    files = [str(path.relative_to(ROOT)) for path in paths if path not in missing]
    # Without the common conftest.py, but with that of the folder.
    conftest = [f"--confcutdir={folder}"] if common in missing else []
    command = ["pytest", "-q", "-p", "no:cacheprovider", *conftest, *options, *files]
    return Stage(command, seconds, needs=("pytest",))


def _missing_imports(paths: list[Path]) -> dict[Path, str]:
    """Import files in a process of their own; return those that lack a module, and which."""
    code = """if True:
        import importlib.util, sys
        for path in sys.argv[1:]:
            spec = importlib.util.spec_from_file_location("tried", path)
            try:
                spec.loader.exec_module(importlib.util.module_from_spec(spec))
            except ModuleNotFoundError as error:
                print(f"lacking\\t{path}\\t{error.name}")
            except BaseException:
                pass  # skipped, or broken: pytest says so
    """
    command = [sys.executable, "-c", code, *map(str, paths)]
    done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True)
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    return {Path(row[1]): row[2] for row in rows if row[0] == "lacking"}


def _environment() -> dict[str, str]:
    """Return the environment in which the checkout is found, whatever is installed."""
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run_stage(stage: Stage, seconds: float, log: Path) -> dict[str, Any]:
    """Run a stage for `seconds` at most, output into `log`; return its status and figures."""
    missing = [
        name
        for name in stage.needs
        if importlib.util.find_spec(name.split(" ")[0]) is None and shutil.which(name) is None
    ]
    if missing:
        return {"status": SKIPPED, "reason": f"needs {', '.join(missing)}"}
    command = [*stage.program, sys.executable, "-m", *stage.command]
    if stage.limited:
        command += ["--limit", str(max(1.0, seconds - 20))]
    env = _environment() | stage.env
    started = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with its children
            process.wait()
            code = None
    text = log.read_text(errors="replace")
    found: dict[str, Any] = {"seconds": round(time.monotonic() - started, 1)}
    if code is None:
        kind = PARTIAL if stage.limited else FAILED
        found |= {"status": kind, "reason": f"stopped after {seconds:.0f} s"}
    elif code == 3 and stage.limited:
        found |= {"status": PARTIAL, "reason": "out of time"}
    elif code == 5 and stage.command[0] == "pytest":
        found |= {"status": SKIPPED, "reason": "no tests"}
    else:
        found["status"] = PASSED if code == 0 else FAILED
        if code:
            found["reason"] = f"exit status {code}"
    lines = [line for line in text.splitlines() if line.strip()]
    found["last lines"] = lines[-1:] if found["status"] == PASSED else lines[-15:]
    if found["status"] == FAILED and stage.command[0] == "pytest":
        found["failed tests"] = [x for x in lines if x.startswith(("FAILED", "ERROR"))][:50]
    return found


def output_options(name: str, stage: Stage, folder: Path) -> Stage:
    """Make a benchmark write its rows beside the results, from where they are taken over."""
    program = stage.command[0].removeprefix("benchmarks.")
    if program == "benchmarks":
        program = stage.command[1]
    if program not in ("model", "training", "loss"):
        return stage
    env = stage.env | {"CDETR_FAST_RESULTS": str(folder)}
    command = [*stage.command, "--output", _part(name)]
    return dataclasses.replace(stage, command=command, env=env)


def _part(name: str) -> str:
    return "part-" + re.sub(r"\W+", "-", name)


def results_path(folder: Path, rehearse: bool) -> Path:
    """Return the file of today's results on this GPU."""
    device = "rehearsal" if rehearse else torch.cuda.get_device_name()
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    version = torch.__version__.split("+")[0]
    return folder / f"{slug}-torch{version}-{datetime.date.today().isoformat()}.json"


def check(
    path: Path, rehearse: bool, only: str, time_limit: float, say: Callable = print
) -> dict[str, Any]:
    """Run the stages that have not passed yet, and write `path` after each of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = path.with_suffix("")  # a folder for logs and for what stages write
    parts.mkdir(exist_ok=True)
    lines = parts / "ops.jsonl"
    environment = results.environment(results.command_line("gpu_check"))
    content: dict[str, Any] = {"environment": environment, "stages": {}, "rows": {}}
    if path.is_file():
        old = json.loads(path.read_text(encoding="utf-8"))
        content["stages"], content["rows"] = old["stages"], old["rows"]
        content["begun with"] = old.get("begun with", old["environment"])
    started = time.monotonic()
    for name, stage in stages(lines, rehearse).items():
        before = content["stages"].get(name, {}).get("status")
        if only not in name:
            continue
        if before == PASSED:
            say(f"{name}: passed before")
            continue
        left = time_limit - (time.monotonic() - started)
        if left < 25:
            content["stages"].setdefault(name, {"status": PARTIAL, "reason": "not begun"})
            say(f"{name}: not begun, out of time; call again")
            write_json(path, content, indent=1, sort_keys=False)
            continue
        say(f"{name}: {' '.join(stage.command[:6])} ...", flush=True)
        stage = output_options(name, stage, parts)
        found = run_stage(stage, min(stage.seconds, left), parts / f"{_part(name)}.log")
        if name == QUALIFICATION:
            found |= take_over_records(parts, content, rehearse)
        content["stages"][name] = found
        say(f"{name}: {found['status']} {found.get('reason', '')} ({found.get('seconds', 0)} s)")
        written = parts / f"{_part(name)}.json"
        if written.is_file():
            content["rows"][name] = json.loads(written.read_text(encoding="utf-8"))["rows"]
        if lines.is_file():
            cells = map(json.loads, lines.read_text(encoding="utf-8").splitlines())
            content["rows"]["microbenchmarks"] = [row for cell in cells for row in cell["rows"]]
        write_json(path, content, indent=1, sort_keys=False)
    return content


def take_over_records(folder: Path, content: dict[str, Any], rehearse: bool) -> dict[str, Any]:
    """Put the findings of the qualification among the rows, and its record into the package.

    Returns:
        What this says about the stage: a kernel that is not right is a failure.
    """
    wrong: list[str] = []
    rows: list[dict[str, Any]] = []
    for file in sorted((folder / "records").glob("*.json")):
        record = evidence.parse(file.read_text(encoding="utf-8"))
        for x in record.findings:
            rows.append({name: str(value) for name, value in dataclasses.asdict(x).items()})
            if x.verdict not in (evidence.RIGHT, OUT_OF_TIME):
                wrong.append(f"{x.operator} {x.path} {x.dtype} {x.label}: {x.verdict} {x.reason}")
        if not rehearse:
            evidence.SHIPPED.mkdir(exist_ok=True)
            write_text(evidence.SHIPPED / file.name, record.to_json())
    content["rows"][QUALIFICATION] = rows
    if wrong:
        return {"status": FAILED, "reason": f"{len(wrong)} findings, such as {wrong[0]}"}
    return {} if rows else {"status": FAILED, "reason": "no findings"}


def report(content: dict[str, Any]) -> None:
    """Print the figures, then the stages: the end is what one looks at first."""
    rows = content["rows"]
    if rows.get("microbenchmarks"):
        results.print_table(ops.summary(rows["microbenchmarks"]))
    for name, group in rows.items():
        if name != "microbenchmarks" and group:
            print(f"\n{name}")
            results.print_table(group)
    print()
    results.print_table(
        [
            {
                "stage": name,
                "status": stage["status"],
                "seconds": stage.get("seconds", "-"),
                "": stage.get("reason", "; ".join(stage.get("last lines", []))[-100:]),
            }
            for name, stage in content["stages"].items()
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, no GPU")
    parser.add_argument("--only", default="", help="stages whose name contains this")
    parser.add_argument("--folder", type=Path, default=results.RESULTS, help="for the results")
    parser.add_argument("--time-limit", type=float, default=TIME_LIMIT, help="seconds")
    options = parser.parse_args(arguments)
    if not options.rehearse and not torch.cuda.is_available():
        print("there is no GPU that torch can use; --rehearse does without", file=sys.stderr)
        return 2
    path = results_path(options.folder.resolve(), options.rehearse)
    content = check(path, options.rehearse, options.only, options.time_limit)
    report(content)
    print("written to", path)
    return 1 if any(x["status"] == FAILED for x in content["stages"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
