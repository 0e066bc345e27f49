"""The served model: satellite tiles in, predictions out. MLflow loads it from this file.

Every registered version carries its own copy of this file. So it is one file whatever its length,
and imports nothing of this project: two versions that are loaded in one process must not share a
module. The network and the description of its training run are artifacts beside it.
"""

import base64
import binascii
import hashlib
import io
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnxruntime
import pandas as pd
import simplejpeg
import yaml
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from PIL import Image

log = logging.getLogger(__name__)

Tile = npt.NDArray[np.uint8]
Prediction = dict[str, Any]

MAX_TILES = 1024
"""Tiles in one request."""
MAX_SIDE_PIXELS = 1024
"""A larger image is a scene, to be cut into tiles first, or a decompression bomb."""
MAX_BATCH = 16
"""Views of tiles in one run of the network: 64 views are only 3 % faster per tile."""
TTA_VIEWS = 8
"""Flips and rotations of a square tile, which test-time augmentation (``tta``) averages."""
TARGET_BATCH = 8
"""Tiles: a batch twice as large is hardly faster per tile."""
MAX_WAIT_MS = 2.0
FAST_JPEG_MAX_BYTES = 65_536
"""JPEG files up to this size are decoded before the checks: they cannot hold many scans."""
MAX_JPEG_SCANS = 50
"""A progressive JPEG usually has 10 scans; each takes as long to decode as a whole image."""
JPEG_SCAN_MARKER = b"\xff\xda"
FORMATS = ("JPEG", "PNG", "TIFF")
FILE_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
"""First bytes of JPEG, PNG, TIFF (two byte orders) and BigTIFF (two byte orders) files."""
TIFF_SIGNATURES = FILE_SIGNATURES[2:]
EIGHT_BIT_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}
"""Pillow modes that convert to RGB."""
TIFF_BITS_PER_SAMPLE, PNG_BIT_DEPTH = 258, 24
"""A TIFF tag, and the offset of a PNG's bit depth: Pillow silently cuts 16-bit colours to 8."""
TIFF_BLOCK_SIDES = (322, 323)
"""TIFF tags: width and height of internal tiles, which are decoded as a whole."""
VERSION_FILE = "registered_model_meta"
"""File that MLflow writes beside MLmodel when it loads a version by a ``models:/`` URI."""
PRECISIONS = {"fp32": "network", "int8": "network_int8"}
"""Precision of the network -> artifact that holds its ONNX file."""
NO_ACTIVATION = "n/a: this network was exported without an activation map"


class InvalidTile(ValueError):
    """A row that cannot be read as a tile; the message names the limit and the remedy."""


class ModelConfig(NamedTuple):
    """MLflow's ``model_config``; keys that are left out keep these defaults."""

    precision: str = "auto"
    """``fp32``, ``int8``, or ``auto``: int8 where the training kept an INT8 network."""
    threads: int = 0
    """Batches that `TileClassifier.submit` computes in parallel, one core each; 0: all cores."""
    max_batch: int = MAX_BATCH
    """Views of tiles in one batch."""
    max_wait_ms: float = MAX_WAIT_MS
    """How long a busy model waits for more tiles; an idle one starts at once."""


class PredictOptions(NamedTuple):
    """Options of a prediction: the ``params`` of MLflow's protocol."""

    top_k: int = 0
    """Number of probabilities, highest first; 0: all classes, in the order of the classes."""
    tta: bool | None = None
    """Average all flips and rotations; None: as in the evaluation of the model."""
    explain: bool = False
    """Add the activation map of the predicted class."""


DEFAULT_OPTIONS = PredictOptions()


class PendingTile(NamedTuple):
    """A tile that waits for its prediction."""

    row: object
    """File bytes, or a nested (H, W, C) tensor."""
    options: PredictOptions
    deadline: float | None
    """Seconds on the monotonic clock; a tile whose batch starts later is not computed."""
    future: Any
    """Future of `concurrent.futures` or asyncio. Its result is a `Prediction`; it raises
    `InvalidTile` or TimeoutError.
    """


class DynamicBatcher:
    """Threads that run waiting tiles through the network in batches.

    An idle batcher starts a single tile at once, and splits several tiles among its free threads.
    While some threads are busy, a free one waits up to ``max_wait_s`` for ``TARGET_BATCH`` tiles.
    """

    def __init__(
        self,
        run_batch: Callable[[list[PendingTile]], None],
        max_tiles_per_batch: Callable[[PredictOptions], int],
        threads: int,
        max_wait_s: float,
    ) -> None:
        self._run_batch, self._max_tiles_per_batch = run_batch, max_tiles_per_batch
        self._max_wait_s = max_wait_s
        self._waiting: deque[PendingTile] = deque()
        self._condition = threading.Condition()
        self._busy, self._closed = 0, False
        self._threads = [
            threading.Thread(target=self._run, name=f"tiles-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, tiles: Sequence[PendingTile]) -> None:
        with self._condition:
            if self._closed:
                raise RuntimeError("this model has been closed")
            self._waiting.extend(tiles)
            self._condition.notify(len(tiles))

    def __len__(self) -> int:
        """Return the number of waiting tiles."""
        return len(self._waiting)

    def close(self) -> None:
        """Compute the waiting tiles, then end the threads."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while tiles := self._next_batch():
            try:
                self._run_batch(tiles)
            except Exception as error:  # noqa: BLE001 - no caller may wait for ever
                for tile in tiles:
                    if not tile.future.done():
                        tile.future.set_exception(error)
            with self._condition:
                self._busy -= 1
                if self._busy == 0:
                    self._condition.notify_all()

    def _next_batch(self) -> list[PendingTile]:
        """Return tiles of equal ``tta`` in order of arrival; an empty list once this is closed."""
        with self._condition:
            wait_until: float | None = None
            while not self._closed:
                if not self._waiting:
                    wait_until = None
                    self._condition.wait()
                elif not self._busy or len(self._waiting) >= TARGET_BATCH or not self._max_wait_s:
                    break
                else:
                    wait_until = wait_until or time.monotonic() + self._max_wait_s
                    if (remaining_s := wait_until - time.monotonic()) <= 0:
                        break
                    self._condition.wait(remaining_s)
            num_free = len(self._threads) - self._busy
            share = -(-len(self._waiting) // max(1, num_free))
            batch: list[PendingTile] = []
            while self._waiting and len(batch) < share:
                options = self._waiting[0].options
                if len(batch) == self._max_tiles_per_batch(options):
                    break
                if batch and options.tta != batch[0].options.tta:
                    break
                batch.append(self._waiting.popleft())
            self._busy += bool(batch)
            return batch


class TileClassifier(PythonModel):
    """Predicts label, confidence, uncertainty and provenance of each tile."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the network. Each thread of `submit` uses one core, so that none waits for another.

        Raises:
            ValueError: a key of ``model_config`` is unknown or out of range, or the network is not
                the one that was registered.
        """
        self._config = _parse_config(context.model_config or {})
        self.precision = _choose_precision(self._config.precision, context.artifacts)
        artifact = PRECISIONS[self.precision]
        network_file = context.artifacts[artifact]
        lineage = json.loads(Path(context.artifacts["lineage"]).read_text())
        _check_digest(Path(network_file), lineage.get("sha256", {}).get(artifact))
        session_options = onnxruntime.SessionOptions()
        session_options.intra_op_num_threads = session_options.inter_op_num_threads = 1
        session_options.log_severity_level = 3  # errors; it would warn that `tta` may be overridden
        self.session = onnxruntime.InferenceSession(
            network_file, session_options, providers=["CPUExecutionProvider"]
        )
        self.outputs = [node.name for node in self.session.get_outputs()]
        overridable = self.session.get_overridable_initializers()
        self.supports_tta = any(node.name == "tta" for node in overridable)
        self._read_metadata(self.session.get_modelmeta().custom_metadata_map)
        self.example_probabilities = lineage.get("example_probabilities", {}).get(artifact)
        """Probabilities of a middle-grey tile, computed when the version was registered."""
        self.provenance = {
            "model_version": _registered_version(Path(network_file)),
            "data_fingerprint": lineage["data_fingerprint"],
            "run_id": lineage["run_id"],
        }
        self._batcher: DynamicBatcher | None = None
        self._batcher_lock = threading.Lock()

    def _read_metadata(self, metadata: dict[str, str]) -> None:
        self.classes: list[str] = json.loads(metadata["classes"])
        height, width = json.loads(metadata["tile_size"])
        self.shape_HWC = (int(height), int(width), int(metadata["bands"]))
        self.default_views = int(metadata.get("views", 1))
        """Views of a tile that the evaluation of the model averaged: 1, or `TTA_VIEWS`."""
        self.full_scale = json.loads(metadata.get("full_scale", "null"))
        """Per band, the uint16 reflectance that the training scaled to 255; None for uint8."""
        self.calibration = json.loads(metadata.get("calibration", "null"))
        if self.calibration and "unlike_above" in self.calibration:  # an earlier export
            self.calibration["ood_threshold"] = self.calibration.pop("unlike_above")

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> list[Prediction]:
        """Return one prediction per row of the column ``image``.

        A row is the bytes of a file or a nested (H, W, C) tensor. ``params`` are the fields of
        `PredictOptions`. Tiles of concurrent callers share batches.

        Raises:
            MlflowException: INVALID_PARAMETER_VALUE (HTTP 400) names row, limit and remedy;
                INTERNAL_ERROR (HTTP 500) is a fault of this model, which is logged.
        """
        rows = list(model_input["image"])
        if not 1 <= len(rows) <= MAX_TILES:
            raise _bad_request(f"{len(rows)} tiles in one request: send 1 to {MAX_TILES}")
        try:
            options = self.parse_options(params or {})
        except ValueError as error:
            raise _bad_request(str(error)) from error
        predictions = []
        for number, future in enumerate(self.submit(rows, options)):
            try:
                predictions.append(future.result())
            except InvalidTile as error:
                raise _bad_request(f"row {number}: {error}") from error
            except Exception as error:
                log.exception("the prediction of row %d failed", number)
                raise MlflowException("internal error of the model", INTERNAL_ERROR) from error
        return predictions

    def parse_options(self, params: dict[str, Any]) -> PredictOptions:
        """Return the options in ``params``; keys of other names are ignored.

        Raises:
            ValueError: an option is out of range, or this network does not support it.
        """
        known = {name: params[name] for name in PredictOptions._fields if name in params}
        options = PredictOptions(**known)
        height, width, _ = self.shape_HWC
        if options.tta and height != width:
            raise ValueError(f"tta needs square tiles; these are {height}x{width}: omit tta")
        if options.tta and not self.supports_tta and self.default_views == 1:
            raise ValueError(
                "this network was exported without tta: omit tta, or export the network again"
            )
        if not 0 <= options.top_k <= len(self.classes):
            raise ValueError(
                f"top_k is {options.top_k}: ask for 1 to {len(self.classes)} classes, or 0 for all"
            )
        return options

    def submit(
        self,
        rows: Sequence[object],
        options: PredictOptions = DEFAULT_OPTIONS,
        deadline: float | None = None,
    ) -> "list[Future[Prediction]]":
        """Queue rows for this model's threads; a future raises `InvalidTile` or TimeoutError."""
        tiles = [self.pending_tile(row, options, deadline, Future()) for row in rows]
        with self._batcher_lock:  # a server that calls `run_batch` itself needs no threads
            if self._batcher is None:
                self._batcher = DynamicBatcher(
                    self.run_batch,
                    self.max_tiles_per_batch,
                    self._config.threads or _num_cores(),
                    self._config.max_wait_ms / 1e3,
                )
        self._batcher.submit(tiles)
        return [tile.future for tile in tiles]

    def pending_tile(
        self, row: object, options: PredictOptions, deadline: float | None, future: Any
    ) -> PendingTile:
        return PendingTile(row, options, deadline, future)

    def close(self) -> None:
        """Compute the waiting tiles and release threads and memory; the model ends with this."""
        if self._batcher is not None:
            self._batcher.close()
        del self.session

    def max_tiles_per_batch(self, options: PredictOptions) -> int:
        """Return how many tiles fit into one run of the network."""
        num_views = self.default_views
        if options.tta is not None:
            num_views = TTA_VIEWS if options.tta else 1
        return max(1, self._config.max_batch // num_views)

    def run_batch(self, tiles: list[PendingTile]) -> None:
        """Set the futures of tiles of equal ``tta``, by one run of the network in this thread."""
        decoded: list[tuple[PendingTile, DecodedTile]] = []
        now = time.monotonic()
        for tile in tiles:
            if tile.future.cancelled():
                continue
            try:
                if tile.deadline is not None and now > tile.deadline:
                    raise TimeoutError("the deadline passed before the tile was computed")
                decoded.append((tile, _decode(tile.row, self.shape_HWC, self.full_scale)))
            except (InvalidTile, TimeoutError) as error:
                tile.future.set_exception(error)
        if not decoded:
            return
        inputs: dict[str, Any] = {"tiles_NHWC": np.stack([image.tile_HWC for _, image in decoded])}
        tta = decoded[0][0].options.tta
        if tta is not None and tta != (self.default_views > 1):
            inputs["tta"] = np.array(tta)
        outputs = dict(zip(self.outputs, self.session.run(self.outputs, inputs), strict=True))
        for number, (tile, image) in enumerate(decoded):
            output = {name: values[number] for name, values in outputs.items()}
            tile.future.set_result(self._format_prediction(output, tile.options, image))

    def _format_prediction(
        self, output: dict[str, Any], options: PredictOptions, image: "DecodedTile"
    ) -> Prediction:
        probabilities = output["probabilities"].tolist()
        best = int(output["probabilities"].argmax())
        by_class = dict(zip(self.classes, probabilities, strict=True))
        if options.top_k:
            likeliest = sorted(by_class, key=lambda name: -by_class[name])[: options.top_k]
            by_class = {name: by_class[name] for name in likeliest}
        prediction: Prediction = {
            "label": self.classes[best],
            "confidence": probabilities[best],
            "probabilities": by_class,
        }
        if self.calibration and "energy" in output:
            prediction |= self._uncertainty(probabilities, float(output["energy"]))
        if image.resized_from:
            prediction["resized_from"] = image.resized_from
        if options.explain:
            prediction["activation"] = (
                _normalise_cam(output["activation"][best])
                if "activation" in output
                else NO_ACTIVATION
            )
        return prediction | self.provenance

    def _uncertainty(self, probabilities: list[float], energy: float) -> Prediction:
        """Return the conformal prediction set, and whether the tile is out of distribution.

        The training fitted both thresholds on its validation fold.
        """
        thresholds = self.calibration["thresholds"]
        ood_threshold = self.calibration["ood_threshold"]
        per_class = zip(self.classes, probabilities, thresholds, strict=True)
        return {
            "prediction_set": [name for name, p, threshold in per_class if 1 - p <= threshold],
            "out_of_distribution": energy > ood_threshold,
            "ood_score": energy - ood_threshold,
        }


class DecodedTile(NamedTuple):
    tile_HWC: Tile
    resized_from: list[int] | None = None
    """Height and width of the image, where they differ from the training's tiles."""


def _decode(
    row: object, shape_HWC: tuple[int, int, int], full_scale: list[float] | None
) -> DecodedTile:
    """Return a row as a uint8 tile of the model's shape.

    Raises:
        InvalidTile: the row cannot be read as one.
    """
    if isinstance(row, str):  # base64, which MLflow decodes in JSON but not in a DataFrame
        row = row.encode()
    if isinstance(row, bytes):
        data = _file_bytes(row)
        if data.startswith(TIFF_SIGNATURES) and shape_HWC[2] != len("RGB"):
            return _decode_geotiff(data, shape_HWC, full_scale)
        return _decode_image(data, shape_HWC)
    if isinstance(row, list | np.ndarray):
        return DecodedTile(_decode_tensor(row, shape_HWC))
    raise InvalidTile(
        f"a {type(row).__name__} is not a tile: send the bytes of a JPEG, PNG or TIFF file in the "
        "column 'image' (or its base64 text), or uint8 pixels as 'inputs'"
    )


def _decode_tensor(row: list[Any] | npt.NDArray[Any], shape_HWC: tuple[int, int, int]) -> Tile:
    try:
        values = np.asarray(row)
    except ValueError as error:
        raise InvalidTile(
            f"lists of unequal length: send pixels of shape {shape_HWC} (height, width, bands)"
        ) from error
    if values.shape == shape_HWC[1:]:
        raise InvalidTile(
            f"shape {values.shape} is a row of pixels: a single tile needs a batch axis, so send "
            f"(1, {', '.join(map(str, shape_HWC))})"
        )
    if values.shape != shape_HWC:
        raise InvalidTile(f"shape {values.shape}: the model takes {shape_HWC}")
    if values.dtype.kind == "S":  # MLflow passes JSON numbers to a binary column as text
        try:
            values = values.astype(np.int64)
        except (ValueError, OverflowError) as error:
            raise InvalidTile(
                "a pixel is not a whole number: send whole numbers from 0 to 255"
            ) from error
    if values.dtype.kind not in "iu":
        raise InvalidTile(f"{values.dtype} pixels: send whole numbers from 0 to 255 (uint8)")
    if values.min() < 0 or values.max() > 255:
        raise InvalidTile("a pixel is outside 0 to 255: scale the tile to uint8")
    return values.astype(np.uint8)


def _decode_image(data: bytes, shape_HWC: tuple[int, int, int]) -> DecodedTile:
    height, width, bands = shape_HWC
    if bands != len("RGB"):
        raise InvalidTile(
            f"this file is a colour image, and the model reads {bands} bands: send a GeoTIFF of "
            f"{bands} bands, or uint8 pixels of shape (N, {height}, {width}, {bands}) as 'inputs'"
        )
    if (pixels := _decode_fast_jpeg(data, height, width)) is not None:
        return DecodedTile(pixels)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_header(image, data)
            direct = image.convert("RGBA") if image.mode in ("P", "PA") else image
            rgb = direct.convert("RGB")
    except InvalidTile:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large("too many pixels to decode") from error
    except Exception as error:  # decoders raise anything on foreign bytes
        raise InvalidTile(
            "the image is damaged, truncated or of an unsupported kind: save it again as an 8-bit "
            "JPEG, PNG or TIFF"
        ) from error
    if rgb.size == (width, height):
        return DecodedTile(np.asarray(rgb))
    resized = rgb.resize((width, height), Image.Resampling.BILINEAR)
    return DecodedTile(np.asarray(resized), [rgb.height, rgb.width])


def _decode_fast_jpeg(data: bytes, height: int, width: int) -> Tile | None:
    """Return the pixels of an ordinary JPEG tile, as Pillow decodes them, in half of its time.

    None is a file that Pillow must decode, or say what is wrong with it.
    """
    if len(data) > FAST_JPEG_MAX_BYTES or not data.startswith(FILE_SIGNATURES[0]):
        return None
    try:
        if simplejpeg.decode_jpeg_header(data)[:3] == (height, width, "YCbCr"):
            pixels: Tile = simplejpeg.decode_jpeg(data, "RGB")
            return pixels
    except ValueError:
        pass
    return None


def _decode_geotiff(
    data: bytes, shape_HWC: tuple[int, int, int], full_scale: list[float] | None
) -> DecodedTile:
    """Read bands of uint8, or of uint16 that ``full_scale`` takes to uint8 as in the training."""
    import rasterio
    from rasterio.io import MemoryFile

    height, width, bands = shape_HWC
    try:
        with (
            rasterio.Env(CPL_LOG="/dev/null"),
            MemoryFile(data) as file,
            file.open(driver="GTiff") as tiff,
        ):
            if max(tiff.height, tiff.width) > MAX_SIDE_PIXELS:
                raise _too_large(f"{tiff.width}x{tiff.height} pixels")
            _check_block_sides(tiff.block_shapes[0])
            dtypes = set(tiff.dtypes)
            expected = "uint16" if full_scale else "uint8"
            if tiff.count != bands or dtypes != {expected}:
                raise InvalidTile(
                    f"a TIFF of {tiff.count} bands of {', '.join(sorted(dtypes))}: the model takes "
                    f"{bands} bands of {expected}"
                )
            values: npt.NDArray[Any] = np.moveaxis(tiff.read(), 0, -1)
    except InvalidTile:
        raise
    except Exception as error:  # GDAL raises anything on foreign bytes
        raise InvalidTile("the TIFF is damaged or truncated: write it again") from error
    if full_scale:
        scale = np.float32(255) / np.asarray(full_scale, np.float32)
        values = np.rint(np.clip(values * scale, 0, 255))
    pixels = values.astype(np.uint8)
    if pixels.shape[:2] == (height, width):
        return DecodedTile(pixels)
    resized = [
        Image.fromarray(np.ascontiguousarray(pixels[:, :, band])).resize(
            (width, height), Image.Resampling.BILINEAR
        )
        for band in range(bands)
    ]
    return DecodedTile(np.stack([np.asarray(band) for band in resized], -1), [*pixels.shape[:2]])


def _file_bytes(data: bytes) -> bytes:
    """Return the file, decoded if it is base64: MLflow decodes columns, but not ``inputs``."""
    if data.startswith(FILE_SIGNATURES):
        return data
    if not data:
        raise InvalidTile("no bytes: send a JPEG, PNG or TIFF file")
    try:
        decoded = base64.b64decode(data, validate=True)
    except binascii.Error:
        decoded = b""
    if not decoded.startswith(FILE_SIGNATURES):
        raise InvalidTile(
            f"{len(data)} bytes that are not a JPEG, PNG or TIFF file: send the file unchanged "
            "(in JSON as base64)"
        )
    return decoded


def _check_header(image: Image.Image, data: bytes) -> None:
    """Raise InvalidTile for what the header tells, before a pixel is decoded."""
    if max(image.size) > MAX_SIDE_PIXELS:
        raise _too_large(f"{image.width}x{image.height} pixels")
    if image.format in ("PNG", "TIFF") and getattr(image, "is_animated", False):
        raise InvalidTile("the file holds several images: send one tile per file")
    if data.startswith(FILE_SIGNATURES[0]) and data.count(JPEG_SCAN_MARKER) > MAX_JPEG_SCANS:
        raise InvalidTile(f"a JPEG of over {MAX_JPEG_SCANS} scans: save it again")
    bits = 8
    if image.format == "PNG":
        bits = data[PNG_BIT_DEPTH]
    elif image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        _check_block_sides([tags.get(tag, 1) for tag in TIFF_BLOCK_SIDES])
        bits = max(tags.get(TIFF_BITS_PER_SAMPLE, (1,)))
    if bits > 8 or image.mode not in EIGHT_BIT_MODES:
        raise InvalidTile(
            f"a {image.format} of {bits} bits, mode {image.mode}: convert it to 8 bits per band, "
            "as the training tiles were"
        )


def _check_block_sides(sides: Sequence[int]) -> None:
    if max(sides) > MAX_SIDE_PIXELS:
        raise InvalidTile(
            f"a TIFF in internal tiles of up to {max(sides)} pixels per side, over "
            f"{MAX_SIDE_PIXELS}: write it again in strips"
        )


def _too_large(size: str) -> InvalidTile:
    limit = f"{MAX_SIDE_PIXELS}x{MAX_SIDE_PIXELS}"
    return InvalidTile(f"{size}, over the {limit} of a tile: cut the image into tiles")


def _normalise_cam(activation_HW: npt.NDArray[np.float32]) -> list[list[float]]:
    """Return the evidence for the class in [0, 1]; see `eurosat.models.export` for its size."""
    evidence = np.maximum(activation_HW, 0)
    scaled = evidence / max(float(evidence.max()), 1e-6)
    return [[round(float(value), 4) for value in row] for row in scaled]


def _bad_request(message: str) -> MlflowException:
    """Return an error that MLflow's scoring server answers with 400.

    The server's ``message`` repeats the request; ``reason`` is passed on as it is.
    """
    return MlflowException(message, error_code=INVALID_PARAMETER_VALUE, reason=message)


def _parse_config(model_config: dict[str, Any]) -> ModelConfig:
    if unknown := sorted(set(model_config) - set(ModelConfig._fields)):
        known = ", ".join(ModelConfig._fields)
        raise ValueError(f"model_config has no key {', '.join(unknown)}: its keys are {known}")
    config = ModelConfig(**model_config)
    if config.threads < 0 or config.max_batch < 1 or not 0 <= config.max_wait_ms <= 1000:
        raise ValueError(
            f"threads must be 0 or more, max_batch 1 or more, max_wait_ms 0 to 1000; got {config}"
        )
    return config


def _choose_precision(precision: str, artifacts: dict[str, str]) -> str:
    available = [name for name, artifact in PRECISIONS.items() if artifact in artifacts]
    if precision == "auto":
        return available[-1]
    if precision not in available:
        raise ValueError(f"this version has no {precision} network: it has {', '.join(available)}")
    return precision


def _check_digest(network_file: Path, expected: str | None) -> None:
    """Compare the network with the sha256 at registration, if the version has it."""
    actual = hashlib.sha256(network_file.read_bytes()).hexdigest()
    if expected and actual != expected:
        raise ValueError(
            f"{network_file.name} has the sha256 {actual[:12]}, not {expected[:12]} as when it was "
            "registered: register its run again"
        )


def _registered_version(artifact: Path) -> str | None:
    """Return the version that the files were loaded as; None for a run or a path."""
    for folder in artifact.parents:
        if (folder / "MLmodel").exists():
            file = folder / VERSION_FILE
            return str(yaml.safe_load(file.read_text())["model_version"]) if file.exists() else None
    return None


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


set_model(TileClassifier())
