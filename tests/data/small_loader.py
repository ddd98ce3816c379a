"""Two small corpora and the loader over them that the tests of the loader share."""

from pathlib import Path

import pytest

from lctw_megatron.config.schema import Corpus, DataConfig
from lctw_megatron.data.loader import TokenLoader
from tests.data.small_data import count_up, write_sidecar, write_tokens

NAN = float("nan")
LENGTHS = {"a": [9, 30, 2, 17, 6], "b": [12, 25]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two corpora, a and b; the short loss of token t of document d is d + t / 100."""
    folder = tmp_path_factory.mktemp("corpora")
    for number, (name, lengths) in enumerate(LENGTHS.items()):
        documents = [[500_000 * number + t for t in d] for d in count_up(lengths)]
        dataset = write_tokens(folder / name, documents)
        write_sidecar(dataset, losses(lengths))
    return folder


def losses(lengths: list[int], first_scored: int = 3) -> list[list[float]]:
    return [
        [NAN if t < first_scored else d + t / 100 for t in range(n)] for d, n in enumerate(lengths)
    ]


def config(folder: Path, names: str = "ab", **fields) -> DataConfig:
    corpora = [Corpus(prefix=str(folder / name), weight=1 + i) for i, name in enumerate(names)]
    return DataConfig(**{"train": corpora, "sequence_length": 8, **fields})


def loader(data: DataConfig, **options) -> TokenLoader:
    return TokenLoader(
        data, **{"seed": 1, "global_batch_size": 4, "micro_batch_size": 1, **options}
    )
