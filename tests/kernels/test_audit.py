"""Machine code of the kernels on every architecture, held to its budgets."""

import pytest
from packaging.version import Version
from support.kernels import compiled_only

pytest.importorskip("triton")
import triton

from cdetr_kernels import registry
from cdetr_kernels.gpu import configurations
from cdetr_kernels.ops.conditional_attention import cases
from cdetr_kernels.testing.machine_code import TARGETS, Audited, compiling_for, complaints, examine

# Set with triton 3.9. For the same kernels 3.6 needs more registers and memory, and spills some.
BUDGETS_HOLD = Version(triton.__version__) >= Version("3.9")

pytestmark = compiled_only


def brief(architecture: str) -> dict[str, Audited]:
    """Every kernel once, with the most options; `python -m benchmarks audit` compiles all."""
    found: dict[str, Audited] = {}
    for name in registry.NAMES:
        for audit in registry.cases(name).audits():
            if audit.brief:
                found |= audit.audited(architecture)
    return found


# sm_89 has the tiles of sm_86 and, for our dtypes, its instructions.
@pytest.mark.parametrize("architecture", [name for name in TARGETS if name != "sm_89"])
def test_every_kernel_stays_within_its_budgets(architecture):
    found = {
        name: complaints(examine(audited.launch, architecture), audited, architecture, BUDGETS_HOLD)
        for name, audited in brief(architecture).items()
    }
    assert len(found) >= 18
    assert not any(found.values()), found


def launched(architecture: str) -> Audited:
    with compiling_for(architecture, "half"):
        return cases.audited("half", 32, 0.0)["forward"]


def test_complaints():
    worse = dict.fromkeys(("tensor", "load16", "store16", "async", "programs"), 0)
    worse |= {"registers": 256, "spills": 8, "shared": 2**20}
    assert len(complaints(worse, launched("sm_90"), "sm_90")) == 6


def test_budgets_of_an_entry_count_only_where_it_is_not_borrowed():
    audited = launched("sm_86")
    used = {"registers": 250, "spills": 0, "shared": 60 * 1024, "programs": 1, "tensor": 1,
            "load16": 1, "store16": 1, "async": 1}  # fmt: skip
    assert not configurations.is_borrowed("sm_80", audited.launch.tile)
    assert complaints(used, audited, "sm_80")
    assert configurations.is_borrowed("sm_86", audited.launch.tile)
    assert complaints(used, audited, "sm_86") == []
    # What a program can have there, whoever's tile it is.
    (complaint,) = complaints(used | {"shared": 100 * 1024}, audited, "sm_86")
    assert "shared > 99 KiB" in complaint
    assert complaints(used | {"spills": 8}, audited, "sm_86")
