"""Does real vLLM serve a repository as it was meant? A program of its own, run by the Python of vLLM's environment.

`python -m tests.vllm_check`, in this folder's grandparent, reads a JSON list of [repository, BF16 copy, report,
[images], draft] from standard input and serves all in one process. It knows nothing of prismaquant_ray, so what it
finds is vLLM's own reading of the files.

The engine is vLLM's, in this process and on the CPU; what is not stock is in `emulation.py`. Checked are, against a
plain BF16 copy with the dequantized weights: the scheme every layer gets, that every parameter came from the files,
every quantized layer's weight bit by bit, and logits with activation rounding switched off.

It shows nothing about GPU kernels: not their repacking, their rounding or their speed.
"""
