"""Claims about calibration images: what reaches the model, in which order, and what is refused."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer

from benchmarks.make_images import IMAGES
from benchmarks.make_images import main as make_images
from prismaquant_ray.calibration import images
from prismaquant_ray.calibration.dataset import CalibrationSet
from prismaquant_ray.calibration.images import ImageSequence, load_images
from prismaquant_ray.errors import InputError
from tests.tiny_families import IMAGE_PAD, VIDEO_PAD, VISION_START, make_family

SHIPPED = Path(__file__).parents[2] / "configs/data/images"
MERGE = 2  # patches a side that one image token stands for
PNG = SHIPPED / "maze.png"


def fingerprint(sequences: Sequence[ImageSequence]) -> str:
    """Of a calibration set with these images."""
    texts = CalibrationSet(tokens=torch.zeros(2, 4, dtype=torch.long), holdout=torch.tensor([False, True]))
    return texts.with_images((sequence.inputs for sequence in sequences), 0.0).fingerprint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family(tmp_path_factory.mktemp("model"), "qwen3_5")


@pytest.fixture(scope="module")
def shipped(model: Path) -> tuple[ImageSequence, ...]:
    return load_images(SHIPPED / "captions.jsonl", model, image_token=IMAGE_PAD)


@pytest.fixture
def broken(model: Path, tmp_path: Path) -> Path:
    """A copy of the model's files to take something away from."""
    return Path(shutil.copytree(model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors")))


def write(path: Path, *entries: Any) -> Path:
    """A JSONL file of objects, or of lines as they are."""
    lines = (entry if isinstance(entry, str) else json.dumps(entry) for entry in entries)
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def entry(image: Path | str = PNG, text: str = "A maze.") -> dict[str, str]:
    return {"image": str(image), "text": text}


def decoded(sequence: ImageSequence, model: Path) -> str:
    return str(AutoTokenizer.from_pretrained(model).decode(sequence.inputs["input_ids"][0]))


def test_shapes_agree_with_the_grid(shipped: tuple[ImageSequence, ...]) -> None:
    assert len(shipped) == len(IMAGES) >= 10
    for sequence in shipped:
        inputs = sequence.inputs
        assert set(inputs) == {"input_ids", "mm_token_type_ids", "pixel_values", "image_grid_thw"}
        length = inputs["input_ids"].shape[1]
        patches = int(inputs["image_grid_thw"].prod())
        assert inputs["input_ids"].shape == inputs["mm_token_type_ids"].shape == (1, length)
        assert inputs["pixel_values"].shape == (patches, 3 * 2 * 16 * 16)
        assert inputs["image_grid_thw"].shape == (1, 3)
        assert (inputs["input_ids"] == IMAGE_PAD).sum() == patches / MERGE**2 > 1
        assert torch.equal(inputs["mm_token_type_ids"], (inputs["input_ids"] == IMAGE_PAD).long())


def test_dtypes_are_those_the_model_takes(shipped: tuple[ImageSequence, ...]) -> None:
    dtypes = {name: {sequence.inputs[name].dtype for sequence in shipped} for name in shipped[0].inputs}
    assert dtypes.pop("pixel_values") == {torch.float32}
    assert all(kinds == {torch.int64} for kinds in dtypes.values())


def test_pixels_reach_the_models_logits(shipped: tuple[ImageSequence, ...], model: Path) -> None:
    network = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
    inputs = shipped[0].inputs
    with torch.no_grad():
        seen = network(**inputs).logits
        other = network(**inputs | {"pixel_values": -inputs["pixel_values"]}).logits
    assert seen.shape[:2] == inputs["input_ids"].shape
    assert (seen - other)[:, -1].abs().max() > 1e-3


def test_order_is_that_of_the_file_and_a_limit_takes_its_start(model: Path, tmp_path: Path) -> None:
    names = ("tree", "clock", "maze")
    path = write(tmp_path / "list.jsonl", *(entry(SHIPPED / f"{name}.png", f"This is a {name}.") for name in names))
    sequences = load_images(path, model, image_token=IMAGE_PAD)
    assert [decoded(sequence, model).split("\n")[-2] for sequence in sequences] == [
        f"This is a {n}.</s>" for n in names
    ]
    for limit in (1, 2, 3, 9):
        some = load_images(path, model, image_token=IMAGE_PAD, limit=limit)
        assert fingerprint(some) == fingerprint(sequences[:limit])


def test_the_caption_answers_a_request_to_describe_the_image(model: Path, tmp_path: Path) -> None:
    (sequence,) = load_images(write(tmp_path / "one.jsonl", entry()), model, image_token=IMAGE_PAD)
    text = decoded(sequence, model)
    assert text.startswith("<s>user\n<|vision_start|><|image_pad|>")
    assert text.endswith("<|vision_end|>Describe the image.</s>\n<s>assistant\nA maze.</s>\n")
    assert text.count("<s>") == 2


def test_without_a_chat_template_the_caption_follows_the_image(broken: Path, tmp_path: Path) -> None:
    (broken / "chat_template.jinja").unlink()
    (sequence,) = load_images(write(tmp_path / "one.jsonl", entry()), broken, image_token=IMAGE_PAD)
    ids = sequence.inputs["input_ids"][0].tolist()
    assert VISION_START in ids[:2]
    assert decoded(sequence, broken).endswith("<|image_pad|><|vision_end|>A maze.")


def test_without_a_declared_class_the_models_type_decides(broken: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "one.jsonl", entry())
    expected = fingerprint(load_images(path, broken, image_token=IMAGE_PAD))
    for name in ("preprocessor_config.json", "video_preprocessor_config.json", "tokenizer_config.json"):
        content = json.loads((broken / name).read_text())
        content.pop("processor_class", None)
        (broken / name).write_text(json.dumps(content))
    assert fingerprint(load_images(path, broken, image_token=IMAGE_PAD)) == expected


def test_paths_are_relative_to_the_file_or_absolute(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    folder = tmp_path / "lists"
    folder.mkdir()
    shutil.copy(PNG, tmp_path / "above.png")
    shutil.copy(PNG, folder / "beside.png")
    path = write(folder / "list.jsonl", entry("beside.png"), "", entry("../above.png"), entry(PNG), "")
    monkeypatch.chdir("/")
    sequences = load_images(path, model, image_token=IMAGE_PAD)
    assert len(sequences) == 3
    assert len({fingerprint([sequence]) for sequence in sequences}) == 1


def test_byte_order_mark_windows_line_ends_and_odd_separators_are_taken(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    line = json.dumps(entry(text="One line\u2028of text."), ensure_ascii=False)
    path.write_bytes(f"\ufeff{line}\r\n{line}\r\n".encode())
    assert len(load_images(path, model, image_token=IMAGE_PAD)) == 2


def test_the_fingerprint_changes_when_one_pixel_changes(model: Path, tmp_path: Path) -> None:
    # Exactly one token large, so that it is not resized: 32 × 32 pixels are the least the tiny processor takes.
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    prints = []
    for change in (0, 0, 1):
        pixels[17, 5, 1] += change
        Image.fromarray(pixels).save(tmp_path / "pixels.png")
        path = write(tmp_path / "list.jsonl", entry("pixels.png"))
        prints.append(fingerprint(load_images(path, model, image_token=IMAGE_PAD)))
    assert prints[0] == prints[1] != prints[2]


def test_the_fingerprint_depends_on_text_order_names_dtypes_and_shapes(shipped: tuple[ImageSequence, ...]) -> None:
    inputs = shipped[0].inputs
    variants: list[dict[str, torch.Tensor]] = [
        inputs,
        inputs | {"input_ids": inputs["input_ids"] + 1},
        inputs | {"input_ids": inputs["input_ids"].int()},
        inputs | {"image_grid_thw": inputs["image_grid_thw"].T},
        {name.upper(): tensor for name, tensor in inputs.items()},
    ]
    prints = {fingerprint([ImageSequence(inputs=variant)]) for variant in variants}
    prints |= {fingerprint(shipped[:2]), fingerprint(shipped[1::-1])}
    assert len(prints) == len(variants) + 2


def test_the_fingerprint_survives_pickling(shipped: tuple[ImageSequence, ...]) -> None:
    again = pickle.loads(pickle.dumps(shipped))  # noqa: S301 - our own
    assert fingerprint(again) == fingerprint(shipped)


def test_transparent_grey_and_turned_images_become_upright_rgb(model: Path, tmp_path: Path) -> None:
    picture = Image.open(PNG).resize((96, 64))
    turned = Image.Exif()
    turned[0x0112] = 6  # stored on its side
    picture.convert("RGBA").save(tmp_path / "alpha.png")
    picture.convert("L").save(tmp_path / "grey.png")
    picture.convert("P").save(tmp_path / "palette.gif")
    picture.save(tmp_path / "turned.jpg", exif=turned)
    path = write(tmp_path / "list.jsonl", *map(entry, ("alpha.png", "grey.png", "palette.gif", "turned.jpg")))
    grids = [s.inputs["image_grid_thw"].tolist()[0] for s in load_images(path, model, image_token=IMAGE_PAD)]
    assert grids == [[1, 4, 6], [1, 4, 6], [1, 4, 6], [1, 6, 4]]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{'image': 'a.png'}", r"is not JSON \(Expecting property name .*\); write .* on a line"),
        ('{"image": "a.png", "text": "cut', r"is not JSON"),
        ("[" * 100_000, "is nested deeper than 64 levels; write"),
        ("[1, 2]", "is not a JSON object; write"),
        ('"a.png"', "is not a JSON object; write"),
        ({"text": "A maze."}, '"image" is missing; write'),
        ({"image": str(PNG)}, '"text" is missing; write'),
        ({"image": str(PNG), "text": None}, '"text" must be a string; write'),
        ({"image": 3, "text": "A maze."}, '"image" must be a string; write'),
        (entry(text=" \n"), '"text" is empty; give'),
        (entry(image=""), '"image" is empty; give'),
        (entry("nowhere.png"), r"there is no image .*nowhere\.png; correct its path"),
        (entry("list.jsonl"), r"image .*list\.jsonl cannot be read \(cannot identify image file .*\); replace it"),
        (entry("."), r"cannot be read \(.*Is a directory.*\); replace it"),
        (entry("nul\0.png"), r"cannot be read \(embedded null byte\); replace it"),
        (entry("cut.png"), r"image .*cut\.png cannot be read \(.*\); replace it"),
        (entry("thin.png"), r"does not take .*thin\.png and its caption: .*aspect ratio .*Change or remove this line"),
        (entry(text="See <|image_pad|>."), r"does not take .*maze\.png and its caption: .*Change or remove this line"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(line: Any, reason: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(PNG.read_bytes()[:3000])
    Image.new("RGB", (900, 2)).save(tmp_path / "thin.png")
    path = write(tmp_path / "list.jsonl", entry(), "", line)
    with pytest.raises(InputError, match=reason) as caught:
        load_images(path, model, image_token=IMAGE_PAD)
    assert str(caught.value).startswith(f"{path}, line 3")
    assert "\n" not in str(caught.value)
    assert len(load_images(path, model, image_token=IMAGE_PAD, limit=1)) == 1


@settings(max_examples=60)
@given(st.integers(0, PNG.stat().st_size - 1), st.binary(min_size=1, max_size=8))
def test_a_damaged_image_is_read_or_refused_by_name(place: int, junk: bytes) -> None:
    content = bytearray(PNG.read_bytes())
    content[place : place + len(junk)] = junk
    folder = SHIPPED.parent / "unused"
    damaged = images._Entry(where="list.jsonl, line 1", image=folder / "damaged.png", caption="A maze.")
    with pytest.MonkeyPatch.context() as patch:
        opened = Image.open
        patch.setattr(Image, "open", lambda _: opened(io.BytesIO(content)))
        try:
            assert images._open(damaged).mode == "RGB"
        except InputError as error:
            assert str(error).startswith("list.jsonl, line 1: image")


def test_an_unusable_list_is_named(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    with pytest.raises(InputError, match=r"List of images .*list\.jsonl cannot be read: No such file"):
        load_images(path, model, image_token=IMAGE_PAD)
    for content in (b"", b"\n \n"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"list\.jsonl lists no image; each line must be"):
            load_images(path, model, image_token=IMAGE_PAD)
    path.write_bytes(b'{"image": "a.png", "text": "caf\xe9"}')
    with pytest.raises(InputError, match=r"list\.jsonl is not UTF-8 text \(byte 31\); convert it to UTF-8"):
        load_images(path, model, image_token=IMAGE_PAD)


def refusal(path: Path, model: Path, image_token: int = IMAGE_PAD) -> str:
    with pytest.raises(InputError) as caught:
        load_images(path, model, image_token=image_token)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("preprocessor_config.json", None),
        ("preprocessor_config.json", "{"),
        ("preprocessor_config.json", "[]"),
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
    ],
)
def test_a_model_with_missing_or_damaged_processor_files_is_refused(
    file: str, content: str | None, broken: Path, tmp_path: Path
) -> None:
    (broken / file).unlink() if content is None else (broken / file).write_text(content)
    message = refusal(write(tmp_path / "one.jsonl", entry()), broken)
    assert message.startswith(f"The processor in {broken} cannot be loaded: ")
    assert message.endswith("Copy the model's processor and tokenizer files next to its config.json.")


def test_a_model_that_reads_only_text_is_refused(tmp_path: Path) -> None:
    text_only = make_family(tmp_path / "model", "qwen3_5_text")
    message = refusal(write(tmp_path / "one.jsonl", entry()), text_only)
    assert message == f"The model in {text_only} has no processor for images; calibrate it on text alone."


def test_a_missing_package_is_named(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    message = refusal(write(tmp_path / "one.jsonl", entry()), model)
    assert "Images need the package pillow" in message
    assert "PIL.Image" in message


def test_ids_without_the_configs_image_token_are_refused(model: Path, tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "one.jsonl", entry()), model, image_token=VIDEO_PAD)
    assert f"line 1: the processor's input_ids do not contain the image token {VIDEO_PAD}" in message
    assert "would not reach the vision tower" in message


def test_a_model_without_its_tokenizer_is_refused(broken: Path, tmp_path: Path) -> None:
    # Transformers makes an empty tokenizer of what is left.
    (broken / "tokenizer.json").unlink()
    message = refusal(write(tmp_path / "one.jsonl", entry()), broken)
    assert message.endswith("copy config.json and the tokenizer files from one and the same model.")


def test_a_processor_without_pixel_values_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = images._load_processor(model)

    class Blind:
        chat_template = None
        image_token = processor.image_token
        tokenizer = processor.tokenizer

        def __call__(self, **_: Any) -> dict[str, torch.Tensor]:
            return {"input_ids": torch.tensor([[IMAGE_PAD]]), "patches": torch.zeros(1)}

    monkeypatch.setattr(images, "_load_processor", lambda _: Blind())
    message = refusal(write(tmp_path / "one.jsonl", entry()), model)
    assert "line 1: the model's processor makes input_ids, patches but no pixel_values" in message


def test_shipped_images_are_distinct_and_not_flat() -> None:
    entries = [json.loads(line) for line in (SHIPPED / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sorted(item["image"] for item in entries) == sorted(path.name for path in SHIPPED.glob("*.png"))
    small = []
    for item in entries:
        path = SHIPPED / item["image"]
        assert path.stat().st_size < 60_000
        pixels = np.asarray(Image.open(path).convert("L"), dtype=np.float64)
        assert pixels.std() > 20
        assert 30 <= len(item["text"].split()) <= 60
        small.append(np.asarray(Image.open(path).convert("L").resize((32, 24)), dtype=np.float64))
    for index, first in enumerate(small):
        assert all(np.abs(first - second).mean() > 10 for second in small[:index])


def test_the_script_makes_the_shipped_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["make_images", str(tmp_path)])
    make_images()
    assert (tmp_path / "captions.jsonl").read_bytes() == (SHIPPED / "captions.jsonl").read_bytes()
    for path in SHIPPED.glob("*.png"):
        made, kept = (np.asarray(Image.open(folder / path.name), dtype=np.int64) for folder in (tmp_path, SHIPPED))
        # Another Pillow or NumPy may round a little differently.
        assert made.shape == kept.shape
        assert np.abs(made - kept).mean() < 2
