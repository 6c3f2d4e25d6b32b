"""`python -m benchmarks.report`."""

import sys

from benchmarks.report.tables import main

sys.exit(main())
