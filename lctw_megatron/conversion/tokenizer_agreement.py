"""Does transformers read texts as the model was taught to? Some of its classes make of a folder
another tokenizer than its tokenizer.json describes."""

from itertools import takewhile
from pathlib import Path

from lctw_megatron.data.tokenizers import load_tokenizer
from lctw_megatron.errors import InputError, one_line


def tokenizer_line(folder: Path, text: str) -> str:
    """What is to be said when ours and AutoTokenizer have read the paragraphs of ``text`` with the
    tokenizer of ``folder``, without BOS and EOS."""
    import transformers

    paragraphs = [part for part in text.split("\n\n") if part]
    try:
        ours = [ids.tolist() for ids in load_tokenizer(folder).encode_batch(paragraphs)]
    except InputError as error:  # the weights can be compared all the same
        return f"tokenizer: not compared ({error})"
    library = f"tokenizer: transformers {transformers.__version__}"
    try:
        # Where a folder brings code of its own, nobody is asked whether to run it.
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        theirs = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in paragraphs]
    except Exception as error:  # whatever its classes raise
        return f"{library} cannot load it ({one_line(error)})"
    for part, known, found in zip(paragraphs, ours, theirs, strict=True):
        if known != found:
            pairs = zip(known, found, strict=False)
            at = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
            return (
                f"{library} ({type(tokenizer).__name__}) reads {part[:40]!r} as "
                f"{found[at : at + 3]} from token {at} on, not as {known[at : at + 3]}; served "
                "with it, the model gets tokens that it was not trained on"
            )
    return f"tokenizer: equal ({sum(map(len, ours)):,} tokens)"
