r"""Find, read and compare the final answer of a completion. Text is parsed, never evaluated.

Each module builds on the ones above it:

    text          characters, LaTeX and markdown around an answer
    numerals      an answer as an exact number, and whether two answers are the same
    marks         where a text marks its answer: `<answer>`, `\boxed{}` or `####`
    statements    the value that one statement gives
    prose         the answer of text without marks
    final_answer  the answer of a complete completion, with or without marks
    comparison    whether that answer is right, as far as numbers and text can tell

Every regular expression in these modules takes time linear in the text, or runs on a piece of limited length.
"""
