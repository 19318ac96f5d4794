"""`kdctl schema`: the JSON Schema of experiment files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from kdctl.cli import console
from kdctl.cli.verb import Option, Options, Reply


def schema(
    options: Options,
    output: Annotated[str | None, Option("-o", "--output", metavar="FILE", help="Write it here.")] = None,
) -> Reply:
    """The JSON Schema of experiment files, for completion and checks in an editor.

    Editors with a YAML language server read it where a file begins with

    \b
    # yaml-language-server: $schema=./experiment.schema.json
    """
    from kdctl.config.json_schema import json_schema
    from kdctl.runs import write_text

    document = json_schema()
    if output is not None:
        write_text(Path(output), json.dumps(document, indent=2) + "\n")
    return Reply({"path": output, "schema": document}, _show)


def _show(document: dict[str, Any]) -> None:
    if document["path"] is None:
        console.out(json.dumps(document["schema"], indent=2))
    else:
        console.out(f"wrote {document['path']}")
