"""Benchmarks: speed beside accuracy, against what else does the same work. Part of the checkout.

    python -m benchmarks                              list them
    python -m benchmarks model --size 800 1066        run one
    python -m benchmarks.report                       write the tables of README.md and docs
    python -m benchmarks.report.plots FILE            draw the results in a file
    python -m benchmarks.convergence                  how fast training converges

`run` is the command line, `registry` the list, `case` one comparison, `timing` and `memory` the
meters, `results` the format of rows and their files in `results/`; `suite/` has a file for each
benchmark, `report/` makes tables and plots, `convergence/` is a study of its own.

To add a benchmark, write `suite/<name>.py` and a line in `registry.BENCHMARKS`. The file has

- a docstring: what is compared, and with which peers; `--help` shows it;
- `add_options(parser)`: options of its own (all have --threads, --repeats, --device, --output);
- `cases(options)`: yields a `Case` for each comparison, with its work (name and sizes), its
  providers as zero-argument functions, and its gate:

      def cases(options):
          x = torch.randn(options.rows, 256)
          yield Case(
              work="softmax",
              shape=f"{options.rows}x256",
              providers={"torch": lambda: x.softmax(-1), "cdetr_fast": lambda: softmax(x)},
              gate=Within(lambda a, b: {"error": largest_difference(a, b)}, {"error": 1e-6}),
          )

The first provider is the reference. Then run it in small form in `tests/benchmarks/test_suite.py`.
"""

import cdetr_fast as cdetr_fast  # which finds cdetr_kernels in a bare checkout
