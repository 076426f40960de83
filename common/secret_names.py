"""Which environment variables hold secrets, going by their names. Not where secrets are kept."""

import re

_NAME = re.compile(
    r"TOKEN(?!IZER)|SECRET|PASSW|PASSPHRASE|_PASS$|_PWD$|CREDENTIAL|API_?KEY|_KEY$|_KEY_|_AUTH(?!OR)"
    r"|^AUTH|COOKIE|WEBHOOK|_DSN$|CONNECTION_STRING|KUBECONFIG|NETRC|^WANDB_|^AWS_"
)
# A name and a password in an address, as in https_proxy or DATABASE_URL.
_LOGIN = re.compile(r"\w://[^/@\s]+@")


def is_secret(name: str, value: str = "") -> bool:
    """Whether a variable stays out of logs, and of processes that run what others wrote.

    Ray's own (RAY_*) do not count: its processes need them to reach each other.
    """
    name = name.upper()
    if name.startswith("RAY_"):
        return False
    return bool(_NAME.search(name) or _LOGIN.search(value))
