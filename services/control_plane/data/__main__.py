"""`python -m services.control_plane.data`: write the prompts of a run spec's source into a file, for programs that choose among them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec

from services.contracts.spec import RunSpec
from services.control_plane.data import DataError, open_source


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m services.control_plane.data", description="List the prompts of a run spec's source.")
    parser.add_argument("--spec", type=Path, required=True, help="run spec as JSON")
    parser.add_argument("--out", type=Path, required=True, help="file to write: an object with id, prompt and answer a line, in the source's order")
    arguments = parser.parse_args()
    spec = RunSpec.model_validate_json(arguments.spec.read_bytes())
    try:
        source = open_source(spec.data, seed=spec.seed)
    except (DataError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    with arguments.out.open("wb") as file:
        for place in range(len(source)):
            item = source[place]
            file.write(msgspec.json.encode({"id": item.id, "prompt": item.prompt, "answer": item.answer}) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
