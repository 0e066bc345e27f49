"""Malformed requests as raw bytes: the corpus of tests/serving/test_bad_input.py."""

import base64
import io
import json
import random
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from serving.errors import CODES
from tests.support.images import GOOD, MALFORMED, REJECTED, encoded, files, png, saved

SECRET = "SECRET"
"""Text in many payloads, which no answer may repeat."""
TIMEOUT_S = 3.0
"""Time that the server of these tests allows for a head, and for a body."""
JPEG, TIFF = encoded(kind="JPEG"), encoded(kind="TIFF")
KINDS = {"image/jpeg": JPEG, "image/png": GOOD, "image/tiff": TIFF}
JSON, FORM = "application/json", "multipart/form-data; boundary=edge"


@dataclass(frozen=True)
class Case:
    wire: Callable[[], Sequence[bytes | float]]
    """Return what is sent: bytes, and seconds of silence between them."""
    statuses: frozenset[int] = frozenset()
    """Allowed statuses; empty: any 4xx but 401 and 429."""
    closes: bool = False
    """The answer may be lost, because the server closes a connection with unread data."""
    to_head: bool = False
    """The answer has no body, as for HEAD."""
    large: bool = False
    """A body of megabytes, whose memory an allocator may keep."""


CASES: dict[str, Case] = {}
WRONG = frozenset(status for status in CODES if 400 <= status < 500) - {401, 429}


def request(
    path: str, body: bytes = b"", headers: Mapping[str, str] | None = None, method: str = "POST"
) -> bytes:
    fields = {"Host": "x", "Content-Length": str(len(body))} | dict(headers or {})
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def add(
    name: str, *wire: bytes | float, statuses: Sequence[int] = (), closes: bool = False
) -> None:
    assert name not in CASES, f"{name} stands twice in the corpus"
    to_head = str(wire[0]).startswith("b'HEAD ")
    CASES[name] = Case(lambda: wire, frozenset(statuses), closes, to_head)


def post(
    name: str, path: str, kind: str | None, body: bytes, *statuses: int, **headers: str
) -> None:
    fields = {key.replace("_", "-"): value for key, value in headers.items()}
    fields |= {} if kind is None else {"Content-Type": kind}
    add(f"{path}: {name}", request(path, body, fields), statuses=statuses)


def post_large(name: str, path: str, kind: str, body: Callable[[], bytes], *statuses: int) -> None:
    """Add a request whose large body is made only when it is sent."""
    CASES[f"{path}: {name}"] = Case(
        lambda: [request(path, body(), {"Content-Type": kind})], frozenset(statuses), large=True
    )


def form(*parts: tuple[str, bytes], end: bytes = b"--edge--\r\n") -> bytes:
    return (
        b"".join(
            b"--edge\r\n" + head.encode() + b"\r\n\r\n" + data + b"\r\n" for head, data in parts
        )
        + end
    )


def file_part(name: str = "file", filename: str = "a.jpg") -> str:
    return f'Content-Disposition: form-data; name="{name}"; filename="{filename}"'


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def with_chunk(kind: bytes, data: bytes) -> bytes:
    """Return a valid PNG with one more chunk after its header."""
    return GOOD[:33] + chunk(kind, data) + GOOD[33:]


def many_scans() -> bytes:
    """Return a progressive JPEG with 20,000 scans, each as slow to decode as a whole image."""
    file = io.BytesIO()
    Image.new("RGB", (1024, 1024)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * 20_000 + data[-2:]


def empty_lists(name: str) -> bytes:
    return f'{{"{name}": ['.encode() + b"[]," * 5_000_000 + b"[]]}"


def many_numbers() -> bytes:
    return b'{"inputs": [' + b"1," * 8_500_000 + b"1]}"


def as_json(value: object) -> bytes:
    return json.dumps(value).encode()


def outside_protocol() -> dict[str, Any]:
    """Return payloads that MLflow would read, but that are not of its documented protocol."""
    return {
        "names of another protocol": {"prompt": 1, "c0": {"0": 1}, "c1": {"1": 1}},
        "columns of rows by name": {"dataframe_split": {"data": {"a": {"0": 1}, "b": {"1": 1}}}},
        "rows of two kinds": {"dataframe_split": {"data": [["x"], "xxxx"]}},
        "names in lists": {"dataframe_split": {"columns": [["a"], ["b"]], "data": [["x"]]}},
        "objects within": {"inputs": [[{"a": {"b": "x"}}]]},
        "a list": [1, 2],
    }


def memory_bombs() -> dict[str, dict[str, Any]]:
    """Return small payloads of which MLflow would make huge frames and arrays."""
    long = "x" * 60_000
    return {
        "rows of one column and one of many": {
            "dataframe_split": {"data": [*([[]] * 1000), list(range(20_000))]}
        },
        "many rows": {"dataframe_split": {"columns": ["image"], "data": [["x"]] * 5000}},
        "many names of columns": {"dataframe_split": {"columns": ["x"] * 5000, "data": []}},
        "records without a name in common": {
            "dataframe_records": [{f"x{number}": 1} for number in range(1020)]
        },
        "a frame of many columns": {"dataframe_records": {f"x{n}": [1] for n in range(5000)}},
        "a long text among short ones in a dict": {"inputs": {"image": [long, *"x" * 5000]}},
        "a long text among numbers": {"instances": [{"image": [long, *range(5000)]}]},
        "a long list among short texts": {
            "dataframe_records": [{"image": [0] * 20_000}, *[{"image": "x"}] * 999]
        },
        "inputs without a name in common": {"inputs": [{f"x{n}": 1} for n in range(1020)]},
    }


def zip_archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(SECRET, SECRET)
    return file.getvalue()


def corpus() -> None:
    images()
    multipart_forms()
    batches()
    mlflow_protocol()
    request_heads()
    connections()


def images() -> None:
    for kind, good in KINDS.items():
        for number, end in enumerate(np.linspace(1, len(good) - 1, 20).astype(int)):
            post(f"{kind} cut at {number}/20", "/predict", kind, good[:end], 200, 422)
        for seed in range(25):
            post(
                f"{kind} with bits flipped, {seed}", "/predict", kind, flipped(good, seed), 200, 422
            )
        post(f"nothing as {kind}", "/predict", kind, b"", 422)
        post(f"zeros as {kind}", "/predict", kind, bytes(5000), 422)
        post(f"text as {kind}", "/predict", kind, SECRET.encode() * 99, 422)
        post(f"{kind}, and a ZIP behind it", "/predict", kind, good + zip_archive(), 200, 422)
        html = f"<html><script>{SECRET}</script></html>".encode()
        post(f"{kind}, and HTML behind it", "/predict", kind, good + html, 200, 422)
        post(f"HTML, and {kind} behind it", "/predict", kind, html + good, 422)
        post(f"{kind} twice", "/predict", kind, good * 2, 200, 422)
        post(f"base64 of {kind}", "/predict", kind, base64.b64encode(good), 200, 422)
        post(f"magic of {kind} alone", "/predict", kind, good[:4], 422)
        post(f"magic of {kind} and noise", "/predict", kind, good[:4] + noise(4000), 422)
    for name, (payload, _) in REJECTED.items():
        if "dataframe_split" in payload:
            rows = [row[0] for row in payload["dataframe_split"]["data"]]
            batch = json.dumps({"images": rows}).encode()
            post(name, "/predict/batch", JSON, batch, 413, 422)
            if rows and name not in ("junk base64", "junk base64 in the second row"):
                worst = base64.b64decode(rows[-1])
                post(name, "/predict", "application/octet-stream", worst, 422)
    for name, bad in {
        "GIF in JPEG's clothes": saved(Image.new("RGB", (64, 64)), "GIF"),
        "WebP": saved(Image.new("RGB", (64, 64)), "WEBP"),
        "PDF": b"%PDF-1.7\n" + noise(300),
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><text>SECRET</text></svg>',
        "ZIP": zip_archive(),
        "ELF": b"\x7fELF" + noise(300),
        "a pickle": b"\x80\x04cos\nsystem\nS'echo SECRET'\n.",
        "a PNG of no width": png(0, 64, 8, 2, b""),
        "a PNG of no known colour": png(64, 64, 8, 5, b"\0" * 1000),
        "a PNG of 2^31 pixels a side": png(2**31 - 1, 2**31 - 1, 8, 2, b"\0"),
        "a PNG without rows": png(64, 64, 8, 2, b""),
        "a PNG whose text unpacks to 64 MB": with_chunk(
            b"zTXt", b"a\0\0" + zlib.compress(bytes(64_000_000), 9)
        ),
        "a JPEG of 65535 pixels a side": JPEG.replace(
            b"\x08\x00\x40\x00\x40\x03", b"\x08\xff\xff\xff\xff\x03"
        ),
        "a TIFF whose directory is its own next": b"II*\0\x08\0\0\0\0\0\x08\0\0\0",
        "a TIFF whose directory is far away": b"II*\0\xff\xff\xff\xff" + noise(99),
        "a TIFF of 65535 tags": b"II*\0\x08\0\0\0\xff\xff" + noise(12 * 65535),
        "a BigTIFF of nothing": b"II+\0\x08\0\0\0" + b"\xff" * 90,
    }.items():
        post(name, "/predict", "image/jpeg", bad, 422)
    profile = b"a\0\0" + zlib.compress(bytes(64_000_000), 9)
    post(
        "a PNG with a colour profile of 64 MB",
        "/predict",
        "image/png",
        with_chunk(b"iCCP", profile),
        200,
        422,
    )
    post_large("a JPEG of 20,000 scans", "/predict", "image/jpeg", many_scans, 422)
    post_large("17 MB", "/predict", "image/jpeg", lambda: JPEG + bytes(17_000_000), 413)
    post_large(
        "15 MB behind a JPEG", "/predict", "image/jpeg", lambda: JPEG + bytes(15_000_000), 200, 422
    )
    for kind in (
        "text/html",
        "image/gif",
        "image/svg+xml",
        "application/json",
        "a/b; c",
        "",
        ";",
        "SECRET",
        "image",
        "x-www-form-urlencoded",
        "image/jpeg, image/png",
    ):
        post(f"as {kind!r}", "/predict", kind, JPEG, 200 if kind in ("", ";") else 415)
    post("of no type", "/predict", None, JPEG, 200)


def flipped(good: bytes, seed: int, most: int = 12) -> bytes:
    chance = random.Random(seed)
    changed = bytearray(good)
    for _ in range(chance.randint(1, most)):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def noise(count: int) -> bytes:
    return random.Random(count).randbytes(count)


def multipart_forms() -> None:
    good = form((file_part(), JPEG))
    for path in ("/predict", "/predict/batch"):
        multipart = "multipart/form-data"
        post("a form without a boundary", path, multipart, good, 400)
        post("a form of an empty boundary", path, f"{multipart}; boundary=", good, 400)
        post("a form of another boundary", path, f"{multipart}; boundary=SECRET", good, 400, 422)
        post(
            "a form of a boundary of 9,999",
            path,
            f"{multipart}; boundary={'x' * 9999}",
            good,
            400,
            422,
        )
        post(
            "a boundary in quotes that do not end",
            path,
            f'{multipart}; boundary="edge',
            good,
            200,
            400,
            422,
        )
        post(
            "a boundary of foreign letters", path, f"{multipart}; boundary=\xff\xfe", good, 400, 422
        )
        post("a form of an unknown charset", path, f"{FORM}; charset=SECRET", good, 200, 400)
        post("an empty form", path, FORM, b"", 400, 422)
        post("a form of its end alone", path, FORM, b"--edge--\r\n", 400, 422)
        post(
            "a form that does not end",
            path,
            FORM,
            form((file_part(), JPEG), end=b""),
            200,
            400,
            422,
        )
        twice = f"{file_part()}\r\n{file_part()}"
        post("a part with two dispositions", path, FORM, form((twice, JPEG)), 400)
        nine = "X-SECRET: x\r\n" * 8 + file_part()
        post("a part of 9 headers", path, FORM, form((nine, JPEG)), 400)
        padded = good.replace(b"--edge\r\n", b"--edge \r\n")
        post("spaces after the first boundary", path, FORM, padded, 400)
        padded = form((file_part(), JPEG), (file_part(), JPEG)).replace(
            b"--edge\r\n", b"--edge\t\r\n"
        )
        post("tabs after a boundary", path, FORM, padded, 400)
        post("text before the first boundary", path, FORM, b"SECRET\r\n" + good, 400)
        post("one dash at the end", path, FORM, form((file_part(), JPEG), end=b"--edge-\r\n"), 400)
        post_large("a form of boundaries", path, FORM, lambda: b"--edge\r\n\r\n" * 100_000, 400)
        post_large(
            "a file of boundaries",
            path,
            FORM,
            lambda: form((file_part(), b"\r\n--edgeX" * 200_000)),
            400,
        )
        post_large(
            "spaces after a boundary",
            path,
            FORM,
            lambda: b"--edge\r\n\r\n\r\n--edge" + b" " * 2_000_000,
            400,
        )
        post("a form cut in a head", path, FORM, good[:30], 400, 422)
        post("a form cut in a file", path, FORM, good[:900], 400, 422)
        post("a form without line ends", path, FORM, good.replace(b"\r\n", b""), 400, 422)
        post("a form of noise", path, FORM, b"--edge\r\n" + noise(5000), 400, 422)
        post(
            "fields and no file",
            path,
            FORM,
            form(('Content-Disposition: form-data; name="file"', b"SECRET")),
            422,
        )
        post(
            "a part without a name",
            path,
            FORM,
            form(('Content-Disposition: form-data; filename="SECRET"', JPEG)),
            200,
            400,
        )
        post("a part without a head", path, FORM, form(("", JPEG)), 400, 422)
        post(
            "a part with a head of 30,000",
            path,
            FORM,
            form((f"X-SECRET: {'x' * 30_000}\r\n{file_part()}", JPEG)),
            200,
            400,
        )
        post(
            "a part of 5,000 heads",
            path,
            FORM,
            form(("X-SECRET: x\r\n" * 5000 + file_part(), JPEG)),
            200,
            400,
        )
        post(
            "a form in a form",
            path,
            FORM,
            form(
                (
                    'Content-Disposition: form-data; name="files"\r\n'
                    "Content-Type: multipart/mixed; boundary=inner",
                    form((file_part(), JPEG)).replace(b"edge", b"inner"),
                )
            ),
            400,
            422,
        )
        post("5,000 files", path, FORM, form(*[(file_part(), b"x")] * 5000), 400, 413)
        post(
            "5,000 fields",
            path,
            FORM,
            form(*[('Content-Disposition: form-data; name="SECRET"', b"x")] * 5000),
            400,
            422,
        )
        post("an empty file of a form", path, FORM, form((file_part(filename=SECRET), b"")), 422)
        post(
            "text as a file of a form",
            path,
            FORM,
            form((file_part(filename=SECRET), b"SECRET")),
            422,
        )
        post("a file by a path", path, FORM, form((file_part(filename="../../SECRET"), b"x")), 422)
        post_large(
            "a form of line ends", path, FORM, lambda: b"--edge\r\n" + b"\r" * 15_000_000, 400, 422
        )
        post_large(
            "a file of line ends",
            path,
            FORM,
            lambda: form((file_part(), b"\r\n--edg" * 2_000_000)),
            422,
        )
    post(
        "two files for a route of one",
        "/predict",
        FORM,
        form((file_part(), JPEG), (file_part(), JPEG)),
        413,
    )
    post("257 files", "/predict/batch", FORM, form(*[(file_part(), JPEG)] * 257), 413)
    post(
        "a bad file behind a good one",
        "/predict/batch",
        FORM,
        form((file_part(), JPEG), (file_part(), b"SECRET")),
        422,
    )


NO_OBJECT = {
    "nothing": b"",
    "a word": b"SECRET",
    "half a word": b"tru",
    "null": b"null",
    "true": b"true",
    "a number": b"5",
    "a list": b"[]",
    "a text": b'"SECRET"',
    "an object cut short": b'{"images": [',
    "single quotes": b"{'images': ['SECRET']}",
    "a comma too many": b'{"images": ["",]}',
    "half a letter of UTF-8": b'{"images": ["SECRET\xe2\x82"]}',
    "Latin-1": b'{"images": ["\xe9"]}',
    "UTF-16 cut short": '{"images": [""]}'.encode("utf-16")[:-1],
    "a NUL": b'{"images": ["\0"]}',
    "NULs": bytes(999),
    "noise": noise(999),
    "a number of 5,000 digits": b'{"images": %s}' % (b"9" * 5000),
    "100,000 brackets": b"[" * 100_000,
    "100,000 braces": b'{"images":' * 100_000,
    "100,000 brackets that close": b'{"images":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "YAML": b"images: [SECRET]",
    "XML": b"<images>SECRET</images>",
    "a JPEG": JPEG,
    "two objects": b'{"images": [""]} {"images": [""]}',
}
"""Bodies that are not JSON, sent as JSON."""


def batches() -> None:
    for name, body in NO_OBJECT.items():
        post(name, "/predict/batch", JSON, body, 400, 422)
    images: list[Any] = [
        None,
        True,
        5,
        "SECRET",
        {},
        {"a": SECRET},
        [None],
        [5],
        [[GOOD.hex()]],
        [{}],
        [],
    ]
    for value in images:
        text = json.dumps({"images": value})
        post(f"images are {text[11:40]}", "/predict/batch", JSON, text.encode(), 400, 422)
    good = base64.b64encode(GOOD).decode()
    for name, row in {
        "a text of no base64": "SECRET!",
        "no padding": good.rstrip("=")[:-1],
        "a blank": "",
        "a space in base64": good[:9] + " " + good[9:],
        "base64 for addresses": "-_-_",
        "half a surrogate": "\ud800",
        "a letter of no base64": "é" * 4,
        "a NUL in base64": "AAAA\0",
        "padding alone": "====",
        "base64 in base64": base64.b64encode(b"SECRET" * 9).decode(),
        "a data address": f"data:image/png;base64,{good}",
        "an address": "http://127.0.0.1/SECRET",
        "a path": "/etc/passwd",
    }.items():
        body = json.dumps({"images": [good, row]}).encode()
        post(f"a row that is {name}", "/predict/batch", JSON, body, 422)
    post("257 images", "/predict/batch", JSON, json.dumps({"images": [good] * 257}).encode(), 413)
    post("in an unknown column", "/predict/batch", JSON, b'{"SECRET": []}', 400)
    for kind in ("text/plain", "text/json", "image/jpeg", "application/x-www-form-urlencoded"):
        post(f"as {kind}", "/predict/batch", kind, b'{"images": []}', 415)
    post("of no type", "/predict/batch", None, b'{"images": []}', 415)


def mlflow_protocol() -> None:
    path = "/invocations"
    for name, (payload, _) in REJECTED.items():
        post(name, path, JSON, json.dumps(payload).encode(), 400, 413, 422)
    for name, malformed in MALFORMED.items():
        post(name, path, JSON, json.dumps(malformed).encode(), 400, 422)
    for name, body in NO_OBJECT.items():
        post(f"{name} for JSON", path, JSON, body, 400, 422)
    row = files(GOOD)
    split = row["dataframe_split"]
    for name, bad in {
        "a column of a secret name": {"dataframe_split": split | {"columns": [SECRET]}},
        "too many columns": {"dataframe_split": split | {"columns": ["image", SECRET]}},
        "the same column twice": {
            "dataframe_split": {"columns": ["image"] * 2, "data": [[SECRET, SECRET]]}
        },
        "a key too many": {"dataframe_split": split | {SECRET: 1}},
        "a table that is a list": {"dataframe_split": [SECRET]},
        "a table that is a text": {"dataframe_split": SECRET},
        "rows that are a text": {"dataframe_split": {"columns": ["image"], "data": SECRET}},
        "rows of an object": {"dataframe_split": {"columns": ["image"], "data": [[{SECRET: 1}]]}},
        "rows of a list": {"dataframe_split": {"columns": ["image"], "data": [[[SECRET]]]}},
        "rows of a number": {"dataframe_split": {"columns": ["image"], "data": [[5]]}},
        "columns that are null": {"dataframe_split": {"columns": None, "data": [[SECRET]]}},
        "columns that are objects": {"dataframe_split": {"columns": [{}], "data": [[SECRET]]}},
        "records that are an object": {"dataframe_records": {"image": SECRET}},
        "records of numbers": {"dataframe_records": [1, 2]},
        "records of null": {"dataframe_records": [None]},
        "records of two kinds": {"dataframe_records": [{"image": SECRET}, {"b": 1}, 7]},
        "records of nothing": {"dataframe_records": []},
        "inputs that are null": {"inputs": None},
        "inputs that are an object": {"inputs": {SECRET: [1]}},
        "inputs of null": {"inputs": [None]},
        "inputs of objects": {"inputs": [{SECRET: SECRET}, {"image": 5}]},
        "inputs of an object and a text": {"inputs": [{"image": SECRET}, SECRET]},
        "inputs that are empty lists": {"inputs": [[[]]]},
        "inputs that are true": {"inputs": True},
        "instances that are a text": {"instances": SECRET},
        "instances of two kinds": {"instances": [{"image": SECRET}, 5]},
        "instances of unequal columns": {"instances": [{"image": SECRET}, {"b": 1}]},
        "instances that are an object": {"instances": {"image": [SECRET], "b": [1, 2]}},
        "a signature's name": {"signature_name": SECRET, "inputs": [1]},
        "messages": {"messages": [{"role": "user", "content": SECRET}]},
        "a prompt": {"prompt": SECRET},
        "an input": {"input": SECRET},
        "a message that looks like ours": {"inputs": [f"\nError: row 0: {SECRET}"]},
        "a column that looks like ours": {
            "dataframe_split": {"columns": [f"\nError: {SECRET}"], "data": [[1]]}
        },
    }.items():
        post(name, path, JSON, json.dumps(bad).encode(), 400, 422)
    longer = json.dumps({"dataframe_split": split | {"index": [1, 2, 3]}}).encode()
    post("an index of another length", path, JSON, longer, 200, 400)
    wishes: list[Any] = [
        {"top_k": SECRET},
        {"top_k": -1},
        {"top_k": 10**30},
        {"top_k": 1.5},
        {"top_k": None},
        {"top_k": [SECRET]},
        {"top_k": {}},
        {"tta": SECRET},
        {"tta": 7},
        {"explain": None},
        {"explain": []},
        [SECRET],
        SECRET,
        5,
    ]
    for params in wishes:
        body = json.dumps(row | {"params": params}).encode()
        post(f"params are {json.dumps(params)[:30]}", path, JSON, body, 200, 400, 422)
    for name, kind, data in (
        ("CSV of another column", "text/csv", b"SECRET\n1\n"),
        ("CSV of text", "text/csv", b"image\nSECRET\n"),
        ("CSV of noise", "text/csv", noise(999)),
        ("CSV of nothing", "text/csv", b""),
        ("CSV of unequal rows", "text/csv", b"image\n1,2,3\n4\n"),
        ("CSV of a quote that does not end", "text/csv", b'image\n"SECRET'),
    ):
        post(name, path, kind, data, 400, 422)
    text = json.dumps(row).encode()
    for kind in (
        "text/plain",
        "SECRET",
        "",
        ";",
        "application/json; charset=latin-1",
        "image/jpeg",
        "application/json; SECRET=1",
        "application/json;;",
        "application/json; charset",
    ):
        post(f"as {kind!r}", path, kind, text, 200, 415)
    post("Parquet, which unpacks", path, "application/vnd.apache.parquet", b"PAR1" * 9, 415)
    post("of no type", path, None, text, 400)
    post_large(
        "one long text among many",
        path,
        JSON,
        lambda: json.dumps({"inputs": ["x" * 2_000_000, *[1] * 3000]}).encode(),
        400,
        413,
        422,
    )
    for lists, kind in ((path, "inputs"), ("/predict/batch", "images")):
        post_large("15 MB of empty lists", lists, JSON, partial(empty_lists, kind), 413)
    for name, bomb in memory_bombs().items():
        post_large(name, path, JSON, partial(as_json, bomb), 413)
    for name, shape in outside_protocol().items():
        post(name, path, JSON, as_json(shape), 400)
    post("nested too deep beside", path, JSON, b'{"inputs": ["x"], "params": ' + b"[" * 5000, 400)
    post_large("CSV of 5,000 rows", path, "text/csv", lambda: b"image\n" + b"x\n" * 5000, 413)
    post_large("CSV of 100,000 columns", path, "text/csv", lambda: b"," * 100_000 + b"\n1", 413)
    post_large("17 MB of JSON", path, JSON, many_numbers, 413)


def request_heads() -> None:
    for path, kind, body in (
        ("/predict", "image/jpeg", JPEG),
        (
            "/predict/batch",
            JSON,
            json.dumps({"images": [base64.b64encode(GOOD).decode()]}).encode(),
        ),
        ("/invocations", JSON, json.dumps(files(GOOD)).encode()),
    ):
        for value in (
            "SECRET",
            "",
            "-1",
            "0",
            "nan",
            "-inf",
            "1e-400",
            "1,5",
            "0x10",
            "1 2",
            "\xb2",
        ):
            post(f"a timeout of {value!r}", path, kind, body, 422, x_request_timeout=value)
        post("a timeout of next to nothing", path, kind, body, 429, x_request_timeout="1e-9")
        for value in ("1e400", "inf", " 5 "):
            post(f"a timeout of {value!r}", path, kind, body, 200, x_request_timeout=value)
        post(
            "a head of 200 headers",
            path,
            kind,
            body,
            200,
            431,
            **{f"x_{number}": SECRET for number in range(200)},
        )
        post("a header of 40,000", path, kind, body, 431, x_long="x" * 40_000)
        long = request(path, body, {"Content-Type": kind, "X-Long": "x" * 400_000})
        add(f"{path}: a header of 400,000", long, statuses=[431], closes=True)
        post("a header of foreign letters", path, kind, body, 200, 400, x_long="\xff\xfe\x80")
        post(
            "a compressed body",
            path,
            kind,
            zlib.compress(body),
            400,
            415,
            422,
            content_encoding="deflate",
        )
        for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "HEAD"):
            add(
                f"{path}: by {method}",
                request(path, body, {"Content-Type": kind}, method),
                statuses=[405],
            )
    for query in (
        "top_k=",
        "top_k=SECRET",
        "top_k=-1",
        "top_k=4",
        "top_k=1.5",
        "top_k=%D9%A1",
        "top_k=" + "9" * 5000,
        "tta=SECRET",
        "tta=",
        "explain=2",
        "SECRET=1",
        "a=1&" * 5000,
        "top_k=1&SECRET",
        "%00=1",
        "top_k=%00",
        "%FF%FE=%80",
        "top_k[]=1",
    ):
        for path in ("/predict", "/predict/batch"):
            body = JPEG if path == "/predict" else form((file_part(), JPEG))
            kind = "image/jpeg" if path == "/predict" else FORM
            name = f"{path}: the query {query[:20]}, {len(query)} long"
            add(name, request(f"{path}?{query}", body, {"Content-Type": kind}), statuses=[422])
    long = request("/predict?" + "x" * 300_000, JPEG, {"Content-Type": "image/jpeg"})
    add("a query of 300,000", long, statuses=[431], closes=True)
    for path in (
        "/SECRET",
        "/predict/",
        "//predict",
        "/predict%00",
        "/predict%2fSECRET",
        "/%ff",
        "/../predict",
        "/predict;SECRET",
        "/docs",
        "/redoc",
        "/.env",
        "*",
    ):
        add(
            f"the path {path}",
            request(path, JPEG, {"Content-Type": "image/jpeg"}),
            statuses=[400, 404],
        )
    add("a path with a NUL", b"POST /predict\0 HTTP/1.1\r\nHost: x\r\n\r\n", statuses=[400])
    add("a path of raw letters", b"POST /\xc3\xa9 HTTP/1.1\r\nHost: x\r\n\r\n", statuses=[400, 404])


def connections() -> None:
    """Add incomplete requests, and slow ones."""
    jpeg = b"Content-Type: image/jpeg\r\n"
    start = b"POST /predict HTTP/1.1\r\nHost: x\r\n" + jpeg
    get = b"GET /ready HTTP/1.1\r\nHost: x\r\n\r\n"
    for name, wire in {
        "noise": noise(999),
        "NULs": bytes(99),
        "line ends": b"\r\n" * 9 + b"x",
        "a word": b"SECRET\r\n\r\n",
        "a TLS hello": bytes.fromhex("16030100c8010000c40303") + noise(189),
        "HTTP/2's beginning": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
        "HTTP/9.9": b"GET /ready HTTP/9.9\r\n\r\n",
        "SSH": b"SSH-2.0-SECRET\r\n",
        "SMTP": b"EHLO SECRET\r\n",
        "Redis": b"*1\r\n$4\r\nPING\r\n",
        "an unknown method": b"SECRET / HTTP/1.1\r\n\r\n",
        "a tunnel": b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n",
        "a header without a colon": b"GET /ready HTTP/1.1\r\nSECRET\r\n\r\n",
        "a header without a name": b"GET /ready HTTP/1.1\r\n: SECRET\r\n\r\n",
        "a space before the colon": b"GET /ready HTTP/1.1\r\nSECRET : x\r\n\r\n",
        "a NUL in a header": b"GET /ready HTTP/1.1\r\nHost: x\0SECRET\r\n\r\n",
        "a folded header": b"GET /ready HTTP/1.1\r\nA: b\r\n SECRET\r\nHost:\0\r\n\r\n",
        "a length of text": start + b"Content-Length: SECRET\r\n\r\n",
        "a length below nothing": start + b"Content-Length: -1\r\n\r\n",
        "a length with a sign": start + b"Content-Length: +5\r\n\r\nabcde",
        "a length of two numbers": start + b"Content-Length: 5, 6\r\n\r\nabcde",
        "a length of 30 digits": start + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n",
        "a length of 5,000 digits": start + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n",
        "a length of 10^18": start + b"Content-Length: " + b"1" + b"0" * 18 + b"\r\n\r\n",
        "two lengths": start + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        "a length and chunks": start
        + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "an unknown encoding": start + b"Transfer-Encoding: SECRET\r\n\r\nabc",
        "chunks, then another encoding": start
        + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
        "a chunk of no length": start + b"Transfer-Encoding: chunked\r\n\r\nSECRET\r\n",
        "a chunk below nothing": start + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nabcde\r\n",
        "a chunk of 2^64": start + b"Transfer-Encoding: chunked\r\n\r\n10000000000000000\r\nabcde",
        "a chunk that is longer than its size": start
        + b"Transfer-Encoding: chunked\r\n\r\n2\r\nabcdefgh\r\n",
        "chunks of no picture": start
        + b"Transfer-Encoding: chunked\r\n\r\n6\r\nSECRET\r\n0\r\n\r\n",
        "a body without a length": start + b"\r\n",
        "a bad trailer": start + b"Transfer-Encoding: chunked\r\n\r\n0\r\nSECRET\r\n\r\n",
    }.items():
        add(f"on the wire: {name}", wire)
    add(
        "a chunk that ends early",
        start + b"Transfer-Encoding: chunked\r\n\r\nff\r\nSECRET",
        statuses=[408],
    )
    add("a body that ends early", start + b"Content-Length: 99\r\n\r\nSECRET", statuses=[408])
    add(
        "a body of 1 byte a while",
        start + b"Content-Length: 99\r\n\r\n",
        *drip(b"SECRET" * 9),
        statuses=[408],
    )
    add(
        "chunks of 1 byte a while",
        start + b"Transfer-Encoding: chunked\r\n\r\n",
        *drip(*[b"1\r\na\r\n"] * 50),
        statuses=[408],
    )
    add("a head that ends early", start, statuses=[408])
    add("a head of 1 byte a while", *drip(start), statuses=[408])
    add("a head of 1 header a while", start, *drip(*[b"X: SECRET\r\n"] * 50), statuses=[408])
    add("a head without an end", start, *[b"X: SECRET\r\n" * 999] * 30, statuses=[431], closes=True)
    add("on the wire: HTTP/0.9", b"GET /ready\r\n\r\n", statuses=[200, 400])
    add("nothing at all", 0.0, statuses=[408])
    add(
        "an early end of what was to be 99 bytes",
        start + b"Expect: 100-continue\r\nContent-Length: 99\r\n\r\n",
        statuses=[408],
    )
    add(
        "an unknown expectation",
        start + b"Expect: SECRET\r\nContent-Length: 3\r\n\r\nabc",
        statuses=[417, 422],
    )
    add(
        "noise behind a request",
        request("/predict", b"SECRET", {"Content-Type": "image/jpeg"}) + noise(99),
        statuses=[400, 422],
    )
    add("500 requests in one breath", get.replace(b"ready", b"SECRET") * 500, statuses=[404])
    add(
        "another protocol asked for",
        get.replace(
            b"\r\n\r\n",
            b"\r\nConnection: Upgrade, HTTP2-Settings\r\n"
            b"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n",
        ),
        statuses=[200],
    )
    add(
        "a websocket",
        get.replace(b"ready", b"predict").replace(
            b"\r\n\r\n",
            b"\r\nConnection: Upgrade\r\n"
            b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n",
        ),
        statuses=[405],
    )


def drip(*pieces: bytes) -> list[bytes | float]:
    """Return pieces with pauses between them, so slow that the request would take minutes."""
    each = [pieces[0][k : k + 1] for k in range(len(pieces[0]))] if len(pieces) == 1 else pieces
    return [part for piece in each for part in (piece, TIMEOUT_S / 5)]


corpus()
