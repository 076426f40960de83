"""A reward in a few lines: prefer short answers.

In a config: `path: examples/rewards/shortness.py:shortness`, `options: {target: 200}`.
"""


def shortness(prompts, completions, target=200, **columns):
    """1.0 for an empty text, falling to 0.0 at `target` characters (an option of the config)."""
    return [
        {"reward": max(0.0, 1.0 - len(text) / target), "characters": len(text)}
        for text in completions
    ]
