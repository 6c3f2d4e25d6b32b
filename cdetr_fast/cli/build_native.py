"""`cdetr-fast build-native`: the C++ and CUDA parts."""

from cdetr_fast.cli.errors import UserError


def build_native() -> None:
    """Build the C++ and CUDA kernels in place.

    Takes the compilers that are there. CDETR_FAST_NATIVE=1 makes a missing C++ compiler an error;
    TORCH_CUDA_ARCH_LIST, CXX and CUDA_HOME are honoured.
    """
    from cdetr_fast.common import progress
    from cdetr_kernels import build

    try:
        with progress.task("compiling C++ and CUDA"):
            build.build(say=progress.current().result)
    except (build.BuildError, OSError) as error:
        raise UserError(str(error)) from error
