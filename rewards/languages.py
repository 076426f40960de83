"""What people call the languages that the sandbox runs: on fenced blocks and in data sets."""

from sandbox.languages import LANGUAGES

_OTHER_NAMES = {
    "python": ("py", "python3"),
    "javascript": ("js", "node", "nodejs", "mjs", "cjs"),
    "typescript": ("ts",),
    "bash": ("sh", "shell"),
    "cpp": ("c++", "cc", "cxx"),
    "go": ("golang",),
    "csharp": ("cs", "c#"),
    "rust": ("rs",),
}
_LANGUAGE_OF = {name: name for name in LANGUAGES} | {
    name: language for language, names in _OTHER_NAMES.items() for name in names
}


def language_named(name: str) -> str | None:
    """The sandbox's name for what `name` calls in any case, or None."""
    return _LANGUAGE_OF.get(name.strip().lower())
