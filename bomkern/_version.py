"""The version. setup.py and tools/release.py run this file by itself, so it imports nothing."""

__version__ = "0.2.0"


def version_for(torch: str, cuda: str) -> str:
    """Return the version of the wheel whose kernels are built for this torch.

    Args:
        torch: the version of torch. The kernels work with all patch releases of its minor version.
        cuda: the version of CUDA that the kernels are built with; empty for a wheel without CUDA kernels.
    """
    minor = ".".join(torch.split(".")[:2])
    return f"{__version__}+torch{minor}.{'cu' + cuda.replace('.', '') if cuda else 'cpu'}"
