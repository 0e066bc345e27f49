"""The exceptions of Google's storage library, as StorageError in one line with the remedy."""

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from eurosat.errors import StorageError
from eurosat.storage.folder import REMEDY
from eurosat.storage.object_store import ObjectChanged

MAX_REASON = 200
"""Characters of the library's own message that an error quotes."""


@contextmanager
def translate_errors(url: str, check_bucket: Callable[[], None]) -> Iterator[None]:
    """Raise StorageError in place of what Google's library and its connections raise.

    ``url`` is the object or bucket in use. ``check_bucket`` raises StorageError if the bucket is
    missing; it is called where an object is not found.
    """
    import requests
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError
    from google.cloud.storage.exceptions import DataCorruption, InvalidResponse

    try:
        yield
    except (
        GoogleAPIError,
        GoogleAuthError,
        InvalidResponse,
        DataCorruption,
        requests.RequestException,
        OSError,
    ) as error:
        if (response := getattr(error, "response", None)) is not None:
            response.close()  # its body is never read
        raise _translated(url, error, check_bucket) from error


def _translated(url: str, error: Exception, check_bucket: Callable[[], None]) -> StorageError:
    import requests
    from google.api_core import exceptions as api
    from google.auth.exceptions import GoogleAuthError, TransportError
    from google.cloud.storage.exceptions import DataCorruption

    reason = _reason(error)
    match error:
        case api.NotFound():
            with contextlib.suppress(api.GoogleAPIError):  # the account may not ask
                check_bucket()
            return ObjectChanged(
                f"{url} is not there: it was deleted or overwritten; run the command again"
            )
        case api.PreconditionFailed():
            return StorageError(f"{url} exists already: give it another name")
        case (
            api.RetryError()
            | TransportError()
            | requests.RequestException()
            | ConnectionError()
            | TimeoutError()
        ):
            server = os.environ.get("STORAGE_EMULATOR_HOST", "storage.googleapis.com")
            return StorageError(
                f"{url} cannot be reached at {server} ({reason}): check the network"
            )
        case api.Unauthorized() | api.Forbidden() | GoogleAuthError():
            return StorageError(
                f"{url}: the credentials are refused or missing ({reason}); run `gcloud auth "
                "application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS, "
                "with roles/storage.objectUser on the bucket"
            )
        case DataCorruption():
            return StorageError(f"{url} arrived damaged ({reason}): run the command again")
        case OSError():
            file = error.filename or "this machine"
            return StorageError(f"{url}: {file}: {error.strerror or error}; {REMEDY}")
        case _:
            return StorageError(f"{url}: the server says {reason}; run the command again")


def _reason(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    message = getattr(cause, "message", None) or str(cause)
    return " ".join(message.split())[:MAX_REASON]
