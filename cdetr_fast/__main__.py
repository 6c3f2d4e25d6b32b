"""`python -m cdetr_fast` is the command `cdetr-fast`."""

from cdetr_fast.cli import main

main()
