"""The served model, which MLflow loads from this very file: tiles in, answers out.

It imports nothing of ours: the network and its lineage travel as artifacts beside it.
"""

import base64
import binascii
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pandas as pd
import yaml
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from PIL import Image

Tile = npt.NDArray[np.uint8]

MAX_TILES = 1024
"""Tiles in one request."""
MAX_SIDE = 1024
"""Pixels. A larger picture is a scene to be cut into tiles, or a decompression bomb."""
BATCH = 64
"""Views of tiles that go through the network at once: bounds the memory of a request."""
FORMATS = ("JPEG", "PNG", "TIFF")
MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
"""How files of those formats begin; the last two are BigTIFF."""
EIGHT_BIT_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}
"""Pillow modes that convert to RGB."""
TIFF_BITS_PER_SAMPLE, PNG_BIT_DEPTH = 258, 24
"""A TIFF tag, and the offset of IHDR's bit depth: Pillow cuts 16-bit colours to 8 silently."""
META = "registered_model_meta"
"""MLflow writes it beside MLmodel when a version is loaded by models:/."""


class TileClassifier(PythonModel):
    """Answers per tile with label, confidence, all probabilities and where the model is from."""

    def load_context(self, context: PythonModelContext) -> None:
        """Open the network on every core that this process may use."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = _cores()
        network = context.artifacts["network"]
        self.session = onnxruntime.InferenceSession(
            network, options, providers=["CPUExecutionProvider"]
        )
        described = self.session.get_modelmeta().custom_metadata_map
        self.classes: list[str] = json.loads(described["classes"])
        height, width = json.loads(described["tile_size"])
        self.shape_HWC = (int(height), int(width), int(described["bands"]))
        self.batch = max(1, BATCH // int(described.get("views", 1)))
        lineage = json.loads(Path(context.artifacts["lineage"]).read_text())
        self.provenance = {
            "model_version": _version(Path(network)),
            "data_fingerprint": lineage["data_fingerprint"],
            "run_id": lineage["run_id"],
        }

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        """One answer per row of the column ``image``: file bytes, or a nested (H, W, C) tensor.

        Raises:
            MlflowException: INVALID_PARAMETER_VALUE (HTTP 400) names row, limit and remedy.
        """
        rows = list(model_input["image"])
        if not 1 <= len(rows) <= MAX_TILES:
            raise _fault(f"{len(rows)} tiles in one request: send 1 to {MAX_TILES}")
        return [answer for batch in self._batches(rows) for answer in self._answers(batch)]

    def _batches(self, rows: Sequence[object]) -> Iterator[npt.NDArray[np.uint8]]:
        for start in range(0, len(rows), self.batch):
            numbered = enumerate(rows[start : start + self.batch], start)
            yield np.stack([self._tile(row, number) for number, row in numbered])

    def _answers(self, tiles_NHWC: npt.NDArray[np.uint8]) -> Iterator[dict[str, Any]]:
        (probabilities_NK,) = self.session.run(["probabilities"], {"tiles_NHWC": tiles_NHWC})
        for probabilities in probabilities_NK.tolist():
            best = int(np.argmax(probabilities))
            yield {
                "label": self.classes[best],
                "confidence": probabilities[best],
                "probabilities": dict(zip(self.classes, probabilities, strict=True)),
                **self.provenance,
            }

    def _tile(self, row: object, number: int) -> Tile:
        if isinstance(row, bytes):
            return _from_bytes(row, number, self.shape_HWC)
        if isinstance(row, list | np.ndarray):
            return _from_tensor(row, number, self.shape_HWC)
        raise _fault(
            f"row {number}: a {type(row).__name__} is no tile: send base64 of a JPEG, PNG or TIFF "
            "file in the column 'image', or raw uint8 pixels as 'inputs'"
        )


def _from_tensor(
    row: list[Any] | npt.NDArray[Any], number: int, shape_HWC: tuple[int, int, int]
) -> Tile:
    try:
        values = np.asarray(row)
    except ValueError as error:
        raise _fault(
            f"row {number}: lists of unequal length where the model takes {shape_HWC}"
        ) from error
    if values.shape == shape_HWC[1:]:
        raise _fault(
            f"row {number}: shape {values.shape} is a row of pixels: a single tile needs its batch "
            f"axis, so send (1, {', '.join(map(str, shape_HWC))})"
        )
    if values.shape != shape_HWC:
        raise _fault(f"row {number}: shape {values.shape} where the model takes {shape_HWC}")
    if values.dtype.kind == "S":  # MLflow hands JSON numbers to a binary column as their text
        try:
            values = values.astype(np.int64)
        except (ValueError, OverflowError) as error:
            raise _fault(
                f"row {number}: holds what is not a whole number: send pixels from 0 to 255"
            ) from error
    if values.dtype.kind not in "iu":
        raise _fault(
            f"row {number}: {values.dtype} pixels: send whole numbers from 0 to 255 (uint8)"
        )
    if values.min() < 0 or values.max() > 255:
        raise _fault(f"row {number}: holds pixels outside 0 to 255: scale the tile to uint8")
    return values.astype(np.uint8)


def _from_bytes(data: bytes, number: int, shape_HWC: tuple[int, int, int]) -> Tile:
    height, width, bands = shape_HWC
    if bands != 3:
        raise _fault(
            f"row {number}: this model reads {bands} bands and files are read as RGB: send raw "
            f"uint8 pixels of shape (N, {height}, {width}, {bands}) as 'inputs'"
        )
    data = _file_bytes(data, number)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_header(image, data, number)
            colours = image.convert("RGBA") if image.mode in ("P", "PA") else image
            rgb = colours.convert("RGB")
            if rgb.size != (width, height):
                rgb = rgb.resize((width, height), Image.Resampling.BILINEAR)
            return np.asarray(rgb)
    except MlflowException:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(number, "more pixels than are read") from error
    except Exception as error:  # decoders raise anything on foreign bytes
        raise _fault(
            f"row {number}: the picture is damaged, truncated or of a kind that is not read: "
            "save it again as an 8-bit JPEG, PNG or TIFF"
        ) from error


def _file_bytes(data: bytes, number: int) -> bytes:
    """The file; base64 that came as ``inputs`` is decoded here, MLflow does columns alone."""
    if data.startswith(MAGIC):
        return data
    if not data:
        raise _fault(f"row {number}: no bytes: the column 'image' is empty or not base64")
    try:
        decoded = base64.b64decode(data, validate=True)
    except binascii.Error:
        decoded = b""
    if not decoded.startswith(MAGIC):
        raise _fault(
            f"row {number}: {len(data)} bytes that are no JPEG, PNG or TIFF file: send the file's "
            "bytes as base64"
        )
    return decoded


def _check_header(image: Image.Image, data: bytes, number: int) -> None:
    """Refuse by what the header says, before a pixel is decoded."""
    if max(image.size) > MAX_SIDE:
        raise _too_large(number, f"{image.width}x{image.height} pixels")
    if image.format in ("PNG", "TIFF") and getattr(image, "is_animated", False):
        raise _fault(f"row {number}: holds several pictures: send one tile a row")
    bits = 8
    if image.format == "PNG":
        bits = data[PNG_BIT_DEPTH]
    elif image.format == "TIFF":
        bits = max(image.tag_v2.get(TIFF_BITS_PER_SAMPLE, (1,)))  # type: ignore[attr-defined]
    if bits > 8 or image.mode not in EIGHT_BIT_MODES:
        raise _fault(
            f"row {number}: a {image.format} of {bits} bits, mode {image.mode}: convert it to "
            "8 bits per band, as the training tiles were"
        )


def _too_large(number: int, size: str) -> MlflowException:
    limit = f"{MAX_SIDE}x{MAX_SIDE}"
    return _fault(f"row {number}: {size}, over the {limit} of a tile: cut the picture into tiles")


def _fault(message: str) -> MlflowException:
    """MLflow's scoring server answers it with 400."""
    return MlflowException(message, error_code=INVALID_PARAMETER_VALUE)


def _version(artifact: Path) -> str | None:
    """The registered version that these files were loaded as; None by runs:/ or a path."""
    for folder in artifact.parents:
        if (folder / "MLmodel").exists():
            meta = folder / META
            return str(yaml.safe_load(meta.read_text())["model_version"]) if meta.exists() else None
    return None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


set_model(TileClassifier())
