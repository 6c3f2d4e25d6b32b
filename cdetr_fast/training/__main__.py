"""`python -m cdetr_fast.training`, as torchrun and `accelerate launch` start it."""

from cdetr_fast.training.commands import train_command

if __name__ == "__main__":
    train_command()
