"""`cdetr-fast build-native`: the C++ and CUDA parts."""

from cdetr_fast.cli.errors import UserError


def build_native() -> None:
    """Build the C++ and CUDA parts of the extension in place, with the compilers available.

    CDETR_FAST_NATIVE=1 makes a missing C++ compiler an error; TORCH_CUDA_ARCH_LIST, CXX and
    CUDA_HOME are honoured.
    """
    from cdetr_kernels import build

    try:
        build.build()
    except (build.BuildError, OSError) as error:
        raise UserError(str(error)) from error
