"""The page at /docs: the OpenAPI document as HTML, with nothing from elsewhere."""

import json
from collections.abc import Iterator
from html import escape
from typing import Any

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #1f2937; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #d1d5db; }
code, pre { font: 14px/1.4 ui-monospace, monospace; background: #f3f4f6; border-radius: 4px; }
code { padding: 0 .25rem; } pre { padding: .75rem; overflow-x: auto; }
table { border-collapse: collapse; } td, th { padding: .2rem 1rem .2rem 0; text-align: left;
  vertical-align: top; }
@media (prefers-color-scheme: dark) { body { background: #111827; color: #e5e7eb; }
  code, pre { background: #1f2937; } h2 { border-color: #374151; } }
"""


def docs_page(openapi: dict[str, Any]) -> str:
    """The page of an OpenAPI document."""
    about = openapi["info"]
    title = escape(f"{about['title']} {about['version']}")
    operations = [
        part
        for path, methods in openapi["paths"].items()
        for method, operation in methods.items()
        for part in _operation(method.upper(), path, operation)
    ]
    schemas = openapi["components"]["schemas"]
    answers = [
        f"<h3 id='{escape(name)}'>{escape(name)}</h3><p>{escape(schema['description'])}</p>"
        + _table(
            (f"<code>{escape(field)}</code>", _type(about), escape(about.get("description", "")))
            for field, about in schema["properties"].items()
        )
        for name, schema in schemas.items()
    ]
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{title}</title>"
        "<meta name='viewport' content='width=device-width'>"
        f"<style>{STYLE}</style><h1>{title}</h1><p>{escape(about['description'])} "
        "For software: <a href='openapi.json'>openapi.json</a>.</p>"
        + "".join(operations)
        + "<h2>Answers</h2>"
        + "".join(answers)
        + "</html>"
    )


def _operation(method: str, path: str, operation: dict[str, Any]) -> Iterator[str]:
    yield f"<h2><code>{method} {escape(path)}</code></h2><p>{escape(operation['description'])}</p>"
    if body := operation.get("requestBody"):
        fields = "multipart/form-data" in body["content"]
        lines = [f"curl -F images=@cat.jpg -F images=@dog.jpg $HOST{path}"] if fields else []
        lines.append(f"curl --data-binary @cat.jpg $HOST{path}")
        yield f"<pre>{escape(chr(10).join(lines))}</pre>"
    if parameters := operation.get("parameters"):
        yield _table(
            (
                f"<code>{escape(each['name'])}</code>",
                _type(each["schema"]),
                escape(each.get("description", "")),
            )
            for each in parameters
        )
    yield _table(
        (f"<code>{status}</code>", escape(answer["description"]), _schema(answer))
        for status, answer in operation["responses"].items()
    )


def _table(rows: Iterator[tuple[str, ...]]) -> str:
    cells = ("".join(f"<td>{cell}</td>" for cell in row) for row in rows)
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"


def _schema(answer: dict[str, Any]) -> str:
    schemas = (content.get("schema", {}) for content in answer.get("content", {}).values())
    return ", ".join(map(_type, schemas))


def _type(schema: dict[str, Any]) -> str:
    """A type, with links to those that have a table."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f"<a href='#{name}'>{name}</a>"
    if "anyOf" in schema:
        found = " or ".join(map(_type, schema["anyOf"]))
    elif schema.get("type") == "array":
        found = f"list of {_type(schema['items'])}"
    else:
        found = escape(schema.get("type", ""))
    default = schema.get("default")
    return found if default is None else f"{found}, {escape(json.dumps(default))} by default"
