"""prismaquant-ray: mixed-precision quantization of large language models. The core, which never imports Ray."""

# Here and not in the package's metadata: a working directory has none, and may be newer than what is installed.
__version__ = "0.4.0"
