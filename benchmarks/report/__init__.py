"""Reports of the results: tables of README.md and docs, and pictures."""
