"""lm-evaluation-harness itself: optional, and imported here only, when it is asked for."""

import contextlib
import gc
import importlib
import importlib.util
import os
import random
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from lctw_megatron.data.json_object import parse_json
from lctw_megatron.errors import InputError, one_line
from lctw_megatron.evaluation.harness_folder import ModelFolder
from lctw_megatron.evaluation.harness_tasks import MARGIN, Call, without_network


@dataclass(frozen=True)
class HarnessSettings:
    """What to measure, and how."""

    tasks: Sequence[str]
    lengths: Sequence[int] = ()
    limit: int | None = None
    """Questions of each task and length; None: all."""
    seed: int = 0
    backend: str = "hf"
    """hf or vllm."""
    batch_size: str = "1"
    """A number, or `auto`. In 16 bits results depend on it a little."""
    model_args: Sequence[str] = ()
    """NAME=VALUE, further arguments of the backend."""
    offline: bool = False
    log_samples: bool = False
    """Keep what was asked and answered."""


def model_arguments(model: ModelFolder, settings: HarnessSettings, max_length: int) -> dict:
    """Of the backend. InputError for a further one that is no NAME=VALUE, or one of ours."""
    ours: dict[str, Any] = {
        "pretrained": str(model.folder),
        "dtype": model.dtype,
        "max_length": max_length,
        "trust_remote_code": False,
    }
    if settings.backend == "vllm":  # which adds none unless told; transformers has the tokenizer's
        ours["add_bos_token"] = model.tokenizer.identity.add_bos
    further: dict[str, Any] = {}
    for text in settings.model_args:
        name, equals, value = text.partition("=")
        if not equals or not name or name in ours:
            reason = "is set from the folder" if name in ours else "is not NAME=VALUE"
            raise InputError(f"--model-args {text}: {reason}")
        try:
            further[name] = parse_json(value)
        except ValueError:
            further[name] = {"True": True, "False": False}.get(value, value)
    return further | ours


def require_harness(backend: str) -> str:
    """The library's version. InputError if it, or the backend, is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(
            'lm-evaluation-harness is not installed: pip install "lctw-megatron[harness]"'
        )
    found = version("lm_eval")
    if tuple(map(int, re.findall(r"\d+", found)[:3])) < (0, 4, 13):
        raise InputError(f"lm-evaluation-harness {found} is too old: pip install -U lm_eval")
    if backend == "vllm" and importlib.util.find_spec("vllm") is None:
        raise InputError("--backend vllm: vLLM is not installed: pip install vllm, or leave it out")
    return found


class Library:
    """The library with one model in memory."""

    def __init__(self, model: ModelFolder, settings: HarnessSettings) -> None:
        if settings.offline:  # read by the libraries when they are imported
            os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
        self._model, self._settings = model, settings
        self._managers: dict[int | bool, Any] = {}
        self._language_model: Any = None
        self._max_length = 0
        model_arguments(model, settings, 0)  # refuses before anything takes long

    def max_length(self, call: Call) -> int:
        """Tokens to which the harness cuts prompts, from the left; one number for all lengths, so
        that the model is loaded once."""
        if call.length is None:
            return self._model.positions
        return max(self._settings.lengths) + MARGIN

    def evaluate(self, call: Call) -> dict[str, Any]:
        """What `simple_evaluate` returns, with samples. InputError if the data are not to be had,
        or the folder cannot be loaded."""
        import lm_eval

        with _quiet():
            tasks = self.load(call)
            return lm_eval.simple_evaluate(
                model=self._open(self.max_length(call)),
                tasks=tasks,
                num_fewshot=call.fewshot,
                limit=self._settings.limit,
                random_seed=self._settings.seed,
                numpy_random_seed=self._settings.seed,
                torch_random_seed=self._settings.seed,
                fewshot_random_seed=self._settings.seed,
                task_manager=self._manager(call),
            )

    def load(self, call: Call) -> list[Any]:
        """The tasks of a call with their data, the same whatever was loaded before."""
        import lm_eval.tasks

        manager = self._manager(call)
        if call.length is not None:
            # RULER draws from the global generators, and so does what it imports; cwe draws from
            # one of its module besides, which is made anew with the module.
            for path in sorted((Path(lm_eval.tasks.__file__).parent / "ruler").glob("*_utils.py")):
                importlib.import_module(f"lm_eval.tasks.ruler.{path.stem}")
            del sys.modules["lm_eval.tasks.ruler.cwe_utils"]
        random.seed(self._settings.seed)
        np.random.seed(self._settings.seed)
        try:
            loaded = manager.load([call.task])
        except Exception as error:  # of any library that fetches or reads data
            known = call.length is not None or call.task in manager.all_tasks
            if not known and not Path(call.task).is_file():
                raise InputError(
                    f"--tasks {call.task}: neither a task of lm-evaluation-harness (lm_eval ls "
                    "tasks) nor a YAML file that defines one; sets are ruler, longbench, short"
                ) from None
            raise InputError(
                f"task {call.task}: its data can't be had ({one_line(error)}); {without_network()}"
            ) from error
        if call.length is not None:
            _check_samples(call, loaded["tasks"][call.task])
        return list(loaded.get("groups", {}).values())[:1] or list(loaded["tasks"].values())

    def _manager(self, call: Call) -> Any:
        """Of RULER's folder or a file only, where that is enough: to read all of the harness's
        definitions takes half a minute."""
        import lm_eval.tasks

        key = call.length or Path(call.task).is_file()
        if key not in self._managers:
            ruler, metadata = None, None
            if call.length is not None:
                ruler = Path(lm_eval.tasks.__file__).parent / "ruler"
                metadata = {"tokenizer": str(self._model.folder), "max_seq_lengths": [call.length]}
            self._managers[key] = lm_eval.tasks.TaskManager(
                include_path=ruler, include_defaults=key is False, metadata=metadata
            )
        return self._managers[key]

    def _open(self, max_length: int) -> Any:
        if self._max_length != max_length:
            import torch
            from lm_eval.api.registry import get_model

            self._language_model = None
            gc.collect()
            settings = self._settings
            os.environ.setdefault("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")  # by MARGIN
            size = settings.batch_size
            try:
                self._language_model = get_model(settings.backend).create_from_arg_obj(
                    model_arguments(self._model, settings, max_length),
                    {
                        "batch_size": int(size) if size.isdigit() else size,
                        "device": "cuda" if torch.cuda.is_available() else "cpu",
                    },
                )
            except Exception as error:  # of any library that reads it
                raise InputError(
                    f"{self._model.folder}: {settings.backend} can't load it ({one_line(error)})"
                ) from error
            self._max_length = max_length
        return self._language_model


def _check_samples(call: Call, task: Any) -> None:
    """A tokenizer of few tokens leaves no room for words: then cwe asks for none of them, which the
    harness finds out when it divides by their number."""
    samples = list(task.test_docs())
    if not samples or not all(sample["outputs"] for sample in samples):
        raise InputError(
            f"task {call.task} at {call.length} tokens: the tokenizer needs so many for words "
            "that samples have no answers; give a greater length or leave the task out"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Standard output is ours; some of RULER's generators print what they do."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
