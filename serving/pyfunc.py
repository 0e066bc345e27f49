"""The served model, which MLflow loads from this very file: tiles in, answers out.

It imports nothing of ours, and is one file whatever its length: the network and its lineage travel
as artifacts beside it, and two versions loaded in one process must not share a module.
"""

import base64
import binascii
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
Answer = dict[str, Any]

MAX_TILES = 1024
"""Tiles in one request."""
MAX_SIDE = 1024
"""Pixels. A larger picture is a scene to be cut into tiles, or a decompression bomb."""
BATCH = 16
"""Views of tiles that go through the network at once: four times as many are 3 % faster a tile."""
VIEWS = 8
"""Flips and turns of a square tile that `tta` looks at."""
ENOUGH = 8
"""Tiles of a batch: one twice as large is hardly faster a tile."""
MAX_WAIT_MS = 2.0
QUICK_BYTES = 65_536
"""Of a JPEG that is decoded before anything is asked of it: it has few scans."""
MAX_SCANS = 50
"""Of a progressive JPEG; usual are 10, and each costs the time of a whole picture."""
SCAN = b"\xff\xda"
FORMATS = ("JPEG", "PNG", "TIFF")
MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
"""How files of those formats begin; the last two are BigTIFF."""
TIFF_MAGIC = MAGIC[2:]
EIGHT_BIT_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}
"""Pillow modes that convert to RGB."""
TIFF_BITS_PER_SAMPLE, PNG_BIT_DEPTH = 258, 24
"""A TIFF tag, and the offset of IHDR's bit depth: Pillow cuts 16-bit colours to 8 silently."""
META = "registered_model_meta"
"""MLflow writes it beside MLmodel when a version is loaded by models:/."""
FORMS = {"fp32": "network", "int8": "network_int8"}
"""Of the network, each with the artifact that holds it."""
NO_MAP = "n/a: this network keeps no map of where it looked"


class BadTile(ValueError):
    """What was sent is no tile that this model reads: the message says limit and remedy."""


class Settings(NamedTuple):
    """MLflow's ``model_config``: keys that are left out keep these values."""

    form: str = "auto"
    """``fp32``, ``int8``, or ``auto``: int8 where the training kept it."""
    threads: int = 0
    """Batches of `ask` that are answered at the same time, each on one core; 0: one per core."""
    max_batch: int = BATCH
    """Views of tiles in one batch."""
    max_wait_ms: float = MAX_WAIT_MS
    """How long a busy model waits for more tiles; an idle one answers at once."""


class Wish(NamedTuple):
    """How a tile is to be answered."""

    top_k: int = 0
    """Probabilities told, the largest first; 0 is all of them, in the order of the classes."""
    tta: bool | None = None
    """Look at all flips and turns; None is as the network was judged."""
    explain: bool = False
    """Tell where the network looked."""


PLAIN = Wish()


class Job(NamedTuple):
    row: object
    wish: Wish
    deadline: float | None
    """On the monotonic clock, seconds; an answer that would start later is not wanted."""
    future: Any
    """Of `concurrent.futures` or asyncio: is given an `Answer`, a `BadTile` or a TimeoutError."""


class Batches:
    """Threads that answer the tiles which wait, as many at once as there are.

    A free model takes a single tile at once, and of several each thread its share. While others are
    busy, a free thread gives the tiles ``max_wait_s`` to become ``ENOUGH``.
    """

    def __init__(
        self,
        answer: Callable[[list[Job]], None],
        most: Callable[[Wish], int],
        threads: int,
        max_wait_s: float,
    ) -> None:
        self._answer, self._most, self._max_wait_s = answer, most, max_wait_s
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._busy, self._closed = 0, False
        self._threads = [
            threading.Thread(target=self._work, name=f"tiles-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, jobs: Sequence[Job]) -> None:
        with self._changed:
            if self._closed:
                raise RuntimeError("this model has been closed")
            self._waiting.extend(jobs)
            self._changed.notify(len(jobs))

    def __len__(self) -> int:
        """Tiles that wait."""
        return len(self._waiting)

    def close(self) -> None:
        """Answer what waits, and end the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while jobs := self._take():
            try:
                self._answer(jobs)
            except Exception as error:  # noqa: BLE001 - whatever it is, nobody must wait for ever
                for job in jobs:
                    if not job.future.done():
                        job.future.set_exception(error)
            with self._changed:
                self._busy -= 1
                if self._busy == 0:
                    self._changed.notify_all()

    def _take(self) -> list[Job]:
        """Jobs of one kind, in the order in which they came; none once this is closed."""
        with self._changed:
            until: float | None = None
            while not self._closed:
                if not self._waiting:
                    until = None
                    self._changed.wait()
                elif not self._busy or len(self._waiting) >= ENOUGH or not self._max_wait_s:
                    break
                else:
                    until = until or time.monotonic() + self._max_wait_s
                    if (left := until - time.monotonic()) <= 0:
                        break
                    self._changed.wait(left)
            free = len(self._threads) - self._busy
            share = -(-len(self._waiting) // max(1, free))
            jobs: list[Job] = []
            while self._waiting and len(jobs) < share:
                wish = self._waiting[0].wish
                if len(jobs) == self._most(wish) or (jobs and wish.tta != jobs[0].wish.tta):
                    break
                jobs.append(self._waiting.popleft())
            self._busy += bool(jobs)
            return jobs


class TileClassifier(PythonModel):
    """Answers per tile with label, confidence, how far to trust it, and where the model is from."""

    def load_context(self, context: PythonModelContext) -> None:
        """Open the network, and the threads that ask it: one core each, so none waits for another.

        Raises:
            ValueError: a setting of ``model_config`` is unknown or out of its range.
        """
        settings = _settings(context.model_config or {})
        self.form = _form(settings.form, context.artifacts)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors alone: it warns that `tta` is free to be given
        network = context.artifacts[FORMS[self.form]]
        self.session = onnxruntime.InferenceSession(
            network, options, providers=["CPUExecutionProvider"]
        )
        self.outputs = [node.name for node in self.session.get_outputs()]
        free = self.session.get_overridable_initializers()
        self.turns = any(node.name == "tta" for node in free)
        described = self.session.get_modelmeta().custom_metadata_map
        self.classes: list[str] = json.loads(described["classes"])
        height, width = json.loads(described["tile_size"])
        self.shape_HWC = (int(height), int(width), int(described["bands"]))
        self.judged_views = int(described.get("views", 1))
        self.full_scale = json.loads(described.get("full_scale", "null"))
        self.calibration = json.loads(described.get("calibration", "null"))
        lineage = json.loads(Path(context.artifacts["lineage"]).read_text())
        self.example_probabilities = lineage.get("example_probabilities", {}).get(FORMS[self.form])
        """What a tile of middle grey was answered when the version was registered."""
        self.provenance = {
            "model_version": _version(Path(network)),
            "data_fingerprint": lineage["data_fingerprint"],
            "run_id": lineage["run_id"],
        }
        self._settings = settings
        self._batches: Batches | None = None
        self._starting = threading.Lock()

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> list[Answer]:
        """One answer per row of the column ``image``: file bytes, or a nested (H, W, C) tensor.

        ``params`` are those of `Wish`. Tiles of callers that ask at the same time are joined.

        Raises:
            MlflowException: INVALID_PARAMETER_VALUE (HTTP 400) names row, limit and remedy;
                INTERNAL_ERROR (HTTP 500) is a fault of this model's, which is logged.
        """
        rows = list(model_input["image"])
        if not 1 <= len(rows) <= MAX_TILES:
            raise _fault(f"{len(rows)} tiles in one request: send 1 to {MAX_TILES}")
        try:
            wish = self.wish(params or {})
        except ValueError as error:
            raise _fault(str(error)) from error
        answers = []
        for number, future in enumerate(self.ask(rows, wish)):
            try:
                answers.append(future.result())
            except BadTile as error:
                raise _fault(f"row {number}: {error}") from error
            except Exception as error:
                log.exception("tiles could not be answered")
                raise MlflowException("a fault of the model's", INTERNAL_ERROR) from error
        return answers

    def wish(self, params: dict[str, Any]) -> Wish:
        """Raises ValueError, which names the parameter and what it takes."""
        wish = Wish(**{name: params[name] for name in Wish._fields if name in params})
        if wish.tta and self.shape_HWC[0] != self.shape_HWC[1]:
            raise ValueError(
                f"tta turns tiles, which must be square; these are {self.shape_HWC[:2]}"
            )
        if wish.tta and not self.turns and self.judged_views == 1:
            raise ValueError("this network looks once: leave tta out, or export it again")
        if not 0 <= wish.top_k <= len(self.classes):
            raise ValueError(
                f"top_k is {wish.top_k}: ask for 1 to {len(self.classes)} classes, or 0 for all"
            )
        return wish

    def ask(
        self, rows: Sequence[object], wish: Wish = PLAIN, deadline: float | None = None
    ) -> "list[Future[Answer]]":
        """What each row will have been answered; a future raises `BadTile` or TimeoutError."""
        jobs = [self.job(row, wish, deadline, Future()) for row in rows]
        with self._starting:  # of threads, which a server that calls `answer` never needs
            if self._batches is None:
                threads = self._settings.threads or _cores()
                wait_s = self._settings.max_wait_ms / 1e3
                self._batches = Batches(self.answer, self.most, threads, wait_s)
        self._batches.put(jobs)
        return [job.future for job in jobs]

    def job(self, row: object, wish: Wish, deadline: float | None, future: Any) -> Job:
        return Job(row, wish, deadline, future)

    def close(self) -> None:
        """Answer what waits, and give back threads and memory; nothing can be asked after it."""
        if self._batches is not None:
            self._batches.close()
        del self.session

    def _views(self, wish: Wish) -> int:
        return self.judged_views if wish.tta is None else VIEWS if wish.tta else 1

    def most(self, wish: Wish) -> int:
        """Tiles in one pass of the network."""
        return max(1, self._settings.max_batch // self._views(wish))

    def answer(self, jobs: list[Job]) -> None:
        """Answer jobs of one ``tta`` in this thread, by one pass for those that can be read."""
        read: list[tuple[Job, Picture]] = []
        now = time.monotonic()
        for job in jobs:
            if job.future.cancelled():
                continue
            try:
                if job.deadline is not None and now > job.deadline:
                    raise TimeoutError("the time allowed had passed before its turn came")
                read.append((job, _picture(job.row, self.shape_HWC, self.full_scale)))
            except (BadTile, TimeoutError) as error:
                job.future.set_exception(error)
        if not read:
            return
        given: dict[str, Any] = {"tiles_NHWC": np.stack([picture.tile_HWC for _, picture in read])}
        tta = read[0][0].wish.tta
        if tta is not None and tta != (self.judged_views > 1):
            given["tta"] = np.array(tta)
        told = dict(zip(self.outputs, self.session.run(self.outputs, given), strict=True))
        for number, (job, picture) in enumerate(read):
            one = {name: values[number] for name, values in told.items()}
            job.future.set_result(self._say(one, job.wish, picture))

    def _say(self, told: dict[str, Any], wish: Wish, picture: "Picture") -> Answer:
        probabilities = told["probabilities"].tolist()
        best = int(told["probabilities"].argmax())
        named = dict(zip(self.classes, probabilities, strict=True))
        if wish.top_k:
            first = sorted(named, key=lambda name: -named[name])[: wish.top_k]
            named = {name: named[name] for name in first}
        answer: Answer = {
            "label": self.classes[best],
            "confidence": probabilities[best],
            "probabilities": named,
        }
        if self.calibration and "energy" in told:
            answer |= self._trust(probabilities, float(told["energy"]))
        if picture.resized_from:
            answer["resized_from"] = picture.resized_from
        if wish.explain:
            answer["activation"] = (
                _lit(told["activation"][best]) if "activation" in told else NO_MAP
            )
        return answer | self.provenance

    def _trust(self, probabilities: list[float], energy: float) -> Answer:
        """The classes that hold the true one as often as promised; is the tile unlike training's.

        Both by thresholds that the training fitted on its validation fold.
        """
        thresholds, above = self.calibration["thresholds"], self.calibration["ood_threshold"]
        each = zip(self.classes, probabilities, thresholds, strict=True)
        return {
            "prediction_set": [name for name, p, threshold in each if 1 - p <= threshold],
            "unlike_training": energy > above,
            "unlike_score": energy - above,
        }


class Picture(NamedTuple):
    tile_HWC: Tile
    resized_from: list[int] | None = None
    """Height and width, where it was another size than the tiles of the training."""


def _picture(
    row: object, shape_HWC: tuple[int, int, int], full_scale: list[float] | None
) -> Picture:
    if isinstance(row, bytes):
        data = _file_bytes(row)
        if data.startswith(TIFF_MAGIC) and shape_HWC[2] != len("RGB"):
            return _from_geotiff(data, shape_HWC, full_scale)
        return _from_bytes(data, shape_HWC)
    if isinstance(row, list | np.ndarray):
        return Picture(_from_tensor(row, shape_HWC))
    raise BadTile(
        f"a {type(row).__name__} is no tile: send base64 of a JPEG, PNG or TIFF "
        "file in the column 'image', or raw uint8 pixels as 'inputs'"
    )


def _from_tensor(row: list[Any] | npt.NDArray[Any], shape_HWC: tuple[int, int, int]) -> Tile:
    try:
        values = np.asarray(row)
    except ValueError as error:
        raise BadTile(f"lists of unequal length where the model takes {shape_HWC}") from error
    if values.shape == shape_HWC[1:]:
        raise BadTile(
            f"shape {values.shape} is a row of pixels: a single tile needs its batch "
            f"axis, so send (1, {', '.join(map(str, shape_HWC))})"
        )
    if values.shape != shape_HWC:
        raise BadTile(f"shape {values.shape} where the model takes {shape_HWC}")
    if values.dtype.kind == "S":  # MLflow hands JSON numbers to a binary column as their text
        try:
            values = values.astype(np.int64)
        except (ValueError, OverflowError) as error:
            raise BadTile("holds what is not a whole number: send pixels from 0 to 255") from error
    if values.dtype.kind not in "iu":
        raise BadTile(f"{values.dtype} pixels: send whole numbers from 0 to 255 (uint8)")
    if values.min() < 0 or values.max() > 255:
        raise BadTile("holds pixels outside 0 to 255: scale the tile to uint8")
    return values.astype(np.uint8)


def _from_bytes(data: bytes, shape_HWC: tuple[int, int, int]) -> Picture:
    height, width, bands = shape_HWC
    if bands != len("RGB"):
        raise BadTile(
            f"this model reads {bands} bands and this file holds a picture in colours: send a "
            f"GeoTIFF of {bands} bands, or raw uint8 pixels of shape (N, {height}, {width}, "
            f"{bands}) as 'inputs'"
        )
    if (quick := _plain_jpeg(data, height, width)) is not None:
        return Picture(quick)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_header(image, data)
            colours = image.convert("RGBA") if image.mode in ("P", "PA") else image
            rgb = colours.convert("RGB")
    except BadTile:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large("more pixels than are read") from error
    except Exception as error:  # decoders raise anything on foreign bytes
        raise BadTile(
            "the picture is damaged, truncated or of a kind that is not read: "
            "save it again as an 8-bit JPEG, PNG or TIFF"
        ) from error
    if rgb.size == (width, height):
        return Picture(np.asarray(rgb))
    resized = rgb.resize((width, height), Image.Resampling.BILINEAR)
    return Picture(np.asarray(resized), [rgb.height, rgb.width])


def _plain_jpeg(data: bytes, height: int, width: int) -> Tile | None:
    """The pixels of a tile like most, as Pillow reads them too, in half the time; else None."""
    if len(data) > QUICK_BYTES or not data.startswith(MAGIC[0]):
        return None
    try:
        if simplejpeg.decode_jpeg_header(data)[:3] == (height, width, "YCbCr"):
            pixels: Tile = simplejpeg.decode_jpeg(data, "RGB")
            return pixels
    except ValueError:  # Pillow tells whether it is damaged
        pass
    return None


def _from_geotiff(
    data: bytes, shape_HWC: tuple[int, int, int], full_scale: list[float] | None
) -> Picture:
    """Bands of uint8, or of uint16 which the training's full scale takes to uint8."""
    import rasterio
    from rasterio.io import MemoryFile

    height, width, bands = shape_HWC
    try:
        with rasterio.Env(CPL_LOG="/dev/null"), MemoryFile(data) as file, file.open() as tiff:
            if max(tiff.height, tiff.width) > MAX_SIDE:
                raise _too_large(f"{tiff.width}x{tiff.height} pixels")
            dtypes = set(tiff.dtypes)
            takes = "uint16" if full_scale else "uint8"
            if tiff.count != bands or dtypes != {takes}:
                raise BadTile(
                    f"a TIFF of {tiff.count} bands of {', '.join(sorted(dtypes))} where the model "
                    f"takes {bands} of {takes}"
                )
            values: npt.NDArray[Any] = np.moveaxis(tiff.read(), 0, -1)
    except BadTile:
        raise
    except Exception as error:  # GDAL raises anything on foreign bytes
        raise BadTile("the TIFF is damaged or truncated: write it again") from error
    if full_scale:
        scale = np.float32(255) / np.asarray(full_scale, np.float32)
        values = np.rint(np.clip(values * scale, 0, 255))
    pixels = values.astype(np.uint8)
    if pixels.shape[:2] == (height, width):
        return Picture(pixels)
    each = (Image.fromarray(np.ascontiguousarray(pixels[:, :, band])) for band in range(bands))
    resized = [one.resize((width, height), Image.Resampling.BILINEAR) for one in each]
    return Picture(np.stack([np.asarray(one) for one in resized], axis=-1), [*pixels.shape[:2]])


def _file_bytes(data: bytes) -> bytes:
    """The file; base64 that came as ``inputs`` is decoded here, MLflow does columns alone."""
    if data.startswith(MAGIC):
        return data
    if not data:
        raise BadTile("no bytes: the column 'image' is empty or not base64")
    try:
        decoded = base64.b64decode(data, validate=True)
    except binascii.Error:
        decoded = b""
    if not decoded.startswith(MAGIC):
        raise BadTile(
            f"{len(data)} bytes that are no JPEG, PNG or TIFF file: send the file's bytes as base64"
        )
    return decoded


def _check_header(image: Image.Image, data: bytes) -> None:
    """Refuse by what the header says, before a pixel is decoded."""
    if max(image.size) > MAX_SIDE:
        raise _too_large(f"{image.width}x{image.height} pixels")
    if image.format in ("PNG", "TIFF") and getattr(image, "is_animated", False):
        raise BadTile("holds several pictures: send one tile a row")
    if data.startswith(MAGIC[0]) and data.count(SCAN) > MAX_SCANS:
        raise BadTile(f"a JPEG of over {MAX_SCANS} scans: save it again")
    bits = 8
    if image.format == "PNG":
        bits = data[PNG_BIT_DEPTH]
    elif image.format == "TIFF":
        bits = max(image.tag_v2.get(TIFF_BITS_PER_SAMPLE, (1,)))  # type: ignore[attr-defined]
    if bits > 8 or image.mode not in EIGHT_BIT_MODES:
        raise BadTile(
            f"a {image.format} of {bits} bits, mode {image.mode}: convert it to "
            "8 bits per band, as the training tiles were"
        )


def _too_large(size: str) -> BadTile:
    limit = f"{MAX_SIDE}x{MAX_SIDE}"
    return BadTile(f"{size}, over the {limit} of a tile: cut the picture into tiles")


def _lit(activation_HW: npt.NDArray[np.float32]) -> list[list[float]]:
    """From 0 to 1, where the tile spoke for its label; see `eurosat.models.export` for its size."""
    lit = np.maximum(activation_HW, 0)
    return [[round(float(one), 4) for one in row] for row in lit / max(float(lit.max()), 1e-6)]


def _fault(message: str) -> MlflowException:
    """MLflow's scoring server answers it with 400, echoes the request in its message, and passes
    ``reason`` on as it is.
    """
    return MlflowException(message, error_code=INVALID_PARAMETER_VALUE, reason=message)


def _settings(given: dict[str, Any]) -> Settings:
    if unknown := sorted(set(given) - set(Settings._fields)):
        known = ", ".join(Settings._fields)
        raise ValueError(f"model_config has no {', '.join(unknown)}: it takes {known}")
    settings = Settings(**given)
    if settings.threads < 0 or settings.max_batch < 1 or not 0 <= settings.max_wait_ms <= 1000:
        raise ValueError(
            f"threads must be 0 or more, max_batch 1 or more, max_wait_ms 0 to 1000; got {settings}"
        )
    return settings


def _form(wanted: str, artifacts: dict[str, str]) -> str:
    held = [form for form, artifact in FORMS.items() if artifact in artifacts]
    if wanted == "auto":
        return held[-1]
    if wanted not in held:
        raise ValueError(f"this version has no form {wanted}: it has {', '.join(held)}")
    return wanted


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
