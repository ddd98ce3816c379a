"""Every fragment in configs/ fits the schema; models have the published parameter counts."""

import pytest

from lctw_megatron.config.load import CONFIGS, FRAGMENTS, load_fragment
from lctw_megatron.config.model_sizes import parameters
from lctw_megatron.config.schema import ModelConfig

FILES = [
    (section, path)
    for section, (folder, _) in FRAGMENTS.items()
    for path in sorted((CONFIGS / folder).glob("*.yaml"))
]

# Parameters of the published checkpoints (sum over their safetensors headers).
PUBLISHED = {
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama32_1b": 1_235_814_400,
    "llama31_8b": 8_030_261_248,
    "llama31_70b": 70_553_706_496,
    "llama32_3b": 3_212_749_824,
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "smollm2_1.7b": 1_711_376_384,
    "mistral_7b": 7_248_023_552,
    "mistral_nemo_12b": 12_247_782_400,
    "qwen2_500m": 494_032_768,
    "qwen25_500m": 494_032_768,
    "qwen25_1.5b": 1_543_714_304,
    "qwen25_3b": 3_085_938_688,
    "qwen25_7b": 7_615_616_512,
    "qwen3_600m": 596_049_920,
    "qwen3_1.7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "qwen3_30b_a3b": 30_532_122_624,
    "mixtral_8x7b": 46_702_792_704,
    "phi2": 2_779_683_840,
}


@pytest.mark.parametrize(("section", "path"), FILES, ids=lambda x: getattr(x, "stem", x))
def test_a_fragment_fits_the_schema_and_says_why_it_is_so(section, path):
    _, kind = FRAGMENTS[section]
    kind.model_validate(load_fragment(section, path.stem, "the test"))
    assert path.read_text().startswith("# "), f"{path} does not say what it is for"


def test_every_folder_of_configs_holds_fragments():
    folders = {folder for folder, _ in FRAGMENTS.values()}
    assert {path.name for path in CONFIGS.iterdir()} == folders
    assert {section for section, _ in FILES} == set(FRAGMENTS)


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_models_have_the_published_number_of_parameters(name, count):
    assert parameters(ModelConfig(**load_fragment("model", name, "the test"))) == count
