"""Source code of the library, shown in the chapters."""

import inspect
import re
import textwrap
from typing import Any

from IPython.display import Code


def listing(*parts: Any) -> Code:
    """The source of functions and classes, with docstrings up to their first section (Parameters, Returns, ...).

    Examples
    --------
    >>> listing(loss.correspondence, loss.center)
    """
    return Code("\n\n\n".join(map(source_without_sections, parts)), language="python")


def source_without_sections(part: Any) -> str:
    """The source of a function or class without the sections of its NumPy docstring."""
    source = textwrap.dedent(inspect.getsource(part)).rstrip()
    section = re.search(r'\n\n( *)\w+\n *---+\n.*?"""', source, re.DOTALL)
    opening = source.find('"""')
    if section is None or source.find('"""', opening + 3) < section.start():  # none in the first docstring
        return source
    kept = source[: section.start()]
    closing = f'\n{section[1]}"""' if "\n" in kept[opening:] else '"""'
    return kept + closing + source[section.end() :]
