"""Qualification: which kernels are right and faster on this machine, found out safely.

`run.qualify` plans tasks (`plan`), has child processes do them (`children`, `worker`, `checks`,
`tuning`) and keeps what they find (`store`). `cdetr_kernels.evidence` reads it.
"""

from cdetr_kernels.qualification.automatic import ensure_qualified
from cdetr_kernels.qualification.run import Report, qualify

__all__ = ["Report", "ensure_qualified", "qualify"]
