"""The HTTP service: one FastAPI application, which `cvt serve` runs by uvicorn."""

from cvt.libraries import require

require("cvt serve", "fastapi", "uvicorn", "python_multipart", "prometheus_client", extra="serve")
