"""The application: routes, statuses, and the way of an image through it."""

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Query, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.middleware import Middleware
from fastapi.responses import HTMLResponse, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException as AnyHTTPException

from cvt import __version__
from cvt.data.decoding import ElongatedError, ImageError, OversizedError, StoredImage
from cvt.inference.classifier import Classifier
from cvt.inference.predict import Result
from cvt.runtime.base import PixelError
from cvt.serving.answers import Models, Predictions, Problem, State
from cvt.serving.batching import Batcher
from cvt.serving.boundary import Boundary, Json, problem
from cvt.serving.docs_page import POLICY, docs_page
from cvt.serving.metrics import Metrics
from cvt.serving.room import FullError, Room
from cvt.serving.served_model import Batched, ServedModel
from cvt.serving.settings import Settings
from cvt.text import printable

STATUSES = {
    400: "the form cannot be read",
    401: "the key is missing or wrong",
    403: "the Host header is not a name of this machine",
    404: "there is no such model",
    413: "the request is too large",
    415: "it is not an image of a known format, or it is damaged",
    422: "a parameter is wrong, or the image has a size that is not taken",
    500: "the service failed; its log says why",
    503: "there is no room for the request: try again after the seconds of Retry-After",
    504: "the request took too long",
}
IMAGE = {"type": "string", "format": "binary"}
BODY = {  # of a request with images; FastAPI could describe the form alone
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["images"],
                "properties": {"images": {"type": "array", "minItems": 1, "items": IMAGE}},
                "additionalProperties": False,
            }
        },
        "application/octet-stream": {"schema": IMAGE},
    },
}


class ModelQuery(BaseModel):
    """The parameters of a request."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(None, description="Name of the model; by default the first.")


class PredictQuery(ModelQuery):
    """The parameters of a prediction."""

    top_k: int = Field(5, ge=1, description="Classes to name; a regression names all.")


class FaultyImageError(Exception):
    """An image has no answer: the status of a request with it alone, and a sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(printable(sentence))
        self.status = status


def create_app(
    classifiers: Mapping[str, tuple[Classifier, str | None]],
    settings: Settings | None = None,
    batched: Batched | None = None,
) -> FastAPI:
    """The service.

    Args:
        classifiers: by the names that requests give, each with the SHA-256 of its files; the first
            answers requests that name none.
        settings: limits and batches.
        batched: how images come together; by default a `Batcher` for each model, which take turns.

    Raises:
        ValueError: a model has no classes.

    Example:
        >>> import cvt
        >>> from cvt.serving.application import create_app
        >>> config = cvt.CvtConfig.from_variant("cvt-digits", num_labels=10)
        >>> model = cvt.CvtForImageClassification(config)
        >>> classifier = cvt.Classifier(model, processor=cvt.image_processor(config, 32))
        >>> app = create_app({"digits": (classifier, None)})
        >>> sorted(app.openapi()["paths"])
        ['/healthz', '/metrics', '/readyz', '/v1/models', '/v1/predict']
    """
    settings = settings or Settings()
    computing = ThreadPoolExecutor(1, "compute")
    decoding = ThreadPoolExecutor(os.cpu_count(), "decode")
    turn = asyncio.Lock()

    def local(compute: Callable, max_batch: int) -> Batcher:
        return Batcher(compute, max_batch, settings.batch_wait_ms / 1000, computing, turn)

    metrics, room = Metrics(), Room(settings)
    metrics.queued.set_function(lambda: room.images)
    models = {
        name: ServedModel(name, classifier, sha256, settings, batched or local, metrics)
        for name, (classifier, sha256) in classifiers.items()
    }

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        for pool in (computing, decoding):
            pool.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(
        title="cvt",
        version=__version__,
        description="Classifies images with a Convolutional vision Transformer.",
        docs_url=None,  # FastAPI's page loads scripts from another host
        redoc_url=None,
        lifespan=lifespan,
        middleware=[Middleware(Boundary, settings=settings, metrics=metrics)],
        exception_handlers={
            AnyHTTPException: of_http_error,
            RequestValidationError: of_parameters,
            FullError: of_full_queue,
            TimeoutError: of_timeout,
            Exception: of_failure,
        },
    )
    protected = [Depends(key_check(settings.api_key))] if settings.api_key else []

    def found(name: str | None) -> ServedModel:
        try:
            return models[next(iter(models)) if name is None else name]
        except KeyError:
            raise HTTPException(404, f"no such model; there are: {', '.join(models)}") from None

    async def answered(
        request: Request,
        model: ServedModel,
        answer: Callable[[StoredImage], Coroutine[Any, Any, dict[str, Any]]],
    ) -> Response:
        """What `answer` gives for each image of a request, or what is wrong with it.

        Raises:
            HTTPException: it has one image, and something is wrong with that.
        """
        length = request.headers.get("content-length", "")
        size = int(length) if length.isdecimal() else settings.max_bytes
        async with asyncio.timeout(settings.timeout):
            with room.taken(1, size):
                contents = await images_of(request, settings.max_queue)
                with room.taken(len(contents) - 1):
                    sources = [StoredImage(f"image {i}", each) for i, each in enumerate(contents)]
                    answers = await asyncio.gather(*map(answer, sources), return_exceptions=True)
        results = []
        for i, each in enumerate(answers):
            if isinstance(each, BaseException) and not isinstance(each, FaultyImageError):
                raise each
            status = each.status if isinstance(each, FaultyImageError) else 200
            metrics.images.labels(model.name, status).inc()
            if isinstance(each, FaultyImageError):
                if len(answers) == 1:
                    raise HTTPException(status, str(each))
                each = {"status": status, "error": str(each)}
            results.append({"image": i, **each})
        return Json({"model": model.name, "results": results})

    async def decoded(model: ServedModel, source: StoredImage) -> Any:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(decoding, model.pixels, source)
        except (OversizedError, ElongatedError, PixelError) as error:
            sentence = str(error) if isinstance(error, ImageError) else f"{source}: {error}"
            raise FaultyImageError(422, sentence) from None
        except ImageError as error:
            raise FaultyImageError(415, str(error)) from None

    @app.post(
        "/v1/predict",
        response_model=Predictions,
        response_model_exclude_unset=True,
        responses=declared(400, 404, 413, 415, 422, 503, 504, settings=settings),
        openapi_extra={"requestBody": BODY},
        dependencies=protected,
        max_body_size=settings.max_bytes,
    )
    async def predict(request: Request, query: Annotated[PredictQuery, Query()]) -> Response:
        """Classify images: files of a form, or one file as the body, of any content type."""
        model = found(query.model)

        async def answer(source: StoredImage) -> dict[str, Any]:
            pixels = await decoded(model, source)
            result = await model.prediction(source, pixels, query.top_k)
            if isinstance(result, Result):
                raise FaultyImageError(500, str(result.error))
            return {"predictions": result.records}

        return await answered(request, model, answer)

    @app.get(
        "/v1/models",
        response_model=Models,
        responses=declared(settings=settings),
        dependencies=protected,
    )
    async def list_models() -> Response:
        """List the models: labels, preprocessing, what runs them, and their hash."""
        return Json({"models": [model.about for model in models.values()]})

    @app.get("/healthz", response_model=State, responses=declared(settings=settings, key=False))
    async def health() -> Response:
        """Report that the process answers."""
        return Json({"status": "ok"})

    @app.get("/readyz", response_model=State, responses=declared(503, settings=settings, key=False))
    async def readiness() -> Response:
        """Report whether there is room for a request now."""
        if room.is_full:
            raise FullError
        return Json({"status": "ok"})

    @app.get(
        "/metrics",
        response_class=Response,
        responses=declared(settings=settings)
        | {200: {"content": {"text/plain": {}}, "description": "Prometheus' text format."}},
        dependencies=protected,
    )
    async def measurements() -> Response:
        """Requests, images, batches and seconds, for Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(docs_page(app.openapi()), headers={"Content-Security-Policy": POLICY})

    return app


def declared(*statuses: int, settings: Settings, key: bool = True) -> dict[int | str, Any]:
    """The statuses of a route beside 200; those that any route may have are added.

    Args:
        statuses: of the route alone.
        settings: of the service.
        key: whether the route asks for the key, where there is one.
    """
    all_ = {*statuses, 413, 500}
    all_ |= {401} if key and settings.api_key else set()
    all_ |= {403} if settings.loopback else set()
    return {status: {"model": Problem, "description": STATUSES[status]} for status in sorted(all_)}


def key_check(key: str) -> Callable[..., None]:
    """The dependency of a route that asks for a key."""
    bearer = HTTPBearer(auto_error=False, description="The key of --api-key-file.")

    def check(
        given: Annotated[HTTPAuthorizationCredentials | None, Security(bearer)],
    ) -> None:
        if given is None or not secrets.compare_digest(given.credentials.encode(), key.encode()):
            raise HTTPException(401, STATUSES[401], {"WWW-Authenticate": "Bearer"})

    return check


async def images_of(request: Request, most: int) -> list[bytes]:
    """The files of a request.

    Raises:
        HTTPException: it has none, or other parts than files named `images`.
    """
    content_type = request.headers.get("content-type", "")
    if not content_type.lower().startswith("multipart/form-data"):
        return [await request.body()]
    async with request.form(max_files=most, max_fields=most) as form:
        parts = form.multi_items()
        files = [part for name, part in parts if name == "images" and not isinstance(part, str)]
        if not files or len(files) < len(parts):
            raise HTTPException(422, "a form must have files, each named images, and nothing else")
        return [await file.read() for file in files]


async def of_http_error(request: Request, error: Exception) -> Response:
    """What routing, the form's parser and this module raise."""
    assert isinstance(error, AnyHTTPException)
    if error.status_code == 413:  # of a body whose length its headers do not have
        return problem(413, STATUSES[413])
    return problem(error.status_code, error.detail, error.headers)


async def of_parameters(request: Request, error: Exception) -> Response:
    """What FastAPI raises for parameters: its own answer would repeat them."""
    assert isinstance(error, RequestValidationError)
    faults = [
        f"{fault['loc'][-1]}: {fault['msg']}"
        if fault["type"] != "extra_forbidden"
        else "there is a parameter that is not known"
        for fault in error.errors()
    ]
    return problem(422, "; ".join(faults))


async def of_full_queue(request: Request, error: Exception) -> Response:
    """What `Room` raises."""
    return problem(503, STATUSES[503], {"Retry-After": "1"})


async def of_timeout(request: Request, error: Exception) -> Response:
    """The time of a request is over."""
    return problem(504, STATUSES[504])


async def of_failure(request: Request, error: Exception) -> Response:
    """Anything else, which goes to the log, too."""
    return problem(500, STATUSES[500])
