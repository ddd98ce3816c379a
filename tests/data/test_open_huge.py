import subprocess
import sys

import numpy as np

from lctw_megatron.data.fingerprint import sample_digest
from lctw_megatron.data.indexed_array import DTYPE_CODES, HEADER, MAGIC
from lctw_megatron.data.manifest import (
    SidecarManifest,
    TokenizerIdentity,
    TokenManifest,
    write_manifest,
)

TEN_BILLION = 10**10
MANY_DOCUMENTS = 10**7
# VmHWM, not ru_maxrss: that one would begin with the memory of the test process that forks.
OPEN_IT = """
import sys
from lctw_megatron.data import Sidecar, TokenDataset
dataset = TokenDataset(sys.argv[1])
sidecar = Sidecar(dataset, "short_loss")
assert dataset.num_tokens == 10**10
assert len(dataset.get(10**7 - 1, 100, 900)) == len(sidecar.get(10**7 - 1, 100, 900)) == 900
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def sparse(prefix, dtype):
    """Ten billion zeros in ten million documents that take no space on the disk."""
    item = np.dtype(dtype).itemsize
    length = TEN_BILLION // MANY_DOCUMENTS
    with open(prefix + ".bin", "wb") as file:
        file.truncate(TEN_BILLION * item)
    with open(prefix + ".idx", "wb") as file:
        codes = DTYPE_CODES[dtype]
        file.write(HEADER.pack(MAGIC, 1, codes, MANY_DOCUMENTS, MANY_DOCUMENTS + 1))
        file.seek(HEADER.size + 4 * (MANY_DOCUMENTS - 1))
        file.write(np.int32(length).tobytes())
        file.seek(HEADER.size + 12 * MANY_DOCUMENTS - 8)
        file.write(np.int64((TEN_BILLION - length) * item).tobytes())
        file.truncate(HEADER.size + 12 * MANY_DOCUMENTS + 8 * (MANY_DOCUMENTS + 1))


def test_opening_ten_billion_tokens_takes_little_memory(tmp_path):
    prefix = str(tmp_path / "huge")
    sparse(prefix, "uint16")
    sparse(prefix + ".short_loss", "float32")
    tokenizer = TokenizerIdentity(
        kind="huggingface",
        path="t",
        digest="d",
        vocab_size=9,
        bos_id=None,
        eos_id=None,
        add_bos=False,
        add_eos=False,
    )
    manifest = TokenManifest(
        fingerprint="f",
        sample_digest=sample_digest(prefix),
        documents=MANY_DOCUMENTS,
        tokens=TEN_BILLION,
        dtype="uint16",
        tokenizer=tokenizer,
        source={},
    )
    write_manifest(prefix, manifest)
    write_manifest(
        prefix + ".short_loss",
        SidecarManifest(
            fingerprint="s",
            sample_digest=sample_digest(prefix + ".short_loss"),
            values=TEN_BILLION,
            scored=TEN_BILLION,
            min=0.0,
            mean=0.0,
            max=0.0,
            tokens_fingerprint="f",
            tokenizer_digest="d",
            window=2048,
            stride=512,
            sequence_length=None,
            score_first_window=False,
            min_context=1536,
            mean_context=1800.0,
            scorer={},
        ),
    )
    opened = subprocess.run(
        [sys.executable, "-c", OPEN_IT, prefix], capture_output=True, text=True, timeout=60
    )
    assert opened.returncode == 0, opened.stderr
    assert int(opened.stdout) < 200_000, f"{opened.stdout} kB"
