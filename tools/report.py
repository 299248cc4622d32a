"""How a script that checks an environment answers: one line of JSON for each check."""

import json
import sys
import traceback

import torch


def environment():
    """Which torch and Python these are."""
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    return f"{torch.__version__}, {cuda}, Python {sys.version_info.major}.{sys.version_info.minor}"


def report(checks):
    """Runs {name: check}. One that fails does not stop the others; the exit status tells whether one did."""
    failed = False
    for name, check in {"environment": environment, **checks}.items():
        try:
            answer = check()
        except Exception as error:
            traceback.print_exc()
            words = str(error).strip().splitlines()
            answer, failed = f"no: {type(error).__name__}: {words[0] if words else ''}", True
        print(json.dumps({name: answer}, ensure_ascii=False), flush=True)
    sys.exit(failed)
