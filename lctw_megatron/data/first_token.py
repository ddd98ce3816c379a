"""What the template of a tokenizer.json puts before a text."""

from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer

from lctw_megatron.errors import InputError, few


def first_token(fast: FastTokenizer, path: Path) -> int | None:
    """The token that ``fast``, the tokenizer of the file ``path``, puts before a text, if it does.
    InputError for more than one: stored documents have one, or none."""
    try:
        plain, whole = (fast.encode("a", add_special_tokens=x) for x in (False, True))
    except BaseException as error:  # a panic of the library's Rust is no Exception
        if type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{path}: its template does not fit its tokens ({error})") from None
    size = len(plain.ids)
    if len(whole.ids) > size and whole.ids[1 : 1 + size] == plain.ids:
        return whole.ids[0]
    if whole.ids[:size] == plain.ids:
        return None
    raise InputError(
        f"{path}: its post_processor makes {few(whole.tokens)} of the text 'a', which is "
        f"{few(plain.tokens)}; expected at most one token before a text, so leave one there, or "
        "none"
    )
