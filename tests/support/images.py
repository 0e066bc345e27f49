"""Tiles as image files, valid and invalid."""

import base64
import io
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

COLOURS = {"Forest": (200, 40, 60), "River": (30, 180, 20), "SeaLake": (10, 60, 220)}
"""A colour per class of the small network, which predicts the class of the largest band."""


def pixels(label: str, size: int = 64) -> npt.NDArray[np.uint8]:
    """Return a tile of the class, with some noise so that it does not compress to nothing."""
    noise = np.random.default_rng(0).integers(-9, 10, (size, size, 3))
    return np.clip(np.array(COLOURS[label]) + noise, 0, 255).astype(np.uint8)


def encoded(label: str = "River", kind: str = "PNG", size: int = 64, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(label, size)).convert(mode).save(file, kind)
    return file.getvalue()


def saved(image: Image.Image, kind: str, pages: Sequence[Image.Image] = ()) -> bytes:
    file = io.BytesIO()
    if pages:
        image.save(file, kind, save_all=True, append_images=list(pages))
    else:
        image.save(file, kind)
    return file.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """Return a PNG whose header may be wrong, which Pillow would not write."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def tiff_16_bit() -> bytes:
    """Return an RGB TIFF of 16 bits per band, which Pillow would silently cut to 8."""
    width = height = 64
    bits_at = 8
    data_at = bits_at + 6
    strip = np.full((height, width, 3), 1000, "<u2").tobytes()
    tags = [
        (256, 3, 1, width),
        (257, 3, 1, height),
        (258, 3, 3, bits_at),
        (259, 3, 1, 1),
        (262, 3, 1, 2),
        (273, 4, 1, data_at),
        (277, 3, 1, 3),
        (278, 3, 1, height),
        (279, 4, 1, len(strip)),
    ]
    directory = struct.pack("<H", len(tags))
    directory += b"".join(struct.pack("<HHII", *tag) for tag in tags) + struct.pack("<I", 0)
    bits = struct.pack("<HHH", 16, 16, 16)
    return b"II*\x00" + struct.pack("<I", data_at + len(strip)) + bits + strip + directory


def grey_16_bit(kind: str) -> bytes:
    return saved(Image.fromarray(np.full((64, 64), 1000, np.uint16)), kind)


def files(*rows: bytes | str) -> dict[str, Any]:
    """Return the payload for files; a text is sent as it is."""
    texts = [row if isinstance(row, str) else base64.b64encode(row).decode() for row in rows]
    return {"dataframe_split": {"columns": ["image"], "data": [[text] for text in texts]}}


def raw(*tiles: npt.NDArray[np.generic]) -> dict[str, Any]:
    return {"inputs": [tile.tolist() for tile in tiles]}


def changed(value: object) -> dict[str, Any]:
    """Return the payload of a tile in which one band of one pixel is ``value``."""
    tile = pixels("River").tolist()
    tile[3][4][1] = value
    return {"inputs": [tile]}


GOOD = encoded()
FRAMES = [Image.fromarray(pixels(label)) for label in COLOURS]
REJECTED: dict[str, tuple[dict[str, Any], str]] = {
    "junk base64": (files("!!!!"), "row 0: no bytes"),
    "junk base64 in the second row": (files(GOOD, "é"), "row 1: no bytes"),
    "base64 of text": (files(b"SECRETSECRET"), "row 0: 12 bytes that are not a JPEG, PNG or TIFF"),
    "GIF": (files(saved(FRAMES[0], "GIF")), "not a JPEG, PNG or TIFF file"),
    "BMP in the third row": (files(GOOD, GOOD, saved(FRAMES[0], "BMP")), "row 2: 12342 bytes"),
    "truncated JPEG": (files(encoded(kind="JPEG")[:500]), "damaged, truncated"),
    "truncated PNG": (files(GOOD[:500]), "damaged, truncated"),
    "truncated TIFF": (files(encoded(kind="TIFF")[:500]), "damaged, truncated"),
    "PNG's beginning alone": (files(GOOD[:8] + b"x" * 99), "damaged, truncated"),
    "16-bit grey PNG": (files(grey_16_bit("PNG")), "a PNG of 16 bits"),
    "16-bit RGB PNG": (
        files(png(64, 64, 16, 2, (b"\0" + b"\3\xe8" * 192) * 64)),
        "convert it to 8 bits per band",
    ),
    "16-bit grey TIFF": (files(grey_16_bit("TIFF")), "a TIFF of 16 bits"),
    "16-bit RGB TIFF": (files(tiff_16_bit()), "a TIFF of 16 bits"),
    "float TIFF": (
        files(saved(Image.fromarray(np.zeros((64, 64), np.float32)), "TIFF")),
        "a TIFF of 32 bits",
    ),
    "LAB TIFF": (files(saved(Image.new("LAB", (64, 64)), "TIFF")), "mode LAB"),
    "a scene": (files(encoded(size=1025)), "1025x1025 pixels, over the 1024x1024"),
    "a bomb": (files(png(50_000, 50_000, 8, 2, b"\0" * 1000)), "cut the image into tiles"),
    "a small bomb": (files(png(10_000, 9_500, 8, 2, b"\0" * 1000)), "cut the image into tiles"),
    "several pages": (files(saved(FRAMES[0], "TIFF", FRAMES[1:])), "several images"),
    "animated PNG": (files(saved(FRAMES[0], "PNG", FRAMES[1:])), "several images"),
    "no tile": (files(), "0 tiles in one request"),
    "no raw tile": ({"inputs": []}, "0 tiles in one request"),
    "too many tiles": (files(*[""] * 1025), "1025 tiles in one request: send 1 to 1024"),
    "a single raw tile": (raw(*pixels("River")), "a single tile needs a batch axis"),
    "another size": (raw(pixels("River", 32)), "shape (32, 32, 3): the model takes"),
    "channels first": (raw(pixels("River").transpose(2, 0, 1)), "shape (3, 64, 64)"),
    "four bands": (raw(np.zeros((64, 64, 4), np.uint8)), "shape (64, 64, 4)"),
    "float pixels": (raw(pixels("River") / 255), "not a whole number"),
    "a pixel of 256": (changed(256), "outside 0 to 255"),
    "a negative pixel": (changed(-1), "outside 0 to 255"),
    "a huge pixel": (changed(10**30), "not a whole number"),
    "a pixel that is text": (changed("SECRET"), "not a whole number"),
    "a pixel that is null": (changed(None), "not a whole number"),
    "a pixel that is true": (changed(True), "not a whole number"),
    "a pixel that is NaN": (changed(float("nan")), "not a whole number"),
    "numbers": ({"inputs": [1, 2, 3]}, "not a JPEG, PNG or TIFF file"),
    "text": ({"inputs": ["SECRETSECRET"]}, "not a JPEG, PNG or TIFF file"),
    "named text": ({"inputs": [{"image": "SECRET"}]}, "not a JPEG, PNG or TIFF file"),
}
"""Payloads that ``predict`` rejects, with a part of the message."""
MALFORMED: dict[str, dict[str, object]] = {
    "ragged rows": {"inputs": [[[1, 2]], [[3]]]},
    "another column": {"dataframe_split": {"columns": ["picture"], "data": [["QUJD"]]}},
    "null": files("x") | {"dataframe_split": {"columns": ["image"], "data": [[None]]}},
    "a scalar": {"inputs": 5},
    "nothing": {},
    "both": files(GOOD) | raw(pixels("River")),
}
"""Payloads that MLflow rejects before it calls ``predict``."""
