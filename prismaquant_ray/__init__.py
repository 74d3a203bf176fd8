"""prismaquant-ray: mixed-precision quantization of large language models. The core, which never imports Ray."""
