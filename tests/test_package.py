"""The package as it is installed and imported, checked in fresh processes."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import cdetr_fast
import cdetr_kernels


def run_python(code: str, cwd: Path, *options: str, **environment: str) -> str:
    """Return the stdout of a fresh Python; a failure shows its stderr."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    env = {**env, "PYTHONWARNINGS": "", **environment}
    done = subprocess.run(
        [sys.executable, *options, "-c", code], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# Finders and paths of an installed package would hide that the checkout cannot do it alone.
WITHOUT_INSTALLATION = """
import sys
from pathlib import Path
def ours(path):
    return any((Path(path) / name).is_dir() for name in ("cdetr_fast", "cdetr_kernels"))
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
sys.path[:] = [p for p in sys.path if p == "" or "site-packages" in p or not ours(p)]
"""


def test_bare_checkout(root):
    """Both packages are found, the import itself loads no torch, and the command runs."""
    code = WITHOUT_INSTALLATION + (
        "import cdetr_fast\n"
        "print('torch' in sys.modules)\n"
        "from cdetr_fast import ConditionalDetrForObjectDetection\n"
        "import cdetr_kernels\n"
        "print(cdetr_fast.__file__)\n"
        "print(cdetr_kernels.__file__)\n"
        "import runpy\n"
        "sys.argv = ['cdetr-fast', 'info']\n"
        "runpy.run_module('cdetr_fast', run_name='__main__')\n"
    )
    loads_torch, *files, info = run_python(code, root, PYTHONPATH="").split("\n", 3)
    assert loads_torch == "False"
    assert files == [
        str(root / "cdetr_fast" / "__init__.py"),
        str(root / "kernels" / "cdetr_kernels" / "__init__.py"),
    ]
    assert "conditional_attention" in info


def test_bare_checkout_imports_kernels_alone(root, tmp_path):
    code = (
        "import sys, cdetr_kernels\n"
        "print(cdetr_kernels.__file__)\n"
        "print('cdetr_fast' in sys.modules)\n"
    )
    output = run_python(code, tmp_path, PYTHONPATH=str(root / "kernels"))
    assert output.splitlines() == [
        str(root / "kernels" / "cdetr_kernels" / "__init__.py"),
        "False",
    ]


def test_kernels_is_a_source_root_and_no_package(root):
    # transformers probes for a package named `kernels` and would import ours.
    assert not (root / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("package", [cdetr_fast, cdetr_kernels], ids=lambda p: p.__name__)
def test_every_folder_with_code_is_a_package(package):
    # setuptools would leave a folder without __init__.py out of the wheel.
    folder = Path(package.__file__).parent
    with_code = {path.parent for path in folder.rglob("*.py")}
    assert [str(p) for p in sorted(with_code) if not (p / "__init__.py").is_file()] == []
    assert (folder / "py.typed").is_file()


@pytest.mark.parametrize("package", [cdetr_fast, cdetr_kernels], ids=lambda p: p.__name__)
def test_public_names_can_be_imported(package):
    assert len(package.__all__) == len(set(package.__all__)) > 0
    module = importlib.import_module(package.__name__)
    assert [name for name in package.__all__ if not hasattr(module, name)] == []
    assert set(package.__all__) <= set(dir(module))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = module.no_such_name


def test_public_names_of_the_documentation(root):
    page = (root / "docs/guides/transformers.md").read_text()
    names = re.findall(r"^\| `(ConditionalDetr\w+)` \|", page, flags=re.MULTILINE)
    assert set(names) == {n for n in cdetr_fast.__all__ if n.startswith("ConditionalDetr")}


@pytest.mark.parametrize(
    ("package", "page"),
    [
        ("cdetr_fast", "*"),
        ("cdetr_kernels", "operators"),
        ("cdetr_fast.training", "training"),
        ("cdetr_fast.images", "images"),
        ("cdetr_fast.serving", "serving"),
    ],
)
def test_public_names_are_in_the_reference(package, page, root):
    """mkdocs fails on a name that is in the reference and does not exist; this is the reverse."""
    text = "".join(path.read_text() for path in (root / "docs/reference").glob(f"{page}.md"))
    documented = set(re.findall(r"^::: ([\w.]+)$", text, flags=re.MULTILINE))
    if package in documented:  # the whole module
        return
    last_names = {name.rsplit(".", 1)[-1] for name in documented}
    module = importlib.import_module(package)
    assert {n for n in module.__all__ if not n.startswith("__")} - last_names == set()


def test_version_is_the_same_everywhere(root):
    changelog = (root / "CHANGELOG.md").read_text()
    latest = re.search(r"^## \[?(\d+\.\d+\.\d+)", changelog, flags=re.MULTILINE)
    assert latest is not None
    assert latest.group(1) == cdetr_fast.__version__


def test_oldest_packages_are_the_lower_bounds(root):
    """`make test-oldest` tests what pyproject.toml allows, and it allows nothing older."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines, wanted = list(project["dependencies"]), ["test"]
    for extra in wanted:  # which grows: `test` names others
        lines += extras[extra]
        wanted += {x for line in extras[extra] for x in Requirement(line).extras} - {*wanted}
    bounds = {
        (canonicalize_name(requirement.name), Version(specifier.version))
        for requirement in map(Requirement, lines)
        for specifier in requirement.specifier
        if specifier.operator == ">="
    }
    assert {Requirement(line).name for line in lines} - {"cdetr-fast"} == {
        Requirement(line).name for line in lines if ">=" in line
    }
    pins = {}
    for line in (root / "constraints-oldest.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, version = line.split("==")
            pins[canonicalize_name(name)] = Version(version)
    assert {(name, pins.get(name)) for name, _ in bounds} == bounds


GLOBAL_STATE = """
import json, logging, os, random, signal, sys, threading, warnings
import numpy, torch, timm, torchvision, PIL.Image, PIL.ImageFile

def state():
    return {
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "gradients": torch.is_grad_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "tf32": [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32],
        "cudnn": [torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "sdp": [torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled(),
                torch.backends.cuda.mem_efficient_sdp_enabled()],
        "cuda": torch.cuda.is_initialized(),
        "torch random state": torch.get_rng_state().sum().item(),
        "numpy random state": repr(numpy.random.get_state()),
        "random state": hash(random.getstate()),
        "warnings": [repr(f) for f in warnings.filters],
        "path": [p for p in sys.path if not p.endswith("kernels")],
        "meta path": [repr(f) for f in sys.meta_path],
        "environment": sorted(os.environ.items()),
        "handlers": [repr(h) for h in logging.getLogger().handlers],
        "level": logging.getLogger().level,
        "excepthook": repr(sys.excepthook),
        "signals": [repr(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)],
        "running threads": threading.active_count(),
        "numpy errors": numpy.geterr(),
        "print options": [repr(numpy.get_printoptions())],
        "pillow": [PIL.Image.MAX_IMAGE_PIXELS, PIL.ImageFile.LOAD_TRUNCATED_IMAGES],
    }

before = state()
import cdetr_fast, cdetr_kernels
for module in (cdetr_fast, cdetr_kernels):
    for name in module.__all__:
        getattr(module, name)
after = state()
print(json.dumps({key: [before[key], after[key]] for key in before if before[key] != after[key]}))
"""


WITHOUT_EXTRAS = """
import cdetr_fast.cli, cdetr_fast.demo.scenes, cdetr_fast.images.draw
config = cdetr_fast.ConditionalDetrConfig(backbone="test_resnet", d_model=32)
cdetr_fast.optimize(cdetr_fast.ConditionalDetrModel(config).eval())
extras = (
    "transformers", "accelerate", "pycocotools", "faster_coco_eval", "onnx", "onnxscript",
    "onnxruntime", "openvino", "nncf", "kernels", "fastapi", "uvicorn",
)
print([name for name in extras if name in sys.modules])
"""


def test_import_changes_no_global_state_and_needs_no_extra(root):
    """Neither do the command line, drawing and an optimised model of this package need one."""
    changes, extras = run_python(GLOBAL_STATE + WITHOUT_EXTRAS, root).splitlines()
    assert json.loads(changes) == {}
    assert extras == "[]"


def test_import_is_cheap(root):
    # Over torch and timm, which any model of this kind needs. Processor time: less noise; the best
    # of three processes that share the import of those.
    code = (
        "import os, time, torch, timm\n"
        "for _ in range(3):\n"
        "    if os.fork() == 0:\n"
        "        start = time.process_time()\n"
        "        import cdetr_fast\n"
        "        cdetr_fast.ConditionalDetrForObjectDetection\n"
        "        cdetr_fast.ConditionalDetrImageProcessor\n"
        "        print(time.process_time() - start, flush=True)\n"
        "        os._exit(0)\n"
        "    os.wait()\n"
    )
    output = run_python(code, root, PYTHONDONTWRITEBYTECODE="")  # the first writes bytecode
    seconds = [float(line) for line in output.split()]
    assert len(seconds) == 3
    assert min(seconds) <= 0.3, seconds


@pytest.mark.slow
def test_wheel(root, tmp_path):
    """A wheel, made of the source distribution, has all of both packages and needs no checkout."""
    source = tmp_path / "source"
    shutil.copytree(
        root,
        source,
        ignore=shutil.ignore_patterns(".*", "build", "output", "*.egg-info", "tests"),
    )
    wheels, target = tmp_path / "wheels", tmp_path / "target"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    make_sources = "from setuptools import build_meta; build_meta.build_sdist('.')"
    subprocess.run(
        [sys.executable, "-c", make_sources], check=True, cwd=source, stdout=subprocess.DEVNULL
    )
    (sources,) = source.glob("*.tar.gz")
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, sources]
    # Compiling takes minutes; tests/kernels/test_native_build.py has a wheel with its C++ part.
    subprocess.run(build, env=os.environ | {"CDETR_FAST_NATIVE": "0"}, check=True)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", target, wheel], check=True)
    code = (
        "import cdetr_fast, cdetr_kernels\n"
        "from cdetr_fast.demo import DEMO\n"
        "model = cdetr_fast.ConditionalDetrForObjectDetection.from_pretrained(DEMO)\n"
        "from cdetr_fast.reports.page import _templates\n"
        "assert _templates().list_templates() == sorted(TEMPLATES)\n"
        "print(cdetr_fast.__file__, cdetr_kernels.__file__, DEMO, sep='\\n')"
    )
    templates = [path.name for path in (root / "cdetr_fast" / "reports" / "templates").iterdir()]
    assert "detections.html" in templates
    code = f"TEMPLATES = {templates}\n{code}"
    # -P and an empty folder: nothing of the checkout is importable.
    found = run_python(code, tmp_path, "-P", PYTHONPATH=str(target)).split()
    assert len(found) == 3
    assert all(Path(path).is_relative_to(target) for path in found)


def test_modules_that_moved_keep_their_old_names_for_a_version():
    from cdetr_fast._moved import MOVED

    for old, new in MOVED.items():
        module = importlib.import_module(f"cdetr_fast.{new}")
        name = next(name for name in vars(module) if not name.startswith("_"))
        message = f"cdetr_fast.{old} has moved to cdetr_fast.{new}"
        with pytest.warns(DeprecationWarning, match=re.escape(message)) as caught:
            found = getattr(importlib.import_module(f"cdetr_fast.{old}"), name)
        assert found is getattr(module, name)
        assert caught[0].filename == __file__


@pytest.mark.parametrize(
    "statement",
    [
        "from cdetr_fast import scenes; scenes.CLASSES",
        "from cdetr_fast.assets import DEMO",
        "from cdetr_fast.training.coco import read_coco",
    ],
)
def test_old_names_work_as_the_first_import(statement, root):
    code = f"import warnings; warnings.simplefilter('ignore')\n{statement}\nprint('imported')"
    assert run_python(code, root).strip() == "imported"
