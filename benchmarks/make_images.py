"""Draw the calibration images of configs/data/images and write their captions: `python -m benchmarks.make_images`.

Everything is computed here, from fixed seeds and the font inside Pillow, so the images belong to nobody (CC0). A second
run with the same Pillow writes the same bytes. The docstring of a function is the caption of what it draws. Shapes are
drawn three times too large and reduced, because Pillow draws no smooth edges.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

DIRECTORY = Path(__file__).parent.parent / "configs/data/images"
SCALE = 3
INK = (40, 44, 52)
PAPER = (252, 250, 244)

Colour = tuple[int, int, int]
Point = tuple[float, float]


class Canvas:
    """A drawing in units of final pixels, from a background colour or a picture of the enlarged size."""

    def __init__(self, width: int, height: int, background: Colour | Image.Image = (255, 255, 255)) -> None:
        self.size = (width, height)
        large = (width * SCALE, height * SCALE)
        if isinstance(background, Image.Image):
            self.image = background.resize(large, Image.Resampling.BICUBIC)
        else:
            self.image = Image.new("RGB", large, background)
        self.draw = ImageDraw.Draw(self.image)

    def line(self, points: Sequence[Point], colour: Colour = INK, width: float = 1) -> None:
        """A polyline."""
        self.draw.line(_large(points), fill=colour, width=round(width * SCALE), joint="curve")

    def box(
        self, left: float, top: float, right: float, bottom: float, fill: Colour | None = None, **more: Any
    ) -> None:
        """A rectangle, filled or outlined."""
        self.draw.rectangle(_large([(left, top), (right, bottom)]), fill=fill, **_outline(more))

    def disc(self, x: float, y: float, radius: float, fill: Colour | None = None, **more: Any) -> None:
        """A circle, filled or outlined."""
        corners = _large([(x - radius, y - radius), (x + radius, y + radius)])
        self.draw.ellipse(corners, fill=fill, **_outline(more))

    def slice(self, x: float, y: float, radius: float, start: float, end: float, fill: Colour) -> None:
        """A sector from `start` to `end` degrees, clockwise from three o'clock."""
        corners = _large([(x - radius, y - radius), (x + radius, y + radius)])
        self.draw.pieslice(corners, start, end, fill=fill, outline=(255, 255, 255), width=SCALE)

    def polygon(self, points: Sequence[Point], fill: Colour) -> None:
        """A filled polygon."""
        self.draw.polygon(_large(points), fill=fill)

    def text(self, x: float, y: float, words: str, size: float = 11, colour: Colour = INK, anchor: str = "la") -> None:
        """Words at a point; `anchor` as in Pillow."""
        self.draw.text((x * SCALE, y * SCALE), words, colour, ImageFont.load_default(size * SCALE), anchor)

    def done(self) -> Image.Image:
        """The drawing in its final size."""
        return self.image.resize(self.size, Image.Resampling.LANCZOS)


def _large(points: Sequence[Point]) -> list[Point]:
    return [(x * SCALE, y * SCALE) for x, y in points]


def _outline(more: dict[str, Any]) -> dict[str, Any]:
    return {"outline": more.get("outline"), "width": round(more.get("width", 1) * SCALE)}


def _gradient(width: int, height: int, stops: Sequence[tuple[float, Colour]]) -> Image.Image:
    """Colours from top to bottom, between stops at shares of the height."""
    rows = np.linspace(0, 1, height)
    places = [place for place, _ in stops]
    column = np.stack([np.interp(rows, places, [colour[i] for _, colour in stops]) for i in range(3)], axis=1)
    return Image.fromarray(np.repeat(column[:, None], width, axis=1).round().astype(np.uint8))


def bar_chart() -> Image.Image:
    """A bar chart titled “Rainfall in Milltown, 2019 (mm)”. Six bars run from January to June. Five are blue: 92,
    74, 55, 38 and 61 millimetres. The last one, June, is orange and the tallest of all with 110. April is the
    driest month."""
    canvas = Canvas(320, 240, PAPER)
    canvas.text(160, 8, "Rainfall in Milltown, 2019 (mm)", 13, anchor="ma")
    for value in range(0, 121, 20):
        y = 210 - 1.4 * value
        canvas.line([(40, y), (308, y)], (214, 212, 206), 0.7)
        canvas.text(34, y, str(value), 9, anchor="rm")
    for i, (month, value) in enumerate(
        zip(("Jan", "Feb", "Mar", "Apr", "May", "Jun"), (92, 74, 55, 38, 61, 110), strict=True)
    ):
        x = 52 + 43 * i
        canvas.box(x, 210 - 1.4 * value, x + 28, 210, (58, 116, 180) if month != "Jun" else (214, 96, 60))
        canvas.text(x + 14, 207 - 1.4 * value, str(value), 9, anchor="md")
        canvas.text(x + 14, 215, month, 10, anchor="ma")
    canvas.line([(40, 36), (40, 210), (308, 210)], INK, 1.3)
    return canvas.done()


def line_chart() -> Image.Image:
    """A line chart of temperature over one week, from Monday to Sunday. The red line for the day rises from 14
    degrees to a peak of 25 on Friday and then falls to 17. The blue line for the night stays below it, between 6
    and 13 degrees."""
    canvas = Canvas(320, 224)
    canvas.text(160, 6, "Temperature over one week", 13, anchor="ma")
    days = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
    series = {"day": ((214, 72, 56), (14, 16, 19, 23, 25, 21, 17)), "night": ((52, 92, 170), (6, 7, 9, 12, 13, 11, 8))}
    for value in range(0, 31, 5):
        canvas.line([(36, 190 - 5 * value), (308, 190 - 5 * value)], (226, 226, 226), 0.7)
        canvas.text(30, 190 - 5 * value, f"{value}°", 9, anchor="rm")
    for i, day in enumerate(days):
        canvas.text(52 + 40 * i, 196, day, 10, anchor="ma")
    for place, (name, (colour, values)) in enumerate(series.items()):
        points = [(52 + 40 * i, 190 - 5 * value) for i, value in enumerate(values)]
        canvas.line(points, colour, 2)
        for x, y in points:
            canvas.disc(x, y, 3.2, colour, outline=(255, 255, 255), width=0.8)
        canvas.line([(230, 34 + 15 * place), (252, 34 + 15 * place)], colour, 2)
        canvas.text(258, 34 + 15 * place, name, 10, anchor="lm")
    canvas.line([(36, 34), (36, 190), (308, 190)], INK, 1.2)
    return canvas.done()


def pie_chart() -> Image.Image:
    """A pie chart titled “Electricity by source” with a legend on the right. Wind is the largest slice with 40
    percent, in blue. Solar has 25 percent in yellow, hydro 20 percent in green, gas 10 percent in red, and other
    sources the last 5 percent in grey."""
    canvas = Canvas(304, 208, (246, 248, 250))
    canvas.text(152, 8, "Electricity by source", 13, anchor="ma")
    parts = (
        ("wind", 40, (70, 130, 180)),
        ("solar", 25, (240, 190, 60)),
        ("hydro", 20, (86, 170, 130)),
        ("gas", 10, (200, 90, 80)),
        ("other", 5, (150, 150, 160)),
    )
    start = -90.0
    for i, (name, share, colour) in enumerate(parts):
        end = start + 3.6 * share
        canvas.slice(104, 116, 78, start, end, colour)
        middle = math.radians((start + end) / 2)
        canvas.text(104 + 55 * math.cos(middle), 116 + 55 * math.sin(middle), f"{share}%", 9, (255, 255, 255), "mm")
        canvas.box(212, 62 + 24 * i, 226, 76 + 24 * i, colour)
        canvas.text(233, 69 + 24 * i, name, 11, anchor="lm")
        start = end
    return canvas.done()


def text_page() -> Image.Image:
    """A printed notice on cream paper with a thin border. Under the red heading “NOTICE TO VISITORS” it says that
    the lighthouse is open from nine until five every day except Tuesday, that there are 214 steps and no lift, and
    it is signed “The Keeper” in the lower right corner."""
    canvas = Canvas(320, 240, PAPER)
    canvas.box(8, 8, 312, 232, outline=(150, 130, 90), width=1)
    canvas.text(160, 20, "NOTICE TO VISITORS", 16, (120, 40, 30), "ma")
    canvas.line([(60, 44), (260, 44)], (120, 40, 30), 1)
    words = (
        "The lighthouse is open from nine in the",
        "morning until five in the afternoon, every",
        "day except Tuesday. Please leave bags at",
        "the door, hold the rail on the stairs, and",
        "let those coming down pass first.",
        "",
        "There are 214 steps and no lift. Children",
        "under eight must be with an adult.",
    )
    for i, row in enumerate(words):
        canvas.text(24, 56 + 17 * i, row, 13)
    canvas.text(296, 208, "The Keeper", 12, (60, 60, 120), "ra")
    return canvas.done()


def solids() -> Image.Image:
    """Three solid shapes stand in a row on a brownish grey floor in front of a pale wall: a shiny red ball on the
    left, a green cube in the middle and a blue cone on the right. Light comes from the upper left, so each throws a
    dark shadow to its right."""
    # A sphere, a cube and a cone lit from the upper left, each with its shadow on the floor.
    width, height = 320 * SCALE, 224 * SCALE
    floor = _gradient(
        320, 224, ((0, (196, 208, 224)), (0.55, (226, 230, 236)), (0.56, (170, 160, 148)), (1, (206, 196, 182)))
    )
    canvas = Canvas(320, 224, floor)
    for x, y, wide in ((98, 184, 52), (196, 186, 48), (276, 182, 38)):
        corners = _large([(x - wide + 14, y - 9), (x + wide + 14, y + 9)])
        canvas.draw.ellipse(corners, fill=(138, 128, 118))
    canvas.polygon([(156, 110), (206, 118), (206, 190), (156, 180)], (70, 140, 90))
    canvas.polygon([(206, 118), (236, 106), (236, 176), (206, 190)], (44, 96, 62))
    canvas.polygon([(156, 110), (187, 99), (236, 106), (206, 118)], (122, 192, 138))
    picture = np.asarray(canvas.image).astype(np.float64)
    y, x = np.mgrid[:height, :width] / SCALE
    _shade_sphere(picture, x, y)
    _shade_cone(picture, x, y)
    canvas.image = Image.fromarray(picture.clip(0, 255).round().astype(np.uint8))
    return canvas.done()


def _shade_sphere(picture: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
    """A red ball of radius 50 at (86, 136)."""
    across, down = (x - 86) / 50, (y - 136) / 50
    inside = across**2 + down**2 <= 1
    depth = np.sqrt(np.clip(1 - across**2 - down**2, 0, 1))
    light = np.clip(-0.5 * across - 0.6 * down + 0.62 * depth, 0, 1)
    colour = (0.25 + 0.75 * light)[..., None] * (205, 52, 48) + (light**24)[..., None] * 190
    picture[inside] = colour[inside]


def _shade_cone(picture: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
    """A blue cone from its tip at (270, 78) to a base of half width 32 at 180."""
    share = np.clip((y - 78) / 102, 1e-6, None)
    across = (x - 270) / (32 * share)
    inside = (np.abs(across) <= 1) & (y >= 78) & (y <= 180 + 8 * np.sqrt(np.clip(1 - across**2, 0, 1)))
    light = np.clip(0.75 - 0.45 * across - 0.25 * across**2, 0.2, 1)
    picture[inside] = (light[..., None] * (74, 112, 214))[inside]


def checkerboard() -> Image.Image:
    """A floor of dark purple and cream square tiles in strong perspective. The tiles are large at the bottom of the
    picture and shrink towards a straight horizon, where they melt into a grey haze. Above it the sky turns from a
    pale pinkish beige to deep blue."""
    # A checkered floor of one-unit tiles that runs to the horizon, sampled finely and averaged.
    width, height, horizon = 320, 208, 72
    fine = 4
    y, x = np.mgrid[: height * fine, : width * fine] / fine
    depth = 150 / np.clip(y - horizon, 0.3, None)
    tiles = (np.floor((x - 160) * depth / 90) + np.floor(depth * 3.0)) % 2
    fade = np.clip(depth / 14, 0, 1)[..., None]
    board = np.where(tiles[..., None] > 0, (236, 228, 208), (44, 36, 56))
    board = board * (1 - fade) + np.array((176, 170, 186)) * fade
    sky = np.asarray(
        _gradient(1, height * fine, ((0, (52, 84, 150)), (horizon / height, (232, 206, 190)), (1, (0, 0, 0))))
    )
    picture = np.where((y >= horizon)[..., None], board, sky)
    small = picture.reshape(height, fine, width, fine, 3).mean(axis=(1, 3))
    return Image.fromarray(small.round().astype(np.uint8))


def maze(cells: int = 15, seed: int = 3) -> Image.Image:
    """A square maze of black walls on white, seen from above. A green dot marks the start in the upper left corner
    and a blue dot the goal in the lower right corner. A thick red line winds through the corridors and joins the
    two without crossing any wall."""
    # A maze without loops, and the only way through it.
    open_walls = _carve(cells, seed)
    canvas = Canvas(240, 240)
    step, edge = 14.4, 12.0
    way = _way(open_walls, (0, 0), (cells - 1, cells - 1))
    canvas.line([(edge + step * (x + 0.5), edge + step * (y + 0.5)) for x, y in way], (220, 60, 50), 3)
    for x, y in ((x, y) for x in range(cells) for y in range(cells)):
        left, top = edge + step * x, edge + step * y
        if x + 1 < cells and frozenset({(x, y), (x + 1, y)}) not in open_walls:
            canvas.line([(left + step, top - 1), (left + step, top + step + 1)], INK, 2)
        if y + 1 < cells and frozenset({(x, y), (x, y + 1)}) not in open_walls:
            canvas.line([(left - 1, top + step), (left + step + 1, top + step)], INK, 2)
    canvas.box(edge, edge, edge + step * cells, edge + step * cells, outline=INK, width=2.5)
    canvas.disc(edge + step / 2, edge + step / 2, 5, (40, 160, 80))
    canvas.disc(edge + step * (cells - 0.5), edge + step * (cells - 0.5), 5, (40, 90, 200))
    return canvas.done()


def _carve(cells: int, seed: int) -> set[frozenset[tuple[int, int]]]:
    """Pairs of neighbouring cells without a wall between them, by a random walk that goes back at dead ends."""
    random = np.random.default_rng(seed)
    stack, seen, opened = [(0, 0)], {(0, 0)}, set()
    while stack:
        free = [cell for cell in _neighbours(stack[-1], cells) if cell not in seen]
        if not free:
            stack.pop()
            continue
        chosen = free[int(random.integers(len(free)))]
        opened.add(frozenset({stack[-1], chosen}))
        seen.add(chosen)
        stack.append(chosen)
    return opened


def _neighbours(cell: tuple[int, int], cells: int) -> list[tuple[int, int]]:
    around = [(cell[0] + dx, cell[1] + dy) for dx, dy in ((1, 0), (0, 1), (-1, 0), (0, -1))]
    return [(x, y) for x, y in around if 0 <= x < cells and 0 <= y < cells]


def _way(
    opened: set[frozenset[tuple[int, int]]], start: tuple[int, int], end: tuple[int, int]
) -> list[tuple[int, int]]:
    ways = [[start]]
    while ways[0][-1] != end:
        way = ways.pop(0)
        steps = (next(iter(pair - {way[-1]})) for pair in opened if way[-1] in pair)
        ways += [[*way, cell] for cell in steps if cell not in way]
    return ways[0]


def mandelbrot() -> Image.Image:
    """The Mandelbrot set: a black heart-shaped body with a round bulb on its left and smaller bulbs all along its
    edge. A glowing fringe of pale yellow and violet follows the outline, and the surroundings fade to deep blue
    away from it. The picture is symmetric about its horizontal middle line."""
    width, height = 288 * 2, 208 * 2
    y, x = np.mgrid[:height, :width]
    c = (x - width * 0.68) / (width * 0.30) + 1j * (y - height / 2) / (width * 0.30)
    z, count = np.zeros_like(c), np.zeros(c.shape)
    escaped = np.zeros(c.shape, dtype=bool)
    for i in range(60):
        z = np.where(escaped, z, z * z + c)
        now = ~escaped & (np.abs(z) > 16)
        count[now] = i + 1 - np.log2(np.log2(np.abs(z[now])))
        escaped |= now
    share = np.clip(count / 26, 0, 1) ** 0.6
    colours = np.stack([255 * share**1.4, 210 * share**2.2 + 10, 110 + 110 * np.sin(math.pi * share)], axis=2)
    colours[~escaped] = (8, 6, 20)
    picture = Image.fromarray(colours.clip(0, 255).round().astype(np.uint8)).resize(
        (288, 208), Image.Resampling.LANCZOS
    )
    return picture.quantize(160).convert("RGB")


def landscape() -> Image.Image:
    """A stylised sunset. A pale yellow sun with a soft halo sits low over three rows of rolling hills that get
    darker towards the viewer. The sky goes from deep blue through pink to gold. Three dark fir trees stand at the
    lower left, and three birds fly above."""
    sky = _gradient(
        320, 200, ((0, (56, 64, 130)), (0.35, (214, 116, 110)), (0.62, (252, 206, 120)), (1, (252, 220, 150)))
    )
    canvas = Canvas(320, 200, sky)
    for radius, colour in ((34, (253, 206, 116)), (28, (254, 226, 140)), (22, (255, 244, 196))):
        canvas.disc(214, 104, radius, colour)
    hills = (
        (118, 16, 0.021, 0.4, (146, 104, 128)),
        (140, 14, 0.030, 2.0, (98, 84, 118)),
        (164, 10, 0.040, 4.1, (52, 62, 84)),
    )
    for base, tall, speed, phase, colour in hills:
        top = [(x, base - tall * math.sin(speed * x + phase) - 3 * math.sin(0.11 * x + phase)) for x in range(-2, 323)]
        canvas.polygon([*top, (322, 202), (-2, 202)], colour)
    for x, y, tall in ((40, 176, 34), (60, 182, 42), (84, 178, 28)):
        canvas.box(x - 1.5, y - 6, x + 1.5, y + 6, (34, 28, 30))
        for part in range(3):
            wide = tall * (0.34 - 0.07 * part)
            bottom = y - 4 - part * tall * 0.26
            canvas.polygon([(x - wide, bottom), (x + wide, bottom), (x, bottom - tall * 0.5)], (22, 40, 44))
    for x, y in ((110, 40), (126, 48), (142, 38)):
        canvas.line([(x - 6, y - 3), (x - 2, y - 4), (x, y), (x + 2, y - 4), (x + 6, y - 3)], (40, 34, 60), 1)
    return canvas.done()


def clock() -> Image.Image:
    """A round wall clock with a brown rim and a cream face on a blue-grey wall. It has the numbers one to twelve
    and a mark for every minute. The short hand is just past ten and the long hand points at two: it is ten past
    ten. The thin red second hand points at seven."""
    canvas = Canvas(224, 224, (72, 96, 110))
    canvas.disc(115, 117, 100, (50, 66, 78))
    canvas.disc(112, 112, 100, (250, 247, 238), outline=(92, 60, 36), width=7)
    for minute in range(60):
        inner = 82 if minute % 5 == 0 else 87
        canvas.line([_hand(minute * 6, inner), _hand(minute * 6, 91)], INK, 2 if minute % 5 == 0 else 0.8)
    for hour in range(1, 13):
        x, y = _hand(hour * 30, 69)
        canvas.text(x, y, str(hour), 16, anchor="mm")
    canvas.line([_hand(305 + 180, 10), _hand(305, 46)], INK, 6)
    canvas.line([_hand(60 + 180, 12), _hand(60, 72)], INK, 3.6)
    canvas.line([_hand(210 + 180, 18), _hand(210, 78)], (200, 50, 40), 1.4)
    canvas.disc(112, 112, 5, (200, 50, 40))
    return canvas.done()


def _hand(degrees: float, length: float) -> Point:
    """The end of a clock hand, clockwise from twelve."""
    return 112 + length * math.sin(math.radians(degrees)), 112 - length * math.cos(math.radians(degrees))


def table() -> Image.Image:
    """A table of stationery with the columns Item, Count, Price and Total. It lists 24 pencils, 8 notebooks, 6
    rulers, 50 envelopes and 3 scissors. The header is white on dark blue, the rows alternate between pale blue and
    white, and the last row, in yellow, gives the sum: 91 pieces for 60.70."""
    canvas = Canvas(320, 192)
    rows = (
        ("Item", "Count", "Price", "Total"),
        ("Pencils", "24", "0.45", "10.80"),
        ("Notebooks", "8", "2.75", "22.00"),
        ("Rulers", "6", "1.20", "7.20"),
        ("Envelopes", "50", "0.12", "6.00"),
        ("Scissors", "3", "4.90", "14.70"),
        ("Sum", "91", "", "60.70"),
    )
    for i, row in enumerate(rows):
        top = 12 + 24 * i
        shade = (52, 72, 104) if i == 0 else (232, 238, 246) if i % 2 else (255, 255, 255)
        canvas.box(12, top, 308, top + 24, shade if i < len(rows) - 1 else (250, 232, 196))
        colour = (255, 255, 255) if i == 0 else INK
        canvas.text(20, top + 12, row[0], 12, colour, "lm")
        for right, words in zip((168, 232, 298), row[1:], strict=True):
            canvas.text(right, top + 12, words, 12, colour, "rm")
    for i in range(len(rows) + 1):
        canvas.line([(12, 12 + 24 * i), (308, 12 + 24 * i)], (130, 140, 156), 0.8)
    for x in (12, 116, 180, 244, 308):
        canvas.line([(x, 12), (x, 180)], (130, 140, 156), 0.8)
    return canvas.done()


def street_map() -> Image.Image:
    """A street map of a small town. Two wide yellow roads cross near the middle, one of them named High Street, and
    narrower white streets run between blocks of beige houses. City Park, green with a round pond, is at the upper
    right. The blue River Aln winds along the bottom, and a red M marks a station."""
    canvas = Canvas(320, 240, (240, 236, 226))
    random = np.random.default_rng(11)
    for x, y in ((x, y) for x in range(8, 320, 18) for y in range(8, 240, 18)):
        wide, tall = random.uniform(9, 14, 2)
        canvas.box(x, y, x + wide, y + tall, (218, 208, 194))
    canvas.box(200, 30, 292, 98, (186, 220, 168))
    canvas.disc(262, 70, 14, (150, 196, 226))
    for x, y in random.uniform((206, 34), (244, 94), (16, 2)):
        canvas.disc(x, y, 3.4, (112, 170, 100))
    bank = [(x, 184 + 14 * math.sin(x / 46)) for x in range(-4, 330, 2)]
    canvas.polygon([*bank, *((x, y + 24) for x, y in reversed(bank))], (150, 196, 226))
    roads = (
        ([(0, 112), (320, 106)], 9, (250, 206, 110)),
        ([(0, 22), (320, 20)], 5, (255, 255, 255)),
        ([(66, 0), (72, 240)], 5, (255, 255, 255)),
        ([(186, 0), (190, 240)], 9, (250, 206, 110)),
        ([(300, 0), (302, 240)], 5, (255, 255, 255)),
        ([(0, 60), (186, 64)], 5, (255, 255, 255)),
        ([(0, 150), (320, 152)], 5, (255, 255, 255)),
        ([(126, 22), (128, 152)], 5, (255, 255, 255)),
        ([(246, 106), (248, 152)], 5, (255, 255, 255)),
    )
    for points, width, _ in roads:
        canvas.line(points, (176, 168, 156), width + 1.6)
    for points, width, colour in roads:
        canvas.line(points, colour, width)
    canvas.text(246, 38, "City Park", 11, (40, 90, 40), "ma")
    canvas.text(36, 206, "River Aln", 10, (40, 90, 150), "mm")
    canvas.text(96, 110, "High Street", 8, (90, 60, 10), "mm")
    canvas.disc(150, 86, 7, (214, 60, 50), outline=(255, 255, 255), width=1.4)
    canvas.text(150, 86, "M", 9, (255, 255, 255), "mm")
    canvas.polygon([(24, 30), (29, 44), (24, 41), (19, 44)], INK)
    canvas.text(24, 28, "N", 10, INK, "md")
    return canvas.done()


def handwriting() -> Image.Image:
    """Ruled notepaper with pale blue lines and a red margin on the left. Five rows of quick looping handwriting in
    dark blue ink imitate a letter, but no word of it can be read. The last row is short and is followed by a zigzag
    stroke like a signature."""
    # Five rows of joined loops of uneven height, like quick writing that nobody can read, on ruled paper.
    canvas = Canvas(320, 176, (254, 252, 240))
    for i in range(6):
        canvas.line([(0, 30 + 26 * i), (320, 30 + 26 * i)], (176, 204, 230), 0.8)
    canvas.line([(36, 0), (36, 176)], (232, 130, 130), 1)
    random = np.random.default_rng(5)
    for row in range(5):
        x, base = 44.0, 29.0 + 26 * row
        while x < (252 if row < 4 else 130):
            length = random.integers(3, 8)
            x = _scribble(canvas, x, base, length, random) + 9
    canvas.line([(200, 150), (228, 141), (262, 150), (284, 140)], (30, 50, 140), 1.6)
    return canvas.done()


def _scribble(canvas: Canvas, x: float, base: float, letters: int, random: np.random.Generator) -> float:
    """One word; returns where it ends."""
    points = []
    for _ in range(letters):
        tall = random.choice([4.5, 4.5, 5.5, 10.0, -5.0])
        turn = np.linspace(0, 2 * math.pi, 18)
        points += [
            (x + 7 * t / (2 * math.pi) + 2.6 * math.sin(t), base - tall * (1 - math.cos(t)) / 1.3 * 0.6) for t in turn
        ]
        x += 7
    canvas.line(points, (30, 50, 140), 1.2)
    return x


def floor_plan() -> Image.Image:
    """The floor plan of a flat with five labelled rooms. The kitchen is at the upper left and the large living room
    at the upper right. Below them are the bath on the left, the hall in the middle and the bedroom on the right.
    Windows are light blue, and a brown entrance door leads into the hall."""
    canvas = Canvas(304, 224, (244, 247, 250))
    rooms = (
        ("Kitchen", 20, 20, 128, 104, (250, 232, 206)),
        ("Living room", 128, 20, 284, 128, (222, 236, 220)),
        ("Bath", 20, 104, 92, 204, (208, 228, 244)),
        ("Hall", 92, 128, 172, 204, (238, 234, 228)),
        ("Bedroom", 172, 128, 284, 204, (236, 222, 240)),
    )
    for _, *corners, colour in rooms:
        canvas.box(*corners, colour)
    canvas.box(92, 104, 128, 128, (238, 234, 228))
    for points in (
        [(20, 20), (284, 20), (284, 204), (20, 204), (20, 20)],
        [(128, 20), (128, 128)],
        [(128, 128), (284, 128)],
        [(20, 104), (128, 104)],
        [(92, 104), (92, 204)],
        [(172, 128), (172, 204)],
    ):
        canvas.line(points, INK, 4)
    doors = (
        ([(100, 104), (120, 104)], (238, 234, 228)),
        ([(138, 128), (160, 128)], (238, 234, 228)),
        ([(92, 150), (92, 172)], (238, 234, 228)),
        ([(172, 150), (172, 172)], (238, 234, 228)),
        ([(120, 204), (144, 204)], (150, 100, 60)),
    )
    for points, colour in doors:
        canvas.line(points, colour, 4.6)
    for name, left, top, right, bottom, _ in rooms:
        canvas.text((left + right) / 2, (top + bottom) / 2, name, 11, anchor="mm")
    for left, right in ((52, 96), (176, 236)):
        canvas.line([(left, 20), (right, 20)], (120, 180, 230), 4)
    canvas.line([(284, 148), (284, 184)], (120, 180, 230), 4)
    return canvas.done()


def tree() -> Image.Image:
    """A single tree with a brown trunk stands on a green meadow under a light blue sky. The trunk forks again and
    again into ever thinner branches, which spread into a wide round crown, and hundreds of small round green leaves
    of different shades sit on the tips of the twigs."""
    canvas = Canvas(256, 240, _gradient(256, 240, ((0, (150, 200, 236)), (0.8, (226, 240, 246)), (1, (240, 246, 240)))))
    canvas.polygon([(0, 206), (90, 200), (256, 210), (256, 240), (0, 240)], (120, 168, 92))
    _branch(canvas, (128, 214), -90, 48, 8, np.random.default_rng(2))
    return canvas.done()


def _branch(
    canvas: Canvas, start: Point, degrees: float, length: float, left: int, random: np.random.Generator
) -> None:
    """A branch and the two that grow from its end; the last ones carry leaves."""
    end = (
        start[0] + length * math.cos(math.radians(degrees)),
        start[1] + length * math.sin(math.radians(degrees)),
    )
    canvas.line([start, end], (98, 66, 42), 0.6 + 0.13 * left**2)
    if left == 0:
        canvas.disc(*end, 2.4, (int(random.integers(30, 90)), int(random.integers(120, 180)), 50))
        return
    for turn in (-25, 22):
        _branch(
            canvas, end, degrees + turn + random.uniform(-7, 7), length * random.uniform(0.74, 0.82), left - 1, random
        )


def ripples() -> Image.Image:
    """Ripples on blue-grey water, seen from above. Two sets of circular waves spread from two points, one left and
    one right of the middle. Where the rings cross they strengthen or cancel each other, and this makes a regular
    pattern of curved bands between and around the two centres."""
    # The height of water where the rings of two stones cross.
    width, height = 288, 192
    y, x = np.mgrid[:height, :width]
    total = np.zeros((height, width))
    for centre_x, centre_y in ((92, 96), (196, 96)):
        distance = np.hypot(x - centre_x, y - centre_y)
        total += np.cos(distance / 2.6) / np.sqrt(1 + distance / 14)
    share = ((total / 1.1 + 1) / 2).clip(0, 1)[..., None]
    colours = np.array((4, 18, 48)) * (1 - share) + np.array((190, 232, 244)) * share
    return Image.fromarray(colours.round().astype(np.uint8)).quantize(40).convert("RGB")


IMAGES: tuple[Callable[[], Image.Image], ...] = (
    bar_chart,
    line_chart,
    pie_chart,
    text_page,
    solids,
    checkerboard,
    maze,
    mandelbrot,
    landscape,
    clock,
    table,
    street_map,
    handwriting,
    floor_plan,
    tree,
    ripples,
)


def main() -> None:
    """Write every image and `captions.jsonl`, in the order of `IMAGES`."""
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else DIRECTORY
    directory.mkdir(parents=True, exist_ok=True)
    lines = []
    for draw in IMAGES:
        file = f"{draw.__name__}.png"
        draw().save(directory / file, optimize=True)
        caption = " ".join((draw.__doc__ or "").split())
        lines.append(json.dumps({"image": file, "text": caption}, ensure_ascii=False) + "\n")
    (directory / "captions.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
