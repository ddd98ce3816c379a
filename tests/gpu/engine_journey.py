"""All tools on several checkpoints in one process, with TransformerEngine or with it hidden:
`python -m tests.gpu.engine_journey with|without FILE`, FILE a JSON list of [tool, argument, ...].

A process takes ten seconds to start; the tools themselves take one each.
"""

import json
import sys
from importlib import import_module
from pathlib import Path

if __name__ == "__main__":
    if sys.argv[1] == "without":
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]
    from lctw_megatron.cli import run_command

    for tool, *arguments in json.loads(Path(sys.argv[2]).read_text()):
        print(f"##### {tool} {' '.join(arguments)}", flush=True)
        sys.argv = [tool, *arguments]
        try:
            run_command(import_module(f"lctw_megatron.commands.{tool}").main)
        except SystemExit as end:
            if end.code:
                raise
