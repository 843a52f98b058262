r"""Where a text marks its answer: in `<answer>`, in `\boxed{}` or after `####`.

This module finds the marks and their contents; final_answer.py reads the contents.
"""

import re

ANSWER_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_BRACES = re.compile(r"\\(?:boxed|fbox)\s{0,2}\{|\\?[{}]")
_HASHES = re.compile(r"####[ \t]*([^\n]{0,400})")
_HEADING = re.compile(
    r"(?:\*\*)?\s?(?:step|solution|explanation|note|check|given|part|example|calculat|verif|conclusion|"
    r"problem|question|method|approach|analysis|how|let|to |first|second|next|the problem)",
    re.IGNORECASE,
)


def find_marks(text: str) -> list[tuple[str, int]]:
    r"""The marked answers of a text: the content and end position of each.

    Only one kind of mark counts: `<answer>` if the text has any, else `\boxed{}`, else `####`.

    >>> find_marks(r"<answer>8</answer>, that is \boxed{9}"), find_marks("#### Answer: 8")
    ([('8', 18)], [('8', 14)])
    """
    found, start = [], None
    for tag in ANSWER_TAG.finditer(text):
        if not tag[1]:
            start = tag.end()
        elif start is not None:
            found.append((text[start : tag.start()], tag.end()))
            start = None
    found = [(content, end) for content, end in found if content.strip()]
    if found:
        return found
    found = find_boxes(text)
    if found:
        return found
    for line in _HASHES.finditer(text):
        content, end = line[1].strip(), line.end()
        label = re.match(
            r"(?:\*\*)?(?:the )?(?:final )?(?:answer|result)(?:\*\*)?(?: is)?\s*:?(?:\*\*)?",
            content,
            re.IGNORECASE,
        )
        if label:
            content = content[label.end() :].strip()
            if not content:  # a heading, with the value on the next line
                below = re.match(r"\s{0,4}([^\n]{1,200})", text[end : end + 210])
                content = below[1].strip() if below else ""
        if content and not (_HEADING.match(content) or content.endswith(":")):
            found.append((content, end))
    return found


def find_boxes(text: str) -> list[tuple[str, int]]:
    r"""The content and end position of each `\boxed{...}` that is closed and not empty. Braces may be nested.

    >>> find_boxes(r"so \boxed{\frac{1}{2}}. \boxed{unclosed")
    [('\\frac{1}{2}', 22)]
    """
    found = []
    # For each open brace: where the content of its box starts, or None if the brace does not open a box.
    open_braces: list[int | None] = []
    for brace in _BRACES.finditer(text):  # one pass; searching for the end of each box would be quadratic
        if brace[0].endswith("{"):
            open_braces.append(brace.end() if "boxed" in brace[0] or "fbox" in brace[0] else None)
        elif open_braces:
            start = open_braces.pop()
            if start is not None and text[start : brace.start()].strip():
                found.append((text[start : brace.start()], brace.end()))
    return sorted(found, key=lambda f: f[1])
