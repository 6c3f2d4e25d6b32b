"""`python -m benchmarks.convergence`."""

import sys

from benchmarks.convergence.study import main

sys.exit(main())
