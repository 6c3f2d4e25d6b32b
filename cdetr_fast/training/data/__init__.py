"""Training data.

Data passes `coco` (or `shards`; both by `records`) -> `index` -> `label_checks` -> `sampling` ->
`dataset` (or `shard_stream`; with `transforms`) -> `loader`.
"""
