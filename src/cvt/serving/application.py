"""The application: routes, statuses, and the way of an image through it."""

import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, HTTPException, Query, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.middleware import Middleware
from fastapi.responses import HTMLResponse, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.requests import ClientDisconnect

from cvt import __version__
from cvt.data.decoding import StoredImage
from cvt.inference.embed import finite_features
from cvt.inference.predict import Result, namer
from cvt.runtime.features import FEATURES, LOGITS
from cvt.serving.answers import Embeddings, Models, Predictions, Problem, State
from cvt.serving.boundary import Boundary, Json, problem
from cvt.serving.docs_page import POLICY, docs_page
from cvt.serving.room import FullError
from cvt.serving.served_model import Batched, OpenedModel
from cvt.serving.service import FaultyImageError, Fields, Service
from cvt.serving.settings import Settings

Function = TypeVar("Function", bound=Callable[..., Any])
STATUSES = {
    400: "the form cannot be read",
    401: "the key is missing or wrong",
    403: "the Host header is not a name of this machine",
    404: "there is no such model",
    413: "the request is too large",
    415: "it is not an image of a known format, or it is damaged",
    422: "a parameter is wrong, or the image has a size that is not taken",
    500: "the service failed; see its log",
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


class EmbedQuery(ModelQuery):
    """The parameters of an embedding."""

    normalize: bool = Field(False, description="Whether the embeddings have length 1.")


def create_app(
    opened: Mapping[str, OpenedModel],
    settings: Settings | None = None,
    batched: Batched | None = None,
) -> FastAPI:
    """The service.

    Args:
        opened: the models, by the names that requests give; the first answers requests that name
            none.
        settings: limits and batches.
        batched: how images come together; by default a `Batcher` for each model, which take turns.

    Raises:
        ValueError: a model has no classes.

    Example:
        >>> import cvt
        >>> from cvt.data.preprocessing import preprocessing_of
        >>> from cvt.runtime import FeatureSettings, open_runtime
        >>> from cvt.serving.application import OpenedModel, create_app
        >>> config = cvt.CvtConfig.from_variant("cvt-digits", num_labels=10)
        >>> model = cvt.CvtForImageClassification(config)
        >>> runtime = open_runtime(model, "fused", features=FeatureSettings())
        >>> processor = preprocessing_of(cvt.image_processor(config, 32))
        >>> app = create_app({"digits": OpenedModel(runtime, processor)})
        >>> sorted(app.openapi()["paths"])
        ['/healthz', '/metrics', '/readyz', '/v1/embed', '/v1/models', '/v1/predict']
    """
    settings = settings or Settings()
    service = Service(opened, settings, batched)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(
        title="cvt",
        version=__version__,
        description="Classifies images with a Convolutional vision Transformer.",
        docs_url=None,  # FastAPI's page loads scripts from another host
        redoc_url=None,
        lifespan=lifespan,
        middleware=[Middleware(Boundary, settings=settings, metrics=service.metrics)],
        exception_handlers={
            AnyHTTPException: of_http_error,
            RequestValidationError: of_parameters,
            FullError: of_full_queue,
            TimeoutError: of_timeout,
            ClientDisconnect: of_disconnect,
            Exception: of_failure,
        },
    )
    protected = [Depends(key_check(settings.api_key))] if settings.api_key else []

    def images_route(path: str, model: type[BaseModel]) -> Callable[[Function], Function]:
        return app.post(
            path,
            response_model=model,
            responses=declared(400, 404, 413, 415, 422, 503, 504, settings=settings),
            openapi_extra={"requestBody": BODY},
            dependencies=protected,
            max_body_size=settings.max_bytes,
        )

    @images_route("/v1/predict", Predictions)
    async def predict(request: Request, query: Annotated[PredictQuery, Query()]) -> Response:
        """Classify images: files of a form, or one file as the body, of any content type."""
        model = service.model(query.model)
        named = namer(model.runtime.config, query.top_k)

        async def of_image(source: StoredImage) -> Fields:
            result = named(Result(source, (await service.outputs(model, source))[LOGITS]))
            if isinstance(result, Result):
                raise FaultyImageError(500, str(result.error))
            return {"predictions": result.records}

        return Json(await service.answer(request, model, of_image))

    @images_route("/v1/embed", Embeddings)
    async def embed(request: Request, query: Annotated[EmbedQuery, Query()]) -> Response:
        """Compute the features of images, the classifier's input; send them as to /v1/predict."""
        model = service.model(query.model)
        if FEATURES not in model.runtime.outputs:
            raise HTTPException(422, f"{model.name} is an export without features")

        async def of_image(source: StoredImage) -> Fields:
            features = (await service.outputs(model, source))[FEATURES]
            result = finite_features(Result(source, features=features), query.normalize)
            if result.features is None:
                raise FaultyImageError(500, str(result.error))
            return {"embedding": result.features.tolist()}

        return Json(await service.answer(request, model, of_image))

    @app.get(
        "/v1/models",
        response_model=Models,
        responses=declared(settings=settings),
        dependencies=protected,
    )
    async def list_models() -> Response:
        """List the models: labels, preprocessing, what runs them, and their hash."""
        return Json({"models": [model.about for model in service.models.values()]})

    @app.get("/healthz", response_model=State, responses=declared(settings=settings, key=False))
    async def health() -> Response:
        """Report that the process answers."""
        return Json({"status": "ok"})

    @app.get("/readyz", response_model=State, responses=declared(503, settings=settings, key=False))
    async def readiness() -> Response:
        """Report whether there is room for a request now."""
        if service.room.is_full:
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
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

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


def key_check(key: str) -> Callable[..., Any]:
    """The dependency of a route that asks for a key."""
    bearer = HTTPBearer(auto_error=False, description="The key of --api-key-file.")

    async def check(
        given: Annotated[HTTPAuthorizationCredentials | None, Security(bearer)],
    ) -> None:
        if given is None or not secrets.compare_digest(given.credentials.encode(), key.encode()):
            raise HTTPException(401, STATUSES[401], {"WWW-Authenticate": "Bearer"})

    return check


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


async def of_disconnect(request: Request, error: Exception) -> Response:
    """The client has closed the connection; nobody receives this answer."""
    return problem(400, "the request ended before its body")


async def of_failure(request: Request, error: Exception) -> Response:
    """Anything else, which goes to the log, too."""
    return problem(500, STATUSES[500])
