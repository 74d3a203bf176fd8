"""Building and loading `guard.cpp`. It must be loaded before torch, so this module does not import it."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

_SOURCE = Path(__file__).with_name("guard.cpp")


def build() -> Path:
    """The compiled guard, once for a version of torch on this machine; needs g++."""
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    torch = Path(found.origin).parent
    identity = f"{torch} {importlib.metadata.version('torch')} ".encode() + _SOURCE.read_bytes()
    library = Path(tempfile.gettempdir()) / f"pretended-cuda-{hashlib.sha256(identity).hexdigest()[:16]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent) as directory:
            made = Path(directory) / library.name
            arguments = [
                "-std=c++20",
                "-O1",
                "-shared",
                "-fPIC",
                f"-I{torch / 'include'}",
                str(_SOURCE),
                "-o",
                str(made),
            ]
            linked = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch / 'lib'}"]
            subprocess.run(["g++", *arguments, *linked], check=True)
            made.replace(library)
    return library


def load() -> None:
    """Give a torch without CUDA, which must not have been imported, a device."""
    if "torch" in sys.modules:
        raise ImportError("the guard must be loaded before torch")
    ctypes.CDLL(str(build()), mode=ctypes.RTLD_GLOBAL)
