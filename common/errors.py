"""The two ways a run ends early. Not a tree of every failure: errors of one sample are values.

`UserError` is bad input: one line that names the key, row or file and the remedy; the command
line prints it without a traceback and exits 2. `InfrastructureError` is the machine's fault after
retries: exit 3, with the root cause as the last lines on screen.
"""


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, where, and what to do."""


class InfrastructureError(Exception):
    """A process, device or file system failed after its retries. Carries the root cause."""


class LearnerLost(InfrastructureError):
    """A rank of the learner died or hangs. The run can go on from its last checkpoint."""
