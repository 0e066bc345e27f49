"""The check of the object store: write, read and delete one object."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from eurosat import tracking
from eurosat.doctor.context import DoctorContext
from eurosat.doctor.findings import Failed, NotApplicable

ARTIFACTS, EMULATOR = "EUROSAT_ARTIFACTS", "STORAGE_EMULATOR_HOST"
DEFAULT_URL = "gs://mlflow/artifacts"
"""The platform's own bucket, used if only an emulator is named."""
ROLE = "roles/storage.objectUser"


def permissions(context: DoctorContext) -> str:
    """Write, read and delete one object; a failure names the missing permission."""
    emulator, url = context.environ.get(EMULATOR), context.environ.get(ARTIFACTS)
    if not (emulator or url):
        raise NotApplicable(f"neither {ARTIFACTS} nor {EMULATOR} is set")
    url = url or DEFAULT_URL
    if not url.startswith("gs://"):
        raise NotApplicable(f"{ARTIFACTS}={url} is not a Google bucket (gs://)")
    if emulator and "://" not in emulator:
        raise Failed(f"{EMULATOR}={emulator} has no scheme", f"set {EMULATOR}=http://{emulator}")
    from google.cloud import storage

    bucket, _, folder = url.removeprefix("gs://").partition("/")
    content = os.urandom(1024)
    limits: dict[str, Any] = {"timeout": context.timeout_s, "retry": None}
    with _translate_errors("use", "a credential", url):
        client = storage.Client()
        blob = client.bucket(bucket).blob(f"{folder}/doctor-{uuid.uuid4().hex[:12]}".lstrip("/"))
    try:
        with _translate_errors("write", "storage.objects.create", url):
            blob.upload_from_string(content, **limits)
        with _translate_errors("read", "storage.objects.get", url):
            # a new blob: an emulator's download link may be valid inside its own network only
            downloaded = blob.bucket.blob(blob.name).download_as_bytes(**limits)
    except BaseException:
        with suppress(Failed), _translate_errors("delete", "", url):  # it may have been written
            blob.delete(**limits)
        raise
    with _translate_errors("delete", "storage.objects.delete", f"gs://{bucket}/{blob.name}"):
        blob.delete(**limits)
    if downloaded != content:
        raise Failed(
            f"{url} returned other bytes than were written", "check the object store and its disk"
        )
    return f"an object in {url}: written, read, deleted"


@contextmanager
def _translate_errors(action: str, permission: str, url: str) -> Iterator[None]:
    """Turn an error of Google's client into one line that names the missing permission.

    Raises:
        Failed: Google's client raised.
    """
    import requests
    from google.api_core import exceptions
    from google.auth.exceptions import GoogleAuthError

    try:
        yield
    except (exceptions.Forbidden, exceptions.Unauthorized) as error:
        raise Failed(
            f"{permission} is denied on {url}", f"grant the account {ROLE} on the bucket"
        ) from error
    except exceptions.NotFound as error:
        raise Failed(
            f"cannot {action} in {url}: there is no such bucket",
            f"create the bucket, or set {ARTIFACTS} to one that exists",
        ) from error
    except GoogleAuthError as error:
        raise Failed(
            f"no credentials for {url}: {tracking.first_line(error)}",
            "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
        ) from error
    except (exceptions.GoogleAPIError, requests.RequestException, OSError) as error:
        raise Failed(
            f"cannot {action} in {url}: {tracking.first_line(error)}",
            f"check that the object store runs; for an emulator, that {EMULATOR} is its address",
        ) from error
