"""prismaquant-ray: mixed-precision quantization of large language models. The core, which never imports Ray."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("prismaquant-ray")
except PackageNotFoundError:  # run from a working directory, e.g. by `ray job submit --working-dir .`
    __version__ = "0.1.0"
