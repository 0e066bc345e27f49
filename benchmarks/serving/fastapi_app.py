"""A service written by hand: `uvicorn --factory benchmarks.serving.fastapi_app:make`."""

from typing import Annotated, Any

from fastapi import Body, FastAPI

from benchmarks.serving import networks


def make() -> FastAPI:
    network = networks.from_environment()
    app = FastAPI()

    @app.post("/predict")
    def predict(file: Annotated[bytes, Body(media_type="image/jpeg")]) -> dict[str, Any]:
        return network(networks.decode(file)[None])[0]  # in a thread, as FastAPI does with a def

    return app
