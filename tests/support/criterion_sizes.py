"""Sizes that the kernels of matching and loss are tested at."""

# layers, queries, classes, number of targets of each image
SIZES = {
    "one of each": (1, 1, 1, (1,)),
    "several tiles": (2, 70, 5, (3, 17, 0)),
    "many classes": (1, 7, 140, (2, 5)),
    "more targets than queries": (1, 3, 4, (5, 1)),
    "nothing to find": (2, 5, 3, (0, 0)),
}
