"""The machine code of every kernel on every architecture: `python -m benchmarks.audit --brief`."""

import pytest
from support.interpreter import INTERPRETED

pytest.importorskip("triton")
from benchmarks import audit
from cdetr_kernels.gpu import configurations

pytestmark = pytest.mark.skipif(INTERPRETED, reason="needs kernels that can be compiled")


@pytest.mark.parametrize("architecture", audit.TARGETS)
def test_every_kernel_stays_within_its_budgets(architecture, capsys):
    assert audit.main([architecture, "--brief"]) == 0, capsys.readouterr().out


def test_budgets_of_an_entry_count_only_where_it_is_not_borrowed():
    case = audit.Case(32, "half")
    launch = audit.launches(case, "sm_86")["forward"]
    used = {"registers": 250, "spills": 0, "shared": 60 * 1024, "programs": 1, "tensor": 1,
            "load16": 1, "store16": 1, "async": 1}  # fmt: skip
    assert not configurations.is_borrowed("sm_80", launch.tile)
    assert audit.complaints(used, launch, case, "sm_80")
    assert configurations.is_borrowed("sm_86", launch.tile)
    assert audit.complaints(used, launch, case, "sm_86") == []
    # What a program can have there, whoever's tile it is.
    (complaint,) = audit.complaints(used | {"shared": 100 * 1024}, launch, case, "sm_86")
    assert "shared > 99 KiB" in complaint
    assert audit.complaints(used | {"spills": 8}, launch, case, "sm_86")
