"""`python -m cdetr_fast.training` is `cdetr-fast train`: for torchrun and `accelerate launch`."""

import sys

from cdetr_fast.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
