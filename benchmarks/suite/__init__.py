"""The benchmarks, a file for each: its work, its peers and its gate."""
