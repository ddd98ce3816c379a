"""lm-evaluation-harness on a Hugging Face folder: a call a task and length, one result file.

The harness believes a folder's config.json: where that names too few positions, prompts lose their
first tokens and the result is a low number and no error. So the folder is looked at first.
"""

import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lctw_megatron.atomic import atomic_file, write_json
from lctw_megatron.errors import InputError
from lctw_megatron.evaluation.harness_folder import ModelFolder, check_words
from lctw_megatron.evaluation.harness_library import (
    HarnessSettings,
    Library,
    require_harness,
)
from lctw_megatron.evaluation.harness_result import FORMAT, read_harness, ruler_means, to_record
from lctw_megatron.evaluation.harness_tasks import Call, calls_for, downloads
from lctw_megatron.evaluation.saved_result import still_holds
from lctw_megatron.ownership import sole_writer


def check(settings: HarnessSettings) -> list[Call]:
    """The calls to make. InputError for settings that make no sense, several processes, and a
    library that is not there: what can be known without a model."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError(
            "the harness runs in one process, without torchrun; for several GPUs give --backend "
            "vllm --model-args tensor_parallel_size=N, or --model-args parallelize=True"
        )
    if not 0 <= settings.seed < 2**32:
        raise InputError(f"--seed {settings.seed}: expected a number from 0 to {2**32 - 1}")
    if not re.fullmatch(r"[1-9]\d*|auto(:[1-9]\d*)?", settings.batch_size):
        raise InputError(f"--batch-size {settings.batch_size}: expected a number or auto")
    require_harness(settings.backend)
    return calls_for(settings.tasks, settings.lengths, settings.offline)


def harness_to_file(
    folder: str | Path,
    output: str | Path,
    settings: HarnessSettings,
    checkpoint: Path | None = None,
) -> dict[str, Any]:
    """Measure the Hugging Face folder, and write ``output`` (see ``harness_result.FORMAT``) after
    every call, so that what is done is not done again; what was asked for, as in the file. The
    harness's own results lie beside it, in a folder of its name. ``checkpoint``: what the folder
    was exported from, which the file names: a run that goes back to an earlier step sets the
    results of later ones aside. InputError.
    """
    output, calls = Path(output), check(settings)
    model = ModelFolder(Path(folder))
    for length in settings.lengths:
        model.check_length(length)
    if any(call.task == "ruler_vt" for call in calls):
        check_words(model)
    described = describe(model, settings)
    if checkpoint:
        described["checkpoint"] = str(checkpoint)
    library = Library(model, settings)
    with sole_writer(output, print):
        found = read_harness(output)
        holds = still_holds(output, found and found.get("settings", {}), described)
        records = found["results"] if found and holds else []
        left = [
            call
            for call in calls
            # What a file defines may have changed, and the data that it names.
            if Path(call.task).is_file()
            or not any(call.gave(record) for record in records)
            or (settings.log_samples and not _samples_file(output, call).exists())
        ]
        _check_names(output, left, records)
        for line in downloads(left, settings.offline):
            print(line, flush=True)
        for call in left:
            begin = time.perf_counter()
            returned = library.evaluate(call)
            record = to_record(call, returned, time.perf_counter() - begin)
            record["max_length"] = library.max_length(call)
            record["file"] = _write_own(output, call, returned, settings.log_samples)
            records = [*(r for r in records if not call.gave(r)), record]
            write_json(output, _result(described, records))
    return _result(described, [r for r in records if any(call.gave(r) for call in calls)])


def describe(model: ModelFolder, settings: HarnessSettings) -> dict[str, Any]:
    """Everything the results depend on, but for task and length."""
    return {
        "folder": str(model.folder),
        "weights": model.identity(),
        "tokenizer": model.tokenizer.identity.digest,
        "bos": model.tokenizer.identity.add_bos,
        "dtype": model.dtype,
        "max_position_embeddings": model.positions,
        "limit": settings.limit,
        "seed": settings.seed,
        "backend": settings.backend,
        "batch_size": settings.batch_size,
        "model_args": list(settings.model_args),
        "harness": require_harness(settings.backend),
    }


def _result(described: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "settings": described,
        "results": records,
        "ruler": ruler_means(records),
    }


def _own_name(call: Call) -> str:
    """Of the files with what the harness returned, without their endings."""
    length = f"-{call.length}" if call.length else ""
    return Path(call.task).stem + length + (f"-{call.fewshot}shot" if call.fewshot else "")


def _check_names(output: Path, calls: Sequence[Call], records: Sequence[dict[str, Any]]) -> None:
    """InputError if what one of ``calls`` returns would be written over another's."""
    taken = {record.get("file"): record.get("call", record)["task"] for record in records}
    for call in calls:
        file = f"{output.stem}/{_own_name(call)}.json"
        other = taken.setdefault(file, call.task)
        if other != call.task:
            raise InputError(
                f"--tasks {call.task}: what it returns would be written over {file}, which is of "
                f"{other}; rename the file, or give another --output"
            )


def _samples_file(output: Path, call: Call) -> Path:
    return output.with_suffix("") / f"{_own_name(call)}.samples.jsonl"


def _write_own(output: Path, call: Call, returned: dict[str, Any], log_samples: bool) -> str:
    """What the harness returned, as its own command writes it but for the time in the name."""
    name, folder = _own_name(call), output.with_suffix("")
    with atomic_file(folder / f"{name}.json", "w") as file:
        own = {key: value for key, value in returned.items() if key != "samples"}
        json.dump(own, file, indent=2, default=str, ensure_ascii=False)
    if not log_samples:  # those of another call would be taken for this one's
        _samples_file(output, call).unlink(missing_ok=True)
    else:
        with atomic_file(_samples_file(output, call), "w") as file:
            for samples in returned["samples"].values():
                for sample in samples:
                    file.write(json.dumps(sample, default=str, ensure_ascii=False) + "\n")
    return f"{folder.name}/{name}.json"
