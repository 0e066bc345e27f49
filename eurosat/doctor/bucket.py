"""Check of the object store, by one object: what may be done, and which permission is missing."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from eurosat import tracking
from eurosat.doctor.checks import Failed, NotApplicable
from eurosat.doctor.context import Visit

ARTIFACTS, EMULATOR = "EUROSAT_ARTIFACTS", "STORAGE_EMULATOR_HOST"
USUAL = "gs://mlflow/artifacts"
"""The platform's own, where only an emulator is named."""
ROLE = "roles/storage.objectUser"


def permissions(visit: Visit) -> str:
    """Write, read and delete an object, each by its permission."""
    emulator, where = visit.environ.get(EMULATOR), visit.environ.get(ARTIFACTS)
    if not (emulator or where):
        raise NotApplicable(f"neither {ARTIFACTS} nor {EMULATOR} is set")
    where = where or USUAL
    if not where.startswith("gs://"):
        raise NotApplicable(f"{ARTIFACTS}={where} is no bucket of Google's")
    if emulator and "://" not in emulator:
        raise Failed(f"{EMULATOR}={emulator} has no scheme", f"say http://{emulator}")
    from google.cloud import storage

    bucket, _, folder = where.removeprefix("gs://").partition("/")
    content = os.urandom(1024)
    limits: dict[str, Any] = {"timeout": visit.timeout_s, "retry": None}
    with _explained("use", "a credential", where):
        client = storage.Client()
        blob = client.bucket(bucket).blob(f"{folder}/doctor-{uuid.uuid4().hex[:12]}".lstrip("/"))
    try:
        with _explained("write", "storage.objects.create", where):
            blob.upload_from_string(content, **limits)
        with _explained("read", "storage.objects.get", where):
            # by name: the link that an emulator gives may be for its neighbours alone
            got = blob.bucket.blob(blob.name).download_as_bytes(**limits)
    except BaseException:
        with suppress(Failed), _explained("delete", "", where):  # it may have been written
            blob.delete(**limits)
        raise
    with _explained("delete", "storage.objects.delete", f"gs://{bucket}/{blob.name}"):
        blob.delete(**limits)
    if got != content:
        raise Failed(f"{where} gave other bytes than it was given", "look at the object store")
    return f"an object in {where}: written, read, deleted"


@contextmanager
def _explained(verb: str, permission: str, where: str) -> Iterator[None]:
    """Name the permission that is missing.

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
            f"{permission} is denied on {where}", f"grant the account {ROLE} on the bucket"
        ) from error
    except exceptions.NotFound as error:
        raise Failed(
            f"cannot {verb} in {where}: there is no such bucket",
            f"make it, or let {ARTIFACTS} name one that is there",
        ) from error
    except GoogleAuthError as error:
        raise Failed(
            f"no credentials for {where}: {tracking.first_line(error)}",
            "`gcloud auth application-default login`, or GOOGLE_APPLICATION_CREDENTIALS",
        ) from error
    except (exceptions.GoogleAPIError, requests.RequestException, OSError) as error:
        raise Failed(
            f"cannot {verb} in {where}: {tracking.first_line(error)}",
            f"see that the object store runs, and that {EMULATOR} names it where it is an emulator",
        ) from error
