"""The HTTP service: one FastAPI application, which `cvt serve` runs by uvicorn."""
