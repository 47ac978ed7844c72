"""Checks the requirements of the Keras models on import, before any module that needs them."""

from cvt.libraries import keep_triton_apart, version_of

BACKENDS = ("tensorflow", "jax", "torch")
OLDEST_KERAS = (3, 13)
INSTALL = "pip install 'cvt-vision[tensorflow]'"
SUPPORTED = f"cvt's TF classes run on {', '.join(BACKENDS)}: set KERAS_BACKEND to one of them"


def check() -> None:
    """Check that Keras is installed, recent enough and on a backend that can train the models.

    Raises:
        ImportError: a requirement is not met; the message states the remedy.
    """
    installed = version_of("keras")
    if installed is None:
        raise ImportError(f"cvt's TF classes need Keras 3 and TensorFlow: {INSTALL}")
    if tuple(int(number) for number in installed.split(".")[:2]) < OLDEST_KERAS:
        oldest = ".".join(map(str, OLDEST_KERAS))
        raise ImportError(
            f"cvt's TF classes need Keras {oldest}, and this is {installed}: {INSTALL}"
        )
    keep_triton_apart()
    try:
        import keras
    except ModuleNotFoundError as error:
        raise ImportError(
            f"Keras' backend needs {error.name}, which is not installed: {INSTALL}, or set "
            f"KERAS_BACKEND to another of {', '.join(BACKENDS)}"
        ) from error
    except ValueError as error:  # Keras raises it for an unknown backend
        raise ImportError(f"{error}; {SUPPORTED}") from error
    if keras.config.backend() not in BACKENDS:
        raise ImportError(f"Keras' backend is {keras.config.backend()}; {SUPPORTED}")


check()
