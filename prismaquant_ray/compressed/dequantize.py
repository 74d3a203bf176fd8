"""Decoding a compressed-tensors repository to BF16: the weights that vLLM computes, for tools that cannot decode.

Only the repository is read. A module's format is that of its config group, resolved by vLLM's matching rules, and its
tensors must be those of that format; errors are raised before anything is written. Weights are decoded while shards
are written, a batch at a time, with the names and shapes of the original model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prismaquant_ray.compressed.decoded_repository import ModuleDecoder, decoded_outputs, divisor_caveats
from prismaquant_ray.compressed.quantized_modules import modules_of, unquantized_config
from prismaquant_ray.errors import InputError
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.repository.manifest import DEQUANTIZED, MANIFEST, README, as_json, claim, sizes_and_digests
from prismaquant_ray.repository.shards import write_shards
from prismaquant_ray.repository.staging import check_output
from prismaquant_ray.repository.writer import REWRITTEN
from prismaquant_ray.source.checkpoint import Checkpoint
from prismaquant_ray.source.files import CONFIG, INDEX
from prismaquant_ray.storage.connection import absolute, local_path
from prismaquant_ray.storage.prefix import Prefix
from prismaquant_ray.storage.store import Store

SCHEMA = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class DequantizedRepository:
    """A repository in BF16: modules by original format, bytes of weights before and after, SHA-256 of shards.

    Each of `notes` is one line about weights on which runtimes disagree.
    """

    source: str
    repository: str
    modules: dict[FormatName, int]
    tensors: int
    bytes_before: int
    bytes_after: int
    files: dict[str, int]
    sha256: dict[str, str]
    notes: list[str]


class QuantizedRepository:
    """A repository and its decoded tensors. Opening reads headers and config.json only.

    Raises:
        InputError: it is not quantized or cannot be decoded; the message names the first module and its scheme.
    """

    def __init__(self, store: Store) -> None:
        self.source = Checkpoint(store)
        self.modules = modules_of(self.source)
        self._decoder = ModuleDecoder(self.source, self.modules)
        self.outputs = decoded_outputs(self.source, self.modules, self._decoder)

    @property
    def formats(self) -> dict[FormatName, int]:
        """Quantized modules by format."""
        found = Counter(module.format for module in self.modules)
        return {name: found[name] for name in FORMATS if found[name]}

    @property
    def bytes_before(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(info.nbytes for info in self.source.stored.values())

    @property
    def bytes_after(self) -> int:
        """Bytes of all tensors when decoded."""
        return sum(output.nbytes for output in self.outputs)

    def write(self, output: Prefix, *, max_shard_bytes: int = 5_000_000_000) -> DequantizedRepository:
        """Write the BF16 repository where nothing or an earlier result is (`check_place`), config.json last.

        Raises:
            InputError: decoding found invalid weights; the output is left incomplete.
        """
        head = {"schema": SCHEMA, "kind": DEQUANTIZED}
        stale = claim(output, head)
        shards = write_shards(output, self.outputs, limit=max_shard_bytes)
        names = [file for file in self.source.other_files() if file not in (*REWRITTEN, README)]
        small = {file: self.source.store.get(file) for file in names}  # the card describes the quantized model
        for file, data in small.items():
            output.put(file, data)
        index = as_json({"metadata": {"total_size": self.bytes_after}, "weight_map": shards.weight_map})
        config = as_json(unquantized_config(self.source.source_config))
        files, digests = sizes_and_digests(shards, small | {INDEX: index, CONFIG: config})
        formats = {str(name): count for name, count in self.formats.items()}
        body = head | {"complete": True, "formats": formats, "sha256": digests, "files": files}
        output.put(MANIFEST, as_json(body))
        output.put(INDEX, index)
        output.put(CONFIG, config)
        output.delete(file for file in stale if file not in files)
        found = self._decoder.divisors  # in the order of threads
        divisors = {module.name: found[module.name] for module in self.modules if module.name in found}
        return DequantizedRepository(
            source=self.source.store.uri,
            repository=output.uri,
            modules=self.formats,
            tensors=len(self.outputs),
            bytes_before=self.bytes_before,
            bytes_after=self.bytes_after,
            files=files,
            sha256=shards.sha256,
            notes=list(divisor_caveats(divisors)),
        )


# Output -------------------------------------------------------------------------------------------------------------


def check_place(repository: str, output: str) -> None:
    """Check that `output` is empty or holds an earlier result.

    Raises:
        InputError: it holds something else, or overlaps with `repository`.
    """
    places = _segments(repository), _segments(output)
    if all(left == right for left, right in zip(*places, strict=False)):
        raise InputError(f"{output} and {repository} are one place, or one lies in the other; choose another output")
    check_output(output, dequantized=True)


def _segments(place: str) -> Sequence[str]:
    path = local_path(place)
    return absolute(place).split("/") if path is None else Path(path).resolve().parts
