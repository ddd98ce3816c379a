"""Checkpoints from and to Hugging Face folders: import, export, verify."""

import argparse
import time
from pathlib import Path

from lctw_megatron.cli import positive, run_command
from lctw_megatron.errors import InputError

IMPORT = """Convert a Hugging Face folder (Llama, Mistral, Mixtral, Qwen2, Qwen3, Qwen3-MoE, Phi;
safetensors), or what Megatron-LM has saved of such a model, to a checkpoint that can be loaded
under any layout. Streamed, so the size of the model does not matter: memory is a few times that of
its largest tensor."""
EXPORT = """Convert a checkpoint, written under any layout, to a Hugging Face folder with the rope
theta and the maximum positions of the trained model, or to a folder that Megatron-LM loads.
Streamed like import."""
VERIFY = """Compare a checkpoint with a Hugging Face folder: the configuration, every tensor bit for
bit, and the logits of both models in float32 on real text. Exit status 1 if they differ, 2 if
something cannot be read. Where transformers reads the text as other tokens, a line says so."""


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    return {"import": _import, "export": _export, "verify": _verify}[options.verb](options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="--debug shows tracebacks, --version the version. A conversion that is finished is "
        "not done again; one that was interrupted leaves no folder of the output's name.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="import | export | verify")

    verb = verbs.add_parser(
        "import", help="Hugging Face or Megatron-LM folder to checkpoint", description=IMPORT
    )
    verb.add_argument("--hf", metavar="DIR", type=Path, required=True, help="the folder to read")
    verb.add_argument(
        "--megatron-lm",
        metavar="DIR",
        type=Path,
        help="take the weights that Megatron-LM saved here (--ckpt-format torch_dist); of --hf "
        "only config.json and tokenizer are read",
    )
    verb.add_argument(
        "--output", metavar="DIR", type=Path, required=True, help="checkpoint to write"
    )
    _add_dtype(verb, "the folder's")

    verb = verbs.add_parser(
        "export", help="checkpoint to Hugging Face or Megatron-LM", description=EXPORT
    )
    _add_checkpoint(verb)
    verb.add_argument(
        "--format",
        choices=["hf", "megatron-lm"],
        default="hf",
        help="hf: a Hugging Face folder (default); megatron-lm: one for Megatron-LM's --load",
    )
    verb.add_argument("--output", metavar="DIR", type=Path, required=True, help="folder to write")
    _add_dtype(verb, "the checkpoint's")
    verb.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        help="hf: no weight file is larger, unless one tensor is; 5GB is decimal, 5GiB binary "
        "(default: 5GB)",
    )

    verb = verbs.add_parser("verify", help="compare the two", description=VERIFY)
    verb.add_argument("--hf", metavar="DIR", type=Path, required=True, help="Hugging Face folder")
    _add_checkpoint(verb)
    source = verb.add_mutually_exclusive_group()
    source.add_argument(
        "--text", metavar="FILE", type=Path, help="text to run on (default: Python's help texts)"
    )
    source.add_argument("--tokens", metavar="FILE", type=Path, help="token ids to run on instead")
    source.add_argument(
        "--no-logits",
        action="store_true",
        help="compare the tensors only; for models that do not fit into memory",
    )
    verb.add_argument(
        "--length",
        metavar="N",
        type=positive,
        default=512,
        help="tokens to run on (default: %(default)s)",
    )
    verb.add_argument(
        "--tolerance",
        metavar="X",
        type=float,
        default=1e-4,
        help="largest difference of two logits that still counts as equal (default: %(default)s)",
    )
    return parser


def _add_checkpoint(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--checkpoint",
        metavar="DIR",
        type=Path,
        required=True,
        help="a checkpoint, or a run folder, whose newest is taken",
    )


def _add_dtype(verb: argparse.ArgumentParser, kept: str) -> None:
    verb.add_argument(
        "--dtype",
        choices=["keep", "fp32", "bf16", "fp16"],
        default="keep",
        help=f"of the weights that are written; keep: {kept} (default)",
    )


def _import(options: argparse.Namespace) -> int:
    from lctw_megatron.conversion.hf_import import import_hf

    start = time.monotonic()
    if options.megatron_lm:
        from lctw_megatron.conversion.megatron_lm_import import import_megatron_lm

        done = import_megatron_lm(options.megatron_lm, options.hf, options.output, options.dtype)
    else:
        done = import_hf(options.hf, options.output, options.dtype)
    _report("imported", done, options.output, time.monotonic() - start)
    return 0


def _export(options: argparse.Namespace) -> int:
    from lctw_megatron.conversion.hf_export import MAX_FILE_BYTES, export_hf
    from lctw_megatron.conversion.safetensors_writer import parse_size

    start = time.monotonic()
    if options.format == "megatron-lm":
        from lctw_megatron.conversion.megatron_lm import export_megatron_lm

        if options.max_shard_size is not None:
            raise InputError(
                f"--max-shard-size {options.max_shard_size}: is for --format hf; leave it out"
            )
        done = export_megatron_lm(options.checkpoint, options.output, options.dtype)
        _report("exported", done, options.output, time.monotonic() - start)
        return 0
    limit = MAX_FILE_BYTES
    if options.max_shard_size is not None:
        limit = parse_size(options.max_shard_size)
    done = export_hf(options.checkpoint, options.output, options.dtype, limit)
    _report("exported", done, options.output, time.monotonic() - start)
    return 0


def _report(verb: str, done, output: Path, seconds: float) -> None:  # type: ignore[no-untyped-def]
    from lctw_megatron.platform.peak_memory import peak_memory_bytes

    if not done.bytes:
        return
    print(
        f"{verb} {done.tensors} tensors, {done.parameters:,} parameters, {done.bytes / 1e9:.2f} GB "
        f"in {seconds:.1f} s ({done.bytes / 1e9 / seconds:.2f} GB/s), peak memory "
        f"{peak_memory_bytes() / 1e9:.2f} GB: {output}"
    )


def _verify(options: argparse.Namespace) -> int:
    from lctw_megatron.conversion import sample_text, verify
    from lctw_megatron.conversion.tokenizer_agreement import tokenizer_line
    from lctw_megatron.data.tokenizer_files import has_tokenizer
    from lctw_megatron.model.checkpoint import find_checkpoint

    checkpoint = find_checkpoint(options.checkpoint)
    if differences := verify.config_differences(options.hf, checkpoint):
        print("configuration: DIFFERENT\n  " + "\n  ".join(differences))
        return 1
    print("configuration: equal")
    tokens = None
    if options.tokens:
        tokens = sample_text.file_tokens(options.tokens, options.length)
    elif not options.no_logits:
        tokens = sample_text.text_tokens(options.hf, options.text, options.length)
    results = verify.compare_tensors(options.hf, checkpoint)
    print(verify.tensor_table(results))
    failed = any(result.different for result in results)
    if tokens is not None:
        logits = verify.compare_logits(options.hf, checkpoint, tokens)
        print(verify.logits_table(logits, options.tolerance))
        failed |= not logits.largest <= options.tolerance
    if has_tokenizer(options.hf):  # the weights are equal all the same
        print(tokenizer_line(options.hf, sample_text.sample_text(options.text, options.length)))
    print("verify: " + ("DIFFERENT" if failed else "equal"))
    return int(failed)


def run() -> None:
    """The console script."""
    run_command(main)


if __name__ == "__main__":
    run()
