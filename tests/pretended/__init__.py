"""A CUDA device that is not there, for proofs that do not need one; `tests/device/` uses it.

A torch without CUDA is told that it has a device (`guard.cpp`). Tensors say cuda:0 and hold real data on the CPU
(`device.py`), so control flow and results are real, and what CUDA would refuse is refused. `job.py` runs whole jobs.
"""
