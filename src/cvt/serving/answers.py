"""What a service answers, as its OpenAPI document describes it."""

from typing import Any

from pydantic import BaseModel, Field


class Problem(BaseModel):
    """Why a request is refused, or failed."""

    detail: str = Field(description="A sentence.")


class Record(BaseModel):
    """A class of an image."""

    label: str = Field(description="Name of the class.")
    score: float = Field(description="From 0 to 1; of a regression, the value itself.")
    predicted: bool | None = Field(
        None, description="Whether the image has the class, where the model has thresholds."
    )


class Predicted(BaseModel):
    """The classes of an image with the highest scores, the highest first."""

    image: int = Field(description="Its place among the images of the request, from 0.")
    predictions: list[Record]


class Failed(BaseModel):
    """Why an image has no answer; the others of its request have theirs."""

    image: int = Field(description="Its place among the images of the request, from 0.")
    status: int = Field(description="The status of a request with this image alone.")
    error: str = Field(description="A sentence.")


class Predictions(BaseModel):
    """The answer to images."""

    model: str = Field(description="Name of the model.")
    results: list[Predicted | Failed] = Field(description="One for each image, in their order.")


class RuntimeOf(BaseModel):
    """What runs a model."""

    name: str
    precision: str
    device: str
    threads: int | None


class Model(BaseModel):
    """A model of this service."""

    name: str = Field(description="What requests give as `model`.")
    sha256: str | None = Field(description="Of its files.")
    labels: list[str] = Field(description="Names of the classes, in the order of the logits.")
    problem_type: str | None = Field(description="What the labels mean; null is one class.")
    thresholds: list[float] | None = Field(description="Scores from which an image has a class.")
    preprocessing: dict[str, Any] | None = Field(
        description="Settings of the preprocessing; null for an image processor other than CvT's."
    )
    runtime: RuntimeOf


class Models(BaseModel):
    """The models of this service; the first answers requests that name none."""

    models: list[Model]


class State(BaseModel):
    """That the service runs."""

    status: str
