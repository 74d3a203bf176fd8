"""Images with captions for vision-language models, prepared by the model's own processor.

A JSONL file lists them, one object per line: `{"image": "relative/path.png", "text": "caption"}`. Paths are relative to
that file. Where the processor has a chat template, the caption becomes the answer to a request to describe the image,
because that is how such models were trained; otherwise it follows the image as it is.

Only Pillow is needed. Transformers would also want torchvision, for videos, and prefer it for images, with slightly
different pixel values: the same calibration on two machines would not be the same.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from prismaquant_ray.calibration.files import check_file, loading, read_text
from prismaquant_ray.errors import InputError
from prismaquant_ray.parsing import MalformedError, parse_object

if TYPE_CHECKING:
    from PIL import Image
    from transformers import ProcessorMixin

__all__ = ["ImageSequence", "files_digest", "load_images"]

REQUEST = "Describe the image."
# Pillow has no error class for damaged files: its decoders raise any of these.
_DAMAGED_IMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    OverflowError,
    NotImplementedError,
    struct.error,
    zlib.error,
)
# Where a checkpoint says which processor class it was made with, in the order in which transformers asks.
_DECLARING = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ImageSequence:
    """One image with its text, as the model's processor prepares it.

    `inputs` are the keyword arguments of the model's forward. For Qwen3.5, with T tokens and P patches:
    `input_ids` and `mm_token_type_ids` int64 (1, T), `pixel_values` float32 (P, D), `image_grid_thw` int64 (1, 3).
    There is no `attention_mask`: nothing is padded.
    """

    inputs: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """One line of the JSONL file."""

    where: str  # "<file>, line <number>"
    image: Path
    caption: str


def load_images(
    path: Path, directory: Path, *, image_token: int, limit: int | None = None
) -> tuple[ImageSequence, ...]:
    """Prepare the first `limit` images that the JSONL file `path` lists, or all of them, in its order.

    `directory` is the model's, with its processor's files; `image_token` is the id its config gives the image token.

    Raises:
        InputError: a line is not as described above, an image cannot be read, the model has no processor that can be
            loaded, or the processor's output would not reach the vision tower.
    """
    entries = tuple(islice(_entries(path), limit))
    if not entries:
        raise InputError(f'{path} lists no image; each line must be {{"image": "path", "text": "caption"}}.')
    processor = _load_processor(directory)
    return tuple(_prepare(entry, processor, image_token) for entry in entries)


def files_digest(path: Path) -> str:
    """sha256 of the list and of every file it names; InputError when one cannot be read."""
    digest = hashlib.sha256(read_text(path, "List of images").encode())
    for entry in _entries(path):
        check_file(entry.image, f"{entry.where}: image")
        try:
            digest.update(entry.image.read_bytes())
        except OSError as error:
            raise InputError(f"{entry.where}: image {entry.image} cannot be read: {error.strerror}.") from error
    return digest.hexdigest()


def _entries(path: Path) -> Iterator[_Entry]:
    # Not splitlines: it also splits at characters that JSON allows inside a string.
    for number, line in enumerate(read_text(path, "List of images").split("\n"), 1):
        if line.strip():
            yield _parse(line, f"{path}, line {number}", path.parent)


def _parse(line: str, where: str, folder: Path) -> _Entry:
    try:
        content = parse_object(line)
    except MalformedError as error:
        raise InputError(f'{where} {error}; write {{"image": "path", "text": "caption"}} on a line.') from error
    for key in ("image", "text"):
        if not isinstance(content.get(key), str):
            problem = "must be a string" if key in content else "is missing"
            raise InputError(f'{where}: "{key}" {problem}; write {{"image": "path", "text": "caption"}}.')
        if not content[key].strip():
            raise InputError(f'{where}: "{key}" is empty; give every image a path and a caption.')
    return _Entry(where=where, image=folder / content["image"], caption=content["text"].strip())


def _load_processor(directory: Path) -> ProcessorMixin:
    def refusal(error: Exception) -> str:
        return (
            f"The processor in {directory} cannot be loaded: {_first_sentence(error)}. Copy the model's processor and "
            "tokenizer files next to its config.json."
        )

    try:
        with loading(refusal):
            return _images_only(directory)
    except ImportError as error:
        raise InputError(
            f"The processor in {directory} cannot be loaded: {_first_sentence(error)}. Images need the package pillow, "
            "and some processors others; install what is missing."
        ) from error


def _images_only(directory: Path) -> ProcessorMixin:
    """The model's processor without its part for videos, with Pillow behind its part for images."""
    import PIL.Image  # noqa: F401 - without it, transformers names a class instead of the package
    from transformers import AutoImageProcessor

    processor = _without_videos(_processor_class(directory)).from_pretrained(directory, local_files_only=True)
    if not hasattr(processor, "image_processor"):
        raise InputError(f"The processor in {directory} takes no images; calibrate this model on text alone.")
    processor.image_processor = AutoImageProcessor.from_pretrained(directory, backend="pil", local_files_only=True)
    return processor


def _processor_class(directory: Path) -> Any:
    """The class that AutoProcessor would choose; AutoProcessor itself would load parts that need torchvision."""
    import transformers
    from transformers import PROCESSOR_MAPPING, AutoConfig

    for file in (directory / name for name in _DECLARING):
        declared = parse_object(file.read_bytes()).get("processor_class") if file.is_file() else None
        if isinstance(declared, str) and hasattr(transformers, declared):
            return getattr(transformers, declared)
    kind = type(AutoConfig.from_pretrained(directory, local_files_only=True))
    if kind not in PROCESSOR_MAPPING:
        raise InputError(f"The model in {directory} has no processor for images; calibrate it on text alone.")
    return PROCESSOR_MAPPING[kind]


def _without_videos(processor_class: Any) -> Any:
    """A processor class that loads no video processor: transformers has none that works without torchvision."""

    class ImagesOnly(processor_class):  # type: ignore[misc]
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

    # Transformers decides some things by the name of the class.
    ImagesOnly.__name__ = processor_class.__name__
    return ImagesOnly


def _prepare(entry: _Entry, processor: Any, image_token: int) -> ImageSequence:
    from jinja2 import TemplateError

    image = _open(entry)
    try:
        text = _text(entry.caption, processor)
        bos = processor.tokenizer.bos_token
        # A template that begins with the BOS token leaves none to be added.
        special = {"add_special_tokens": False} if bos is not None and text.startswith(bos) else {}
        prepared = processor(text=[text], images=[image], return_tensors="pt", **special)
    except (ValueError, TypeError, AttributeError, TemplateError) as error:
        raise InputError(
            f"{entry.where}: the model's processor does not take {entry.image} and its caption: "
            f"{_first_sentence(error)}. Change or remove this line."
        ) from error
    inputs = {name: value for name, value in prepared.items() if isinstance(value, Tensor) and name != "attention_mask"}
    _check(inputs, entry, image_token)
    return ImageSequence(inputs=inputs)


def _open(entry: _Entry) -> Image.Image:
    """The image upright and in RGB."""
    from PIL import Image, ImageOps

    try:
        with Image.open(entry.image) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError as error:
        raise InputError(f"{entry.where}: there is no image {entry.image}; correct its path.") from error
    except (*_DAMAGED_IMAGE, Image.DecompressionBombError) as error:
        raise InputError(
            f"{entry.where}: image {entry.image} cannot be read ({_first_sentence(error)}); replace it."
        ) from error


def _text(caption: str, processor: Any) -> str:
    if processor.chat_template is None:
        start, end = (getattr(processor, f"vision_{side}_token", "") for side in ("start", "end"))
        return f"{start}{processor.image_token}{end}{caption}"
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": REQUEST}]},
        {"role": "assistant", "content": [{"type": "text", "text": caption}]},
    ]
    return str(processor.apply_chat_template(messages, tokenize=False))


def _check(inputs: dict[str, Tensor], entry: _Entry, image_token: int) -> None:
    """InputError for inputs in which the model would see no image."""
    if "pixel_values" not in inputs:
        raise InputError(
            f"{entry.where}: the model's processor makes {', '.join(sorted(inputs))} but no pixel_values; "
            "only models that take their images as pixel_values can be calibrated on images."
        )
    if not (inputs["input_ids"] == image_token).any():
        raise InputError(
            f"{entry.where}: the processor's input_ids do not contain the image token {image_token}, so the image "
            "would not reach the vision tower; copy config.json and the tokenizer files from one and the same model."
        )


def _first_sentence(error: Exception) -> str:
    """The start of a message that may have many lines; the name of the error when it says nothing."""
    lines = str(error).split("\n")
    first = next((line.strip() for line in lines if line.strip()), type(error).__name__)
    return first.split(". ")[0].rstrip(".")
