"""`clipgraft VERB …`: find the function of a verb, and turn errors into a line and an exit code."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence

from clipgraft.cli.terminal import plain_output, wording
from clipgraft.errors import ClipgraftError
from clipgraft.processes import is_our_process
from clipgraft.shown import one_line, shown

VERBS = {
    "data": "look at images with captions before training: lengths, duplicates, odd pairs; split them",
    "train": "train a LoRA adapter, or fine-tune the model, on images with captions",
    "eval": "measure retrieval or classification of a base, or of an adapter beside its base",
    "sweep": "train a grid of target sets, ranks and seeds beside the base and full fine-tuning",
    "fewshot": "adapt a base to a few images of each class in several ways, beside each other",
    "report": "write one HTML page on runs and sweeps that needs no network",
    "encode": "write vectors of images or texts to a folder; a second run encodes only what has changed",
    "index": "build a FAISS index over encoded vectors",
    "search": "find encoded images or texts by text, by image, or by both",
    "serve": "answer over HTTP with a base and any number of its adapters: embeddings, classes, search",
    "merge": "merge adapters into their base: a model for open_clip, transformers or ONNX Runtime",
    "push": "publish an adapter on the Hugging Face hub, with a card made from its run",
    "convert": "convert an adapter to another format: PEFT, the guide's .pt files, CLIP-LoRA",
    "inspect": "show a model's configuration, structure, layers, sites and adapter sizes",
    "profile": "show what a model costs by module and site: multiply-adds, memory, training",
    "compact": "build a smaller CLIP from some blocks and tokens of a base, and distil the base into it",
    "demo": "adapt the embedded model to Vietnamese captions and show the gain",
    "config": "print every option of a command as commented YAML for its --config",
    "completion": "print the completion of commands and flags for bash, zsh or fish",
    "doctor": "show versions, devices, speed and folders of this machine, for a report of a fault",
}
_MODULES = {
    "index": "search",
    "convert": "merge",
    "inspect": "profile",
}  # of verbs whose module has another name
_HELP = ("-h", "--help")
_MANY_OBJECTS = 10_000
_INTERRUPTED = 128  # what shells add to the number of the signal that ended a program


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns 0 done, 2 bad usage or input, 1 failure, 130 and 143 stopped by a signal."""
    if is_our_process():
        return 0  # the script that started a sweep or a server is being imported for a process of theirs
    arguments = list(sys.argv[1:] if argv is None else argv)
    with plain_output(), _rare_collections():
        try:
            code = _dispatch(arguments)
            sys.stdout.flush()
        except ClipgraftError as error:
            return _fail(error.lines, error.exit_code)
        except KeyboardInterrupt as stop:
            return _fail([str(stop) or "interrupted"], _INTERRUPTED + _signal_of(stop))
        except BrokenPipeError:
            # Python flushes once more when it exits, and would complain about it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except OSError as error:
            where = f"{error.filename}: " if error.filename is not None else ""
            return _fail([f"{where}{error.strerror or ' '.join(str(error).split())}"], 1)
        return code


@contextlib.contextmanager
def _rare_collections() -> Iterator[None]:
    """Collect garbage after more new objects: importing torch makes a million, none of them garbage.

    Collections take a fifth of the time that a command takes to start.
    """
    before = gc.get_threshold()
    gc.set_threshold(_MANY_OBJECTS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def function_of(verb: str) -> Callable[[Sequence[str]], None]:
    """Import the module of a verb and return its function; other verbs and `--help` do not load it."""
    module = importlib.import_module(f"clipgraft.cli.{_MODULES.get(verb, verb)}")
    found: Callable[[Sequence[str]], None] = getattr(module, f"run_{verb}")
    return found


def _dispatch(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in _HELP:
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] in ("--version", "-V"):
        from clipgraft import __version__

        print(f"clipgraft {__version__}")
        return 0
    verb, *rest = arguments
    if verb not in VERBS:
        return _fail([f"there is no command '{verb}'{_nearest(verb)}; commands are {', '.join(VERBS)}"])
    function_of(verb)(rest)
    return 0


def _usage() -> str:
    verbs = "\n".join(f"  {verb:<10} {text}" for verb, text in VERBS.items())
    return (
        "usage: clipgraft COMMAND [--flags]\n\n"
        f"Graft LoRA adapters onto CLIP models.\n\ncommands:\n{verbs}\n\n"
        "`clipgraft COMMAND --help` lists a command's flags; `clipgraft --version` prints the version."
    )


def _nearest(verb: str) -> str:
    import difflib

    close = difflib.get_close_matches(verb, VERBS, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _signal_of(stop: KeyboardInterrupt) -> int:
    """Return the signal that asked to stop: SIGINT, unless the interruption names another."""
    return int(getattr(stop, "signal", signal.SIGINT))


def _fail(lines: Sequence[str], code: int = 2) -> int:
    from clipgraft.cli.pretty import BAD, say

    sys.stdout.flush()
    for line in lines:
        say(shown(one_line(wording(line))), sys.stderr, BAD, mark="clipgraft: ")
    return code
