"""State that Accelerate keeps for the whole process."""

import sys


def forget_accelerate_state() -> None:
    """Reset the settings of Accelerate, if it has been imported."""
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()
