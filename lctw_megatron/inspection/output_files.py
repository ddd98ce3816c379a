"""What may be written where: never over what is looked at, nor over a file of somebody else's."""

from collections.abc import Iterable

from lctw_megatron.atomic import check_not_read
from lctw_megatron.data.earlier_output import check_earlier_lines, check_earlier_mark
from lctw_megatron.data.manifest import files_of
from lctw_megatron.data.sidecar import sidecar_prefix
from lctw_megatron.inspection.describe_data import stored_files


def check_output(
    option: str, output: str, prefixes: Iterable[str], sidecars: Iterable[str]
) -> None:
    """InputError if ``output``, of ``--rank-documents``, ``--html`` or ``--png``, would replace a
    file of the datasets ``prefixes``, of their ``sidecars``, or one that is no earlier output."""
    sidecars = list(sidecars)
    for prefix in prefixes:
        beside = [sidecar_prefix(prefix, name) for name in sidecars]
        read = [file for each in beside for file in files_of(each)] + stored_files(prefix)
        check_not_read(option, output, read)
    # Here, for these take torch and matplotlib along.
    if option == "--rank-documents":
        from lctw_megatron.inspection.rank_documents import RankedDocument

        check_earlier_lines(option, output, "ranking", RankedDocument.__dataclass_fields__)
    elif option == "--html":
        from lctw_megatron.report import page

        check_earlier_mark(option, output, "page of ours", page.MARK)
    else:
        from lctw_megatron.report import plot_style

        check_earlier_mark(option, output, "picture of ours", plot_style.MARK)
