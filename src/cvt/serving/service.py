"""From the images of a request to their answers: room, time, decoding, batches."""

import asyncio
import os
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import HTTPException, Request

from cvt.data.decoding import ElongatedError, ImageError, OversizedError, StoredImage
from cvt.runtime.base import PixelError
from cvt.serving.batching import Batcher
from cvt.serving.metrics import Metrics
from cvt.serving.room import Room
from cvt.serving.served_model import Batched, Compute, OpenedModel, Outputs, ServedModel
from cvt.serving.settings import Settings
from cvt.text import printable

Fields = dict[str, Any]  # of an answer


class FaultyImageError(Exception):
    """An image has no answer: the status of a request with it alone, and a sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(printable(sentence))
        self.status = status


class Service:
    """Models, and what their requests share.

    Args:
        opened: as in `cvt.serving.application.create_app`, as all that follows.
        settings: likewise.
        batched: likewise.
    """

    def __init__(
        self, opened: Mapping[str, OpenedModel], settings: Settings, batched: Batched | None
    ) -> None:
        self.settings, self.metrics, self.room = settings, Metrics(), Room(settings)
        self.metrics.queued.set_function(lambda: self.room.images)
        self.computing = ThreadPoolExecutor(1, "compute")
        self.decoding = ThreadPoolExecutor(os.cpu_count(), "decode")
        turn = asyncio.Lock()

        def local(compute: Compute, max_batch: int) -> Batcher:
            return Batcher(compute, max_batch, settings.batch_wait_ms / 1000, self.computing, turn)

        self.models = {
            name: ServedModel(name, model, settings, batched or local, self.metrics)
            for name, model in opened.items()
        }

    def close(self) -> None:
        """Let the threads end."""
        for pool in (self.computing, self.decoding):
            pool.shutdown(wait=False, cancel_futures=True)

    def model(self, name: str | None) -> ServedModel:
        """The model of a name; the first of none.

        Raises:
            HTTPException: there is no such model.
        """
        try:
            return self.models[next(iter(self.models)) if name is None else name]
        except KeyError:
            listed = ", ".join(self.models)
            raise HTTPException(404, f"no such model; there are: {listed}") from None

    async def outputs(self, model: ServedModel, source: StoredImage) -> Outputs:
        """Logits and features of an image.

        Raises:
            FaultyImageError: it cannot be used.
        """
        loop = asyncio.get_running_loop()
        try:
            pixels = await loop.run_in_executor(self.decoding, model.pixels, source)
        except (OversizedError, ElongatedError) as error:
            raise FaultyImageError(422, str(error)) from None
        except ImageError as error:
            raise FaultyImageError(415, str(error)) from None
        except PixelError as error:
            raise FaultyImageError(422, f"{source}: {error}") from None
        return await model.outputs(pixels)

    async def answer(
        self,
        request: Request,
        model: ServedModel,
        of_image: Callable[[StoredImage], Coroutine[Any, Any, Fields]],
    ) -> Fields:
        """What `of_image` gives for each image of a request, or what is wrong with it.

        Raises:
            FullError: there is no room for the request.
            HTTPException: it has one image, and something is wrong with that; or its form is.
            TimeoutError: it takes too long.
        """
        length = request.headers.get("content-length", "")
        size = int(length) if length.isdecimal() else self.settings.max_bytes
        async with asyncio.timeout(self.settings.timeout):
            with self.room.taken(1, size):
                contents = await images_of(request, self.settings.max_queue)
                with self.room.taken(len(contents) - 1):
                    sources = [StoredImage(f"image {i}", each) for i, each in enumerate(contents)]
                    found = await asyncio.gather(*map(of_image, sources), return_exceptions=True)
        results: list[Fields] = []
        for i, each in enumerate(found):
            if isinstance(each, FaultyImageError):
                if len(found) == 1:
                    raise HTTPException(each.status, str(each))
                results.append({"image": i, "status": each.status, "error": str(each)})
            elif isinstance(each, BaseException):
                raise each
            else:
                results.append({"image": i, **each})
        return {"model": model.name, "results": results}


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
