"""Training data.

Data passes `coco` or `shards` -> `label_checks` -> `sampling` -> `dataset` (with `transforms`).
"""
